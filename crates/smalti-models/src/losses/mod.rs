//! Losses of training.
