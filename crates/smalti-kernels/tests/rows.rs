//! Layer normalisation, cross-entropy and nearest code against their portable bodies.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Int, Tensor, TensorData};
use inputs::{assert_close, normal, stream};
use smalti_kernels::{
    gated_residual, layer_norm, modulate, modulated_layer_norm, nearest_code, portable, softmax_cross_entropy,
    unit_length,
};

#[test]
fn layer_norm_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(1);
    for case in 0..40 {
        let [b, t, d] = [1 + s.below(4), 1 + s.below(30), 8 + s.below(100)];
        let x = match case % 3 {
            0 => normal(&mut s, [b, d, t], &device).swap_dims(1, 2),
            1 => normal(&mut s, [b, t + 2, d + 1], &device).slice([0..b, 1..t + 1, 1..d + 1]),
            _ => normal(&mut s, [b, t, d], &device) + 5.0,
        };
        let (gamma, beta) = (normal(&mut s, [d], &device) + 1.0, normal(&mut s, [d], &device));
        let up = normal(&mut s, [b, t, d], &device);
        let run = |f: fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>| {
            let (x, gamma, beta) =
                (x.clone().require_grad(), gamma.clone().require_grad(), beta.clone().require_grad());
            let y = f(x.clone(), gamma.clone(), beta.clone(), 1e-5);
            let grads = (y.clone() * up.clone()).sum().backward();
            let [gamma, beta] = [gamma, beta].map(|p| p.grad(&grads).unwrap().reshape([1, 1, d]));
            [y, x.grad(&grads).unwrap(), gamma, beta]
        };
        let (found, expected) = (run(layer_norm), run(portable::layer_norm));
        for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dx", "dgamma", "dbeta"]) {
            assert_close(found, expected, 1e-4, &format!("{name} of {:?}", [b, t, d]));
        }
    }
}

#[test]
fn modulated_layer_norm_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(3);
    for case in 0..40 {
        // Some have sums over several tasks.
        let [b, t, d] = [1 + s.below(4), 1 + s.below(if case % 8 == 0 { 2000 } else { 30 }), 8 + s.below(100)];
        let x = normal(&mut s, [b, t, d], &device) + 1.0;
        let given = [[b, 1, d], [b, t, d], [1, 1, d], [1, t, d]][case % 4];
        let (scale, shift) = (normal(&mut s, given, &device), normal(&mut s, given, &device));
        let up = normal(&mut s, [b, t, d], &device);
        let run = |f: fn(Tensor<3>, Tensor<3>, Tensor<3>, f64) -> Tensor<3>| {
            let inputs = [&x, &scale, &shift].map(|input| input.clone().require_grad());
            let [x, scale, shift] = inputs.clone();
            let y = f(x, scale, shift, 1e-6);
            let grads = (y.clone() * up.clone()).sum().backward();
            let [x, scale, shift] = inputs.map(|input| input.grad(&grads).unwrap());
            [y, x, scale / (t as f32).sqrt(), shift / (t as f32).sqrt()]
        };
        let (found, expected) = (run(modulated_layer_norm), run(portable::modulated_layer_norm));
        for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dx", "dscale", "dshift"]) {
            assert_close(found, expected, 1e-4, &format!("{name} of {:?} by {given:?}", [b, t, d]));
        }
    }
}

#[test]
fn unit_length_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(5);
    for case in 0..40 {
        // Some have sums over several tasks.
        let [b, n] = [1 + s.below(4), 1 + s.below(if case % 8 == 0 { 500 } else { 20 })];
        let [h, d] = [1 + s.below(6), 2 + s.below(80)];
        let x = match case % 3 {
            0 => normal(&mut s, [b, h, n, d], &device).swap_dims(1, 2),
            1 => normal(&mut s, [b, n, h, d], &device) * 1e-3,
            _ => normal(&mut s, [b, n, h, d], &device),
        };
        let up = normal(&mut s, [b, n, h, d], &device);
        let factors = normal(&mut s, [h], &device);
        let run = |f: fn(Tensor<4>, Tensor<1>) -> Tensor<4>| {
            let (x, factors) = (x.clone().require_grad(), factors.clone().require_grad());
            let y = f(x.clone(), factors.clone());
            let grads = (y.clone() * up.clone()).sum().backward();
            let factors = factors.grad(&grads).unwrap().reshape([1, 1, h, 1]) / ((b * n) as f32).sqrt();
            [y, x.clone().grad(&grads).unwrap() * x.inner().abs().mean().unsqueeze(), factors]
        };
        let (found, expected) = (run(unit_length), run(portable::unit_length));
        for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dx", "dfactors"]) {
            assert_close(found, expected, 1e-4, &format!("{name} of {:?}", [b, n, h, d]));
        }
    }
}

#[test]
fn zero_has_no_direction() {
    let device = Device::flex().autodiff();
    let x = Tensor::<4>::zeros([1, 2, 1, 3], &device).require_grad();
    let y = unit_length(x.clone(), Tensor::ones([1], &device));
    let grads = y.clone().sum().backward();
    assert!(y.into_data().iter::<f32>().all(|y| y == 0.0));
    assert!(x.grad(&grads).unwrap().into_data().iter::<f32>().all(f32::is_finite));
}

