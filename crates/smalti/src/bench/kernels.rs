//! Each own operation against its portable body, at shapes of published models.

use super::clock::Clock;
use super::machine::Machine;
use burn::tensor::{Device, Distribution, Int, Tensor};
use serde::Serialize;
use smalti_base::{Error, Result};
use smalti_kernels::{AdamW, AdamWState, Conv2dOptions, portable};

/// A kernel's numbers. Times are medians in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Operation and shapes.
    pub name: String,
    /// Forward.
    pub forward_ms: f64,
    /// The portable body's forward.
    pub portable_forward_ms: f64,
    /// Forward and backward, where there is one.
    pub backward_ms: Option<f64>,
    /// The portable body's forward and backward.
    pub portable_backward_ms: Option<f64>,
    /// Operations of a direct computation, 10^9 a second in the forward pass; above the machine's peak where an algorithm needs
    /// fewer.
    pub gflops: f64,
    /// That as a share of the machine's matrix products.
    pub of_peak: f64,
}

/// A call; with `true` it also runs the backward pass.
type Call = Box<dyn Fn(bool)>;
/// Makes the own and the portable call on a device.
type Make = Box<dyn Fn(&Device) -> [Call; 2]>;

/// A row before it is made: name, operations of the forward pass, whether it has a backward pass, own and portable body.
struct Case {
    name: String,
    operations: usize,
    backward: bool,
    calls: Make,
}

/// Names of all rows.
pub(super) fn names() -> Vec<String> {
    cases().into_iter().map(|case| case.name).collect()
}

/// Times the row of this name.
pub(super) fn measure(name: &str, machine: &Machine, clock: &Clock, device: &Device) -> Result<KernelRow> {
    let case = cases().into_iter().find(|case| case.name == name);
    let Some(case) = case else { return Err(Error::unknown("bench", "kernel", name, names())) };
    let [own, base] = (case.calls)(device);
    let [forward_ms, portable_forward_ms] = clock.alternate([&|| own(false), &|| base(false)])?;
    let both = case.backward.then(|| clock.alternate([&|| own(true), &|| base(true)])).transpose()?;
    let gflops = case.operations as f64 / forward_ms / 1e6;
    Ok(KernelRow {
        name: case.name,
        forward_ms,
        portable_forward_ms,
        backward_ms: both.map(|[own, _]| own),
        portable_backward_ms: both.map(|[_, base]| base),
        gflops,
        of_peak: gflops / machine.gemm_gflops,
    })
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let three = Conv2dOptions::padded(1);
    let one = Conv2dOptions::padded(0);
    let down = one.with_stride(2).with_padding([0, 0, 1, 1]);
    for (shape, out, k, options) in [
        ([1, 3, 256, 256], 128, 3, three),
        ([1, 128, 256, 256], 128, 3, three),
        ([1, 128, 256, 256], 128, 3, down),
        ([1, 128, 256, 256], 3, 3, three),
        ([1, 256, 64, 64], 256, 3, three),
        ([1, 512, 16, 16], 512, 3, three),
        ([1, 512, 16, 16], 512, 1, one),
        ([1, 512, 16, 16], 512, 3, three.upsampled()),
        ([4, 128, 64, 64], 128, 3, three),
        ([4, 128, 64, 64], 256, 1, one),
        ([16, 32, 64, 64], 32, 3, three),
        ([16, 128, 16, 16], 128, 3, three),
        ([16, 192, 8, 8], 192, 3, three),
        ([16, 64, 32, 32], 128, 4, three.with_stride(2)),
    ] {
        cases.push(conv2d(shape, out, k, options));
    }
    for shape in [[1, 128, 256, 256], [1, 512, 16, 16], [4, 128, 64, 64], [16, 192, 8, 8]] {
        cases.push(group_norm(shape));
    }
    cases.extend([layer_norm([8, 256, 512]), layer_norm([16, 75, 256])]);
    cases.extend([linear([8, 256, 512], 2048), linear([16, 75, 256], 1024), linear([1, 1, 768], 3072)]);
    cases.extend([gelu([8, 256, 2048]), gelu([16, 75, 1024])]);
    cases.extend([attention([8, 8, 256, 64]), attention([4, 8, 1024, 64]), attention([16, 4, 75, 64])]);
    cases.extend([cross_entropy([2048, 1024]), cross_entropy([1024, 8192])]);
    cases.extend([nearest_code(2048, 8192, 512), nearest_code(4096, 1024, 8), nearest_code(1024, 1024, 64)]);
    cases.push(adamw(1 << 22));
    cases
}

