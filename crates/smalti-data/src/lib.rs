//! What goes into and comes out of the models: images, transforms, data sets, ordered prefetch, token shards, text
//! tokenizers. Everything here is host memory; no tensor and no device is known.
//!
//! The way of an image: [`datasets`] gives bytes, label and caption; [`loader`] decodes ([`image`]) and transforms
//! ([`transforms`]) on worker threads and hands over batches in a fixed order.

pub mod datasets;
pub mod image;
pub mod loader;
pub mod shard;
pub mod text;
pub mod transforms;

pub use datasets::{DataConfig, Dataset};
pub use image::Image;
pub use loader::{ImageBatch, Loader};
pub use shard::{RowTokens, ShardWriter, Shards, TokenRow};
pub use text::TextTokenizer;
pub use transforms::Transform;
