//! Frozen networks whose features compare images.

pub mod mobilenet_v2;
pub mod vgg16;

pub use mobilenet_v2::MobileNetV2;
pub use vgg16::Vgg16;
