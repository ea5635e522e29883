//! smalti-nn

pub mod attention;
pub mod cache;
pub mod dense;
pub mod init;
pub mod positions;
pub mod transformer;
