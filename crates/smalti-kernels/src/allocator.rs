//! A global allocator that hands the memory of large blocks out again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// The system's allocator, but large blocks come from memory that is kept when they are freed.
///
/// A network asks for some megabytes again and again, and gives them back. The system gets such blocks from the kernel each
/// time, which clears them page by page when they are first touched: up to a third of the time of a convolution. Here what is freed
/// joins its free neighbours, and is cut for the next request. What is kept and what is in use exceed what was in use at once before by
/// no more than a part of what comes and goes. On systems other than Unix all is left to the system.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: smalti_kernels::Keeping = smalti_kernels::Keeping::new();
/// ```
#[derive(Debug)]
pub struct Keeping {
    locked: AtomicBool,
    prepared: AtomicBool,
    state: UnsafeCell<State>,
}

/// The least size that is kept: smaller blocks are the system allocator's own business.
const LARGE: usize = 256 << 10;

/// Large blocks are multiples of this and begin at multiples of it.
const GRANULE: usize = 64 << 10;

/// Linux is asked for pages of this size: it clears them faster, and reading along a column of a matrix does not need a new entry of the
/// page table for each value.
const HUGE: usize = 2 << 20;

/// So much address space is taken at a time. It becomes memory where it is touched.
const REGION: usize = 64 << 20;

/// So much may be free at the end of glibc's heap, which it would else give back and ask for again all the time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const UNTRIMMED: libc::c_int = 8 << 20;

/// What is kept may pass the peak by this part of what comes and goes: free memory in small pieces serves no large request.
const SLACK: usize = 64;

/// What is kept may always pass the peak by this much, or by a third of what comes and goes if that is less: where little does,
/// it changes its sizes more, as between a generator and a decoder.
const LEAST_SLACK: usize = 16 << 20;

/// Most free extents.
const SLOTS: usize = 2048;

/// Free address space.
#[derive(Debug, Clone, Copy)]
struct Extent {
    start: usize,
    size: usize,
    /// Whether there may be memory behind it; if not, it is zero when it is touched.
    resident: bool,
}

impl Extent {
    fn end(self) -> usize {
        self.start + self.size
    }

    /// Bytes without memory.
    fn fresh(self) -> usize {
        if self.resident { 0 } else { self.size }
    }
}

/// Neighbouring free extents that hold a block: all of them but `over` bytes, at the front of the first one or at the end of the last.
#[derive(Debug, Clone, Copy)]
struct Found {
    first: usize,
    last: usize,
    over: usize,
    at_front: bool,
    /// Bytes of the block without memory.
    fresh: usize,
}

#[derive(Debug)]
struct State {
    /// By address; neighbours that touch differ in whether they are resident.
    free: [Extent; SLOTS],
    count: usize,
    /// Of the free ones that are resident.
    kept_bytes: usize,
    used_bytes: usize,
    /// The most that was in use at once.
    peak_bytes: usize,
    /// The least that was in use since then: weights and the like, which stay.
    lowest_bytes: usize,
}

// SAFETY: the state is accessed only by the thread that holds the lock.
unsafe impl Sync for Keeping {}

impl Keeping {
    /// With nothing kept.
    #[must_use]
    pub const fn new() -> Self {
        let (locked, prepared) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { locked, prepared, state: UnsafeCell::new(State::new()) }
    }

    /// The size of the block, if it is a large one.
    fn size(layout: Layout) -> Option<usize> {
        let size = layout.size();
        if !cfg!(unix) || size < LARGE || layout.align() > GRANULE {
            return None;
        }
        size.checked_next_multiple_of(GRANULE).filter(|&size| size <= isize::MAX as usize - REGION)
    }

    /// Runs `work` alone.
    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        // SAFETY: the lock is held, and `work` does not allocate.
        let result = work(unsafe { &mut *self.state.get() });
        self.locked.store(false, Ordering::Release);
        result
    }

    fn take(&self, size: usize, zeroed: bool) -> *mut u8 {
        self.prepare();
        let Some((start, fresh)) = self.with(|state| state.acquire(size)) else { return std::ptr::null_mut() };
        let block = std::ptr::with_exposed_provenance_mut::<u8>(start);
        if zeroed && fresh < size {
            // SAFETY: the block has this size and is nobody's but ours.
            unsafe { block.write_bytes(0, size) };
        }
        block
    }

    /// Makes glibc keep the blocks that are left to it: by itself it would give memory back to the kernel again and again.
    fn prepare(&self) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        if !self.prepared.swap(true, Ordering::Relaxed) {
            // SAFETY: settings of the allocator, which may be changed at any time.
            unsafe {
                libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as libc::c_int);
                libc::mallopt(libc::M_TRIM_THRESHOLD, UNTRIMMED);
            }
        }
    }

    fn give(&self, start: *mut u8, size: usize) {
        self.with(|state| state.release(start.expose_provenance(), size));
    }
}

