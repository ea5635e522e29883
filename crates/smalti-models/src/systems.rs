//! The table of what exists, one line for each arm of the configuration enums. Help texts and the documentation read it.

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
}

impl Role {
    /// The role's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Quantizer => "quantizer",
            Self::Generator => "generator",
        }
    }
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
    /// The layouts of its tokens.
    pub tokens: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
}

/// All systems, in the order of the roles.
pub const SYSTEMS: &[System] = &[
    System {
        role: Role::Tokenizer,
        kind: "vqgan",
        arxiv: "2012.09841",
        tokens: "as its quantizer's",
        about: "convolutional autoencoder with a codebook (VQGAN, VAR)",
    },
    System {
        role: Role::Tokenizer,
        kind: "vit",
        arxiv: "2110.04627",
        tokens: "as its quantizer's",
        about: "vision transformer autoencoder with a codebook (ViT-VQGAN)",
    },
    System {
        role: Role::Tokenizer,
        kind: "kl",
        arxiv: "2112.10752",
        tokens: "grid of vectors",
        about: "convolutional autoencoder with normal latents (KL autoencoder of latent diffusion, MAR's KL-16)",
    },
    System {
        role: Role::Tokenizer,
        kind: "patches",
        arxiv: "2406.11838",
        tokens: "grid of vectors",
        about: "patches of unchanged pixels, nothing to train",
    },
    System {
        role: Role::Quantizer,
        kind: "vq",
        arxiv: "1711.00937",
        tokens: "grid",
        about: "learned codebook: by gradient or moving averages, l2 or cosine, k-means start, dead codes revived",
    },
    System {
        role: Role::Quantizer,
        kind: "fsq",
        arxiv: "2309.15505",
        tokens: "grid",
        about: "finite scalar quantization: each channel rounded to a few levels, no codebook to learn",
    },
    System {
        role: Role::Quantizer,
        kind: "gumbel",
        arxiv: "1611.01144",
        tokens: "grid",
        about: "codebook whose codes are drawn with a falling temperature while it learns (Gumbel-softmax)",
    },
    System {
        role: Role::Quantizer,
        kind: "multi_scale",
        arxiv: "2404.02905",
        tokens: "pyramid",
        about: "token maps of growing size, each coding what the coarser ones left over (VAR)",
    },
    System {
        role: Role::Generator,
        kind: "gpt",
        arxiv: "2012.09841",
        tokens: "grid, sequence",
        about: "decoder-only transformer, one token after another; larger pictures through a sliding window (VQGAN)",
    },
    System {
        role: Role::Generator,
        kind: "maskgit",
        arxiv: "2202.04200",
        tokens: "grid, sequence",
        about: "bidirectional transformer, masked tokens decoded in parallel, the most certain first (MaskGIT)",
    },
    System {
        role: Role::Generator,
        kind: "var",
        arxiv: "2404.02905",
        tokens: "pyramid",
        about: "transformer that predicts a whole token map at each step, coarse to fine (VAR)",
    },
    System {
        role: Role::Generator,
        kind: "mar",
        arxiv: "2406.11838",
        tokens: "grid, sequence, of vectors",
        about: "masked autoencoder with a diffusion loss, tokens filled in in random order, first a few and then many per step (MAR)",
    },
    System {
        role: Role::Generator,
        kind: "causal_mar",
        arxiv: "2406.11838",
        tokens: "grid, sequence, of vectors",
        about: "decoder-only transformer with MAR's diffusion loss, one token after another in raster or random order",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generators::GeneratorConfig;
    use crate::quantizers::QuantizerConfig;
    use crate::tokenizers::TokenizerConfig;
    use serde::de::DeserializeOwned;

    /// The arms of a configuration enum, as reading an unknown one names them.
    fn arms<T: DeserializeOwned + std::fmt::Debug>() -> Vec<String> {
        let error = serde_json::from_str::<T>(r#"{ "kind": "?" }"#).unwrap_err().to_string();
        error.split('`').skip(3).step_by(2).map(str::to_string).collect()
    }

    #[test]
    fn the_table_has_a_line_for_each_arm() {
        for (role, mut arms) in [
            (Role::Tokenizer, arms::<TokenizerConfig>()),
            (Role::Quantizer, arms::<QuantizerConfig>()),
            (Role::Generator, arms::<GeneratorConfig>()),
        ] {
            let mut kinds: Vec<&str> = SYSTEMS.iter().filter(|s| s.role == role).map(|s| s.kind).collect();
            kinds.sort_unstable();
            arms.sort();
            assert_eq!(kinds, arms, "{role:?}");
        }
    }
}
