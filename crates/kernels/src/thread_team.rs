//! A persistent team of threads for the hot path.
//!
//! Fork and join per layer would cost most of the time of a small model, and spinning without parking collapses when
//! another process takes a core; so workers spin briefly, then park. Tasks are handed out one by one from a shared
//! counter, so a worker that loses its core delays only the task it holds.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// What one `run` hands to the workers: the body, how many tasks, and the counter of the next one.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize, usize) + Sync),
    tasks: usize,
}

// SAFETY: `body` points at a `Sync` closure that `run` keeps alive until every worker has finished the job.
unsafe impl Send for Job {}

struct Shared {
    /// Number of the newest job; workers spin on it.
    epoch: AtomicUsize,
    /// The next task to hand out.
    next: AtomicUsize,
    /// Workers that have not finished the newest job.
    running: AtomicUsize,
    stop: AtomicBool,
    job: Mutex<Option<Job>>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A fixed set of threads that run the tasks of one job at a time; the calling thread takes part as worker 0.
pub struct ThreadTeam {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time: a second caller waits here.
    turn: Mutex<()>,
}

/// Spins before a waiting thread yields its core: about 20 µs, longer than the gap between two layers' jobs.
const SPINS: usize = 2_000;

impl ThreadTeam {
    /// A team of `threads` threads, the caller's included. Zero counts as one.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = (1..threads.max(1))
            .map(|worker| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("iceformer-{worker}"))
                    .spawn(move || work(&shared, worker))
                    .expect("the system starts a thread")
            })
            .collect();
        Self { shared, workers, turn: Mutex::new(()) }
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
    /// are done. `worker` is below [`ThreadTeam::threads`] and no two threads have the same at one time.
    ///
    /// # Panics
    /// Carries the first panic of a task to the caller, after all threads have left the job.
    pub fn run(&self, tasks: usize, body: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let body: &(dyn Fn(usize, usize) + Sync) = &body;
        // SAFETY: only the lifetime changes. Every worker leaves the job before this function returns (`running`
        // reaches zero below, also when a task panics), so none uses `body` after it ends.
        let body: &'static (dyn Fn(usize, usize) + Sync) = unsafe { std::mem::transmute(body) };
        let shared = &*self.shared;
        shared.next.store(0, Ordering::Relaxed);
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        {
            let mut job = shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *job = Some(Job { body, tasks });
            shared.epoch.fetch_add(1, Ordering::Release);
            shared.wake.notify_all();
        }
        run_tasks(shared, body, tasks, 0);
        let mut spins = 0;
        while shared.running.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = shared.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `data` into chunks of `chunk` elements (the last may be shorter) and calls `body(index, chunk, worker)`
    /// on each, in parallel.
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
        self.shared.stop.store(true, Ordering::Release);
        {
            let _job = self.shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn run_tasks(shared: &Shared, body: &(dyn Fn(usize, usize) + Sync), tasks: usize, worker: usize) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let task = shared.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            body(task, worker);
        }
    }));
    if let Err(panic) = outcome {
        shared.next.store(tasks, Ordering::Relaxed);
        shared.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(panic);
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            std::hint::spin_loop();
            spins += 1;
        }
        let job = {
            let mut job = shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            while shared.epoch.load(Ordering::Acquire) == seen {
                job = shared.wake.wait(job).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            seen = shared.epoch.load(Ordering::Acquire);
            *job
        };
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        let Some(job) = job else { continue };
        // SAFETY: `run` waits for `running` to reach zero before the closure ends, and this worker counts as running.
        run_tasks(shared, unsafe { &*job.body }, job.tasks, worker);
        shared.running.fetch_sub(1, Ordering::Release);
    }
}
