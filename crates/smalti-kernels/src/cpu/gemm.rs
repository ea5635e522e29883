//! Matrix products by the `gemm` crate.

use gemm::Parallelism;

/// A matrix in a slice: element `(row, column)` is at `row * strides[0] + column * strides[1]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub values: &'a [f32],
    pub strides: [usize; 2],
}

/// `dst = lhs rhs`, or `dst += lhs rhs` when `add`, for `lhs [m, k]` and `rhs [k, n]`; `strides` are those of `dst`.
/// On one thread: for callers that spread tasks of their own.
pub(crate) fn multiply(
    sizes: [usize; 3],
    dst: &mut [f32],
    strides: [usize; 2],
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    product(sizes, dst, strides, add, lhs, rhs, Parallelism::None);
}

/// [`multiply`] by all threads of the pool; small products by one.
pub(crate) fn multiply_on_all_threads(
    sizes: [usize; 3],
    dst: &mut [f32],
    strides: [usize; 2],
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    let small = sizes.iter().product::<usize>() < 1 << 19;
    let threads = if small { Parallelism::None } else { Parallelism::Rayon(rayon::current_num_threads()) };
    product(sizes, dst, strides, add, lhs, rhs, threads);
}

fn product(
    [m, n, k]: [usize; 3],
    dst: &mut [f32],
    strides: [usize; 2],
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    threads: Parallelism,
) {
    assert!(fits(dst.len(), [m, n], strides), "product outside of its slice");
    assert!(fits(lhs.values.len(), [m, k], lhs.strides), "left factor outside of its slice");
    assert!(fits(rhs.values.len(), [k, n], rhs.strides), "right factor outside of its slice");
    let [dst_rs, dst_cs] = strides.map(|s| s as isize);
    let [lhs_rs, lhs_cs] = lhs.strides.map(|s| s as isize);
    let [rhs_rs, rhs_cs] = rhs.strides.map(|s| s as isize);
    // SAFETY: all elements that the sizes and strides reach are inside of the slices, as checked above, and `dst` is
    // borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            dst_cs,
            dst_rs,
            add,
            lhs.values.as_ptr(),
            lhs_cs,
            lhs_rs,
            rhs.values.as_ptr(),
            rhs_cs,
            rhs_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Whether the last element of a matrix lies inside of a slice.
fn fits(len: usize, [rows, columns]: [usize; 2], [rs, cs]: [usize; 2]) -> bool {
    rows == 0 || columns == 0 || (rows - 1) * rs + (columns - 1) * cs < len
}
