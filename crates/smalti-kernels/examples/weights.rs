//! Times the matrix products of a decoding step against the bandwidth of the memory:
//! `cargo run --release -p smalti-kernels --example weights [width] [depth] [outside]`, by default 768 and 12.
//!
//! The calls come from a task of the thread pool, as in decoding, or with `outside` from a thread that must wake it.
//! Each row is one pass through all layers with so many sequences; the runs alternate, and the smallest time of each counts.

use burn::tensor::{Device, Distribution, Tensor, module};
use rayon::prelude::*;
use smalti_kernels::{PackedMatrix, WeightPrecision, on_pool, packed_linear, packed_linears};
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 15;

fn main() {
    let number = |place| std::env::args().nth(place).and_then(|text| text.parse().ok());
    let (width, depth) = (number(1).unwrap_or(768), number(2).unwrap_or(12));
    let layers: Vec<Vec<Tensor<2>>> = (0..depth).map(|_| layer(width)).collect();
    let packed = WeightPrecision::ALL.map(|precision| {
        let pack = |weight: &Tensor<2>| PackedMatrix::from_tensor(weight.clone(), precision);
        layers.iter().map(|layer| layer.iter().map(pack).collect()).collect::<Vec<Vec<_>>>()
    });
    let memory = vec![1u64; 32 << 20];
    let work = || table(width, &layers, &packed, &memory);
    match std::env::args().any(|arg| arg == "outside") {
        true => work(),
        false => on_pool(&Device::flex(), work),
    }
}

fn table(width: usize, layers: &[Vec<Tensor<2>>], packed: &[Vec<Vec<PackedMatrix>>], memory: &[u64]) {
    let megabytes =
        |layers: &Vec<Vec<PackedMatrix>>| layers.iter().flatten().map(PackedMatrix::bytes).sum::<usize>() as f64 / 1e6;
    println!("{:>9} {:>10} {:>9} {:>9} {:>8}", "sequences", "weights", "ms", "GB/s", "of read");
    for n in [1, 2, 4, 8, 16, 64, 256] {
        let x = Tensor::<2>::random([n, width], Distribution::Normal(0.0, 1.0), &Device::flex());
        let mut calls: Vec<Box<dyn Fn()>> = vec![
            Box::new(|| {
                black_box(read(memory));
            }),
            Box::new(|| {
                black_box(plain(&x, layers));
            }),
        ];
        for layers in packed {
            calls.push(Box::new(|| {
                black_box(pass(&x, layers));
            }));
        }
        let mut best = vec![f64::INFINITY; calls.len()];
        for _ in 0..if n > 16 { ROUNDS / 5 } else { ROUNDS } {
            for (best, call) in best.iter_mut().zip(&calls) {
                let start = Instant::now();
                call();
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
        let limit = size_of_val(memory) as f64 / 1e9 / best[0];
        let row = |name: &str, megabytes: f64, seconds: f64| {
            let speed = megabytes / 1e3 / seconds;
            println!("{n:>9} {name:>10} {:>9.2} {speed:>9.1} {:>7.0}%", 1e3 * seconds, 100.0 * speed / limit);
        };
        row("(read)", size_of_val(memory) as f64 / 1e6, best[0]);
        row("burn f32", megabytes(&packed[0]), best[1]);
        for ((layers, precision), best) in packed.iter().zip(WeightPrecision::ALL).zip(&best[2..]) {
            row(precision.name(), megabytes(layers), *best);
        }
    }
}

/// The matrices of a block: queries, keys, values, output, and the two of the MLP.
fn layer(width: usize) -> Vec<Tensor<2>> {
    let shapes = [[width, width]; 4].into_iter().chain([[width, 4 * width], [4 * width, width]]);
    shapes.map(|shape| Tensor::random(shape, Distribution::Normal(0.0, 0.02), &Device::flex())).collect()
}

fn plain(x: &Tensor<2>, layers: &[Vec<Tensor<2>>]) -> Tensor<2> {
    layers.iter().fold(x.clone(), |x, layer| {
        let linear = |x: Tensor<2>, i: usize| module::linear(x, layer[i].clone(), None);
        let [_, _, v] = [0, 1, 2].map(|i| linear(x.clone(), i));
        linear(linear(linear(v, 3), 4), 5)
    })
}

fn pass(x: &Tensor<2>, layers: &[Vec<PackedMatrix>]) -> Tensor<2> {
    layers.iter().fold(x.clone(), |x, layer| {
        let [_, _, v] = packed_linears(x, [(&layer[0], None), (&layer[1], None), (&layer[2], None)]);
        let linear = |x: Tensor<2>, i: usize| packed_linear(x, &layer[i], None);
        linear(linear(linear(v, 3), 4), 5)
    })
}

/// Reads memory by all threads, as fast as it comes.
fn read(memory: &[u64]) -> u64 {
    let sum = |part: &[u64]| {
        let mut lanes = [0u64; 32];
        for chunk in part.as_chunks::<32>().0 {
            lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane = lane.wrapping_add(*value));
        }
        lanes.iter().fold(0, |sum, lane| sum ^ lane)
    };
    memory.par_chunks(1 << 18).map(sum).reduce(|| 0, |a, b| a ^ b)
}