impl Default for Keeping {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    const fn new() -> Self {
        let none = Extent { start: 0, size: 0, resident: false };
        Self { free: [none; SLOTS], count: 0, kept_bytes: 0, used_bytes: 0, peak_bytes: 0, lowest_bytes: 0 }
    }

    /// A block of this size: where it begins, and how much of it has no memory yet. None if the system has none.
    fn acquire(&mut self, size: usize) -> Option<(usize, usize)> {
        let (start, fresh) = self.take(size).or_else(|| {
            self.grow(size);
            self.take(size)
        })?;
        self.used_bytes += size;
        let risen = self.used_bytes > self.peak_bytes;
        if risen {
            self.peak_bytes = self.used_bytes;
            self.lowest_bytes = self.used_bytes;
        }
        if risen || fresh > 0 {
            self.trim();
        }
        Some((start, fresh))
    }

    /// Keeps a block that was in use.
    fn release(&mut self, start: usize, size: usize) {
        self.used_bytes -= size;
        self.lowest_bytes = self.lowest_bytes.min(self.used_bytes);
        match self.insert(Extent { start, size, resident: true }) {
            true => self.kept_bytes += size,
            false => pages::unmap(start, size),
        }
    }

    /// More address space, with all that is free given back where there is no more.
    fn grow(&mut self, size: usize) {
        let least = size.next_multiple_of(HUGE);
        let ask = || [least.max(REGION), least].into_iter().find_map(|size| Some((pages::map(size)?, size)));
        let found = ask().or_else(|| {
            self.free[..self.count].iter().for_each(|extent| pages::unmap(extent.start, extent.size));
            (self.count, self.kept_bytes) = (0, 0);
            ask()
        });
        if let Some((start, size)) = found
            && !self.insert(Extent { start, size, resident: false })
        {
            pages::unmap(start, size);
        }
    }

    /// Adds an extent to the free ones; false if there are too many.
    fn insert(&mut self, extent: Extent) -> bool {
        let at = self.free[..self.count].partition_point(|other| other.start < extent.start);
        let joins = |a: Extent, b: Extent| a.end() == b.start && a.resident == b.resident;
        let before = at > 0 && joins(self.free[at - 1], extent);
        let after = at < self.count && joins(extent, self.free[at]);
        match (before, after) {
            (true, true) => {
                self.free[at - 1].size += extent.size + self.free[at].size;
                self.free.copy_within(at + 1..self.count, at);
                self.count -= 1;
            }
            (true, false) => self.free[at - 1].size += extent.size,
            (false, true) => self.free[at] = Extent { size: extent.size + self.free[at].size, ..extent },
            (false, false) if self.count == SLOTS => return false,
            (false, false) => {
                self.free.copy_within(at..self.count, at + 1);
                self.free[at] = extent;
                self.count += 1;
            }
        }
        true
    }

    /// The place for a block that needs the least new memory, and of those the one that leaves the least over.
    fn find(&self, size: usize) -> Option<Found> {
        let free = &self.free[..self.count];
        let mut best: Option<Found> = None;
        for first in 0..free.len() {
            let (mut total, mut fresh) = (0, 0);
            for (last, extent) in free.iter().enumerate().skip(first) {
                if extent.start != free[first].start + total {
                    break;
                }
                total += extent.size;
                fresh += extent.fresh();
                if total < size {
                    continue;
                }
                let over = total - size;
                let ends = [(false, *extent), (true, free[first])].into_iter().filter(|(_, end)| over < end.size);
                for (at_front, end) in ends {
                    let found = Found { first, last, over, at_front, fresh: fresh - over.min(end.fresh()) };
                    if best.is_none_or(|best| (found.fresh, found.over) < (best.fresh, best.over)) {
                        best = Some(found);
                    }
                }
                break;
            }
        }
        best
    }

    /// A block out of the free extents: where it begins, and how much of it has no memory yet.
    fn take(&mut self, size: usize) -> Option<(usize, usize)> {
        let Found { first, last, over, at_front, fresh } = self.find(size)?;
        let (front, back) = (self.free[first], self.free[last]);
        let (start, rest) = match at_front {
            true => (front.start + over, Extent { size: over, ..front }),
            false => (front.start, Extent { start: back.end() - over, size: over, ..back }),
        };
        let kept = usize::from(over > 0);
        self.free[first] = rest;
        self.free.copy_within(last + 1..self.count, first + kept);
        self.count -= last + 1 - first - kept;
        self.kept_bytes -= size - fresh;
        Some((start, fresh))
    }

