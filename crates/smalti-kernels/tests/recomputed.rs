//! Operations that make an activation again for the backward pass: as the single operations that they stand for, bit by bit.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor, TensorData};
use inputs::{normal, stream, strided};
use smalti_kernels::{
    Conv2dOptions, GroupNormalization, conv2d, gelu, gelu_linear, group_norm, linear, norm_silu_conv2d,
};

/// The result and the gradients of all inputs.
fn equal(found: Vec<TensorData>, expected: Vec<TensorData>) {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).for_each(|(found, expected)| found.assert_eq(expected, true));
}

#[test]
fn gelu_and_linear() {
    let device = Device::flex().autodiff();
    let mut s = stream(21);
    for case in 0..40 {
        let [b, t, i, o] = [1 + s.below(3), 1 + s.below(90), 1 + s.below(80), 1 + s.below(90)];
        let x = match case % 2 {
            0 => normal(&mut s, [b, t, i], &device),
            _ => normal(&mut s, [b, i, t], &device).swap_dims(1, 2),
        };
        let weight = normal(&mut s, [i, o], &device);
        let bias = (case % 4 < 2).then(|| normal(&mut s, [o], &device));
        let up = normal(&mut s, [b, t, o], &device);
        let run = |f: &dyn Fn(Tensor<3>, Tensor<2>, Option<Tensor<1>>) -> Tensor<3>| {
            let (x, weight) = (x.clone().require_grad(), weight.clone().require_grad());
            let bias = bias.clone().map(Tensor::require_grad);
            let y = f(x.clone(), weight.clone(), bias.clone());
            let grads = (y.clone() * up.clone()).sum().backward();
            let mut all = vec![y.inner().into_data(), x.grad(&grads).unwrap().into_data()];
            all.push(weight.grad(&grads).unwrap().into_data());
            all.extend(bias.map(|bias| bias.grad(&grads).unwrap().into_data()));
            all
        };
        let tanh = case % 3 == 0;
        let expected = run(&|x, weight, bias| linear(gelu(x, tanh), weight, bias));
        equal(run(&|x, weight, bias| gelu_linear(x, tanh, weight, bias)), expected);
    }
}

#[test]
fn norm_and_convolution() {
    let device = Device::flex().autodiff();
    let mut s = stream(22);
    for case in 0..40 {
        let groups = 1 + s.below(4);
        let [b, c, h, w] = [1 + s.below(3), groups * (1 + s.below(6)), 4 + s.below(20), 4 + s.below(20)];
        let (out, k) = (1 + s.below(24), [1, 3, 3, 4][case % 4]);
        let options = Conv2dOptions { stride: 1 + case % 2, padding: [s.below(3); 4], upsample: case % 5 == 0 };
        let (x, weight) = (strided(&mut s, [b, c, h, w], &device), normal(&mut s, [out, c, k, k], &device));
        let norm = [normal(&mut s, [c], &device) + 1.0, normal(&mut s, [c], &device)];
        let bias = (case % 4 < 2).then(|| normal(&mut s, [out], &device));
        let run = |fused: bool| {
            let (x, weight) = (x.clone().require_grad(), weight.clone().require_grad());
            let [gamma, beta] = norm.clone().map(Tensor::require_grad);
            let bias = bias.clone().map(Tensor::require_grad);
            let (scale, shift) = (gamma.clone(), beta.clone());
            let y = match fused {
                true => {
                    let norm = GroupNormalization { gamma: scale, beta: shift, groups, epsilon: 1e-6 };
                    norm_silu_conv2d(x.clone(), norm, weight.clone(), bias.clone(), options)
                }
                false => {
                    let normal = group_norm(x.clone(), scale, shift, groups, 1e-6, true);
                    conv2d(normal, weight.clone(), bias.clone(), options)
                }
            };
            let up = normal(&mut stream(23), y.dims(), &device);
            let grads = (y.clone() * up).sum().backward();
            let mut all = vec![y.inner().into_data(), x.grad(&grads).unwrap().into_data()];
            all.extend([gamma, beta].map(|p| p.grad(&grads).unwrap().into_data()));
            all.push(weight.grad(&grads).unwrap().into_data());
            all.extend(bias.map(|bias| bias.grad(&grads).unwrap().into_data()));
            all
        };
        equal(run(true), run(false));
    }
}

/// A frozen network in front of a trained one, and a trained one in front of a frozen one.
#[test]
fn only_what_is_asked_for_gets_gradients() {
    let device = Device::flex().autodiff();
    let mut s = stream(24);
    let (x, weight) = (normal(&mut s, [1, 4, 8, 8], &device), normal(&mut s, [3, 4, 3, 3], &device));
    let (gamma, beta) = (normal(&mut s, [4], &device), normal(&mut s, [4], &device));
    let norm = GroupNormalization { gamma, beta, groups: 2, epsilon: 1e-6 };
    let trained = weight.clone().require_grad();
    let y = norm_silu_conv2d(x.clone(), norm.clone(), trained.clone(), None, Conv2dOptions::padded(1));
    assert!(trained.grad(&y.sum().backward()).is_some());
    let x = x.require_grad();
    let y = norm_silu_conv2d(x.clone(), norm, weight, None, Conv2dOptions::padded(1));
    assert!(x.grad(&y.sum().backward()).is_some());
}
