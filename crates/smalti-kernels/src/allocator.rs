//! A global allocator that hands large blocks out again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// The system's allocator, but large blocks that are freed are kept for the next request of their size.
///
/// A network asks for the same few sizes of some megabytes again and again. The system gets such blocks from the kernel each
/// time, which clears them page by page when they are first touched: up to a third of the time of a convolution. What is
/// kept and what is in use exceed what was in use at once before by no more than a part of what comes and goes.
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

/// From this size on glibc returns blocks to the kernel: those leave the large holes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const RETURNED: libc::c_int = 1 << 20;

/// So much may be free at the end of glibc's heap, which it would else give back and ask for again all the time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const UNTRIMMED: libc::c_int = 8 << 20;

/// What is kept may pass the peak by this part of what comes and goes: a training step asks for its sizes in another order than it
/// gave them back, and without slack every sixth block would come from the kernel anew.
const SLACK: usize = 12;

/// What is kept may always pass the peak by this much, or by a third of what comes and goes if that is less: where little does,
/// it changes its sizes more, as between a generator and a decoder.
const LEAST_SLACK: usize = 48 << 20;

/// Most blocks that are kept.
const SLOTS: usize = 1024;

/// Blocks are cache lines apart, which vector code likes.
const ALIGN: usize = 64;

/// Blocks of this size and more begin on such a border and ask Linux for pages of this size: it clears them faster, and
/// reading along a column of a matrix does not need a new entry of the page table for each value.
const HUGE: usize = 2 << 20;

#[derive(Debug, Clone, Copy)]
struct Block {
    start: *mut u8,
    size: usize,
}

#[derive(Debug)]
struct State {
    /// From the one kept longest to the one kept last.
    kept: [Block; SLOTS],
    count: usize,
    kept_bytes: usize,
    used_bytes: usize,
    /// The most that was in use at once.
    peak_bytes: usize,
    /// The least that was in use since then: weights and the like, which stay.
    lowest_bytes: usize,
}

// SAFETY: the state is accessed only by the thread that holds the lock.
unsafe impl Sync for Keeping {}
// SAFETY: the kept blocks belong to no thread.
unsafe impl Send for Keeping {}

impl Keeping {
    /// With nothing kept.
    #[must_use]
    pub const fn new() -> Self {
        let none = Block { start: std::ptr::null_mut(), size: 0 };
        let state =
            State { kept: [none; SLOTS], count: 0, kept_bytes: 0, used_bytes: 0, peak_bytes: 0, lowest_bytes: 0 };
        let (locked, prepared) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { locked, prepared, state: UnsafeCell::new(state) }
    }

    /// The size that is asked of the system: rounded up by a thirty-second at most, so that similar requests share blocks.
    fn size(layout: Layout) -> Option<usize> {
        let size = layout.size();
        if size < LARGE || layout.align() > ALIGN {
            return None;
        }
        size.checked_next_multiple_of(1 << (size.ilog2() - 5)).filter(|&size| size <= isize::MAX as usize - ALIGN)
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
        let found = self.with(|state| state.take(size));
        if let Some(block) = found {
            if zeroed {
                // SAFETY: the block has this size and is nobody's but ours.
                unsafe { block.write_bytes(0, size) };
            }
            return block;
        }
        self.prepare();
        // What the system gives counts with what is kept.
        self.trim();
        let Some(layout) = layout_of(size) else { return std::ptr::null_mut() };
        let ask = || match size >= HUGE {
            true => map(layout),
            // SAFETY: the size is not zero.
            false => unsafe { System.alloc(layout) },
        };
        let mut block = ask();
        if block.is_null() {
            while let Some(kept) = self.with(State::oldest) {
                release(kept);
            }
            block = ask();
        }
        self.with(|state| if block.is_null() { state.used_bytes -= size } else { state.rise() });
        if zeroed && !block.is_null() && !(MAPS && size >= HUGE) {
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(0, size) };
        }
        block
    }

    /// Makes glibc return the largest blocks to the kernel when they are freed, and only those. By itself it begins to keep them in
    /// its heap, too, where they leave holes that other sizes do not fill.
    fn prepare(&self) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        if !self.prepared.swap(true, Ordering::Relaxed) {
            // SAFETY: settings of the allocator, which may be changed at any time.
            unsafe {
                libc::mallopt(libc::M_MMAP_THRESHOLD, RETURNED);
                libc::mallopt(libc::M_TRIM_THRESHOLD, UNTRIMMED);
            }
        }
    }

    fn give(&self, block: Block) {
        if !self.with(|state| state.keep(block)) {
            release(block);
        }
    }

    /// Gives the blocks kept longest back, until what is kept and in use is no more than the peak.
    fn trim(&self) {
        while let Some(block) = self.with(State::surplus) {
            release(block);
        }
    }
}

