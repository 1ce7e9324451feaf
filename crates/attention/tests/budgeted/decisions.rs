//! Where clusters are used, where exact attention takes over, and what is audited.

use std::ops::Range;

use iceformer_attention::{KeyValueType, Mask, Method, ThreadTeam};
use iceformer_testing::synthetic::Kind;

use crate::case::{BUDGETED, assert_kept, difference, quantile, shape, synthetic, topical};

#[test]
fn diffuse_inputs_fall_back_to_exact() {
    let team = ThreadTeam::new(2);
    let case = synthetic(Kind::Gauss, shape(300, 6_300, 64, 64), Mask::causal());
    for kind in KeyValueType::ALL {
        let cache = case.cache(kind, 0..6_300, &team);
        let (exact, _, _) = case.run(Method::Exact, &cache, 0..300, &team);
        let (output, _, report) = case.run(BUDGETED, &cache, 0..300, &team);
        assert!(report.fallback_share() > 0.95, "{}", report.fallback_share());
        assert!(quantile(&case.missed(&exact, &output), 1.0) < 1e-3);
        assert!(report.kept_share() > 0.95);
    }
}

#[test]
fn diffuse_inputs_are_decoded_by_exact_attention() {
    let team = ThreadTeam::new(2);
    let case = synthetic(Kind::Gauss, shape(40, 6_300, 64, 64), Mask::causal());
    let cache = case.cache(KeyValueType::Int8, 0..6_300, &team);
    let mut fallbacks = 0;
    for token in 0..40 {
        let exact = case.run(Method::Exact, &cache, token..token + 1, &team);
        let budgeted = case.run(BUDGETED, &cache, token..token + 1, &team);
        // Only the first tokens, which are measured, have their keys added up in another order.
        let is_same = budgeted.0 == exact.0 && budgeted.1 == exact.1;
        assert!(is_same || token < 4 && difference(&budgeted, &exact) < 1e-3, "token {token}");
        fallbacks += budgeted.2.fallback_rows;
    }
    assert_eq!(fallbacks, 40 * 4);
}

/// Its exact rows are known then.
#[test]
fn a_decoded_token_that_is_measured_is_exact() {
    let team = ThreadTeam::new(2);
    let (tokens, keys, prompt) = (400, 8_000, 300);
    let case = topical(shape(tokens, keys, 64, 64), Mask::causal());
    let cache = case.cache(KeyValueType::F32, 0..keys, &team);
    case.run(BUDGETED, &cache, 0..prompt, &team);
    let mut estimated = 0;
    for token in prompt..tokens {
        let exact = case.run(Method::Exact, &cache, token..token + 1, &team);
        let budgeted = case.run(BUDGETED, &cache, token..token + 1, &team);
        if token == prompt + 63 {
            assert!(difference(&exact, &budgeted) < 1e-4);
            assert_eq!((budgeted.2.kept_share(), budgeted.2.fallback_rows), (1.0, 0));
        } else if budgeted.2.kept_share() < 0.5 {
            estimated += 1;
        }
    }
    assert!(estimated > 90, "of 99 others {estimated} are estimated");
}

/// The one decoded token of which rows are measured bears nothing.
#[test]
fn one_decoded_token_gives_no_head_up() {
    let team = ThreadTeam::new(1);
    let (tokens, keys) = (500, 8_300);
    let mut case = topical(shape(tokens, keys, 64, 64), Mask::causal());
    let (prompt, measured) = (300, 300 + 63);
    case.look_for_keys_apart((100..keys).step_by(60), std::iter::once(measured), 20.0);
    let cache = case.cache(KeyValueType::F32, 0..keys, &team);
    case.run(BUDGETED, &cache, 0..prompt, &team);
    // Of four rows a token.
    let fell_back = |tokens: Range<usize>| -> u64 {
        tokens.map(|token| case.run(BUDGETED, &cache, token..token + 1, &team).2.fallback_rows).sum()
    };
    assert!(fell_back(prompt..measured) < 8);
    fell_back(measured..measured + 1);
    assert!(fell_back(measured + 1..measured + 64) > 0, "nothing was learnt from the odd one");
    // The next that is measured is like all others.
    assert!(fell_back(measured + 64..tokens) < 8);
}

