//! Decoding with both caches.

use super::{Classifier, RqTransformer, RqTransformerConfig};
use crate::generators::upload::upload;
use crate::generators::{
    Condition, Draw, Generation, Generator, GeneratorLoss, GeneratorSettings, Predictions, Request,
};
use crate::quantizers::QuantizerModel;
use crate::sampling::{Draws, Sampling, Seeded, decide_rows, filter, guide};
use crate::tokenizers::Tokenizer;
use crate::{Codes, host};
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use smalti_base::{Error, Result};
use smalti_nn::cache::{Cache, KeyValueCache};
use smalti_nn::dense::{Dense, Pack};

impl RqTransformer {
    /// [`Generator::start`] with random draws from elsewhere.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_with(&self, request: &Request, draws: Box<dyn Draws>) -> Result<RqGeneration> {
        let RqTransformerConfig { tokens, condition, .. } = &self.config;
        let known = request.check(&self.config)?;
        // A packed model is for inference already, and would be unpacked by `valid`.
        let packed = self.body.first().is_some_and(|block| block.mlp.expand.packed().is_some());
        let model = if packed { self.clone() } else { self.valid() };
        let device = model.norm.gamma.val().device();
        let depth = self.config.stack();
        let caches = |count: usize, places| (0..count).map(|_| KeyValueCache::new(places, 0)).collect();
        Ok(RqGeneration {
            condition_rows: self.config.condition_ids(&request.conditions(), None, &device)?,
            body: caches(self.config.depth, condition.length() + tokens.length() / depth - 1),
            head: caches(self.config.head_depth, depth),
            sampling: (0..depth).map(|at| request.sampling.at(at)).collect(),
            codes: vec![vec![0; tokens.length()]; known.len()],
            context: None,
            done: 0,
            model,
            device,
            known,
            draws,
        })
    }
}

impl Generator for RqTransformer {
    fn settings(&self) -> &dyn GeneratorSettings {
        &self.config
    }

    fn loss(&self, codes: Codes, given: &[Condition], draw: &mut Draw<'_>) -> Result<GeneratorLoss> {
        self.training_loss(codes, given, draw.stream)
    }

    fn predictions(&self, codes: Codes, given: &[Condition], _: u64) -> Result<Predictions> {
        self.given_predictions(codes, given)
    }

    fn adopt(&mut self, tokenizer: &dyn Tokenizer) -> Result<()> {
        if self.vectors.is_empty() {
            return Ok(());
        }
        let Some(QuantizerModel::Residual(quantizer)) = tokenizer.quantizer() else {
            return Err(Error::unsupported(
                "rq_transformer over the tokens of another quantizer than residual",
                "train a tokenizer with `kind = \"residual\"`",
            ));
        };
        let theirs: Vec<_> = quantizer.codebooks.iter().map(|codebook| codebook.weight.val().inner()).collect();
        let found: Vec<[usize; 2]> = theirs.iter().map(Tensor::dims).collect();
        let expected: Vec<[usize; 2]> = self.vectors.iter().map(|table| table.lazy_shape().dims()).collect();
        let (depth, depths) = (self.config.stack(), quantizer.config.depth);
        if (&found, depths) != (&expected, depth) {
            return Err(Error::Mismatch {
                what: "code vectors".into(),
                left_name: "model".into(),
                left: format!("{depth} depths, tables {expected:?}"),
                right_name: "tokenizer".into(),
                right: format!("{depths} depths, tables {found:?}"),
                hint: None,
            });
        }
        self.vectors = theirs.into_iter().map(|table| Param::from_tensor(table).set_require_grad(false)).collect();
        Ok(())
    }

    fn dense_layers(&mut self) -> Vec<&mut Dense> {
        let blocks = self.body.iter_mut().chain(&mut self.head).flat_map(Pack::dense_layers);
        let classifier = match &mut self.classifier {
            Classifier::Shared(layer) => Some(layer),
            Classifier::Each(_) => None,
        };
        blocks.chain(&mut self.body_input).chain(&mut self.head_input).chain(classifier).collect()
    }

    fn start(&self, request: &Request) -> Result<Box<dyn Generation + '_>> {
        let draws = Seeded::new(request.images.iter().map(|image| image.seed));
        Ok(Box::new(self.start_with(request, Box::new(draws))?))
    }
}

/// Decoding under way: one code at each step. Codes that are known for every image are fed together with the next one that must be
/// drawn.
pub struct RqGeneration {
    model: RqTransformer,
    device: Device,
    /// For each depth.
    sampling: Vec<Sampling>,
    condition_rows: Tensor<2, Int>,
    /// Over places; filled up to the one that is being made.
    body: Vec<KeyValueCache>,
    /// Over the codes of that place.
    head: Vec<KeyValueCache>,
    /// What the body says of it, `[rows, 1, width]`, and which one it is.
    context: Option<(usize, Tensor<3>)>,
    known: Vec<Vec<Option<u32>>>,
    codes: Vec<Vec<u32>>,
    draws: Box<dyn Draws>,
    done: usize,
}

