//! A persistent team of threads for the hot path.
//!
//! Fork and join per layer would cost most of the time of a small model, and spinning without parking collapses when
//! another process takes a core. So waiting threads spin briefly, then park; tasks are handed out one by one from a
//! shared counter; and the caller waits only for workers that have *entered* the job. A worker that has lost its core
//! delays nothing but the one task it may hold.

mod gate;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use gate::Gate;

type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// What one `run` hands to the workers.
#[derive(Clone, Copy)]
struct Job {
    body: *const Body<'static>,
    tasks: usize,
}

struct Shared {
    gate: Gate,
    /// The newest job: written by the caller while the gate is closed and nobody is inside, read by workers inside.
    job: UnsafeCell<Option<Job>>,
    /// The next task to hand out.
    next: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the gate orders every access to `job` (see there), and the body that it points at is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is only followed inside the gate, on whatever thread.
unsafe impl Send for Shared {}

/// A fixed set of threads that run the tasks of one job at a time; the calling thread takes part as worker 0.
pub struct ThreadTeam {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The process that the workers are in. A fork copies the team and leaves them behind, and whatever was locked stays so.
    process: u32,
    /// One job at a time: a second caller waits here.
    turn: Mutex<()>,
}

thread_local! {
    /// Whether this thread runs a task of some team: a job started from within runs on this thread alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The teams whose turns this thread has taken.
    static TURNS: RefCell<Vec<*const ThreadTeam>> = const { RefCell::new(Vec::new()) };
}

/// The turn of one thread with a team; see [`ThreadTeam::take_turn`].
#[must_use = "the turn ends when this is dropped"]
pub struct Turn<'a> {
    /// Nothing where there was nothing to take.
    taken: Option<(&'a ThreadTeam, MutexGuard<'a, ()>)>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some((team, _)) = self.taken {
            TURNS.with_borrow_mut(|turns| turns.retain(|taken| !std::ptr::eq(*taken, team)));
        }
    }
}

impl ThreadTeam {
    /// A team of `threads` threads, the caller's included. Zero counts as one. Where the system refuses to start a
    /// thread the team is smaller.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            gate: Gate::default(),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..threads.max(1))
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                let builder = std::thread::Builder::new().name(format!("iceformer-{worker}"));
                builder.spawn(move || work(&shared, worker)).ok()
            })
            .collect();
        Self { shared, workers, process: std::process::id(), turn: Mutex::new(()) }
    }

    /// How many threads a process may use by default: the cores its affinity mask and control group allow.
    pub fn available() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(task, worker)` once for every task below `tasks`, in any order, on all threads; returns when all
    /// are done. `worker` is below [`ThreadTeam::threads`], and no two threads have the same one within one call.
    ///
    /// Several threads may call at once: they take turns. A call from within a task, of this or another team, runs
    /// all its tasks on the calling thread, and so does one in a process that was forked after the team was made.
    ///
    /// # Panics
    /// Carries the first panic of a task to the caller, after all threads have left the job; tasks not yet begun are
    /// dropped. The team stays usable.
    pub fn run(&self, tasks: usize, body: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.runs_alone() {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        let _turn = self.take_turn();
        let shared = &*self.shared;
        let body: &Body<'_> = &body;
        // SAFETY: only the lifetime changes. Workers use `body` inside the gate only, and `close` below returns when
        // the last one has left; nothing between can unwind, because `run_tasks` catches panics.
        let body: &'static Body<'static> = unsafe { std::mem::transmute(body) };
        // SAFETY: the gate is closed and nobody is inside: the last call's `close` has returned, and `turn` keeps
        // other callers out.
        unsafe { *shared.job.get() = Some(Job { body, tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.open();
        run_tasks(shared, body, tasks, 0);
        shared.gate.close();
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Takes the calling thread's turn for all calls until the result is dropped: other threads wait. Who locks something
    /// that tasks of others may lock as well takes the turn first. Else two threads could wait for each other: one that
    /// holds the lock for its turn, and one whose tasks want the lock.
    pub fn take_turn(&self) -> Turn<'_> {
        if self.runs_alone() || TURNS.with_borrow(|turns| turns.contains(&std::ptr::from_ref(self))) {
            return Turn { taken: None };
        }
        let turn = lock(&self.turn);
        TURNS.with_borrow_mut(|turns| turns.push(self));
        Turn { taken: Some((self, turn)) }
    }

    /// Whether what this thread asks for runs on no other, so that it needs no turn.
    fn runs_alone(&self) -> bool {
        self.workers.is_empty() || INSIDE.get() || self.is_forked()
    }

    fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    /// Splits `data` into chunks of `chunk` elements (the last may be shorter) and calls `body(index, chunk, worker)`
    /// on each, in parallel.
    ///
    /// # Panics
    /// When `chunk` is zero; otherwise as [`ThreadTeam::run`].
    pub fn run_chunks<T: Send>(&self, data: &mut [T], chunk: usize, body: impl Fn(usize, &mut [T], usize) + Sync) {
        assert!(chunk > 0, "a chunk has at least one element");
        let length = data.len();
        let base = SendPointer(data.as_mut_ptr());
        self.run(length.div_ceil(chunk), |index, worker| {
            let start = index * chunk;
            let count = chunk.min(length - start);
            // SAFETY: `start + count <= length`, and chunks of different tasks do not overlap; each task runs once.
            let part = unsafe { std::slice::from_raw_parts_mut(base.get().add(start), count) };
            body(index, part, worker);
        });
    }
}

struct SendPointer<T>(*mut T);

impl<T> SendPointer<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: the pointer is only used for disjoint chunks of a slice of `T: Send` (see `run_chunks`).
unsafe impl<T: Send> Sync for SendPointer<T> {}

impl Drop for ThreadTeam {
    fn drop(&mut self) {
        if self.is_forked() {
            // Nobody is there to be waited for.
            self.workers.drain(..).for_each(std::mem::forget);
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        // SAFETY: no call is running (`&mut self`), so the gate is closed and nobody is inside.
        unsafe { *self.shared.job.get() = None };
        self.shared.gate.open();
        self.shared.gate.close();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Takes tasks until none is left; keeps the first panic for the caller.
fn run_tasks(shared: &Shared, body: &Body<'_>, tasks: usize, worker: usize) {
    INSIDE.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let task = shared.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            body(task, worker);
        }
    }));
    INSIDE.set(false);
    if let Err(panic) = outcome {
        shared.next.store(tasks, Ordering::Relaxed);
        lock(&shared.panic).get_or_insert(panic);
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    while !shared.stop.load(Ordering::Acquire) {
        if shared.gate.enter(&mut seen) {
            // SAFETY: inside the gate nobody writes `job`, and the caller keeps the body alive until all have left.
            if let Some(Job { body, tasks }) = unsafe { *shared.job.get() } {
                // SAFETY: as above.
                run_tasks(shared, unsafe { &*body }, tasks, worker);
            }
            shared.gate.leave();
        }
    }
}
