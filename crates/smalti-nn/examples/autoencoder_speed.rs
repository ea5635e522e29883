//! Times VQGAN's f16 encoder and decoder at 256 pixels with random weights on the CPU:
//! `cargo run --release -p smalti-nn --example autoencoder_speed [batch sizes]`.
//!
//! Medians of 5 in milliseconds, and the multiplications and additions of direct convolutions per second.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Tensor};
use smalti_kernels::Conv2dOptions;
use smalti_nn::{ConvAutoencoderConfig, Shortcut};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: smalti_kernels::Keeping = smalti_kernels::Keeping::new();

fn main() {
    let batches: Vec<usize> = std::env::args().skip(1).filter_map(|batch| batch.parse().ok()).collect();
    let batches = if batches.is_empty() { vec![1, 4] } else { batches };
    let device = Device::flex();
    let config = ConvAutoencoderConfig {
        image_size: 256,
        in_channels: 3,
        out_channels: 3,
        ch: 128,
        ch_mult: vec![1, 1, 2, 2, 4],
        num_res_blocks: 2,
        attn_resolutions: vec![16],
        mid_attention: true,
        dropout: 0.0,
        z_channels: 256,
        norm_groups: 32,
        norm_epsilon: 1e-6,
        resamp_with_conv: true,
        shortcut: Shortcut::Pointwise,
    };
    let (encoder, decoder) = (config.encoder(&device), config.decoder(&device));
    for batch in batches {
        let images = random([batch, 3, 256, 256], &device);
        let latents = random([batch, 256, 16, 16], &device);
        let [encode, decode] =
            [median(5, || drop(encoder.forward(images.clone()))), median(5, || drop(decoder.forward(latents.clone())))];
        // Convolutions of one image, counted by hand from the layers' shapes.
        let [encoding, decoding] = [operations(&encoder_layers()), operations(&decoder_layers())];
        for (name, time, count) in [("encode", encode, encoding), ("decode", decode, decoding)] {
            println!("{name} batch {batch}: {time:.1} ms, {:.0} GFLOP/s", batch as f64 * count / time / 1e6);
        }
        share("encoder", batch, &encoder_layers(), encode, &device);
        share("decoder", batch, &decoder_layers(), decode, &device);
    }
    let train = median(3, || step(&encoder, &decoder, &device));
    println!("forward and backward of both, batch 1: {train:.1} ms");
    println!("peak memory: {} MiB", peak().unwrap_or_default() / 1024);
}

/// Inputs, outputs, side of the result, kernel, stride, and how many there are.
type Layer = ([usize; 5], usize);

fn operations(layers: &[Layer]) -> f64 {
    layers.iter().map(|&([i, o, side, k, _], n)| (2 * i * o * side * side * k * k * n) as f64).sum()
}

fn encoder_layers() -> Vec<Layer> {
    let mut layers = vec![([3, 128, 256, 3, 1], 1)];
    layers.extend([([128, 128, 256, 3, 1], 4), ([128, 128, 128, 3, 2], 1)]);
    layers.extend([([128, 128, 128, 3, 1], 4), ([128, 128, 64, 3, 2], 1)]);
    layers.extend([([128, 256, 64, 3, 1], 1), ([128, 256, 64, 1, 1], 1), ([256, 256, 64, 3, 1], 3)]);
    layers.extend([([256, 256, 32, 3, 2], 1), ([256, 256, 32, 3, 1], 4), ([256, 256, 16, 3, 2], 1)]);
    layers.extend([([256, 512, 16, 3, 1], 1), ([256, 512, 16, 1, 1], 1), ([512, 512, 16, 3, 1], 7)]);
    layers.extend([([512, 512, 16, 1, 1], 12), ([512, 256, 16, 3, 1], 1)]);
    layers
}

fn decoder_layers() -> Vec<Layer> {
    let mut layers = vec![([256, 512, 16, 3, 1], 1), ([512, 512, 16, 3, 1], 10), ([512, 512, 16, 1, 1], 16)];
    layers.extend([([512, 512, 32, 3, 1], 1), ([512, 256, 32, 3, 1], 1), ([512, 256, 32, 1, 1], 1)]);
    layers.extend([([256, 256, 32, 3, 1], 5), ([256, 256, 64, 3, 1], 7), ([256, 128, 128, 3, 1], 1)]);
    layers.extend([([256, 256, 128, 3, 1], 1), ([256, 128, 128, 1, 1], 1), ([128, 128, 128, 3, 1], 5)]);
    layers.extend([([128, 128, 256, 3, 1], 7), ([128, 3, 256, 3, 1], 1)]);
    layers
}

/// Prints what the kinds of convolutions take alone, and what is left for all else.
fn share(name: &str, batch: usize, layers: &[Layer], total: f64, device: &Device) {
    let mut left = total;
    for (kind, kernel, stride) in [("3x3", 3, 1), ("3x3 halving", 3, 2), ("1x1", 1, 1)] {
        let of_kind = layers.iter().filter(|&&([_, _, _, k, s], _)| (k, s) == (kernel, stride));
        let time: f64 = of_kind.map(|&(layer, n)| n as f64 * alone(batch, layer, device)).sum();
        left -= time;
        println!("  {name}: {kind} convolutions {time:.1} ms, {:.0} %", 100.0 * time / total);
    }
    println!("  {name}: the rest {left:.1} ms, {:.0} %", 100.0 * left / total);
}

fn alone(batch: usize, [inputs, outputs, side, k, stride]: [usize; 5], device: &Device) -> f64 {
    let options = Conv2dOptions::padded(k / 2).with_stride(stride);
    let options = if stride == 2 { options.with_padding([0, 0, 1, 1]) } else { options };
    let x = random([batch, inputs, side * stride, side * stride], device);
    let (weight, bias) = (random([outputs, inputs, k, k], device), Tensor::zeros([outputs], device));
    median(3, || drop(smalti_kernels::conv2d(x.clone(), weight.clone(), Some(bias.clone()), options)))
}

/// Forward and backward passes of both, with all gradients.
fn step(encoder: &smalti_nn::ConvEncoder, decoder: &smalti_nn::ConvDecoder, device: &Device) {
    let (encoder, decoder) = (encoder.clone().train(), decoder.clone().train());
    let images = random([1, 3, 256, 256], device).autodiff();
    let loss = (decoder.forward(encoder.forward(images.clone())) - images).square().mean();
    let gradients = loss.backward();
    let mut count = Count { gradients: &gradients, found: 0 };
    encoder.visit(&mut count);
    decoder.visit(&mut count);
    assert!(count.found > 0, "no gradients");
}

/// Counts the parameters that have a gradient.
struct Count<'a> {
    gradients: &'a burn::tensor::Gradients,
    found: usize,
}

impl ModuleVisitor for Count<'_> {
    fn visit_float<const D: usize>(&mut self, parameter: &Param<Tensor<D>>) {
        self.found += usize::from(parameter.val().grad(self.gradients).is_some());
    }
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// Median in milliseconds, after one run that does not count.
fn median(runs: usize, work: impl Fn()) -> f64 {
    work();
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// The largest resident memory of this process in KiB, where the system tells.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
