//! Times each operation against its portable body on the CPU: `cargo run --release --example speed [part of a name]`.
//!
//! The two run alternately; the numbers are medians in milliseconds: forward, and forward with backward.

use burn::tensor::{Device, Distribution, Int, Tensor};
use smalti_kernels::{Conv2dOptions, portable};
use std::time::Instant;

/// A call on inputs of a device; with `true` it also runs the backward pass.
type Call = Box<dyn Fn(bool)>;

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    println!(
        "{:<44} {:>9} {:>9} {:>6}   {:>9} {:>9} {:>6}",
        "ms", "forward", "portable", "x", "+backward", "portable", "x"
    );
    for (name, make) in cases() {
        if !name.contains(&filter) {
            continue;
        }
        let [own, base] = make();
        let [f, fp] = compare(&own, &base, false);
        let [t, tp] = compare(&own, &base, true);
        println!("{name:<44} {f:>9.3} {fp:>9.3} {:>6.2}   {t:>9.3} {tp:>9.3} {:>6.2}", fp / f, tp / t);
    }
}

/// Medians of alternating runs, for about a second.
fn compare(own: &Call, base: &Call, train: bool) -> [f64; 2] {
    let time = |call: &Call| {
        let start = Instant::now();
        call(train);
        start.elapsed().as_secs_f64() * 1e3
    };
    let once = time(own) + time(base);
    let rounds = ((800.0 / once) as usize).clamp(7, 60);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        times[0].push(time(own));
        times[1].push(time(base));
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

type Make = Box<dyn Fn() -> [Call; 2]>;

fn cases() -> Vec<(String, Make)> {
    let mut cases: Vec<(String, Make)> = Vec::new();
    for shape in [[16, 32, 64, 64], [16, 64, 32, 32], [16, 128, 16, 16], [16, 192, 8, 8], [4, 128, 64, 64]] {
        for silu in [false, true] {
            let name = format!("group_norm {shape:?} silu {silu}");
            cases.push((
                name,
                Box::new(move || {
                    [group_norm(smalti_kernels::group_norm, shape, silu), group_norm(portable::group_norm, shape, silu)]
                }),
            ));
        }
    }
    let three = Conv2dOptions::padded(1);
    let one = Conv2dOptions::padded(0);
    let down = one.with_stride(2).with_padding([0, 0, 1, 1]);
    let convolutions = [
        ([16, 3, 64, 64], 32, 3, three),
        ([16, 32, 64, 64], 32, 3, three),
        ([16, 32, 64, 64], 3, 3, three),
        ([16, 32, 64, 64], 32, 3, down),
        ([16, 32, 64, 64], 64, 1, one),
        ([16, 64, 32, 32], 64, 3, three),
        ([16, 64, 16, 16], 64, 3, three.upsampled()),
        ([16, 64, 32, 32], 64, 3, down),
        ([16, 128, 16, 16], 128, 3, three),
        ([16, 128, 16, 16], 128, 1, one),
        ([16, 192, 8, 8], 192, 3, three),
        ([16, 64, 32, 32], 128, 4, three.with_stride(2)),
        ([4, 128, 64, 64], 128, 3, three),
        ([1, 128, 256, 256], 128, 3, three),
        ([1, 256, 64, 64], 256, 3, three),
        ([1, 512, 16, 16], 512, 3, three),
    ];
    for (shape, out, k, options) in convolutions {
        let up = if options.upsample { " upsampled" } else { "" };
        let name = format!("conv2d {shape:?} -> {out}, {k}x{k} stride {}{up}", options.stride);
        cases.push((
            name,
            Box::new(move || {
                [
                    conv2d(smalti_kernels::conv2d, shape, out, k, options),
                    conv2d(portable::conv2d, shape, out, k, options),
                ]
            }),
        ));
    }
    for shape in [[8, 256, 512], [16, 64, 256]] {
        let name = format!("layer_norm {shape:?}");
        cases.push((
            name,
            Box::new(move || [layer_norm(smalti_kernels::layer_norm, shape), layer_norm(portable::layer_norm, shape)]),
        ));
    }
    for shape in [[2048, 1024], [1024, 8192]] {
        let name = format!("softmax_cross_entropy {shape:?}");
        cases.push((
            name,
            Box::new(move || {
                [
                    cross_entropy(smalti_kernels::softmax_cross_entropy, shape),
                    cross_entropy(portable::softmax_cross_entropy, shape),
                ]
            }),
        ));
    }
    for (n, k, c) in [(2048, 8192, 512), (4096, 1024, 8), (1024, 1024, 64)] {
        let name = format!("nearest_code {n} x {k} x {c}");
        cases.push((
            name,
            Box::new(move || {
                [nearest_code(smalti_kernels::nearest_code, n, k, c), nearest_code(portable::nearest_code, n, k, c)]
            }),
        ));
    }
    for shape in [[8, 8, 256, 64], [4, 8, 1024, 64]] {
        let name = format!("attention {shape:?} causal");
        cases.push((
            name,
            Box::new(move || [attention(smalti_kernels::attention, shape), attention(portable::attention, shape)]),
        ));
    }
    cases
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// With a gradient wanted, or not.
fn input<const D: usize>(tensor: &Tensor<D>, train: bool) -> Tensor<D> {
    if train { tensor.clone().autodiff().require_grad() } else { tensor.clone() }
}

fn group_norm(
    operation: fn(Tensor<4>, Tensor<1>, Tensor<1>, usize, f64, bool) -> Tensor<4>,
    shape: [usize; 4],
    silu: bool,
) -> Call {
    let (x, gamma, beta) = (random(shape), random([shape[1]]), random([shape[1]]));
    Box::new(move |train| {
        let y = operation(input(&x, train), input(&gamma, train), input(&beta, train), 32, 1e-6, silu);
        if train {
            y.backward();
        }
    })
}

fn conv2d(
    operation: fn(Tensor<4>, Tensor<4>, Option<Tensor<1>>, Conv2dOptions) -> Tensor<4>,
    shape: [usize; 4],
    out: usize,
    k: usize,
    options: Conv2dOptions,
) -> Call {
    let (x, weight, bias) = (random(shape), random([out, shape[1], k, k]), random([out]));
    Box::new(move |train| {
        let y = operation(input(&x, train), input(&weight, train), Some(input(&bias, train)), options);
        if train {
            y.backward();
        }
    })
}

fn layer_norm(operation: fn(Tensor<3>, Tensor<1>, Tensor<1>, f64) -> Tensor<3>, shape: [usize; 3]) -> Call {
    let (x, gamma, beta) = (random(shape), random([shape[2]]), random([shape[2]]));
    Box::new(move |train| {
        let y = operation(input(&x, train), input(&gamma, train), input(&beta, train), 1e-6);
        if train {
            y.backward();
        }
    })
}

fn cross_entropy(
    operation: fn(Tensor<2>, Tensor<1, Int>, Option<Tensor<1>>, f32) -> Tensor<1>,
    [n, k]: [usize; 2],
) -> Call {
    let logits = random([n, k]);
    let targets = Tensor::arange(0..n as i64, &Device::flex()) % (k as i32);
    Box::new(move |train| {
        let y = operation(input(&logits, train), targets.clone(), None, 0.1);
        if train {
            y.backward();
        }
    })
}

fn nearest_code(operation: fn(Tensor<2>, Tensor<2>) -> Tensor<1, Int>, n: usize, k: usize, c: usize) -> Call {
    let (latents, codebook) = (random([n, c]), random([k, c]));
    Box::new(move |_| {
        operation(latents.clone(), codebook.clone());
    })
}

fn attention(
    operation: fn(Tensor<4>, Tensor<4>, Tensor<4>, bool, Option<Tensor<4, burn::tensor::Bool>>) -> Tensor<4>,
    shape: [usize; 4],
) -> Call {
    let (q, k, v) = (random(shape), random(shape), random(shape));
    Box::new(move |train| {
        let y = operation(input(&q, train), input(&k, train), input(&v, train), true, None);
        if train {
            y.backward();
        }
    })
}
