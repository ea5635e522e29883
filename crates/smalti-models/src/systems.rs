//! The table of what exists. Help texts and the documentation read it; it is made of the tables of the roles.

use crate::{encoders, generators, quantizers, tokenizers};
use serde::Serialize;

/// What a system is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Image to tokens and back.
    Tokenizer,
    /// The step inside a tokenizer that makes latents discrete.
    Quantizer,
    /// Condition to tokens.
    Generator,
    /// Image to features.
    Encoder,
}

impl Role {
    /// The role's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Quantizer => "quantizer",
            Self::Generator => "generator",
            Self::Encoder => "encoder",
        }
    }
}

/// What is said of a kind beside its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The arXiv number of its paper.
    pub arxiv: &'static str,
    /// The layouts of its tokens, or what it makes instead.
    pub tokens: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
}

/// One system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct System {
    /// What it is for.
    pub role: Role,
    /// Its name in configurations, `kind = "..."`.
    pub kind: &'static str,
    /// The arXiv number of its paper.
    pub arxiv: &'static str,
    /// The layouts of its tokens, or what it makes instead.
    pub tokens: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
}

impl System {
    pub(crate) const fn new(role: Role, kind: &'static str, facts: Facts) -> Self {
        Self { role, kind, arxiv: facts.arxiv, tokens: facts.tokens, about: facts.about }
    }
}

/// All systems, in the order of the roles.
pub fn all() -> Vec<System> {
    [tokenizers::SYSTEMS, quantizers::SYSTEMS, generators::SYSTEMS, encoders::SYSTEMS].concat()
}
