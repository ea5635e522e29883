//! Weights and bundles on disk.