    /// The most that may be kept and in use.
    fn most(&self) -> usize {
        let changing = self.peak_bytes - self.lowest_bytes;
        self.peak_bytes + (changing / SLACK).max(LEAST_SLACK.min(changing / 3))
    }

    /// Gives memory back, of the largest extents first, until there is no more than [`Self::most`].
    fn trim(&mut self) {
        loop {
            let surplus = (self.kept_bytes + self.used_bytes).saturating_sub(self.most());
            let resident = self.free[..self.count].iter().enumerate().filter(|(_, extent)| extent.resident);
            let Some((at, extent)) = resident.max_by_key(|(_, extent)| extent.size).filter(|_| surplus > 0) else {
                return;
            };
            let (extent, surplus) = (*extent, surplus.next_multiple_of(HUGE));
            // Without a free slot for the rest, the whole.
            let size = if self.count == SLOTS { extent.size } else { extent.size.min(surplus) };
            let start = extent.end() - size;
            if size == extent.size {
                self.free.copy_within(at + 1..self.count, at);
                self.count -= 1;
            } else {
                self.free[at].size -= size;
            }
            self.kept_bytes -= size;
            let empty = pages::clear(start, size);
            if !(empty && self.insert(Extent { start, size, resident: false })) {
                pages::unmap(start, size);
            }
        }
    }
}

/// Memory of the system.
#[cfg(unix)]
mod pages {
    use super::HUGE;

    const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    const KIND: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANON;

    /// New address space, a multiple of [`HUGE`] that begins at one; it is zero.
    pub(super) fn map(size: usize) -> Option<usize> {
        let more = size.checked_add(HUGE)?;
        // SAFETY: new memory; what is before and behind the aligned part is given back.
        unsafe {
            let start = libc::mmap(std::ptr::null_mut(), more, ACCESS, KIND, -1, 0);
            if start == libc::MAP_FAILED {
                return None;
            }
            let before = start.align_offset(HUGE);
            let block = start.byte_add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            if before < HUGE {
                libc::munmap(block.byte_add(size), HUGE - before);
            }
            // Advice, which may be refused.
            #[cfg(target_os = "linux")]
            libc::madvise(block, size, libc::MADV_HUGEPAGE);
            Some(block.expose_provenance())
        }
    }

    fn pointer(start: usize) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(start)
    }

    /// Gives the memory of a part of what was mapped back, but not its addresses; false if that fails.
    #[cfg(target_os = "linux")]
    pub(super) fn clear(start: usize, size: usize) -> bool {
        // SAFETY: mapped by `map`, and nobody uses it.
        unsafe { libc::madvise(pointer(start), size, libc::MADV_DONTNEED) == 0 }
    }

    /// As above.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn clear(start: usize, size: usize) -> bool {
        // SAFETY: mapped by `map`, and nobody uses it.
        let new = unsafe { libc::mmap(pointer(start), size, ACCESS, KIND | libc::MAP_FIXED, -1, 0) };
        new != libc::MAP_FAILED
    }

    /// Gives a part of what was mapped back.
    pub(super) fn unmap(start: usize, size: usize) {
        // SAFETY: mapped by `map`, and nobody uses it.
        unsafe { libc::munmap(pointer(start), size) };
    }
}

/// Not used: all is left to the system.
#[cfg(not(unix))]
mod pages {
    pub(super) fn map(_: usize) -> Option<usize> {
        None
    }

    pub(super) fn clear(_: usize, _: usize) -> bool {
        false
    }

    pub(super) fn unmap(_: usize, _: usize) {}
}

