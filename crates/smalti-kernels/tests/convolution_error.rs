//! The errors of both algorithms of convolution; in a process of its own, since the algorithm is set for all of it.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::Device;
use inputs::{normal, stream};
use smalti_base::rng::Stream;
use smalti_kernels::{Conv2dOptions, Convolution, conv2d, set_convolution};

/// Root mean square and largest of the errors against a sum in `f64`, relative to the largest result.
fn errors(s: &mut Stream, channels: usize, side: usize) -> [f64; 2] {
    let (device, out) = (Device::flex(), 8);
    let (x, w) = (normal(s, [1, channels, side + 2, side + 2], &device), normal(s, [out, channels, 3, 3], &device));
    let values = conv2d(x.clone(), w.clone(), None, Conv2dOptions::padded(0)).into_data().try_to_vec::<f32>().unwrap();
    let (x, w) = (x.into_data().try_to_vec::<f32>().unwrap(), w.into_data().try_to_vec::<f32>().unwrap());
    let (mut squares, mut worst, mut largest) = (0.0, 0.0f64, 0.0f64);
    for (i, &found) in values.iter().enumerate() {
        let (o, y, column) = (i / (side * side), i / side % side, i % side);
        let taps = (0..channels).flat_map(|c| (0..9).map(move |t| (c, t)));
        let term = |(c, t): (usize, usize)| {
            let from = (c * (side + 2) + y + t / 3) * (side + 2) + column + t % 3;
            f64::from(x[from]) * f64::from(w[(o * channels + c) * 9 + t])
        };
        let expected: f64 = taps.map(term).sum();
        let error = (f64::from(found) - expected).abs();
        squares += error * error;
        worst = worst.max(error);
        largest = largest.max(expected.abs());
    }
    [(squares / values.len() as f64).sqrt() / largest, worst / largest]
}

/// The bounds that the documentation of `Convolution` states.
#[test]
fn both_algorithms_are_as_close_to_f64_as_documented() {
    let mut s = stream(5);
    for (channels, side) in [(64, 32), (128, 32), (256, 24), (512, 16)] {
        for (algorithm, most) in [(Convolution::Fast, [1e-6, 1.2e-5]), (Convolution::Direct, [1e-7, 1e-6])] {
            set_convolution(algorithm);
            let found = errors(&mut s, channels, side);
            set_convolution(Convolution::Fast);
            println!("{algorithm:?}, {channels} channels: rms {:.2e}, largest {:.2e}", found[0], found[1]);
            assert!(found[0] < most[0] && found[1] < most[1], "{algorithm:?}, {channels} channels: {found:?}");
        }
    }
}
