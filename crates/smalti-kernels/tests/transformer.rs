//! Linear maps, GELU, attention and AdamW against their portable bodies.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Bool, Device, Tensor, TensorData};
use inputs::{assert_close, normal, stream};
use smalti_base::rng::Stream;
use smalti_kernels::{AdamW, AdamWState, attention, gelu, linear, portable, silu};

/// Contiguous, transposed in memory, or cut out of something larger.
fn odd(s: &mut Stream, [b, t, d]: [usize; 3], case: usize, device: &Device) -> Tensor<3> {
    match case % 3 {
        0 => normal(s, [b, t, d], device),
        1 => normal(s, [b, d, t], device).swap_dims(1, 2),
        _ => normal(s, [b, t + 2, d + 1], device).slice([0..b, 1..t + 1, 1..d + 1]),
    }
}

#[test]
fn linear_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(11);
    for case in 0..60 {
        let [b, t, i, o] = [1 + s.below(3), 1 + s.below(90), 1 + s.below(120), 1 + s.below(200)];
        let x = odd(&mut s, [b, t, i], case, &device);
        let weight = match case % 2 {
            0 => normal(&mut s, [i, o], &device),
            _ => normal(&mut s, [o, i], &device).transpose(),
        };
        let bias = (case % 4 < 2).then(|| normal(&mut s, [o], &device));
        let up = normal(&mut s, [b, t, o], &device);
        let run = |f: fn(Tensor<3>, Tensor<2>, Option<Tensor<1>>) -> Tensor<3>| {
            let (x, weight) = (x.clone().require_grad(), weight.clone().require_grad());
            let bias = bias.clone().map(Tensor::require_grad);
            let y = f(x.clone(), weight.clone(), bias.clone());
            let grads = (y.clone() * up.clone()).sum().backward();
            let bias = bias.map_or_else(|| Tensor::zeros([1], &device), |bias| bias.grad(&grads).unwrap());
            (y, x.grad(&grads).unwrap(), weight.grad(&grads).unwrap(), bias)
        };
        let (found, expected) = (run(linear), run(portable::linear));
        let of = format!("of {:?}, case {case}", [b, t, i, o]);
        assert_close(found.0, expected.0, 2e-5, &format!("y {of}"));
        assert_close(found.1, expected.1, 2e-5, &format!("dx {of}"));
        assert_close(found.2, expected.2, 2e-5, &format!("dweight {of}"));
        assert_close(found.3, expected.3, 2e-5, &format!("dbias {of}"));
    }
}

#[test]
fn activations_equal_the_portable_bodies() {
    let device = Device::flex().autodiff();
    let mut s = stream(12);
    for case in 0..20 {
        let shape = [1 + s.below(3), 1 + s.below(300), 1 + s.below(100)];
        let x = odd(&mut s, shape, case, &device) * 2.5;
        let up = normal(&mut s, shape, &device);
        type Activation = fn(Tensor<3>) -> Tensor<3>;
        let pairs: [(&str, Activation, Activation); 3] = [
            ("gelu", |x| gelu(x, false), |x| portable::gelu(x, false)),
            ("gelu with tanh", |x| gelu(x, true), |x| portable::gelu(x, true)),
            ("silu", silu, portable::silu),
        ];
        for (name, own, portable) in pairs {
            let run = |f: Activation| {
                let x = x.clone().require_grad();
                let y = f(x.clone());
                let grads = (y.clone() * up.clone()).sum().backward();
                (y, x.grad(&grads).unwrap())
            };
            let (found, expected) = (run(own), run(portable));
            assert_close(found.0, expected.0, 3e-6, &format!("y of {shape:?}, {name}"));
            assert_close(found.1, expected.1, 3e-6, &format!("dx of {shape:?}, {name}"));
        }
    }
}

type Attend = fn(Tensor<4>, Tensor<4>, Tensor<4>, bool, Option<Tensor<4, Bool>>) -> Tensor<4>;

