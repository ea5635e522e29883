//! Memory for results and scratch.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

/// A vector of `n` values that `fill` writes in full.
///
/// # Safety
/// `fill` must not read from the slice before writing, and must have written every element when it returns.
pub(crate) unsafe fn written(n: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f32> {
    // SAFETY: the caller's promise.
    let [values] = unsafe { all_written([n], |[values]| fill(values)) };
    values
}

/// Vectors of so many values, all of which `fill` writes in full.
///
/// # Safety
/// As [`written`], for each of them.
pub(crate) unsafe fn all_written<const N: usize>(
    sizes: [usize; N],
    fill: impl FnOnce([&mut [f32]; N]),
) -> [Vec<f32>; N] {
    let mut all = sizes.map(Vec::<f32>::with_capacity);
    let mut asked = sizes.into_iter();
    fill(all.each_mut().map(|values| {
        let n = asked.next().unwrap_or_default().min(values.capacity());
        // SAFETY: inside of the capacity, every bit pattern is an `f32`, and the caller promises that all are written first.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr(), n) }
    }));
    for (values, n) in all.iter_mut().zip(sizes) {
        // SAFETY: all `n` values, for which there is room, are initialised now.
        unsafe { values.set_len(n) };
    }
    all
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

    /// The address of `len` values from `start` on, all inside of the slice.
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut f32 {
        assert!(start <= self.len && len <= self.len - start, "range outside of the shared slice");
        // SAFETY: inside of the slice.
        unsafe { self.start.add(start) }
    }

    /// `len` values from `start` on, to read.
    ///
    /// # Safety
    /// They are written, and nobody writes to them while the slice lives.
    pub(crate) unsafe fn read(&self, start: usize, len: usize) -> &'a [f32] {
        // SAFETY: inside the slice that was borrowed for `'a`; not changed, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.pointer(start, len), len) }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// No other live slice of this memory may overlap with the range.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: inside the slice that was borrowed for `'a`; not aliased, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, len), len) }
    }
}

/// Sixteen values in a cache line of their own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Scratch memory that begins with a cache line.
#[derive(Default)]
struct Scratch(Vec<Line>);

impl Scratch {
    fn with_len(values: usize) -> Self {
        Self(vec![Line([0.0; 16]); values.div_ceil(16)])
    }

    fn len(&self) -> usize {
        self.0.len() * 16
    }

    fn values(&mut self) -> &mut [f32] {
        // SAFETY: a line is 16 values without gaps.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}

/// Values of scratch memory that a thread keeps for its next call: 8 MiB.
const KEPT_BY_A_THREAD: usize = 2 << 20;

/// Values of scratch memory that the process keeps for what threads do together: 32 MiB.
const KEPT_TOGETHER: usize = 8 << 20;

thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch(Vec::new())) };
}

static TOGETHER: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());

/// Calls `work` with `N` pieces of this thread's scratch memory, each on a cache line. What is in them is arbitrary.
pub(crate) fn with_scratch<const N: usize, R>(sizes: [usize; N], work: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    // Pieces begin a line apart from where they could, so that equal offsets do not share cache sets.
    let sizes = sizes.map(|size| (size, size.next_multiple_of(16) + 16));
    let total: usize = sizes.iter().map(|&(_, padded)| padded).sum();
    let mut memory = SCRATCH.take();
    if memory.len() < total {
        drop(memory);
        memory = Scratch::with_len(total);
    }
    let mut rest = memory.values();
    let pieces = sizes.map(|(size, padded)| {
        let (piece, others) = std::mem::take(&mut rest).split_at_mut(padded);
        rest = others;
        &mut piece[..size]
    });
    let result = work(pieces);
    if memory.len() <= KEPT_BY_A_THREAD {
        SCRATCH.set(memory);
    }
    result
}

/// Calls `work` with memory that tasks on several threads use. What is in it is arbitrary.
pub(crate) fn with_shared<R>(size: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let pool = || TOGETHER.lock().unwrap_or_else(PoisonError::into_inner);
    let found = {
        let mut pool = pool();
        let fitting = pool.iter().enumerate().filter(|(_, memory)| memory.len() >= size);
        let smallest = fitting.min_by_key(|(_, memory)| memory.len()).map(|(i, _)| i);
        smallest.map(|i| pool.swap_remove(i))
    };
    let mut memory = found.unwrap_or_else(|| Scratch::with_len(size));
    let result = work(&mut memory.values()[..size]);
    let mut pool = pool();
    pool.push(memory);
    // The smallest go first: the others serve their calls too.
    pool.sort_by_key(|memory| std::cmp::Reverse(memory.len()));
    let mut kept = 0;
    pool.retain(|memory| {
        let keeps = kept + memory.len() <= KEPT_TOGETHER;
        kept += if keeps { memory.len() } else { 0 };
        keeps
    });
    result
}
