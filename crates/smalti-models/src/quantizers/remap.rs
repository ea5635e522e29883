//! A smaller vocabulary for a trained table: only the codes that are used keep a number (the `remap` option of
//! taming-transformers). The table stays whole; tokens are numbers in a list of kept codes.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Device, Int, IntDType, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use smalti_base::{Error, Result, Rng};

/// Integers of different widths do not mix, and weights are read as wider ones.
const IDS: IntDType = IntDType::I32;

/// Settings of a [`Remap`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemapConfig {
    /// Number of codes that are kept. Which ones is in the weights; fresh weights keep the first.
    pub kept: usize,
    /// What becomes of the others.
    #[serde(default)]
    pub unknown: Unknown,
}

/// The token of a code that is not kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Unknown {
    /// One of the kept codes, drawn once for each code that is not, so that an image's tokens are always the same (the
    /// official code draws again each time).
    #[default]
    Random,
    /// One token more, `kept`, which stands for all of them. It decodes as the first kept code.
    Extra,
    /// Always the same token.
    Token {
        /// Its number, below `kept`.
        token: usize,
    },
}

impl RemapConfig {
    /// Number of tokens.
    pub fn vocabulary(&self) -> usize {
        self.kept + usize::from(self.unknown == Unknown::Extra)
    }

    /// A list of the first codes of a table of `codes`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if none or more than all are kept, or the token for the others is not among them.
    pub fn init(&self, codes: usize, device: &Device) -> Result<Remap> {
        let problem = |problem: String| Err(Error::invalid("quantizer: remap", problem));
        if self.kept == 0 || self.kept > codes {
            return problem(format!("kept is {}, expected 1 to {codes}, the number of codes", self.kept));
        }
        if let Unknown::Token { token } = self.unknown
            && token >= self.kept
        {
            return problem(format!("unknown: token is {token}, expected less than kept, which is {}", self.kept));
        }
        let device = device.clone().without_autodiff();
        let mut stream = Rng::new(0).stream(0, 0);
        let substitutes: Vec<i32> = (0..codes)
            .map(|_| match self.unknown {
                Unknown::Random => stream.below(self.kept) as i32,
                Unknown::Extra => self.kept as i32,
                Unknown::Token { token } => token as i32,
            })
            .collect();
        Ok(Remap {
            used: Param::initialized(ParamId::new(), Tensor::arange(0..self.kept as i64, &device)),
            substitutes: Tensor::<1, Int>::from_data(TensorData::new(substitutes, [codes]), &device).cast(IDS),
            config: self.clone(),
        })
    }
}

/// Codes to tokens and back.
#[derive(Module, Debug)]
pub struct Remap {
    /// The kept codes, `[kept]`; a token is a place in this list.
    pub used: Param<Tensor<1, Int>>,
    /// The token of each code if it is not kept, `[codes]`.
    substitutes: Tensor<1, Int>,
    /// The settings.
    #[module(skip)]
    pub config: RemapConfig,
}

impl Remap {
    /// Codes of the table `[n]` to tokens `[n]`, each below [`RemapConfig::vocabulary`].
    pub fn tokens(&self, codes_n: Tensor<1, Int>) -> Tensor<1, Int> {
        let ([n], [kept]) = (codes_n.dims(), self.used.dims());
        let column_nk = codes_n.clone().cast(IDS).unsqueeze_dim::<2>(1).expand([n, kept]);
        let same_nk = column_nk.equal(self.used().unsqueeze_dim::<2>(0).expand([n, kept])).int();
        let unknown_n = same_nk.clone().sum_dim(1).equal_elem(0).squeeze_dim::<1>(1);
        let place_n = same_nk.argmax(1).squeeze_dim::<1>(1).cast(IDS);
        place_n.mask_where(unknown_n, self.substitutes.clone().select(0, codes_n))
    }

    /// Tokens `[n]` to codes of the table `[n]`.
    pub fn codes(&self, tokens_n: Tensor<1, Int>) -> Tensor<1, Int> {
        let [kept] = self.used.dims();
        let extra_n = tokens_n.clone().greater_equal_elem(kept as i64);
        self.used().select(0, tokens_n.mask_fill(extra_n, 0))
    }

    fn used(&self) -> Tensor<1, Int> {
        self.used.val().cast(IDS)
    }
}