#[test]
fn attention_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(13);
    for case in 0..60 {
        let [b, h, t, d, e] = [1 + s.below(3), 1 + s.below(4), 1 + s.below(150), 1 + s.below(40), 1 + s.below(40)];
        let causal = case % 3 == 1;
        let keys = if causal { t + s.below(20) } else { 1 + s.below(200) };
        let mut heads = |n: usize, d: usize| match case % 2 {
            0 => normal(&mut s, [b, n, h, d], &device).swap_dims(1, 2),
            _ => normal(&mut s, [b, h, n, d], &device),
        };
        let (q, k, v, up) = (heads(t, d), heads(keys, d), heads(keys, e), heads(t, e));
        let mask = (case % 3 == 2).then(|| {
            let [mb, mh] = [if case % 2 == 0 { 1 } else { b }, if case % 4 < 2 { 1 } else { h }];
            // The first key is always seen: what Burn gives for a row that sees nothing is tested apart.
            // Some show steps: groups of queries see up to the end of their group.
            let steps = case % 4 == 2;
            let end = |query: usize| (query / 40 + 1) * 40 * keys / t.max(40);
            let is_hidden = |i: usize, s: &mut Stream| match steps {
                true => i % keys > end(i / keys % t),
                false => !i.is_multiple_of(keys) && s.below(2) == 0,
            };
            let hidden: Vec<bool> = (0..mb * mh * t * keys).map(|i| is_hidden(i, &mut s)).collect();
            Tensor::<4, Bool>::from_data(TensorData::new(hidden, [mb, mh, t, keys]), &device)
        });
        let run = |f: Attend| {
            let [q, k, v] = [&q, &k, &v].map(|x| x.clone().require_grad());
            let y = f(q.clone(), k.clone(), v.clone(), causal, mask.clone());
            let grads = (y.clone() * up.clone()).sum().backward();
            [y, q.grad(&grads).unwrap(), k.grad(&grads).unwrap(), v.grad(&grads).unwrap()]
        };
        let (found, expected) = (run(attention), run(portable::attention));
        for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dq", "dk", "dv"]) {
            assert_close(found, expected, 3e-5, &format!("{name} of {:?}, case {case}", [b, h, t, keys, d, e]));
        }
    }
}

#[test]
fn a_query_that_sees_nothing_gives_zeros_and_no_gradient() {
    let device = Device::flex().autodiff();
    let mut s = stream(14);
    let [q, k, v] = [(); 3].map(|()| normal(&mut s, [1, 2, 3, 4], &device).require_grad());
    let hidden: Vec<bool> = (0..9).map(|i| i / 3 == 1).collect();
    let mask = Tensor::<4, Bool>::from_data(TensorData::new(hidden, [1, 1, 3, 3]), &device);
    let y = attention(q.clone(), k.clone(), v.clone(), false, Some(mask));
    let grads = y.clone().sum().backward();
    let blind = |x: Tensor<4>| x.slice([0..1, 0..2, 1..2, 0..4]).abs().max().into_scalar::<f32>();
    assert_eq!(blind(y.inner()), 0.0);
    assert_eq!(blind(q.grad(&grads).unwrap()), 0.0);
    assert!(k.grad(&grads).unwrap().abs().max().into_scalar::<f32>().is_finite());
    // More queries than keys, aligned at the end: the first ones see nothing.
    let [q, k] = [7, 3].map(|n| normal(&mut s, [1, 1, n, 4], &device));
    let y = attention(q, k.clone(), k, true, None).inner();
    assert_eq!(y.clone().slice([0..1, 0..1, 0..4, 0..4]).abs().max().into_scalar::<f32>(), 0.0);
    assert!(y.slice([0..1, 0..1, 4..7, 0..4]).abs().min().into_scalar::<f32>() > 0.0);
}

#[test]
fn adamw_equals_the_portable_body() {
    let device = Device::flex();
    let mut s = stream(15);
    for case in 0..12 {
        let n = [1, 17, 70_000][case % 3];
        let mut state = AdamWState {
            value: normal(&mut s, [n], &device),
            first: Tensor::zeros([n], &device),
            second: Tensor::zeros([n], &device),
            average: (case % 2 == 0).then(|| Tensor::zeros([n], &device)),
        };
        let mut expected = state.clone();
        for t in 1..4 {
            let step = AdamW {
                gradient_factor: 0.5,
                rate: 1e-2,
                betas: (0.9, 0.95),
                corrections: (1.0 - 0.9f64.powi(t), 1.0 - 0.95f64.powi(t)),
                epsilon: 1e-8,
                weight_decay: 0.1,
                average_decay: Some(0.9),
            };
            let gradient = normal(&mut s, [n], &device);
            let kept = state.clone();
            let before = kept.value.clone().sum().into_scalar::<f32>();
            state = step.step(state, gradient.clone());
            assert_eq!(kept.value.sum().into_scalar::<f32>(), before, "a copy that is still held does not change");
            expected = step.portable(expected, gradient);
        }
        assert_close(state.value, expected.value, 1e-6, "value");
        assert_close(state.first, expected.first, 1e-6, "first moment");
        assert_close(state.second, expected.second, 1e-6, "second moment");
        if let (Some(found), Some(expected)) = (state.average, expected.average) {
            assert_close(found, expected, 1e-6, "average");
        }
    }
}