impl Default for Keeping {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// Counts a block of this size as used: one that is kept, or none where the system has to give one.
    fn take(&mut self, size: usize) -> Option<*mut u8> {
        self.used_bytes += size;
        let at = self.kept[..self.count].iter().rposition(|block| block.size == size)?;
        self.rise();
        Some(self.remove(at).start)
    }

    /// Counts what is in use now, all of which was got.
    fn rise(&mut self) {
        if self.used_bytes > self.peak_bytes {
            self.peak_bytes = self.used_bytes;
            self.lowest_bytes = self.used_bytes;
        }
    }

    /// Whether there was room for it.
    fn keep(&mut self, block: Block) -> bool {
        self.used_bytes -= block.size;
        self.lowest_bytes = self.lowest_bytes.min(self.used_bytes);
        if self.count == SLOTS {
            return false;
        }
        self.kept[self.count] = block;
        self.count += 1;
        self.kept_bytes += block.size;
        true
    }

    fn remove(&mut self, at: usize) -> Block {
        let block = self.kept[at];
        self.kept.copy_within(at + 1..self.count, at);
        self.count -= 1;
        self.kept_bytes -= block.size;
        block
    }

    fn oldest(&mut self) -> Option<Block> {
        (self.count > 0).then(|| self.remove(0))
    }

    fn surplus(&mut self) -> Option<Block> {
        if self.kept_bytes + self.used_bytes > self.most() { self.oldest() } else { None }
    }

    /// The most that may be kept and in use.
    fn most(&self) -> usize {
        let changing = self.peak_bytes - self.lowest_bytes;
        self.peak_bytes + (changing / SLACK).max(LEAST_SLACK.min(changing / 3))
    }
}

/// Of a block of this size, as the system is asked for it.
fn layout_of(size: usize) -> Option<Layout> {
    let align = if size >= HUGE { HUGE } else { ALIGN };
    Layout::from_size_align(size, align).ok()
}

/// Whether blocks of [`HUGE`] and more are mappings of their own, which the kernel has cleared.
const MAPS: bool = cfg!(target_os = "linux");

/// A mapping of its own, with huge pages where a whole number of them fits; null if there is no memory.
#[cfg(target_os = "linux")]
fn map(layout: Layout) -> *mut u8 {
    let (size, align) = (layout.size(), layout.align());
    let Some(more) = size.checked_add(align) else { return std::ptr::null_mut() };
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory; what is before and behind the aligned block is given back, and the advice changes no content (that it may
    // be refused does not matter).
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), more, access, kind, -1, 0);
        if start == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let before = start.align_offset(align);
        let block = start.byte_add(before);
        if before > 0 {
            libc::munmap(start, before);
        }
        if before < align {
            libc::munmap(block.byte_add(size), align - before);
        }
        libc::madvise(block, size / HUGE * HUGE, libc::MADV_HUGEPAGE);
        block.cast()
    }
}

#[cfg(not(target_os = "linux"))]
fn map(layout: Layout) -> *mut u8 {
    // SAFETY: the size is not zero.
    unsafe { System.alloc(layout) }
}

fn release(block: Block) {
    #[cfg(target_os = "linux")]
    if block.size >= HUGE {
        // SAFETY: the block is a mapping of this size, and nobody uses it.
        unsafe { libc::munmap(block.start.cast(), block.size) };
        return;
    }
    if let Some(layout) = layout_of(block.size) {
        // SAFETY: the block came from the system with this layout, and nobody uses it.
        unsafe { System.dealloc(block.start, layout) };
    }
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
            Some(size) => self.give(Block { start, size }),
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

#[cfg(test)]
mod tests {
    use super::*;

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
            let other = keeping.alloc(small);
            other.write_bytes(3, small.size());
            let grown = keeping.realloc(other, small, 2 << 20);
            assert!(grown.read() == 3 && grown.add(small.size() - 1).read() == 3);
            keeping.with(|state| assert!(state.kept_bytes + state.used_bytes <= state.most()));
            keeping.dealloc(grown, Layout::array::<u8>(2 << 20).unwrap());
            // What cannot be had does not count, and what was kept is given back for it.
            let peak = keeping.with(|state| state.peak_bytes);
            assert!(keeping.alloc(Layout::from_size_align(1 << 60, 64).unwrap()).is_null());
            keeping.with(|state| assert!(state.count == 0 && state.peak_bytes == peak));
        }
        keeping.with(|state| assert!(state.used_bytes == 0 && state.kept_bytes <= state.peak_bytes));
        while let Some(block) = keeping.with(|state| (state.count > 0).then(|| state.remove(0))) {
            release(block);
        }
    }
}
