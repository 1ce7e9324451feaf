//! The team under panics, nesting, many callers and many small jobs.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use super::*;

fn rounds(many: usize) -> usize {
    if cfg!(miri) { 20 } else { many }
}

#[test]
fn every_task_runs_once_for_any_number_of_tasks_and_threads() {
    for threads in [0, 1, 2, 3, 8] {
        let team = ThreadTeam::new(threads);
        assert_eq!(team.threads(), threads.max(1));
        for tasks in [0, 1, 2, 3, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            team.run(tasks, |task, worker| {
                assert!(worker < team.threads());
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
        }
    }
}

#[test]
fn chunks_cover_the_slice_without_overlap() {
    let team = ThreadTeam::new(3);
    let mut data = vec![0_usize; 103];
    team.run_chunks(&mut data, 10, |index, chunk, _| {
        assert_eq!(chunk.len(), if index == 10 { 3 } else { 10 });
        chunk.iter_mut().for_each(|value| *value += index + 1);
    });
    assert!(data.iter().enumerate().all(|(at, &value)| value == at / 10 + 1));
    team.run_chunks(&mut data[..0], 10, |_, _, _| unreachable!("no chunk"));
}

#[test]
fn many_small_jobs_lose_no_task() {
    let team = ThreadTeam::new(4);
    let total = AtomicU64::new(0);
    for job in 0..rounds(20_000) {
        team.run(2 + job % 7, |_, _| {
            total.fetch_add(1, Ordering::Relaxed);
        });
    }
    let expected: usize = (0..rounds(20_000)).map(|job| 2 + job % 7).sum();
    assert_eq!(total.into_inner(), expected as u64);
}

#[test]
fn jobs_after_a_pause_find_the_workers_again() {
    let team = ThreadTeam::new(3);
    for pause in [0, 40, 60, 200, 2_000].repeat(rounds(20) / 4) {
        std::thread::sleep(Duration::from_micros(pause));
        let total = AtomicU64::new(0);
        team.run(50, |task, _| {
            total.fetch_add(task as u64, Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 1225);
    }
}

#[test]
fn all_threads_take_part() {
    let team = ThreadTeam::new(3);
    let seen = Mutex::new(HashSet::new());
    let begin = Instant::now();
    // Each of the three tasks holds its thread until all three have begun.
    team.run(3, |_, worker| {
        lock(&seen).insert(worker);
        while lock(&seen).len() < 3 {
            assert!(begin.elapsed() < Duration::from_secs(60), "a worker never came");
            std::thread::yield_now();
        }
    });
    assert_eq!(seen.into_inner().unwrap(), HashSet::from([0, 1, 2]));
}

#[test]
fn a_panic_reaches_the_caller_and_the_team_goes_on() {
    let team = ThreadTeam::new(3);
    for round in 0..rounds(200) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            team.run(20, |task, _| assert!(task != round % 20, "task {task} fails"));
        }));
        let message = outcome.expect_err("the panic is carried");
        assert_eq!(message.downcast_ref::<String>().unwrap(), &format!("task {} fails", round % 20));
        let total = AtomicU64::new(0);
        team.run(10, |task, _| {
            total.fetch_add(task as u64, Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 45);
    }
}

#[test]
fn nested_jobs_run_on_the_calling_thread() {
    let (team, other) = (ThreadTeam::new(3), ThreadTeam::new(2));
    let total = AtomicU64::new(0);
    team.run(6, |_, _| {
        let thread = std::thread::current().id();
        for inner in [&team, &other] {
            inner.run(5, |task, worker| {
                assert_eq!((thread, worker), (std::thread::current().id(), 0));
                total.fetch_add(task as u64, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(total.into_inner(), 6 * 2 * 10);
    // A panic inside leaves the thread able to start jobs of its own again.
    let nested = catch_unwind(AssertUnwindSafe(|| team.run(2, |_, _| team.run(2, |_, _| panic!("inner")))));
    assert!(nested.is_err());
    let workers = Mutex::new(0);
    let begin = Instant::now();
    team.run(2, |_, _| {
        *lock(&workers) += 1;
        while *lock(&workers) < 2 {
            assert!(begin.elapsed() < Duration::from_secs(60), "the job ran on one thread");
            std::thread::yield_now();
        }
    });
}

#[test]
fn several_callers_take_turns() {
    let team = ThreadTeam::new(3);
    std::thread::scope(|scope| {
        for caller in 0..4_u64 {
            let team = &team;
            scope.spawn(move || {
                for _ in 0..rounds(500) {
                    let mut data = vec![0_u64; 64];
                    team.run_chunks(&mut data, 5, |_, chunk, _| chunk.fill(caller + 1));
                    assert!(data.iter().all(|&value| value == caller + 1));
                }
            });
        }
    });
}

#[test]
fn a_turn_keeps_other_threads_out_until_it_ends() {
    let (team, other) = (ThreadTeam::new(2), ThreadTeam::new(2));
    let order = Mutex::new(Vec::new());
    let turn = team.take_turn();
    std::thread::scope(|scope| {
        scope.spawn(|| team.run(2, |_, _| lock(&order).push("others")));
        std::thread::sleep(Duration::from_millis(20));
        // The thread that has it goes on, with another team between, too.
        team.run(2, |_, _| lock(&order).push("own"));
        let within = other.take_turn();
        team.run(2, |_, _| lock(&order).push("own"));
        drop(within);
        drop(team.take_turn());
        other.run(2, |_, _| ());
        team.run(2, |_, _| lock(&order).push("own"));
        drop(turn);
    });
    assert_eq!(lock(&order)[..], [["own"; 6].as_slice(), &["others"; 2]].concat());
}

#[test]
fn teams_end_with_their_owner() {
    let alive = Arc::new(());
    for round in 0..rounds(100) {
        let team = ThreadTeam::new(4);
        let held = Arc::clone(&alive);
        if round % 2 == 0 {
            team.run(8, |_, _| assert!(Arc::strong_count(&held) >= 2));
        }
        if round % 10 == 0 {
            // Long enough for the workers to park.
            std::thread::sleep(Duration::from_micros(300));
        }
        drop((team, held));
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}

/// A fork while a job runs: the copy has no workers, and a lock that nobody gives back.
#[cfg(all(unix, not(miri)))]
#[test]
fn a_forked_process_works_alone() {
    let team = ThreadTeam::new(2);
    let turn = lock(&team.turn);
    // SAFETY: the child only adds up numbers and ends; it takes no lock but those of the team, which is what is tested.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "no fork");
    if child == 0 {
        let sum = AtomicUsize::new(0);
        team.run(100, |task, worker| {
            sum.fetch_add(task + worker, Ordering::Relaxed);
        });
        let ended = i32::from(sum.into_inner() != 4950);
        // Neither waits.
        std::mem::forget(turn);
        drop(team);
        // SAFETY: ends the process at once, without what the test runner does at an exit.
        unsafe { libc::_exit(ended) };
    }
    drop(turn);
    let start = Instant::now();
    let mut status = -1;
    // SAFETY: `child` is a child of this process, and `status` lives.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        if start.elapsed() > Duration::from_secs(20) {
            // SAFETY: it was not waited for yet.
            unsafe { libc::kill(child, libc::SIGKILL) };
            panic!("the forked process hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status, 0);
}
