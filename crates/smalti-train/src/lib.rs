//! smalti-train
