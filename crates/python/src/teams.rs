//! Thread teams, kept from call to call.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use iceformer_attention::{ArrayScratch, ThreadTeam};
use pyo3::prelude::*;

/// What a process keeps.
#[derive(Default)]
struct Kept {
    /// By number of threads.
    teams: HashMap<usize, Arc<ThreadTeam>>,
    /// Buffers that no call uses now.
    scratches: Vec<ArrayScratch>,
}

/// A place for what one process keeps.
struct Place {
    /// 0: free.
    process: AtomicU32,
    kept: Mutex<Option<Kept>>,
}

/// Each process of a line of forks takes the next: the threads of its parent's teams stayed behind, and another thread of
/// its parent may have held the lock when it forked, so that it stays locked for ever.
static PLACES: [Place; MOST_FORKS] =
    [const { Place { process: AtomicU32::new(0), kept: Mutex::new(None) } }; MOST_FORKS];

/// Processes in a line, each forked by the one before, that keep anything.
const MOST_FORKS: usize = 16;
/// Most buffers kept: calls from more threads at once make and drop their own.
const MOST_SCRATCHES: usize = 4;
/// Teams from which those that nothing uses are given back before the next is made.
const MANY_TEAMS: usize = 4;

fn with_kept<T>(work: impl FnOnce(&mut Kept) -> T) -> T {
    let process = std::process::id();
    let is_ours = |place: &&Place| {
        let taken = place.process.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed);
        taken.map_or_else(|owner| owner == process, |_| true)
    };
    match PLACES.iter().find(is_ours) {
        Some(place) => {
            let mut kept = place.kept.lock().unwrap_or_else(PoisonError::into_inner);
            work(kept.get_or_insert_default())
        }
        None => work(&mut Kept::default()),
    }
}

/// The team of `threads` threads.
pub fn team(threads: usize) -> Arc<ThreadTeam> {
    with_kept(|kept| {
        if let Some(team) = kept.teams.get(&threads) {
            return Arc::clone(team);
        }
        if kept.teams.len() >= MANY_TEAMS {
            kept.teams.retain(|_, team| Arc::strong_count(team) > 1);
        }
        Arc::clone(kept.teams.entry(threads).or_insert_with(|| Arc::new(ThreadTeam::new(threads))))
    })
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
