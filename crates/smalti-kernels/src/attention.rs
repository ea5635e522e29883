//! Scaled dot-product attention (arXiv 1706.03762) that does not keep the scores (after arXiv 2205.14135).

use crate::cpu::attention::{Differentiation, Heads, Mask, Piece, View, forward};
use crate::flex::{dims, serves, tensor};
use burn::backend::autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Bool, module, ops::AttentionModuleOptions};
use burn::tensor::{BoolStore, DType, Tensor};
use std::sync::Arc;

/// `softmax(q kᵀ / sqrt(d)) v` for each batch entry and head.
///
/// `causal` hides the future, aligned bottom-right: the last query sees every key. In `mask`, true hides. Rows that see
/// nothing give zeros. On the CPU neither pass keeps the scores: memory grows with `t + s`, not with `t * s`.
///
/// # Shapes
/// `q [b, h, t, d]`, `k [b, h, s, d]`, `v [b, h, s, e]`, `mask [b or 1, h or 1, t, s]` → `[b, h, t, e]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, causal: bool, mask: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let ([b, h, t, d], [_, _, s, e]) = (q.dims(), v.dims());
    let fits = k.dims() == [b, h, s, d] && v.dims() == [b, h, s, e] && b * h * t * s * d * e > 0;
    let masked = mask.as_ref().is_none_or(|mask| {
        let [mb, mh, mt, ms] = mask.dims();
        let bytes = matches!(mask.dtype(), DType::Bool(BoolStore::Native | BoolStore::U8));
        bytes && (mb == b || mb == 1) && (mh == h || mh == 1) && [mt, ms] == [t, s]
    });
    if !(fits && masked && serves(&q) && serves(&k) && serves(&v)) {
        return portable(q, k, v, causal, mask);
    }
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(match mask {
        Some(mask) => <Dispatch as Attention>::smalti_attention_masked(q, k, v, mask.into_dispatch(), causal),
        None => <Dispatch as Attention>::smalti_attention(q, k, v, causal),
    })
}

/// [`attention`] over the keys and values of several tensors as if they were joined. On the CPU none is copied; where gradients are
/// recorded, and on other devices, they are joined first.
///
/// # Shapes
/// `q [b, h, t, d]`, `keys [b, h, s_i, d]`, `values [b, h, s_i, e]` → `[b, h, t, e]`.
///
/// # Panics
/// If shapes do not fit, or there are no keys.
pub fn attention_over(q: Tensor<4>, keys: &[Tensor<4>], values: &[Tensor<4>]) -> Tensor<4> {
    let [batch, heads, queries, width] = q.dims();
    let [.., value_width] = values[0].dims();
    assert_eq!(keys.len(), values.len(), "tensors of keys and of values");
    for (keys, values) in keys.iter().zip(values) {
        let [.., rows, _] = keys.dims();
        assert_eq!(keys.dims(), [batch, heads, rows, width], "keys for queries {:?}", q.dims());
        assert_eq!(values.dims(), [batch, heads, rows, value_width], "values for keys {:?}", keys.dims());
    }
    let own = |tensor: &Tensor<4>| serves(tensor) && !tensor.is_autodiff() && tensor.shape().num_elements() > 0;
    let primitive = |tensor: &Tensor<4>| {
        let own = Some(tensor).filter(|tensor| own(tensor))?;
        own.clone().try_into_primitive::<Flex>().ok().map(Strided::of)
    };
    let all = |tensors: &[Tensor<4>]| tensors.iter().map(primitive).collect::<Option<Vec<_>>>();
    let (Some(asked), Some(own_keys), Some(own_values)) = (primitive(&q), all(keys), all(values)) else {
        let [keys, values] = [keys, values].map(|tensors| match tensors {
            [one] => one.clone(),
            several => Tensor::cat(several.to_vec(), 2),
        });
        return attention(q, keys, values, false, None);
    };
    let [keys, values] = [&own_keys, &own_values].map(|tensors| tensors.iter().map(Strided::piece).collect::<Vec<_>>());
    let count = keys.iter().map(|piece| piece.rows).sum();
    let scale = (width as f32).powf(-0.5);
    let shape = Heads { batch, heads, queries, keys: count, width, value_width, causal: false, scale };
    let (mixed, _) = forward(shape, asked.view(), &keys, &values, None);
    Tensor::from_primitive::<Flex>(by_head(mixed, shape, queries, value_width))
}

/// [`attention`] by Burn's own operation.
pub fn portable(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, causal: bool, mask: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
    module::attention(q, k, v, mask, None, options)
}

#[backend_extension(Autodiff, Flex)]
trait Attention: Backend {
    fn smalti_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self>;

    fn smalti_attention_masked(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self>;
}

impl Attention for Flex {
    fn smalti_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        Call::new([q, k, v], None, causal).forward().0
    }

    fn smalti_attention_masked(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        Call::new([q, k, v], Some(mask), causal).forward().0
    }
}

impl<C: CheckpointStrategy> Attention for Autodiff<Flex, C> {
    fn smalti_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        record::<C>([q, k, v], None, causal)
    }

    fn smalti_attention_masked(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        record::<C>([q, k, v], Some(mask), causal)
    }
}

