//! Tasks for all threads.

use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `work` for each number below `tasks`. A thread takes the next one when it is done with one, so that all end at about the
/// same time; Rayon cuts a loop into some pieces for each thread, and waits for the last piece.
pub(crate) fn share(tasks: usize, work: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads < 2 {
        return (0..tasks).for_each(work);
    }
    let next = AtomicUsize::new(0);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            work(task);
        }
    });
}
