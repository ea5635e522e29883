//! Convolution against its portable body and against a sum in `f64`.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor};
use inputs::{assert_close, normal, stream, strided};
use smalti_base::rng::Stream;
use smalti_kernels::{Conv2dOptions, conv2d, portable};

type Operation = fn(Tensor<4>, Tensor<4>, Option<Tensor<1>>, Conv2dOptions) -> Tensor<4>;

/// The result, and the gradients of x, weight and bias for an upstream gradient drawn from `seed`.
fn run(
    f: Operation,
    x: &Tensor<4>,
    w: &Tensor<4>,
    b: &Option<Tensor<1>>,
    o: Conv2dOptions,
    seed: u64,
) -> Vec<Tensor<4>> {
    let (x, w, b) = (x.clone().require_grad(), w.clone().require_grad(), b.clone().map(Tensor::require_grad));
    let y = f(x.clone(), w.clone(), b.clone(), o);
    let up = strided(&mut stream(seed), y.dims(), &y.device());
    let grads = (y.clone() * up).sum().backward();
    let mut found = vec![y, x.grad(&grads).unwrap(), w.grad(&grads).unwrap()];
    found.extend(b.map(|b| b.grad(&grads).unwrap().reshape([-1, 1, 1, 1])));
    found
}

fn compare(s: &mut Stream, [b, c, h, w]: [usize; 4], out: usize, kernel: [usize; 2], o: Conv2dOptions, seed: u64) {
    let device = Device::flex().autodiff();
    let x = strided(s, [b, c, h, w], &device);
    let scale = 1.0 / ((c * kernel[0] * kernel[1]) as f32).sqrt();
    let weight = strided(s, [out, c, kernel[0], kernel[1]], &device) * scale;
    let bias = (s.below(2) == 0).then(|| normal(s, [out], &device));
    let found = run(conv2d, &x, &weight, &bias, o, seed);
    let expected = run(portable::conv2d, &x, &weight, &bias, o, seed);
    for ((found, expected), name) in found.into_iter().zip(expected).zip(["y", "dx", "dweight", "dbias"]) {
        assert_close(found, expected, 3e-5, &format!("{name}: {:?} -> {out}, {kernel:?}, {o:?}", [b, c, h, w]));
    }
}

fn padding(s: &mut Stream, most: usize) -> [usize; 4] {
    std::array::from_fn(|_| s.below(most + 1))
}

#[test]
fn three_by_three_equals_the_portable_body() {
    let mut s = stream(1);
    for case in 0..60 {
        let shape = [1 + s.below(4), 1 + s.below(40), 1 + s.below(30), 1 + s.below(30)];
        let upsample = s.below(3) == 0 && shape[1] < 20;
        let options = Conv2dOptions { stride: 1, padding: [1; 4], upsample };
        let options = if case % 3 == 0 { options } else { options.with_padding(padding(&mut s, 4)) };
        let [h, w] = [shape[2], shape[3]].map(|n| if upsample { 2 * n } else { n });
        let [top, left, bottom, right] = options.padding;
        if h + top + bottom >= 3 && w + left + right >= 3 {
            let out = 1 + s.below(40);
            compare(&mut s, shape, out, [3, 3], options, case);
        }
    }
}

#[test]
fn wide_images_equal_the_portable_body() {
    let mut s = stream(2);
    for (case, width) in [64, 65, 63, 130, 128, 66, 32, 16].into_iter().enumerate() {
        let shape = [1 + case % 2, 8 + s.below(9), 5 + s.below(8), width];
        let out = 8 + s.below(9);
        compare(&mut s, shape, out, [3, 3], Conv2dOptions::padded(1), case as u64);
        compare(&mut s, shape, out, [3, 3], Conv2dOptions::padded(1).upsampled(), case as u64);
    }
}

