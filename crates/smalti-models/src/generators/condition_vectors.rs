//! Conditions as one vector, for generators that are told a class.

use super::{ConditionConfig, Conditions, Request, upload::index};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use smalti_base::Result;
use smalti_nn::dense::TokenEmbedding;
use smalti_nn::init::Init;

/// A vector for each class, and one for no condition.
#[derive(Module, Debug)]
pub struct ConditionVectors {
    /// Of the classes, if there are any.
    pub classes: Option<TokenEmbedding>,
    /// Of no condition, `[1, d]`.
    pub none: Param<Tensor<2>>,
}

impl ConditionVectors {
    pub(super) fn new(condition: &Conditions, width: usize, init: Init, device: &Device) -> Self {
        let classes = condition.all().iter().any(|one| matches!(one, ConditionConfig::Class { .. }));
        Self {
            classes: classes.then(|| TokenEmbedding::new(condition.null(), width, init, device)),
            none: init.param([1, width], device),
        }
    }

    /// The vectors `[b, 1, d]` of ids `[b, 1]`; the null id comes after the classes.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let none = self.none.val();
        let table = match &self.classes {
            Some(classes) => Tensor::cat(vec![classes.table.val(), none], 0),
            None => none,
        };
        burn::tensor::module::embedding(table, ids)
    }
}

/// Ids of conditions `[n, 1]`, and with guidance below them those of what guidance leads away from.
pub(super) fn id_rows(ids: &[[usize; 2]], guided: bool, device: &Device) -> Tensor<2, Int> {
    let away = ids.iter().map(|[_, away]| *away).filter(|_| guided);
    index(ids.iter().map(|[id, _]| *id).chain(away).collect(), device).unsqueeze_dim(1)
}

/// The id of each condition of a request that was checked, and of what guidance leads away from.
///
/// # Errors
/// As [`Conditions::ids`].
pub(super) fn ids_of(config: &Conditions, request: &Request) -> Result<Vec<[usize; 2]>> {
    let id = |condition| Ok(config.ids(condition)?.first().copied().unwrap_or(config.null()));
    request.images.iter().map(|image| Ok([id(&image.condition)?, id(&image.negative)?])).collect()
}
