//! Operations that make an activation again for the backward pass.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor, TensorData};
use inputs::{assert_close, normal, stream, strided};
use smalti_kernels::{
    Conv2dOptions, GroupNormalization, chunks, conv2d, gated_residual, gelu, group_norm, layer_norm, linear, modulate,
    norm_silu_conv2d, portable, silu, unit_length,
};

/// The result and the gradients of all inputs, bit by bit.
fn equal(found: Vec<TensorData>, expected: Vec<TensorData>) {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).for_each(|(found, expected)| found.assert_eq(expected, true));
}

type Vary = fn(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>;

/// The operations of a block, from one of the two sets.
struct Operations {
    norm: fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>,
    modulate: Vary,
    add: Vary,
    linear: fn(Tensor<3>, Tensor<2>, Option<Tensor<1>>) -> Tensor<3>,
    activations: [fn(Tensor<3>) -> Tensor<3>; 2],
    unit_length: fn(Tensor<4>, Tensor<1>) -> Tensor<4>,
    chunks: fn(Tensor<3>) -> [Tensor<3>; 3],
}

const OWN: Operations = Operations {
    norm: layer_norm,
    modulate,
    add: gated_residual,
    linear,
    activations: [silu, |x| gelu(x, true)],
    unit_length,
    chunks,
};

const PORTABLE: Operations = Operations {
    norm: portable::layer_norm,
    modulate: portable::modulate,
    add: portable::gated_residual,
    linear: portable::linear,
    activations: [portable::silu, |x| portable::gelu(x, true)],
    unit_length: portable::unit_length,
    chunks: portable::chunks,
};

/// A network in which results that are made again are used several times, follow each other, and are left unused.
#[test]
fn a_network_equals_its_portable_body() {
    let device = Device::flex().autodiff();
    let mut s = stream(21);
    for case in 0..24 {
        // Wide enough for norms that do not magnify rounding.
        let [b, t, h, d] = [1 + s.below(3), 1 + s.below(50), 1 + s.below(3), 8 + s.below(20)];
        let width = h * d;
        let x = normal(&mut s, [b, t, width], &device);
        let told = normal(&mut s, [b, t, width], &device);
        let matrices: Vec<_> = [3 * width, width, width, width, width]
            .map(|outputs| normal(&mut s, [width, outputs], &device) * (width as f64).powf(-0.5))
            .into();
        let vectors: Vec<_> = [width, width, width, h].map(|n| normal(&mut s, [n], &device) * 0.2 + 1.0).into();
        // Some are frozen, or only some are trained.
        let trained = |i: usize| case % 3 == 0 || !(i + case).is_multiple_of(3);
        let run = |of: &Operations| {
            let (x, told) = match trained(0) {
                true => (x.clone().require_grad(), told.clone().require_grad()),
                false => (x.clone(), told.clone().require_grad()),
            };
            let m = matrices.iter().cloned().enumerate();
            let m: Vec<_> = m.map(|(i, p)| if trained(i + 1) { p.require_grad() } else { p }).collect();
            let v = vectors.iter().cloned().enumerate();
            let v: Vec<_> = v.map(|(i, p)| if trained(i) { p.require_grad() } else { p }).collect();
            let [shift, scale, gain] = (of.chunks)((of.linear)(told.clone(), m[0].clone(), None));
            let normal = (of.norm)(x.clone(), v[0].clone(), v[1].clone(), 1e-6);
            let varied = (of.modulate)(normal.clone(), scale, shift.clone());
            let [one, other] = [1, 2].map(|i| (of.linear)(varied.clone(), m[i].clone(), None));
            let [one, other] = [of.activations[0](one), of.activations[1](other)];
            let one = (of.linear)(one, m[3].clone(), Some(v[2].clone()));
            let unit = (of.unit_length)(other.clone().reshape([b, t, h, d]), v[3].clone());
            // Each is used once more, and one not at all.
            let _ = (of.modulate)(one.clone(), shift.clone(), gain.clone());
            let y = (of.add)(x.clone(), one, gain) + unit.reshape([b, t, width]) * other;
            let y = (of.linear)(y, m[4].clone(), None) + varied * normal;
            let grads = (y.clone() * y.clone()).sum().backward();
            let mut all = vec![("y", y.inner().reshape([-1]))];
            let all3 = [("dx", &x), ("dtold", &told)];
            all.extend(all3.into_iter().filter_map(|(name, p)| Some((name, p.grad(&grads)?.reshape([-1])))));
            all.extend(m.iter().filter_map(|p| Some(("dmatrix", p.grad(&grads)?.reshape([-1])))));
            all.extend(v.iter().filter_map(|p| Some(("dvector", p.grad(&grads)?))));
            all
        };
        let (found, expected) = (run(&OWN), run(&PORTABLE));
        assert_eq!(found.len(), expected.len());
        for ((name, found), (_, expected)) in found.into_iter().zip(expected) {
            assert_close::<1>(found, expected, 3e-5, &format!("{name}, case {case}"));
        }
    }
}

#[test]
fn pieces_of_a_parameter() {
    let device = Device::flex().autodiff();
    let x = normal(&mut stream(25), [2, 3, 4], &device).require_grad();
    let [a, b] = chunks(x.clone());
    let grads = ((a * 2.0).sum() + (b * 3.0).sum()).backward();
    let expected = [2.0f32, 2.0, 3.0, 3.0].repeat(6);
    assert_eq!(x.grad(&grads).unwrap().into_data().try_to_vec::<f32>().unwrap(), expected);
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