fn case(name: String, operations: usize, calls: impl Fn(&Device) -> [Call; 2] + 'static) -> Case {
    Case { name, operations, backward: true, calls: Box::new(calls) }
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// With a gradient wanted, or not.
fn input<const D: usize>(tensor: &Tensor<D>, train: bool) -> Tensor<D> {
    if train { tensor.clone().autodiff().require_grad() } else { tensor.clone() }
}

/// Runs the backward pass if it is wanted.
fn finish<const D: usize>(y: Tensor<D>, train: bool) {
    if train {
        y.backward();
    }
}

type Convolve = fn(Tensor<4>, Tensor<4>, Option<Tensor<1>>, Conv2dOptions) -> Tensor<4>;

fn conv2d(shape: [usize; 4], out: usize, k: usize, options: Conv2dOptions) -> Case {
    let [b, c, h, w] = shape;
    let up = if options.upsample { ", upsampled" } else { "" };
    let enlarged = if options.upsample { 4 } else { 1 };
    let operations = 2 * b * c * h * w * enlarged * out * k * k / (options.stride * options.stride);
    case(format!("conv2d {shape:?} to {out}, {k}x{k} stride {}{up}", options.stride), operations, move |device| {
        let (x, weight, bias) = (random(shape, device), random([out, shape[1], k, k], device), random([out], device));
        let call = |f: Convolve| -> Call {
            let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
            Box::new(move |train| {
                let (x, weight, bias) = (input(&x, train), input(&weight, train), input(&bias, train));
                finish(f(x, weight, Some(bias), options), train);
            })
        };
        [call(smalti_kernels::conv2d), call(portable::conv2d)]
    })
}

type Normalize = fn(Tensor<4>, Tensor<1>, Tensor<1>, usize, f64, bool) -> Tensor<4>;

fn group_norm(shape: [usize; 4]) -> Case {
    case(format!("group_norm {shape:?} with silu"), 0, move |device| {
        let (x, gamma, beta) = (random(shape, device), random([shape[1]], device), random([shape[1]], device));
        let call = |f: Normalize| -> Call {
            let (x, gamma, beta) = (x.clone(), gamma.clone(), beta.clone());
            Box::new(move |train| {
                let (x, gamma, beta) = (input(&x, train), input(&gamma, train), input(&beta, train));
                finish(f(x, gamma, beta, 32, 1e-6, true), train);
            })
        };
        [call(smalti_kernels::group_norm), call(portable::group_norm)]
    })
}

type NormalizeRows = fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>;

fn layer_norm(shape: [usize; 3]) -> Case {
    case(format!("layer_norm {shape:?}"), 0, move |device| {
        let (x, gamma, beta) = (random(shape, device), random([shape[2]], device), random([shape[2]], device));
        let call = |f: NormalizeRows| -> Call {
            let (x, gamma, beta) = (x.clone(), gamma.clone(), beta.clone());
            Box::new(move |train| finish(f(input(&x, train), input(&gamma, train), input(&beta, train), 1e-5), train))
        };
        [call(smalti_kernels::layer_norm), call(portable::layer_norm)]
    })
}

type Map = fn(Tensor<3>, Tensor<2>, Option<Tensor<1>>) -> Tensor<3>;

fn linear(shape: [usize; 3], out: usize) -> Case {
    let operations = 2 * shape.iter().product::<usize>() * out;
    case(format!("linear {shape:?} to {out}"), operations, move |device| {
        let (x, weight, bias) = (random(shape, device), random([shape[2], out], device), random([out], device));
        let call = |f: Map| -> Call {
            let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
            Box::new(move |train| finish(f(input(&x, train), input(&weight, train), Some(input(&bias, train))), train))
        };
        [call(smalti_kernels::linear), call(portable::linear)]
    })
}

fn gelu(shape: [usize; 3]) -> Case {
    case(format!("gelu {shape:?}"), 0, move |device| {
        let x = random(shape, device);
        let call = |f: fn(Tensor<3>, bool) -> Tensor<3>| -> Call {
            let x = x.clone();
            Box::new(move |train| finish(f(input(&x, train), false), train))
        };
        [call(smalti_kernels::gelu), call(portable::gelu)]
    })
}

type Attend = fn(Tensor<4>, Tensor<4>, Tensor<4>, bool, Option<Tensor<4, burn::tensor::Bool>>) -> Tensor<4>;

fn attention(shape: [usize; 4]) -> Case {
    let [b, h, t, d] = shape;
    // The causal half of two products.
    case(format!("attention {shape:?} causal"), 2 * b * h * t * t * d, move |device| {
        let [q, k, v] = [(); 3].map(|()| random([b, t, h, d], device).swap_dims(1, 2));
        let call = |f: Attend| -> Call {
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            Box::new(move |train| finish(f(input(&q, train), input(&k, train), input(&v, train), true, None), train))
        };
        [call(smalti_kernels::attention), call(portable::attention)]
    })
}

type Judge = fn(Tensor<2>, Tensor<1, Int>, Option<Tensor<1>>, f32) -> Tensor<1>;

fn cross_entropy([n, k]: [usize; 2]) -> Case {
    case(format!("softmax_cross_entropy [{n}, {k}]"), 0, move |device| {
        let logits = random([n, k], device);
        let targets = Tensor::arange(0..n as i64, device) % (k as i32);
        let call = |f: Judge| -> Call {
            let (logits, targets) = (logits.clone(), targets.clone());
            Box::new(move |train| finish(f(input(&logits, train), targets.clone(), None, 0.1), train))
        };
        [call(smalti_kernels::softmax_cross_entropy), call(portable::softmax_cross_entropy)]
    })
}

fn nearest_code(n: usize, k: usize, c: usize) -> Case {
    let case = case(format!("nearest_code {n} latents, {k} codes, {c} channels"), 2 * n * k * c, move |device| {
        let (latents, codebook) = (random([n, c], device), random([k, c], device));
        let call = |f: fn(Tensor<2>, Tensor<2>) -> Tensor<1, Int>| -> Call {
            let (latents, codebook) = (latents.clone(), codebook.clone());
            Box::new(move |_| drop(f(latents.clone(), codebook.clone())))
        };
        [call(smalti_kernels::nearest_code), call(portable::nearest_code)]
    });
    Case { backward: false, ..case }
}

/// The state is moved in and out, so that the update works in place.
fn adamw(n: usize) -> Case {
    let step = AdamW {
        gradient_factor: 0.5,
        rate: 1e-4,
        betas: (0.9, 0.95),
        corrections: (0.1, 0.05),
        epsilon: 1e-8,
        weight_decay: 0.01,
        average_decay: Some(0.999),
    };
    let case = case(format!("adamw with average [{n}]"), 0, move |device| {
        let gradient = random([n], device);
        let call = |f: fn(&AdamW, AdamWState, Tensor<1>) -> AdamWState| -> Call {
            let [value, first, second, average] = [(); 4].map(|()| random([n], device).abs());
            let state = std::cell::RefCell::new(Some(AdamWState { value, first, second, average: Some(average) }));
            let gradient = gradient.clone();
            Box::new(move |_| {
                let old = state.borrow_mut().take();
                *state.borrow_mut() = old.map(|old| f(&step, old, gradient.clone()));
            })
        };
        [call(AdamW::step), call(AdamW::portable)]
    });
    Case { backward: false, ..case }
}
