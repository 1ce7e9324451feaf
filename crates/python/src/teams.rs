//! Thread teams, kept from call to call.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use iceformer_attention::{ArrayScratch, ThreadTeam};
use pyo3::prelude::*;

/// What a process keeps.
#[derive(Default)]
struct Kept {
    /// Process that all this belongs to.
    process: u32,
    /// By number of threads.
    teams: HashMap<usize, Arc<ThreadTeam>>,
    /// Buffers that no call uses now.
    scratches: Vec<ArrayScratch>,
}

static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

/// Most buffers kept: calls from more threads at once make and drop their own.
const MOST_SCRATCHES: usize = 4;

fn with_kept<T>(work: impl FnOnce(&mut Kept) -> T) -> T {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    let kept = match &mut *kept {
        Some(kept) if kept.process == process => kept,
        other => {
            // Forked: the threads of these teams stayed behind, and dropping a team would wait for them for ever.
            std::mem::forget(other.take());
            other.insert(Kept { process, ..Kept::default() })
        }
    };
    work(kept)
}

/// The team of `threads` threads.
pub fn team(threads: usize) -> Arc<ThreadTeam> {
    with_kept(|kept| Arc::clone(kept.teams.entry(threads).or_insert_with(|| Arc::new(ThreadTeam::new(threads)))))
}

/// Runs `work` with buffers of an earlier call.
pub fn with_scratch<T>(work: impl FnOnce(&mut ArrayScratch) -> T) -> T {
    let mut scratch = with_kept(|kept| kept.scratches.pop()).unwrap_or_default();
    let result = work(&mut scratch);
    with_kept(|kept| {
        if kept.scratches.len() < MOST_SCRATCHES {
            kept.scratches.push(scratch);
        }
    });
    result
}

/// Threads that a call uses by default: the cores that this process may use.
#[pyfunction]
pub fn available_threads() -> usize {
    ThreadTeam::available()
}
