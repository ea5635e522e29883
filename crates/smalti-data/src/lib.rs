//! smalti-data
