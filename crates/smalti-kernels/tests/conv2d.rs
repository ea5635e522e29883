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
fn small_shapes_of_all_kinds_equal_the_portable_body() {
    let mut s = stream(8);
    for case in 0..200 {
        let k = [1, 1, 3, 3, 3, 4, 5][s.below(7)];
        let kernel = [k, if s.below(8) == 0 { 1 + s.below(4) } else { k }];
        let shape = [s.below(6), 1 + s.below(18), 5 + s.below(16), 5 + s.below(16)];
        let options = Conv2dOptions { stride: 1 + s.below(3), padding: padding(&mut s, 3), upsample: s.below(4) == 0 };
        let out = 1 + s.below(26);
        if shape[0] > 0 {
            compare(&mut s, shape, out, kernel, options, case);
        }
    }
}

/// The tests of this binary again, by the other instruction sets.
#[test]
fn narrower_instruction_sets_pass_the_same_tests() {
    if std::env::var_os("SMALTI_SIMD").is_some() {
        return;
    }
    for level in ["avx2", "base"] {
        let tests =
            std::process::Command::new(std::env::current_exe().unwrap()).env("SMALTI_SIMD", level).output().unwrap();
        assert!(tests.status.success(), "{level}: {}", String::from_utf8_lossy(&tests.stdout));
    }
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
