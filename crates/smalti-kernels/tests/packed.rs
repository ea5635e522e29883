//! Products with packed matrices against sums in `f64`.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor, TensorData};
use inputs::{assert_close, normal, stream};
use smalti_kernels::{PackedMatrix, WeightPrecision, packed_linear, packed_linears, portable};

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// Checks `packed_linear` against the sums of the values that the matrix stands for, within the rounding of `f32` sums.
#[track_caller]
fn check(x: Tensor<2>, weight: &PackedMatrix, bias: Option<Tensor<1>>) {
    let ([rows, inputs], [_, outputs]) = (x.dims(), weight.shape());
    let found = packed_linear(x.clone(), weight, bias.clone());
    assert_eq!(found.dims(), [rows, outputs]);
    let (x, weights, found) = (floats(x), floats(weight.unpack(&Device::flex())), floats(found));
    let bias = bias.map_or(vec![0.0; outputs], floats);
    for row in 0..rows {
        for output in 0..outputs {
            let terms = |i: usize| f64::from(x[row * inputs + i]) * f64::from(weights[i * outputs + output]);
            let sum = (0..inputs).map(terms).sum::<f64>() + f64::from(bias[output]);
            let size = (0..inputs).map(|i| terms(i).abs()).sum::<f64>() + f64::from(bias[output].abs());
            let error = (f64::from(found[row * outputs + output]) - sum).abs();
            assert!(
                error <= 1e-7 * (4.0 + inputs as f64) * size + 1e-37,
                "[{rows}, {inputs}] x {weight:?}, {row} {output}: {} instead of {sum}",
                found[row * outputs + output]
            );
        }
    }
}

#[test]
fn products_equal_the_sums() {
    let device = Device::flex();
    let mut s = stream(1);
    for case in 0..150 {
        let [rows, inputs, outputs] = [1 + s.below(20), 1 + s.below(140), 1 + s.below(140)];
        let x = match case % 3 {
            0 => normal(&mut s, [inputs, rows], &device).transpose(),
            1 => normal(&mut s, [rows + 2, inputs + 1], &device).slice([1..rows + 1, 1..inputs + 1]),
            _ => normal(&mut s, [rows, inputs], &device),
        };
        let weight = normal(&mut s, [inputs, outputs], &device);
        let bias = (case % 2 == 0).then(|| normal(&mut s, [outputs], &device));
        for precision in WeightPrecision::ALL {
            let packed = PackedMatrix::from_tensor(weight.clone(), precision);
            assert_eq!((packed.shape(), packed.precision()), ([inputs, outputs], precision));
            check(x.clone(), &packed, bias.clone());
            let expected = portable::packed_linear(x.clone(), &packed, bias.clone());
            assert_close(packed_linear(x.clone(), &packed, bias.clone()), expected, 1e-5, "portable body");
        }
    }
}

#[test]
fn weights_are_the_nearest_that_their_precision_has() {
    let device = Device::flex();
    let mut s = stream(2);
    let [inputs, outputs] = [70, 45];
    // Each output has a size of its own, from the smallest floats to the largest.
    let sizes: Vec<f32> = (0..outputs).map(|o| 10f32.powi(o as i32 * 75 / 44 - 38)).collect();
    let values: Vec<f32> = (0..inputs * outputs).map(|i| s.normal().clamp(-3.0, 3.0) * sizes[i % outputs]).collect();
    let weight = Tensor::<2>::from_data(TensorData::new(values.clone(), [inputs, outputs]), &device);
    for precision in WeightPrecision::ALL {
        let kept = floats(PackedMatrix::from_tensor(weight.clone().transpose().transpose(), precision).unpack(&device));
        for (i, (value, kept)) in values.iter().zip(kept).enumerate() {
            let column = || (0..inputs).map(|k| values[k * outputs + i % outputs].abs());
            let error = match precision {
                WeightPrecision::F32 => 0.0,
                WeightPrecision::Bf16 => value.abs() / 256.0 + 1e-40,
                WeightPrecision::Int8 => column().fold(0.0, f32::max) / 254.0 * 1.001 + 1e-40,
            };
            assert!((value - kept).abs() <= error, "{precision}: {value} became {kept}");
        }
    }
    let bytes = WeightPrecision::ALL.map(|p| PackedMatrix::from_tensor(weight.clone(), p).bytes());
    assert_eq!(bytes, [70 * 64 * 4, 70 * 64 * 2, 70 * 64 + 45 * 4]);
}