// SAFETY: small blocks are the system's; a large one has at least the size and alignment asked for, and is handed out again
// only after it was freed, as `size` gives the same for the same layout.
unsafe impl GlobalAlloc for Keeping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match Self::size(layout) {
            Some(size) => self.take(size, false),
            // SAFETY: passed on.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match Self::size(layout) {
            Some(size) => self.take(size, true),
            // SAFETY: passed on.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        match Self::size(layout) {
            Some(size) => self.give(start, size),
            // SAFETY: passed on.
            None => unsafe { System.dealloc(start, layout) },
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the rounded size does not overflow.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (Self::size(layout), Self::size(wanted)) {
            // SAFETY: passed on.
            (None, None) => unsafe { System.realloc(start, layout, size) },
            (Some(old), Some(new)) if old == new => start,
            _ => {
                // SAFETY: the sizes are not zero; both blocks have as many bytes as are copied, and the old one is given
                // back once.
                unsafe {
                    let block = self.alloc(wanted);
                    if !block.is_null() {
                        std::ptr::copy_nonoverlapping(start, block, layout.size().min(size));
                        self.dealloc(start, layout);
                    }
                    block
                }
            }
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use smalti_base::Rng;

    /// Gives all that is kept back.
    fn empty(keeping: &Keeping) {
        keeping.with(|state| {
            assert!(state.used_bytes == 0 && state.kept_bytes <= state.most());
            state.free[..state.count].iter().for_each(|extent| pages::unmap(extent.start, extent.size));
        });
    }

    #[test]
    fn a_freed_block_is_used_again_and_the_peak_is_kept() {
        let keeping = Keeping::new();
        let [small, large] = [300 << 10, 3 << 20].map(|size| Layout::array::<u8>(size).unwrap());
        // SAFETY: every block is written inside of its size and freed once with its layout.
        unsafe {
            let first = keeping.alloc(large);
            first.write_bytes(7, large.size());
            keeping.dealloc(first, large);
            let again = keeping.alloc_zeroed(large);
            assert!(first == again && again.read() == 0 && again.add(large.size() - 1).read() == 0);
            keeping.dealloc(again, large);
            // A part of it.
            let other = keeping.alloc(small);
            assert!(first == other);
            other.write_bytes(3, small.size());
            let grown = keeping.realloc(other, small, 2 << 20);
            assert!(grown.read() == 3 && grown.add(small.size() - 1).read() == 3);
            keeping.dealloc(grown, Layout::array::<u8>(2 << 20).unwrap());
            // What cannot be had does not count, and what was kept is given back for it.
            let peak = keeping.with(|state| state.peak_bytes);
            assert!(keeping.alloc(Layout::from_size_align(1 << 60, 64).unwrap()).is_null());
            keeping.with(|state| assert!(state.count == 0 && state.peak_bytes == peak));
        }
        empty(&keeping);
    }

    #[test]
    fn blocks_never_overlap_and_the_bound_holds() {
        let (keeping, mut stream) = (Keeping::new(), Rng::new(5).stream(0, 0));
        let mut blocks: Vec<(*mut u8, Layout, u8)> = Vec::new();
        for step in 0..4000u32 {
            // Grows for a while, then shrinks.
            if !blocks.is_empty() && stream.below(10) < if step / 500 % 2 == 0 { 4 } else { 6 } {
                let (start, layout, mark) = blocks.swap_remove(stream.below(blocks.len()));
                // SAFETY: a block of this layout, which is freed once.
                unsafe {
                    assert!([0, layout.size() / 2, layout.size() - 1].iter().all(|i| start.add(*i).read() == mark));
                    keeping.dealloc(start, layout);
                }
                continue;
            }
            let layout =
                Layout::array::<u8>((256 << 10) + stream.below(1 << [18, 20, 22, 24][step as usize % 4])).unwrap();
            let (mark, zeroed) = (step as u8, stream.below(2) == 0);
            // SAFETY: written inside of its size.
            unsafe {
                let start = if zeroed { keeping.alloc_zeroed(layout) } else { keeping.alloc(layout) };
                let ends = [0, layout.size() / 2, layout.size() - 1];
                assert!(!zeroed || ends.iter().all(|i| start.add(*i).read() == 0));
                ends.iter().for_each(|i| start.add(*i).write(mark));
                blocks.push((start, layout, mark));
            }
            let used: usize = blocks.iter().filter_map(|(_, layout, _)| Keeping::size(*layout)).sum();
            keeping.with(|state| {
                assert_eq!(state.used_bytes, used);
                assert!(state.kept_bytes + used <= state.most());
                let free = &state.free[..state.count];
                assert_eq!(state.kept_bytes, free.iter().filter(|e| e.resident).map(|e| e.size).sum::<usize>());
                let apart = |pair: &[Extent]| {
                    let touch = pair[0].end() == pair[1].start;
                    pair[0].end() <= pair[1].start && !(touch && pair[0].resident == pair[1].resident)
                };
                assert!(free.windows(2).all(apart));
            });
        }
        for (start, layout, _) in blocks {
            // SAFETY: a block of this layout, which is freed once.
            unsafe { keeping.dealloc(start, layout) };
        }
        empty(&keeping);
    }
}
