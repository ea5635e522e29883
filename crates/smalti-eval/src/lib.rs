//! smalti-eval
