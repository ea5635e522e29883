//! smalti-nn