/// Whatever its tiles are and wherever it is cut: one token of its last tile, one row of each head.
#[test]
fn every_call_of_enough_tokens_is_audited() {
    let team = ThreadTeam::new(2);
    // A last tile of five tokens; a step that ends amid the call, or three tokens before its end.
    for (keys, tokens) in [(8_600, 128), (8_600, 197), (8_300, 200), (8_195, 151)] {
        let case = topical(shape(tokens, keys, 32, 32), Mask::causal());
        let cache = case.cache(KeyValueType::F32, 0..keys, &team);
        let (_, _, report) = case.run(BUDGETED, &cache, 0..tokens, &team);
        // None of its other tiles is audited.
        let audited = report.audited_missed_mass.count();
        assert!((1..=4).contains(&audited), "{audited} rows of {tokens} tokens up to {keys}");
    }
}

#[test]
fn short_texts_and_narrow_windows_take_exact_attention() {
    let team = ThreadTeam::new(2);
    let case = topical(shape(100, 4_000, 64, 64), Mask::causal());
    let cache = case.cache(KeyValueType::Int8, 0..4_000, &team);
    let (exact, _, _) = case.run(Method::Exact, &cache, 0..100, &team);
    let (output, _, report) = case.run(BUDGETED, &cache, 0..100, &team);
    assert_eq!(exact, output);
    assert_eq!((report.kept_share(), report.fallback_rows, cache.index_bytes()), (1.0, 0, 0));

    let case = topical(shape(100, 7_000, 64, 64), Mask { window: Some(5_000), ..Mask::causal() });
    let cache = case.cache(KeyValueType::Int8, 0..7_000, &team);
    let (exact, _, _) = case.run(Method::Exact, &cache, 0..100, &team);
    let (output, _, report) = case.run(BUDGETED, &cache, 0..100, &team);
    assert_eq!(exact, output);
    assert_eq!((report.kept_share(), cache.index_bytes()), (1.0, 0), "clusters are of no use in a narrow window");
}

#[test]
fn queries_amid_the_keys_use_clusters_without_a_causal_mask() {
    let team = ThreadTeam::new(2);
    let keys = 20_000;
    let case = topical(shape(300, keys, 32, 32), Mask::default());
    let cache = case.cache(KeyValueType::Int8, 0..keys, &team);
    for first in [0, 9_000, keys - 300] {
        let (exact, _, _) = case.run_at(first, &case.mask, Method::Exact, &cache, 0..300, &team);
        let (output, _, report) = case.run_at(first, &case.mask, BUDGETED, &cache, 0..300, &team);
        assert_kept(&case.missed(&exact, &output), &format!("from {first}"));
        assert!(report.kept_share() < 0.4, "from {first}: kept {}", report.kept_share());
    }
}

#[test]
fn regions_stay_small_beside_a_window() {
    let team = ThreadTeam::new(2);
    let keys = 20_000;
    let case = topical(shape(keys, keys, 32, 32), Mask { window: Some(8_192), ..Mask::causal() });
    let mut cache = case.cache(KeyValueType::Int8, 0..0, &team);
    let mut kept = 0.0;
    for first in (0..keys).step_by(2_000) {
        case.append(&mut cache, first..first + 2_000, &team);
        let (_, _, report) = case.run_at(first, &case.mask, BUDGETED, &cache, first..first + 2_000, &team);
        kept = report.kept_share();
    }
    assert!(kept < 0.55, "the last 2,000 queries kept {kept}");
}

/// A row that falls back had clusters to make use of, in any task and whatever else the cache holds.
#[test]
fn queries_before_all_clusters_do_not_fall_back() {
    let team = ThreadTeam::new(1);
    let case = topical(shape(1_000, 7_000, 32, 32), Mask::causal());
    let cache = case.cache(KeyValueType::Int8, 0..7_000, &team);
    case.run(BUDGETED, &cache, 0..1_000, &team);
    let (_, _, report) = case.run_at(0, &case.mask, BUDGETED, &cache, 0..1_000, &team);
    assert_eq!((report.rows, report.fallback_rows), (4_000, 0));
}
