//! Attention over a key-value cache.

use crate::cpu::cached_attention::{Sizes, attend};
use crate::flex::{Values, serves, tensor};
use burn::backend::Flex;
use burn::tensor::{Bool, Tensor, TensorData};

/// `softmax(q kᵀ / sqrt(d)) v` for new tokens over a memory that is filled from its beginning: query `i` sees the first
/// `visible[i]` places, and what is behind them is not read. A query's result depends on that query only.
///
/// # Shapes
/// `q [b, h, n, d]`, `keys [b, h, capacity, d]`, `values [b, h, capacity, e]` → `[b, h, n, e]`.
///
/// # Panics
/// If shapes do not fit, or a query sees nothing or more than the capacity.
pub fn cached_attention(q: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, visible: &[usize]) -> Tensor<4> {
    let ([b, h, queries, d], [.., capacity, _], [.., value]) = (q.dims(), keys.dims(), values.dims());
    assert_eq!(keys.dims(), [b, h, capacity, d], "keys for queries {:?}", q.dims());
    assert_eq!(values.dims(), [b, h, capacity, value], "values for keys {:?}", keys.dims());
    assert_eq!(visible.len(), queries, "one number of visible places for each query");
    assert!(visible.iter().all(|seen| (1..=capacity).contains(seen)), "visible places {visible:?} of {capacity}");
    let filled = [b, h, queries, d, value].iter().all(|&n| n > 0);
    let own = [&q, &keys, &values].into_iter().all(|tensor| serves(tensor) && !tensor.is_autodiff());
    if !(filled && own) {
        return portable(q, keys, values, visible);
    }
    let primitive = |tensor: &Tensor<4>| tensor.clone().try_into_primitive::<Flex>().map(Values::of);
    let (Ok(q), Ok(keys), Ok(values)) = (primitive(&q), primitive(&keys), primitive(&values)) else {
        return portable(q, keys, values, visible);
    };
    let mixed = attend(Sizes { queries, capacity, key: d, value }, &q, &keys, &values, visible);
    Tensor::from_primitive::<Flex>(tensor(mixed, [b, h, queries, value]))
}

/// [`cached_attention`] by Burn's own operation with a mask.
pub fn portable(q: Tensor<4>, keys: Tensor<4>, values: Tensor<4>, visible: &[usize]) -> Tensor<4> {
    let longest = visible.iter().copied().max().unwrap_or(0);
    let hidden: Vec<bool> = visible.iter().flat_map(|seen| (0..longest).map(move |place| place >= *seen)).collect();
    let data = TensorData::new(hidden, [1, 1, visible.len(), longest]);
    let hidden = Tensor::<4, Bool>::from_data(data, &q.device());
    let (keys, values) = (keys.narrow(2, 0, longest), values.narrow(2, 0, longest));
    crate::attention::portable(q, keys, values, false, Some(hidden))
}
