//! Attention, its caches, and the blocks made of it.

pub mod attention;
pub mod cache;
pub mod transformer;
pub mod vit;