#[test]
fn other_kernels_and_strides_equal_the_portable_body() {
    let mut s = stream(3);
    for case in 0..80 {
        let kernel = [1 + s.below(5), 1 + s.below(5)];
        let shape = [1 + s.below(4), 1 + s.below(20), 5 + s.below(30), 5 + s.below(30)];
        let stride = 1 + s.below(3);
        let options = Conv2dOptions { stride, padding: padding(&mut s, 2), upsample: s.below(4) == 0 };
        let out = 1 + s.below(20);
        compare(&mut s, shape, out, kernel, options, case);
    }
}

#[test]
fn the_shapes_of_encoders_equal_the_portable_body() {
    let mut s = stream(4);
    let down = Conv2dOptions::padded(0).with_stride(2).with_padding([0, 0, 1, 1]);
    compare(&mut s, [2, 64, 32, 32], 64, [3, 3], Conv2dOptions::padded(1), 1);
    compare(&mut s, [8, 96, 8, 8], 128, [3, 3], Conv2dOptions::padded(1), 2);
    compare(&mut s, [2, 64, 32, 32], 64, [3, 3], down, 3);
    compare(&mut s, [3, 48, 16, 16], 96, [1, 1], Conv2dOptions::padded(0), 4);
    compare(&mut s, [2, 16, 32, 32], 32, [4, 4], Conv2dOptions::padded(1).with_stride(2), 5);
    compare(&mut s, [2, 3, 64, 64], 32, [3, 3], Conv2dOptions::padded(1), 6);
    compare(&mut s, [2, 32, 64, 64], 3, [3, 3], Conv2dOptions::padded(1), 7);
}

#[test]
fn winograd_is_close_to_the_sum_in_f64() {
    let mut s = stream(5);
    let device = Device::flex();
    let (x, w) = (normal(&mut s, [1, 64, 20, 20], &device), normal(&mut s, [32, 64, 3, 3], &device));
    let values = conv2d(x.clone(), w.clone(), None, Conv2dOptions::padded(0)).into_data().try_to_vec::<f32>().unwrap();
    let (x, w) = (x.into_data().try_to_vec::<f32>().unwrap(), w.into_data().try_to_vec::<f32>().unwrap());
    // Squares of the errors and of the values, and the largest error.
    let (mut errors, mut squares, mut worst) = (0.0, 0.0, 0.0f64);
    for o in 0..32 {
        for (p, row) in (0..18).flat_map(|y| (0..18).map(move |x| (y, x))).enumerate() {
            let taps = (0..64).flat_map(|c| (0..9).map(move |t| (c, t)));
            let term = |(c, t): (usize, usize)| {
                let from = (c * 20 + row.0 + t / 3) * 20 + row.1 + t % 3;
                f64::from(x[from]) * f64::from(w[(o * 64 + c) * 9 + t])
            };
            let expected: f64 = taps.map(term).sum();
            let found = f64::from(values[o * 324 + p]);
            errors += (found - expected).powi(2);
            squares += expected.powi(2);
            worst = worst.max((found - expected).abs());
        }
    }
    let (relative, worst) = ((errors / squares).sqrt(), worst / (squares / (32.0 * 324.0)).sqrt());
    println!("relative error {relative:.2e}, the worst {worst:.2e} of the root mean square");
    assert!(relative < 4e-6 && worst < 4e-5, "relative error {relative:e}, the worst {worst:e}");
}

#[test]
fn the_same_call_gives_the_same_bits() {
    let mut s = stream(6);
    let device = Device::flex().autodiff();
    let (x, w) = (normal(&mut s, [4, 24, 24, 24], &device), normal(&mut s, [24, 24, 3, 3], &device));
    let once = || run(conv2d, &x, &w, &None, Conv2dOptions::padded(1), 9).map_data();
    assert!(once() == once());
}

trait MapData {
    fn map_data(self) -> Vec<Vec<f32>>;
}

impl MapData for Vec<Tensor<4>> {
    fn map_data(self) -> Vec<Vec<f32>> {
        self.into_iter().map(|t| t.inner().into_data().try_to_vec::<f32>().unwrap()).collect()
    }
}
