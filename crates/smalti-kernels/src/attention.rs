//! Scaled dot-product attention.

use burn::tensor::{Bool, Tensor, module, ops::AttentionModuleOptions};

/// `softmax(q kᵀ / sqrt(d)) v` for each batch entry and head.
///
/// `causal` hides the future, aligned bottom-right: the last query sees every key. In `mask`, true hides. Rows that see
/// nothing give zeros.
///
/// # Shapes
/// `q [b, h, t, d]`, `k [b, h, s, d]`, `v [b, h, s, e]`, `mask [b or 1, h or 1, t, s]` → `[b, h, t, e]`.
///
/// # Panics
/// Where Burn's operations do: shapes that do not fit, mixed data types.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, causal: bool, mask: Option<Tensor<4, Bool>>) -> Tensor<4> {
    portable(q, k, v, causal, mask)
}

/// [`attention`] by Burn's own operation.
pub fn portable(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, causal: bool, mask: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
    module::attention(q, k, v, mask, None, options)
}
