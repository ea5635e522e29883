//! Multi-head self-attention (arXiv 1706.03762).

use crate::cache::Cache;
use crate::dense::Dense;
use crate::init::Init;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Bool, Device, Tensor, TensorData, activation};
use smalti_kernels::{packed_linears, unit_length};

/// Which tokens a token can see.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Visible {
    /// All of them.
    All,
    /// Itself and those before it.
    Past,
    /// Those that a mask does not hide: `[1 or b, 1 or h, queries, keys]`, true hides.
    Except(Tensor<4, Bool>),
}

impl Visible {
    /// The past, and for the first `prefix` of `n` tokens the whole prefix.
    pub fn past_and_prefix(n: usize, prefix: usize, device: &Device) -> Self {
        if prefix <= 1 {
            return Self::Past;
        }
        Self::unless(n, |q, k| k > q && (q >= prefix || k >= prefix), device)
    }

    /// The own group and those before it, of groups with so many tokens each.
    pub fn past_groups(sizes: &[usize], device: &Device) -> Self {
        let group: Vec<usize> = sizes.iter().enumerate().flat_map(|(i, size)| vec![i; *size]).collect();
        Self::unless(group.len(), |q, k| group[k] > group[q], device)
    }

    fn unless(n: usize, hides: impl Fn(usize, usize) -> bool, device: &Device) -> Self {
        let hidden: Vec<bool> = (0..n * n).map(|i| hides(i / n, i % n)).collect();
        Self::Except(Tensor::from_data(TensorData::new(hidden, [1, 1, n, n]), device))
    }
}

/// Self-attention with separate projections for queries, keys, values and the output.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[d, d]`.
    pub query: Dense,
    /// `[d, d]`.
    pub key: Dense,
    /// `[d, d]`.
    pub value: Dense,
    /// `[d, d]`.
    pub output: Dense,
    /// Of the attention weights, in training.
    pub dropout: Dropout,
    /// Number of heads; divides the width.
    pub heads: usize,
    /// Of the products of queries and keys, beside `1 / sqrt(d / heads)`.
    pub factor: f64,
    /// Scales queries and keys to unit length instead; their products get this factor for each head, as a logarithm
    /// `[heads]` that counts up to ln 100 (Swin Transformer V2, arXiv 2111.09883).
    pub log_scale: Option<Param<Tensor<1>>>,
}

/// The largest factor of products of unit queries and keys.
const MOST: f64 = 100.0;

impl SelfAttention {
    /// Attention over `width` channels; `dropout` in `0..1` acts on the attention weights.
    pub fn new(width: usize, heads: usize, dropout: f64, init: Init, device: &Device) -> Self {
        let dense = || Dense::new(width, width, init, device);
        let dropout = DropoutConfig::new(dropout).init();
        let [query, key, value, output] = std::array::from_fn(|_| dense());
        Self { query, key, value, output, dropout, heads, factor: 1.0, log_scale: None }
    }

    /// Mixes the tokens.
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn forward(&self, x_bnd: Tensor<3>, visible: &Visible) -> Tensor<3> {
        let [q, k, v] = self.project(x_bnd);
        self.attend(q, k, v, visible)
    }

