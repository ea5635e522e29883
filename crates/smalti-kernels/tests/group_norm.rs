//! Group normalisation against its portable body.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor};
use inputs::{assert_close, normal, stream, strided};
use smalti_kernels::{group_norm, portable};

type Operation = fn(Tensor<4>, Tensor<1>, Tensor<1>, usize, f64, bool) -> Tensor<4>;

/// The result, and the gradients of x, gamma and beta for the upstream gradient `up`.
fn run(operation: Operation, t: [Tensor<4>; 2], p: [Tensor<1>; 2], groups: usize, silu: bool) -> [Tensor<4>; 4] {
    let [x, up] = t;
    let [gamma, beta] = p.map(Tensor::require_grad);
    let x = x.require_grad();
    let y = operation(x.clone(), gamma.clone(), beta.clone(), groups, 1e-6, silu);
    let grads = (y.clone() * up).sum().backward();
    let c = gamma.dims()[0];
    let [gamma, beta] = [gamma, beta].map(|p| p.grad(&grads).unwrap().reshape([1, c, 1, 1]));
    [y, x.grad(&grads).unwrap(), gamma, beta]
}

#[test]
fn equals_the_portable_body_in_values_and_gradients() {
    let device = Device::flex().autodiff();
    let mut s = stream(1);
    for case in 0..60 {
        let groups = 1 + s.below(4);
        let shape = [1 + s.below(3), groups * (1 + s.below(5)), 1 + s.below(9), 2 + s.below(17)];
        let (x, up) = (strided(&mut s, shape, &device) * 2.0 + 3.0, normal(&mut s, shape, &device));
        let parameters = [normal(&mut s, [shape[1]], &device) + 1.0, normal(&mut s, [shape[1]], &device)];
        let silu = case % 2 == 0;
        let found = run(group_norm, [x.clone(), up.clone()], parameters.clone(), groups, silu);
        let expected = run(portable::group_norm, [x, up], parameters, groups, silu);
        for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dx", "dgamma", "dbeta"]) {
            assert_close(found, expected, 1e-4, &format!("{name} of {shape:?}, {groups} groups, silu {silu}"));
        }
    }
}

#[test]
fn plain_and_recorded_results_are_the_same() {
    let mut s = stream(2);
    let device = Device::flex();
    let x = normal(&mut s, [2, 32, 5, 7], &device);
    let (gamma, beta) = (normal(&mut s, [32], &device), normal(&mut s, [32], &device));
    let plain = group_norm(x.clone(), gamma.clone(), beta.clone(), 8, 1e-6, true);
    let mixed = group_norm(x, gamma.autodiff().require_grad(), beta, 8, 1e-6, true);
    assert!(mixed.is_autodiff() && !plain.is_autodiff());
    mixed.inner().into_data().assert_eq(&plain.into_data(), true);
}

#[test]
fn a_large_mean_does_not_spoil_the_variance() {
    let mut s = stream(3);
    let device = Device::flex();
    let x = normal(&mut s, [1, 4, 16, 16], &device);
    let (gamma, beta) = (Tensor::ones([4], &device), Tensor::zeros([4], &device));
    let near = group_norm(x.clone(), gamma.clone(), beta.clone(), 2, 1e-6, false);
    let far = group_norm(x + 1000.0, gamma, beta, 2, 1e-6, false);
    assert_close(far, near, 1e-3, "shifted input");
}
