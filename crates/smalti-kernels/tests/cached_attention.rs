//! Attention over a cache against its portable body.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor};
use inputs::{assert_close, normal, stream, strided};
use smalti_kernels::{attention_over, cached_attention, portable};

#[test]
fn it_equals_the_portable_body() {
    let device = Device::flex();
    let mut s = stream(1);
    for _ in 0..60 {
        let [b, h, n, capacity] = [1 + s.below(3), 1 + s.below(4), 1 + s.below(5), 5 + s.below(90)];
        let [d, e] = [1 + s.below(70), 1 + s.below(70)];
        let q = strided(&mut s, [b, h, n, d], &device) * 2.0;
        let (keys, values) =
            (strided(&mut s, [b, h, capacity, d], &device), normal(&mut s, [b, h, capacity, e], &device));
        let visible: Vec<usize> = (0..n).map(|_| 1 + s.below(capacity)).collect();
        let expected = portable::cached_attention(q.clone(), keys.clone(), values.clone(), &visible);
        let found = cached_attention(q, keys, values, &visible);
        assert_close(found, expected, 1e-5, &format!("{:?}", [b, h, n, capacity, d, e]));
    }
}

#[test]
fn what_is_behind_is_not_read_and_queries_do_not_meet() {
    let device = Device::flex();
    let mut s = stream(2);
    let q = normal(&mut s, [2, 3, 4, 16], &device);
    let (keys, values) = (normal(&mut s, [2, 3, 9, 16], &device), normal(&mut s, [2, 3, 9, 16], &device));
    let whole = cached_attention(q.clone(), keys.clone(), values.clone(), &[3, 4, 5, 6]);
    let nothing = Tensor::full([2, 3, 3, 16], f32::NAN, &device);
    let [keys, values] = [keys, values].map(|x| x.slice_assign([0..2, 0..3, 6..9, 0..16], nothing.clone()));
    for i in 0..4 {
        let one = cached_attention(q.clone().narrow(2, i, 1), keys.clone(), values.clone(), &[3 + i]);
        let one = one.into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(one, whole.clone().narrow(2, i, 1).into_data().try_to_vec::<f32>().unwrap());
    }
}

#[test]
fn keys_of_several_tensors_count_as_if_they_were_joined() {
    let device = Device::flex();
    let mut s = stream(3);
    for case in 0..60 {
        let [b, h, n] = [1 + s.below(3), 1 + s.below(4), 1 + s.below(90)];
        let [d, e] = [1 + s.below(70), 1 + s.below(70)];
        let pieces: Vec<usize> = (0..1 + s.below(4)).map(|_| 1 + s.below(60)).collect();
        let q = strided(&mut s, [b, h, n, d], &device) * 2.0;
        let mut memories = |channels| -> Vec<Tensor<4>> {
            pieces.iter().map(|rows| strided(&mut s, [b, h, *rows, channels], &device)).collect()
        };
        let (mut keys, mut values) = (memories(d), memories(e));
        if case % 5 == 1 {
            // The same value in all channels, once in memory.
            let broadcast = |x: &Tensor<4>| x.clone().narrow(3, 0, 1).expand(x.dims());
            keys = keys.iter().map(broadcast).collect();
            values = values.iter().map(broadcast).collect();
        }
        let (all_keys, all_values) = (Tensor::cat(keys.clone(), 2), Tensor::cat(values.clone(), 2));
        let expected = portable::attention(q.clone(), all_keys, all_values, false, None);
        // What is recorded for gradients takes another way.
        let found = match case % 4 {
            0 => {
                let recorded = |all: &[Tensor<4>]| all.iter().cloned().map(Tensor::autodiff).collect::<Vec<_>>();
                attention_over(q.autodiff(), &recorded(&keys), &recorded(&values)).inner()
            }
            _ => attention_over(q, &keys, &values),
        };
        assert_close(found, expected, 1e-5, &format!("{:?} {pieces:?}", [b, h, n, d, e]));
    }
}