fn record<C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<Flex, C>>; 3],
    mask: Option<BoolTensor<Flex>>,
    causal: bool,
) -> FloatTensor<Autodiff<Flex, C>> {
    let nodes = [inputs[0].node(), inputs[1].node(), inputs[2].node()];
    match AttentionStep.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let ids = [prep.checkpoint(&inputs[0]), prep.checkpoint(&inputs[1]), prep.checkpoint(&inputs[2])];
            let call = Call::new(inputs.map(|input| input.into_primitive()), mask.clone(), causal);
            let (y, log_sums) = call.forward();
            prep.finish(Saved { ids, mask, causal, log_sums: log_sums.into() }, y)
        }
        OpsKind::UnTracked(prep) => {
            prep.finish(Call::new(inputs.map(|input| input.into_primitive()), mask, causal).forward().0)
        }
    }
}

/// Inputs in strides that the CPU body reads.
struct Call {
    shape: Heads,
    inputs: [Strided; 3],
    mask: Option<(BoolTensor<Flex>, [usize; 2])>,
}

struct Strided {
    tensor: FloatTensor<Flex>,
    strides: [usize; 4],
}

impl Strided {
    /// As it is, or a copy where an axis runs backwards.
    fn of(tensor: FloatTensor<Flex>) -> Self {
        let tensor = if tensor.layout().has_positive_strides() { tensor } else { tensor.to_contiguous() };
        let strides = tensor.layout().strides();
        let strides = std::array::from_fn(|axis| strides[axis].unsigned_abs());
        Self { tensor, strides }
    }

    /// All rows.
    fn piece(&self) -> Piece<'_> {
        Piece { view: self.view(), rows: dims::<4>(&self.tensor)[2] }
    }

    fn view(&self) -> View<'_> {
        View { values: &self.tensor.storage::<f32>()[self.tensor.layout().start_offset()..], strides: self.strides }
    }
}

impl Call {
    fn new(inputs: [FloatTensor<Flex>; 3], mask: Option<BoolTensor<Flex>>, causal: bool) -> Self {
        let ([batch, heads, queries, width], [.., keys, value_width]) = (dims::<4>(&inputs[0]), dims::<4>(&inputs[2]));
        let scale = (width as f32).powf(-0.5);
        let mask = mask.map(|mask| {
            let [b, h, ..] = dims::<4>(&mask);
            let plane = queries * keys;
            let strides = [if b == 1 { 0 } else { h * plane }, if h == 1 { 0 } else { plane }];
            (if mask.layout().contiguous_offsets().is_some() { mask } else { mask.to_contiguous() }, strides)
        });
        let shape = Heads { batch, heads, queries, keys, width, value_width, causal, scale };
        Self { shape, inputs: inputs.map(Strided::of), mask }
    }

    fn mask(&self) -> Option<Mask<'_>> {
        self.mask
            .as_ref()
            .map(|(mask, strides)| Mask { values: &mask.bytes()[mask.layout().start_offset()..], strides: *strides })
    }

    fn forward(&self) -> (FloatTensor<Flex>, Vec<f32>) {
        let [q, k, v] = &self.inputs;
        let (y, log_sums) = forward(self.shape, q.view(), &[k.piece()], &[v.piece()], self.mask());
        (by_head(y, self.shape, self.shape.queries, self.shape.value_width), log_sums)
    }

    fn backward(&self, dy: FloatTensor<Flex>, log_sums: &[f32]) -> [FloatTensor<Flex>; 3] {
        let [q, k, v] = [0, 1, 2].map(|i| self.inputs[i].view());
        let dy = Strided::of(dy);
        let call = Differentiation { shape: self.shape, q, k, v, mask: self.mask(), log_sums, dy: dy.view() };
        let found = call.gradients();
        let Heads { queries, keys, width, value_width, .. } = self.shape;
        [(found.q, queries, width), (found.k, keys, width), (found.v, keys, value_width)]
            .map(|(values, rows, channels)| by_head(values, self.shape, rows, channels))
    }
}

/// `[batch, rows, heads, channels]` seen as `[batch, heads, rows, channels]`.
fn by_head(values: Vec<f32>, shape: Heads, rows: usize, channels: usize) -> FloatTensor<Flex> {
    Flex::float_swap_dims(tensor(values, [shape.batch, rows, shape.heads, channels]), 1, 2)
}

#[derive(Debug)]
struct AttentionStep;

/// What the backward step needs; the inputs are kept by the graph.
#[derive(Debug, Clone)]
struct Saved {
    ids: [NodeId; 3],
    mask: Option<BoolTensor<Flex>>,
    causal: bool,
    log_sums: Arc<[f32]>,
}

impl Backward<Flex, 3> for AttentionStep {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let dy = grads.consume::<Flex>(&ops.node);
        let Saved { ids, mask, causal, log_sums } = ops.state;
        let inputs = ids.map(|id| checkpointer.retrieve_node_output::<FloatTensor<Flex>>(id));
        let found = Call::new(inputs, mask, causal).backward(dy, &log_sums);
        for (node, gradient) in ops.parents.into_iter().zip(found) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}
