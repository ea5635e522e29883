//! Memory for results and scratch.

use std::cell::Cell;
use std::marker::PhantomData;

/// A vector of `n` values that `fill` writes in full.
///
/// # Safety
/// `fill` must not read from the slice before writing, and must have written every element when it returns.
pub(crate) unsafe fn written(n: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut values = Vec::<f32>::with_capacity(n);
    // SAFETY: the capacity is `n`, every bit pattern is an `f32`, and the caller promises that all are written first.
    fill(unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr(), n) });
    // SAFETY: all `n` values are initialised now.
    unsafe { values.set_len(n) };
    values
}

/// A mutable slice that several threads write to, each to ranges of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `range`, whose callers promise that ranges in use never overlap.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), lifetime: PhantomData }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// No other live slice of this memory may overlap with the range.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "range outside of the shared slice");
        // SAFETY: inside the slice that was borrowed for `'a`; not aliased, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with `N` pieces of this thread's scratch memory, which is kept for the next call. What is in them is
/// arbitrary.
pub(crate) fn with_scratch<const N: usize, R>(sizes: [usize; N], work: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    // Pieces begin at multiples of a cache line and a bit, so that equal offsets do not share cache sets.
    let sizes = sizes.map(|size| (size, size.next_multiple_of(16) + 16));
    let total: usize = sizes.iter().map(|&(_, padded)| padded).sum();
    let mut memory = SCRATCH.take();
    if memory.len() < total {
        memory.resize(total, 0.0);
    }
    let mut rest = &mut memory[..];
    let pieces = sizes.map(|(size, padded)| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(padded);
        rest = others;
        &mut piece[..size]
    });
    let result = work(pieces);
    SCRATCH.set(memory);
    result
}
