//! The door to a job: workers enter while it is open, the caller closes it and waits until all have left.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::lock;

/// How long a thread spins before it parks: longer than the gap between the jobs of two layers, shorter than what
/// another process on the core would notice.
const SPIN: Duration = Duration::from_micros(50);

/// Bit of [`Gate::state`] that is set while workers may enter.
const OPEN: u64 = 1 << 31;
/// One opening more.
const OPENING: u64 = 1 << 32;

/// Everything is sequentially consistent where a thread that is about to park and one that might have to wake it look
/// at each other: each first writes its own side, then reads the other's, so at least one of them sees the other.
#[derive(Default)]
pub(super) struct Gate {
    /// Openings so far (high 32 bits), [`OPEN`], and workers inside (low 31 bits).
    state: AtomicU64,
    /// Workers parked outside.
    parked: AtomicUsize,
    /// Whether the caller is parked until the last worker leaves.
    caller_parked: AtomicBool,
    mutex: Mutex<()>,
    opened: Condvar,
    emptied: Condvar,
}

impl Gate {
    /// Opens the gate and wakes parked workers. What the caller wrote before is visible to whoever enters.
    pub fn open(&self) {
        let state = self.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & (OPENING - 1), 0, "closed, nobody inside");
        self.state.store(state.wrapping_add(OPENING) | OPEN, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.mutex));
            self.opened.notify_all();
        }
    }

    /// Closes the gate and returns when nobody is inside. What workers wrote inside is visible afterwards.
    pub fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let empty = || self.state.load(Ordering::SeqCst) & (OPEN - 1) == 0;
        if spin_until(empty) {
            return;
        }
        // The core is worth more to a worker that has lost its own than to a thread that waits for it.
        let mut guard = lock(&self.mutex);
        self.caller_parked.store(true, Ordering::SeqCst);
        while !empty() {
            guard = self.emptied.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        self.caller_parked.store(false, Ordering::Relaxed);
    }

    /// Waits for an opening that is not the one in `seen`, and enters if the gate is still open. Whoever entered
    /// must leave.
    pub fn enter(&self, seen: &mut u32) -> bool {
        let opening = |state: u64| (state >> 32) as u32;
        let new = || opening(self.state.load(Ordering::SeqCst)) != *seen;
        if !spin_until(new) {
            let mut guard = lock(&self.mutex);
            self.parked.fetch_add(1, Ordering::SeqCst);
            while !new() {
                guard = self.opened.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            self.parked.fetch_sub(1, Ordering::Relaxed);
        }
        let entered = self
            .state
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| (state & OPEN != 0).then_some(state + 1));
        let (Ok(state) | Err(state)) = entered;
        *seen = opening(state);
        entered.is_ok()
    }

    /// Leaves; the last one out wakes a parked caller.
    pub fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        if before & (OPEN | (OPEN - 1)) == 1 && self.caller_parked.load(Ordering::SeqCst) {
            drop(lock(&self.mutex));
            self.emptied.notify_one();
        }
    }
}

/// Spins until `done`, [`SPIN`] at most; tells whether it is.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return done();
        }
    }
}