#[test]
fn zeros_constants_and_extremes() {
    let device = Device::flex();
    let columns: [f32; 10] = [0.0, 1.0, -3.5, 1e-45, 1e-38, 3e38, f32::MAX, -1e30, 1e-20, 127.0];
    let inputs = 33;
    let values: Vec<f32> = (0..inputs).flat_map(|_| columns).collect();
    let x = Tensor::<2>::from_data(TensorData::new(vec![0.25f32 / inputs as f32; 3 * inputs], [3, inputs]), &device);
    let zeros = x.clone() * 0.0;
    for precision in WeightPrecision::ALL {
        let packed = PackedMatrix::new(&values, [inputs, columns.len()], precision);
        let kept = floats(packed.unpack(&device));
        for (column, kept) in columns.iter().zip(kept) {
            // A constant row is kept but for a rounding: its size is a whole number of steps.
            let error = if precision == WeightPrecision::Bf16 { 1.0 / 256.0 } else { 1e-6 };
            assert!((column - kept).abs() <= error * column.abs() + 1e-42, "{precision}: {column} became {kept}");
        }
        check(x.clone(), &packed, None);
        assert!(floats(packed_linear(zeros.clone(), &packed, None)).iter().all(|y| *y == 0.0));
    }
}

#[test]
fn what_is_not_a_number_stays_visible() {
    for (wrong, precision) in [(f32::NAN, WeightPrecision::Int8), (f32::INFINITY, WeightPrecision::Int8)]
        .into_iter()
        .chain([(f32::NAN, WeightPrecision::Bf16), (f32::INFINITY, WeightPrecision::Bf16)])
    {
        let packed = PackedMatrix::new(&[1.0, 4.0, wrong, 4.0], [2, 2], precision);
        let y = floats(packed_linear(Tensor::<2>::ones([1, 2], &Device::flex()), &packed, None));
        assert!(!y[0].is_finite() && (y[1] - 8.0).abs() < 1e-5, "{precision} {wrong}: {y:?}");
    }
}

#[test]
fn nothing_times_something_is_nothing() {
    let device = Device::flex();
    for precision in WeightPrecision::ALL {
        let packed = PackedMatrix::new(&[1.0; 6], [2, 3], precision);
        assert_eq!(packed_linear(Tensor::<3>::zeros([0, 4, 2], &device), &packed, None).dims(), [0, 4, 3]);
        let none = PackedMatrix::new(&[], [0, 3], precision);
        assert_eq!(floats(packed_linear(Tensor::<2>::zeros([2, 0], &device), &none, None)), [0.0; 6]);
    }
}

#[test]
fn a_row_does_not_depend_on_the_others_nor_on_the_threads() {
    let device = Device::flex();
    let mut s = stream(3);
    let (x, weight) = (normal(&mut s, [150, 257], &device), normal(&mut s, [257, 300], &device));
    let bias = normal(&mut s, [300], &device);
    for precision in WeightPrecision::ALL {
        let packed = PackedMatrix::from_tensor(weight.clone(), precision);
        let run = |x: Tensor<2>| floats(packed_linear(x, &packed, Some(bias.clone())));
        let whole = run(x.clone());
        for (first, rows) in [(0, 1), (3, 7), (8, 9), (100, 50)] {
            assert_eq!(run(x.clone().narrow(0, first, rows)), whole[first * 300..(first + rows) * 300]);
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| run(x.clone())), whole, "{threads} threads");
        }
    }
}

#[test]
fn several_matrices_equal_each_by_itself() {
    let device = Device::flex();
    let mut s = stream(4);
    let x = normal(&mut s, [2, 3, 40], &device);
    let [a, b] =
        [50, 7].map(|outputs| PackedMatrix::from_tensor(normal(&mut s, [40, outputs], &device), WeightPrecision::Int8));
    let bias = normal(&mut s, [7], &device);
    let [left, right] = packed_linears(x.clone(), [(&a, None), (&b, Some(bias.clone()))]);
    assert_eq!(floats(left), floats(packed_linear(x.clone(), &a, None)));
    assert_eq!(floats(right), floats(packed_linear(x, &b, Some(bias))));
}

#[test]
fn gradients_flow_through_the_portable_body() {
    let device = Device::flex().autodiff();
    let packed = PackedMatrix::new(&[1.0, 2.0, 3.0, 4.0], [2, 2], WeightPrecision::Bf16);
    let x = Tensor::<2>::ones([1, 2], &device).require_grad();
    let gradients = packed_linear(x.clone(), &packed, None).sum().backward();
    assert_eq!(floats(x.grad(&gradients).unwrap()), [3.0, 7.0]);
}

#[test]
fn unknown_precisions_are_named() {
    let error = "int4".parse::<WeightPrecision>().unwrap_err().to_string();
    assert!(error.contains("int4") && error.contains("`int8`"), "{error}");
    assert_eq!(WeightPrecision::ALL.map(|p| p.to_string().parse::<WeightPrecision>().unwrap()), WeightPrecision::ALL);
}