#[test]
fn gated_sums_equal_the_portable_bodies() {
    let device = Device::flex().autodiff();
    let mut s = stream(5);
    type Sum = fn(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>;
    let modulated: [Sum; 2] =
        [|shift, x, scale| modulate(x, scale, shift), |shift, x, scale| portable::modulate(x, scale, shift)];
    for case in 0..48 {
        // Some have sums over several tasks.
        let [b, t, d] = [1 + s.below(4), 1 + s.below(if case % 8 == 0 { 2000 } else { 30 }), 8 + s.below(100)];
        let gains = [[b, 1, d], [b, t, d], [1, 1, d], [1, t, d]][case % 4];
        let y = normal(&mut s, [b, t, d], &device);
        // Base and gain are pieces of each row of a larger tensor, or lie in another order.
        let parts = normal(&mut s, [gains[0], gains[1], 3 * d], &device).require_grad();
        let turned = normal(&mut s, [t, b, 2 * d], &device).require_grad();
        let up = normal(&mut s, [b, t, d], &device);
        let run = |f: Sum| {
            let y = y.clone().require_grad();
            let base = match case % 3 {
                0 => turned.clone().swap_dims(0, 1).narrow(2, d, d),
                _ => turned.clone().narrow(2, 0, d).reshape([b, t, d]),
            };
            let sum = f(base, y.clone(), parts.clone().narrow(2, d, d));
            let grads = (sum.clone() * up.clone()).sum().backward();
            let gain = parts.grad(&grads).unwrap() / (t as f32).sqrt();
            [sum, y.grad(&grads).unwrap(), turned.grad(&grads).unwrap(), gain]
        };
        for (own, portable) in [(gated_residual as Sum, portable::gated_residual as Sum), modulated.into()] {
            for ((found, expected), name) in
                run(own).into_iter().zip(run(portable)).zip(["sum", "dy", "dbase", "dgain"])
            {
                assert_close(found, expected, 1e-5, &format!("{name} of {:?} by {gains:?}", [b, t, d]));
            }
        }
    }
}

#[test]
fn cross_entropy_equals_the_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(2);
    for case in 0..40 {
        let [n, k] = [1 + s.below(40), 2 + s.below(300)];
        let logits = normal(&mut s, [n, k], &device) * 4.0;
        let targets: Vec<i64> = (0..n).map(|_| s.below(k) as i64).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [n]), &device);
        let weights = (case % 2 == 0).then(|| normal(&mut s, [n], &device).abs() + 0.01);
        let smoothing = if case % 3 == 0 { 0.0 } else { 0.1 };
        let run = |f: fn(Tensor<2>, Tensor<1, Int>, Option<Tensor<1>>, f32) -> Tensor<1>| {
            let logits = logits.clone().require_grad();
            let loss = f(logits.clone(), targets.clone(), weights.clone(), smoothing);
            let grads = (loss.clone() * 3.0).backward();
            (loss, logits.grad(&grads).unwrap() * n as f32)
        };
        let (found, expected) = (run(softmax_cross_entropy), run(portable::softmax_cross_entropy));
        assert_close(found.0, expected.0, 1e-5, &format!("loss of {n} x {k}"));
        assert_close(found.1, expected.1, 1e-5, &format!("dlogits of {n} x {k}"));
    }
}

#[test]
fn cross_entropy_of_hidden_classes_and_hidden_rows() {
    let device = Device::flex().autodiff();
    let hidden = f32::NEG_INFINITY;
    let logits = Tensor::<2>::from_data([[1.0, hidden, 1.0], [hidden, hidden, 7.0], [0.0, 9.0, 0.0]], &device);
    let logits = logits.require_grad();
    let targets = Tensor::<1, Int>::from_data([0, 2, 0], &device);
    let weights = Tensor::<1>::from_data([1.0, 1.0, 0.0], &device);
    let loss = softmax_cross_entropy(logits.clone(), targets, Some(weights), 0.0);
    let grads = loss.clone().backward();
    assert_close(loss, Tensor::from_data([2.0f32.ln() / 2.0], &device), 1e-6, "loss");
    let expected = Tensor::from_data([[-0.25, 0.0, 0.25], [0.0; 3], [0.0; 3]], &device);
    assert_close(logits.grad(&grads).unwrap(), expected, 1e-6, "gradient");
}

#[test]
fn nearest_code_equals_the_search_in_f64() {
    let device = Device::flex();
    let mut s = stream(3);
    for _ in 0..20 {
        let [n, k, c] = [1 + s.below(300), 1 + s.below(700), 1 + s.below(40)];
        let latents = normal(&mut s, [c, n], &device).transpose();
        let codebook = normal(&mut s, [k, c], &device);
        let found = nearest_code(latents.clone(), codebook.clone()).into_data().convert::<i64>();
        let values = |t: Tensor<2>| t.into_data().try_to_vec::<f32>().unwrap();
        let (latents, codebook) = (values(latents), values(codebook));
        let distance = |i: usize, j: usize| -> f64 {
            let pairs = latents[i * c..(i + 1) * c].iter().zip(&codebook[j * c..(j + 1) * c]);
            pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
        };
        for (i, found) in found.try_to_vec::<i64>().unwrap().into_iter().enumerate() {
            let least = (0..k).map(|j| distance(i, j)).fold(f64::INFINITY, f64::min);
            assert!(distance(i, found as usize) <= least + 1e-4, "latent {i} of {n}, {k} codes, {c} channels");
        }
    }
}

#[test]
fn nearest_code_takes_the_first_of_equal_rows() {
    let device = Device::flex();
    let mut s = stream(4);
    let half = normal(&mut s, [300, 5], &device);
    let codebook = Tensor::cat(vec![half.clone(), half.clone()], 0);
    let found = nearest_code(half.clone().autodiff(), codebook.clone()).into_data().convert::<i64>();
    found.assert_eq(&TensorData::from((0..300).collect::<Vec<i64>>().as_slice()), true);
}