impl RqGeneration {
    fn depth(&self) -> usize {
        self.sampling.len()
    }

    fn is_guided(&self) -> bool {
        self.sampling[0].is_guided()
    }

    /// Codes of some places of the layout, with guidance twice, `[rows, n]`.
    fn rows(&self, places: std::ops::Range<usize>) -> Tensor<2, Int> {
        let mut rows: Vec<Vec<u32>> = self.codes.iter().map(|codes| codes[places.clone()].to_vec()).collect();
        if self.is_guided() {
            rows.extend_from_within(..);
        }
        upload(&rows, &self.device)
    }

    /// What the body says of a place, after what its cache has not seen.
    fn look(&mut self, place: usize) -> Tensor<3> {
        let seen = self.body.first().map_or(0, KeyValueCache::length);
        let (prefix, depth) = (self.condition_rows.dims()[1], self.depth());
        let mut parts = Vec::new();
        if seen == 0 {
            parts.push(self.model.embed_condition(self.condition_rows.clone()));
        }
        let first = seen.saturating_sub(prefix);
        if first < place {
            let places = self.model.places(self.rows(first * depth..place * depth));
            parts.push(self.model.positions.forward(places, first));
        }
        let mut x = Tensor::cat(parts, 1);
        for (block, cache) in self.model.body.iter().zip(&mut self.body) {
            x = block.decode(x, cache);
        }
        let n = x.dims()[1];
        x.narrow(1, n - 1, 1)
    }

    /// Logits of the next code with guidance, `[n, 1, codes]`.
    fn predict(&mut self) -> Tensor<3> {
        let (place, at) = (self.done / self.depth(), self.done % self.depth());
        let context = match &self.context {
            Some((known, context)) if *known == place => context.clone(),
            _ => {
                self.head.iter_mut().for_each(KeyValueCache::clear);
                let context = self.look(place);
                self.context = Some((place, context.clone()));
                context
            }
        };
        let first = self.head.first().map_or(0, KeyValueCache::length);
        let mut parts = Vec::new();
        if first == 0 {
            parts.push(context);
        }
        if at > 0 {
            // Codes of this place from `at` on are not looked at.
            let codes = self.rows(place * self.depth()..(place + 1) * self.depth());
            parts.extend(self.model.fed(codes, first.saturating_sub(1)..at));
        }
        let mut x = self.model.depth_positions.forward(Tensor::cat(parts, 1), first);
        for (block, cache) in self.model.head.iter().zip(&mut self.head) {
            x = block.decode(x, cache);
        }
        let n = x.dims()[1];
        let x = self.model.norm.forward(x.narrow(1, n - 1, 1));
        let x = match self.is_guided() {
            true => guide(x, self.sampling[at].guidance_at(self.done, self.steps())),
            false => x,
        };
        self.model.classifier.forward(x, at)
    }

    /// Logits of the next code as they are before sampling, `[n, codes]` row by row. It does not decide anything.
    ///
    /// # Errors
    /// What the device returns.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        let (device, at) = (self.device.clone(), self.done % self.depth());
        let mut logits = smalti_kernels::on_pool(&device, || host::floats(self.predict()))?;
        let (most, codes) = (self.model.config.most_codes(), self.model.config.codes_at(at));
        logits.chunks_exact_mut(most).for_each(|row| row[codes..].fill(f32::NEG_INFINITY));
        Ok(logits)
    }

    /// Decides the next code by the logits that [`Self::logits`] gave.
    pub fn decide(&mut self, mut logits: Vec<f32>) {
        let place = self.done;
        let sampling = &self.sampling[place % self.depth()];
        let decided = decide_rows(&mut logits, self.model.config.most_codes(), |image, row| {
            self.known[image][place].unwrap_or_else(|| {
                filter(row, sampling);
                self.draws.token(image, place, 0, row) as u32
            })
        });
        for (codes, code) in self.codes.iter_mut().zip(decided) {
            codes[place] = code;
        }
        self.done += 1;
    }
}

impl Generation for RqGeneration {
    fn steps(&self) -> usize {
        self.codes.first().map_or(0, Vec::len)
    }

    fn done(&self) -> usize {
        self.done
    }

    fn step(&mut self) -> Result<()> {
        if self.done == self.steps() {
            return Ok(());
        }
        let place = self.done;
        if self.known.iter().all(|known| known[place].is_some()) {
            for (codes, known) in self.codes.iter_mut().zip(&self.known) {
                codes[place] = known[place].unwrap_or_default();
            }
            self.done += 1;
        } else {
            let logits = self.logits()?;
            self.decide(logits);
        }
        Ok(())
    }

    fn codes(&self) -> Codes {
        Codes::Discrete(upload(&self.codes, &self.device))
    }
}
