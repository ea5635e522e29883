//! The systems: tokenizers, the quantizers inside them, generators over their tokens, encoders beside them, and what trains and
//! samples them.
//!
//! One system is one file that reads from top to bottom: what it is and its paper, its configuration, its parts, its forward
//! pass, its loss and its decoding.

pub mod checkpoint;
pub mod codes;
pub mod encoders;
pub mod generators;
pub mod host;
pub mod losses;
pub mod quantizers;
mod role;
pub mod sampling;
pub mod systems;
pub mod tokenizers;

pub use codes::Codes;
pub use encoders::Encoder;
pub use generators::{
    Condition, ConditionConfig, Conditions, Generation, Generator, GeneratorConfig, GeneratorLoss, GeneratorModel,
    ImageRequest, Known, Request,
};
pub use quantizers::Quantizer;
pub use sampling::Sampling;
pub use tokenizers::Tokenizer;