    /// Mixes the tokens, but only for those that `wanted` takes out of them: all see all.
    ///
    /// # Shapes
    /// `[b, n, d]`, of which `wanted` makes `[b, m, d]`, to that.
    pub fn forward_for(&self, x_bnd: Tensor<3>, wanted: impl Fn(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        let q = self.query.forward(wanted(x_bnd.clone()));
        let [k, v] = match [&self.key, &self.value].map(Dense::packed) {
            [Some(key), Some(value)] => {
                let [k, v] = [&self.key, &self.value].map(Dense::bias_value);
                packed_linears(x_bnd, [(key, k), (value, v)])
            }
            _ => [&self.key, &self.value].map(|layer| layer.forward(x_bnd.clone())),
        };
        let [q, k, v] = self.by_head([q, k, v]);
        self.attend(q, k, v, &Visible::All)
    }

    fn attend(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, visible: &Visible) -> Tensor<3> {
        let mixed_bhnd = if self.drops(&q) {
            self.attend_with_dropout(q, k, v, visible)
        } else {
            match visible {
                Visible::All => smalti_kernels::attention(q, k, v, false, None),
                Visible::Past => smalti_kernels::attention(q, k, v, true, None),
                Visible::Except(hidden) => smalti_kernels::attention(q, k, v, false, Some(hidden.clone())),
            }
        };
        self.merge(mixed_bhnd)
    }

    /// Mixes tokens that come after those of a cache, to which they are added; see [`Cache::attend`].
    ///
    /// # Shapes
    /// `[b, n, d]` to the same.
    pub fn decode(&self, x_bnd: Tensor<3>, cache: &mut impl Cache) -> Tensor<3> {
        let [q, k, v] = self.project(x_bnd);
        self.merge(cache.attend(q, k, v))
    }

    /// Queries, keys and values, `[b, h, n, d / h]` each.
    fn project(&self, x_bnd: Tensor<3>) -> [Tensor<4>; 3] {
        let layers = [&self.query, &self.key, &self.value];
        self.by_head(match layers.map(Dense::packed) {
            [Some(query), Some(key), Some(value)] => {
                let [q, k, v] = layers.map(Dense::bias_value);
                packed_linears(x_bnd, [(query, q), (key, k), (value, v)])
            }
            _ => layers.map(|layer| layer.forward(x_bnd.clone())),
        })
    }

    /// Cuts queries, keys and values `[b, n, d]` into heads and scales them.
    fn by_head(&self, projected: [Tensor<3>; 3]) -> [Tensor<4>; 3] {
        let [_, _, d] = projected[0].dims();
        let [q, k, v] = projected.map(|x| {
            let [b, n, d] = x.dims();
            x.reshape([b, n, self.heads, d / self.heads])
        });
        let (q, k) = match &self.log_scale {
            Some(log_scale) => {
                let scale = log_scale.val().clamp_max(MOST.ln()).exp() * ((d / self.heads) as f64).sqrt();
                let one = Tensor::ones([self.heads], &scale.device());
                (unit_length(q, scale), unit_length(k, one))
            }
            None if self.factor == 1.0 => (q, k),
            None => (q * self.factor, k),
        };
        [q, k, v].map(|x| x.swap_dims(1, 2))
    }

    fn merge(&self, mixed_bhnd: Tensor<4>) -> Tensor<3> {
        let [b, h, n, d] = mixed_bhnd.dims();
        self.output.forward(mixed_bhnd.swap_dims(1, 2).reshape([b, n, h * d]))
    }

    fn drops(&self, x: &Tensor<4>) -> bool {
        self.dropout.prob > 0.0 && self.dropout.training.is_enabled() && x.device().is_autodiff()
    }

    /// The fused operation cannot drop attention weights, so this composes them.
    fn attend_with_dropout(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, visible: &Visible) -> Tensor<4> {
        let [_, _, n, d] = q.dims();
        let scores = (q * (d as f64).powf(-0.5)).matmul(k.swap_dims(2, 3));
        let scores = match visible {
            Visible::All => scores,
            Visible::Past => {
                let hidden = Tensor::<2, Bool>::tril_mask([n, n], 0, &scores.device());
                scores.mask_fill(hidden.unsqueeze::<4>(), f32::NEG_INFINITY)
            }
            Visible::Except(hidden) => scores.mask_fill(hidden.clone(), f32::NEG_INFINITY),
        };
        self.dropout.forward(activation::softmax(scores, 3)).matmul(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{GroupCache, KeyValueCache};
    use crate::init::Init;
    use smalti_base::Rng;

    fn input(b: usize, n: usize, d: usize) -> Tensor<3> {
        let mut stream = Rng::new(1).stream(0, 0);
        let values: Vec<f32> = (0..b * n * d).map(|_| stream.normal()).collect();
        Tensor::from_data(TensorData::new(values, [b, n, d]), &Device::flex())
    }

    fn difference(a: Tensor<3>, b: Tensor<3>) -> f32 {
        (a - b).abs().max().into_scalar()
    }

    #[test]
    fn composed_attention_equals_the_fused_one() {
        let plain = SelfAttention::new(16, 2, 0.0, Init::Normal(0.3), &Device::flex());
        let mut dropping = plain.clone().train();
        // Nothing is dropped, but the composed path is taken.
        dropping.dropout.prob = 1e-12;
        let x = input(2, 5, 16);
        let prefix = Visible::past_and_prefix(5, 3, &Device::flex());
        for visible in [Visible::All, Visible::Past, prefix] {
            let fused = plain.forward(x.clone(), &visible);
            let composed = dropping.forward(x.clone().autodiff(), &visible).inner();
            assert!(difference(fused, composed) < 1e-5, "{visible:?}");
        }
    }

    #[test]
    fn a_cache_changes_nothing() {
        let layer = SelfAttention::new(16, 2, 0.0, Init::Normal(0.3), &Device::flex());
        let x = input(2, 6, 16);
        for (prefix, groups) in [(0, vec![3, 1, 2]), (0, vec![1; 6]), (3, vec![3, 1, 1, 1]), (3, vec![5, 1])] {
            let whole = layer.forward(x.clone(), &Visible::past_and_prefix(6, prefix, &Device::flex()));
            let mut cache = KeyValueCache::new(8, prefix);
            let parts = groups.into_iter().map(|n| {
                let new = x.clone().narrow(1, cache.length(), n);
                layer.decode(new, &mut cache)
            });
            let parts = Tensor::cat(parts.collect(), 1);
            assert!(difference(whole, parts) < 1e-5);
            assert_eq!(cache.length(), 6);
        }
    }

    #[test]
    fn a_cache_of_groups_equals_the_mask_of_groups() {
        let device = Device::flex();
        let mut layer = SelfAttention::new(16, 2, 0.0, Init::Normal(0.3), &device);
        let x = input(2, 7, 16);
        for unit in [false, true] {
            layer.log_scale = unit.then(|| Init::Ones.param([2], &device));
            let whole = layer.forward(x.clone(), &Visible::past_groups(&[1, 4, 2], &device));
            // The last group needs no room.
            for capacity in [8, 7, 5] {
                let mut cache = GroupCache::new(capacity);
                let parts = [1, 4, 2].map(|n| layer.decode(x.clone().narrow(1, cache.length(), n), &mut cache));
                assert!(difference(whole.clone(), Tensor::cat(parts.to_vec(), 1)) < 1e-5);
            }
        }
    }

    #[test]
    fn the_prefix_is_seen_by_the_prefix_only_and_the_future_by_none() {
        let Visible::Except(hidden) = Visible::past_and_prefix(4, 2, &Device::flex()) else { unreachable!() };
        let hidden: Vec<bool> = hidden.into_data().iter::<bool>().collect();
        let expected = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0].map(|h| h == 1);
        assert_eq!(hidden, expected);
    }
}
