//! Method `budgeted` against exact attention: what it misses, when it falls back, and that nothing but the inputs
//! decides its result.

mod budget;
mod case;
mod decisions;
mod few_tiles;
mod records;
mod sorted_keys;

use iceformer_attention::{BudgetSettings, DciSettings, KeyValueType, Mask, Method, ThreadTeam};

use case::{BUDGETED, assert_kept, shape, topical};

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let case = topical(shape(200, 6_500, 64, 64), Mask::causal());
    let run = |threads| {
        let team = ThreadTeam::new(threads);
        case.run(BUDGETED, &case.cache(KeyValueType::Int8, 0..6_500, &team), 0..200, &team)
    };
    let one = run(1);
    for threads in [2, 3, 4] {
        let (output, log_sum_exp, report) = run(threads);
        assert!(one.0 == output && one.1 == log_sum_exp, "{threads} threads");
        assert_eq!(one.2, report);
    }
}

#[test]
fn values_of_padding_are_no_measure() {
    // A region of keys that nobody sees, with values beside which no error would count.
    let hidden = 64 + 1024;
    let mask = Mask { keys: Some(hidden..9_000), ..Mask::causal() };
    let case = topical(shape(512, 9_000, 32, 32), mask);
    let mut spoilt = topical(case.shape, case.mask.clone());
    spoilt.inputs.values[..hidden * 2 * 32].iter_mut().for_each(|value| *value *= 1e5);
    let team = ThreadTeam::new(2);
    let run = |method| {
        let cache = spoilt.cache(KeyValueType::F32, 0..9_000, &team);
        spoilt.run(method, &cache, 0..512, &team)
    };
    let ((exact, ..), (output, _, report)) = (run(Method::Exact), run(BUDGETED));
    assert_kept(&case.missed(&exact, &output), "padding");
    assert!(report.kept_share() < 0.9, "{}", report.kept_share());
}

#[test]
fn broken_numbers_show_where_exact_attention_shows_them() {
    let team = ThreadTeam::new(1);
    for value in [f32::NAN, f32::INFINITY] {
        let mut case = topical(shape(60, 6_000, 64, 64), Mask::causal());
        // Key 3,000 of the first key/value head.
        case.inputs.keys[3_000 * 2 * 64 + 5] = value;
        let cache = case.cache(KeyValueType::F32, 0..6_000, &team);
        let (exact, _, _) = case.run(Method::Exact, &cache, 0..60, &team);
        let (output, _, _) = case.run(BUDGETED, &cache, 0..60, &team);
        for (row, (exact, output)) in exact.chunks_exact(64).zip(output.chunks_exact(64)).enumerate() {
            let (exact, output) =
                (exact.iter().all(|value| value.is_finite()), output.iter().all(|value| value.is_finite()));
            assert_eq!(exact, output, "{value}: row {row}");
        }
    }
}

#[test]
fn equal_values_and_equal_keys_are_no_trouble() {
    let team = ThreadTeam::new(2);
    let mut case = topical(shape(100, 6_000, 16, 16), Mask::causal());
    for (keys, values) in [(true, false), (false, true), (true, true)] {
        if keys {
            case.inputs.keys.fill(0.5);
        }
        if values {
            case.inputs.values.fill(2.0);
        }
        for kind in KeyValueType::ALL {
            let cache = case.cache(kind, 0..6_000, &team);
            let (exact, _, _) = case.run(Method::Exact, &cache, 0..100, &team);
            let (output, _, _) = case.run(BUDGETED, &cache, 0..100, &team);
            let difference = exact.iter().zip(&output).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference < 0.02, "{}: {difference}", kind.name());
        }
    }
}

#[test]
#[should_panic(expected = "the budget is 0; expected a share above 0 and up to 1")]
fn a_budget_of_nothing_is_refused() {
    let case = topical(shape(1, 10, 16, 16), Mask::causal());
    let team = ThreadTeam::new(1);
    let cache = case.cache(KeyValueType::F32, 0..10, &team);
    case.run(Method::Budgeted(BudgetSettings { budget: 0.0 }), &cache, 0..1, &team);
}

/// Tasks of one caller's team call attention themselves, while another thread does with the same team and cache: neither
/// waits for what the other holds.
#[test]
fn calls_from_within_tasks_and_beside_them_share_a_cache() {
    let case = topical(shape(300, 6_000, 16, 16), Mask::causal());
    for method in [BUDGETED, Method::Dci(DciSettings::default())] {
        let team = ThreadTeam::new(3);
        let cache = case.cache(KeyValueType::Int8, 0..6_000, &team);
        let (done, wait) = std::sync::mpsc::channel();
        let method = &method;
        std::thread::scope(|scope| {
            let (team, cache, case) = (&team, &cache, &case);
            let within = done.clone();
            scope.spawn(move || {
                for _ in 0..10 {
                    team.run(4, |task, _| drop(case.run(*method, cache, task * 20..task * 20 + 20, team)));
                }
                within.send(()).unwrap();
            });
            scope.spawn(move || {
                (0..10).for_each(|_| drop(case.run(*method, cache, 0..100, team)));
                done.send(()).unwrap();
            });
            for _ in 0..2 {
                // A hang would end with the test's own limit of time, and say nothing.
                if wait.recv_timeout(std::time::Duration::from_secs(60)).is_err() {
                    eprintln!("two calls wait for each other");
                    std::process::abort();
                }
            }
        });
    }
}
