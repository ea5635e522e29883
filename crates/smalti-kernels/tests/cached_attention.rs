//! Attention over a cache against its portable body.
#![allow(clippy::unwrap_used)]

mod inputs;

use burn::tensor::{Device, Tensor};
use inputs::{assert_close, normal, stream, strided};
use smalti_kernels::{cached_attention, portable};

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
