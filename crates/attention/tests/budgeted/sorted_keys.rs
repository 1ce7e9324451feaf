//! Keys that were sorted into their clusters, through appending and cutting.

use iceformer_attention::{CacheShape, KeyValueCache, KeyValueType, Mask, Method, ThreadTeam};

use crate::case::{BUDGET, BUDGETED, assert_kept, difference, quantile, shape, topical};

#[test]
fn clusters_follow_truncation_and_appending() {
    let team = ThreadTeam::new(2);
    let case = topical(shape(200, 7_000, 64, 64), Mask::causal());
    for kind in KeyValueType::ALL {
        let fresh = case.cache(kind, 0..7_000, &team);
        let (exact, _, _) = case.run(Method::Exact, &fresh, 0..200, &team);
        let mut cache = case.cache(kind, 0..7_000, &team);
        case.run(BUDGETED, &cache, 0..200, &team);
        let bytes = cache.index_bytes();
        cache.truncate(5_000);
        let left = cache.index_bytes();
        assert!(left > bytes / 3 && left < bytes, "{left} of {bytes}: the regions of the first 4,160 keys");
        // Other keys for a while, clustered, then dropped again.
        case.append(&mut cache, 0..1_500, &team);
        case.run(BUDGETED, &cache, 0..1, &team);
        cache.truncate(5_000);
        case.append(&mut cache, 5_000..6_990, &team);
        case.append(&mut cache, 6_990..7_000, &team);
        assert!(read_all(&fresh) == read_all(&cache), "{}", kind.name());
        let (output, _, report) = case.run(BUDGETED, &cache, 0..200, &team);
        assert_kept(&case.missed(&exact, &output), kind.name());
        assert!(report.kept_share() < 0.8, "{}: kept {}", kind.name(), report.kept_share());
    }
}

#[test]
fn a_token_taken_back_costs_the_last_region_only() {
    let team = ThreadTeam::new(1);
    // The last region ends with the last key.
    let keys = 64 + 9 * 1024;
    let case = topical(shape(400, keys, 32, 32), Mask::causal());
    let mut cache = case.cache(KeyValueType::Int8, 0..keys, &team);
    case.run(BUDGETED, &cache, 0..400, &team);
    case.run_at(keys - 1, &case.mask, BUDGETED, &cache, 0..1, &team);
    cache.compact(&team);
    cache.truncate(keys - 1);
    assert!(cache.index_bytes() > 0);
    case.append(&mut cache, keys - 1..keys, &team);
    let (exact, _, _) = case.run_at(keys - 1, &case.mask, Method::Exact, &cache, 0..1, &team);
    let (output, _, report) = case.run_at(keys - 1, &case.mask, BUDGETED, &cache, 0..1, &team);
    assert!(report.kept_share() < 0.6, "{}", report.kept_share());
    assert!(quantile(&case.missed(&exact, &output), 1.0) <= f64::from(BUDGET));
}

/// Every key and value of head 1, as the cache holds them.
fn read_all(cache: &KeyValueCache) -> Vec<f32> {
    let CacheShape { key_dim, value_dim, .. } = cache.shape();
    let (mut key, mut value) = (vec![0.0; key_dim], vec![0.0; value_dim]);
    let mut all = Vec::new();
    for index in 0..cache.len() {
        cache.read_key(1, index, &mut key);
        cache.read_value(1, index, &mut value);
        all.extend(key.iter().chain(&value));
    }
    all
}

#[test]
fn keys_sorted_into_their_clusters_are_held_once_and_are_the_same() {
    let team = ThreadTeam::new(2);
    for (kind, key_dim, value_dim) in
        [(KeyValueType::F32, 20, 16), (KeyValueType::Bf16, 36, 80), (KeyValueType::Int8, 128, 128)]
    {
        let case = topical(shape(300, 9_001, key_dim, value_dim), Mask::causal());
        let plain = case.cache(kind, 0..9_001, &team);
        let mut cache = case.cache(kind, 0..9_001, &team);
        let unsorted = case.cache(kind, 0..9_001, &team);
        case.run(BUDGETED, &unsorted, 0..300, &team);
        case.run(BUDGETED, &cache, 0..300, &team);
        let copied = cache.index_bytes();
        cache.compact(&team);
        let what = kind.name();
        assert!(cache.index_bytes() + cache.bytes() * 7 / 10 < copied, "{what}: {copied} to {}", cache.index_bytes());
        if kind == KeyValueType::Int8 {
            let brain = case.cache(KeyValueType::Bf16, 0..9_001, &team).bytes();
            let held = cache.bytes() + cache.index_bytes();
            assert!(held * 10 <= brain * 6, "{held} bytes for keys, values and clusters, {brain} for bf16");
        }
        assert!(read_all(&plain) == read_all(&cache), "{what}");

        // Clusters lie in the cache; queries see all that was sorted, part of it, or none.
        let allowed = if kind == KeyValueType::F32 { 5e-5 } else { 3e-3 };
        let [before, after] = [&unsorted, &cache].map(|cache| case.run(BUDGETED, cache, 0..300, &team));
        assert!(difference(&before, &after) < allowed, "{what}: {}", difference(&before, &after));
        assert_eq!(before.2.kept_keys, after.2.kept_keys, "{what}");
        let masks = [
            Mask::causal(),
            Mask { window: Some(40), ..Mask::causal() },
            Mask { window: Some(4_000), ..Mask::causal() },
            Mask { keys: Some(700..7_000), ..Mask::default() },
        ];
        for mask in masks {
            for (first_position, tokens) in [(8_701, 0..300), (9_000, 0..1), (3_000, 0..70), (20, 0..70), (1_500, 0..1)]
            {
                let run = |cache| case.run_at(first_position, &mask, Method::Exact, cache, tokens.clone(), &team);
                let difference = difference(&run(&plain), &run(&cache));
                assert!(difference < allowed, "{what}, {mask:?} from {first_position}: {difference}");
            }
        }

        // More keys, more clusters, and back to fewer keys than were sorted.
        case.append(&mut cache, 0..4_000, &team);
        case.run_at(12_701, &case.mask, BUDGETED, &cache, 0..300, &team);
        cache.compact(&team);
        cache.truncate(6_500);
        assert!(read_all(&plain)[..read_all(&cache).len()] == read_all(&cache), "{what}");
        case.append(&mut cache, 6_500..9_001, &team);
        assert!(read_all(&plain) == read_all(&cache), "{what}");
        let (exact, _, _) = case.run(Method::Exact, &plain, 0..300, &team);
        let (output, _, _) = case.run(BUDGETED, &cache, 0..300, &team);
        assert_kept(&case.missed(&exact, &output), what);
    }
}

#[test]
fn windows_and_padding_keep_keys_in_order() {
    let team = ThreadTeam::new(2);
    let masks = [
        Mask { window: Some(6_000), ..Mask::causal() },
        Mask { keys: Some(700..9_000), ..Mask::causal() },
        Mask { keys: Some(700..9_000), ..Mask::default() },
    ];
    for mask in masks {
        let case = topical(shape(300, 9_000, 16, 16), mask);
        let mut cache = case.cache(KeyValueType::F32, 0..9_000, &team);
        case.run(BUDGETED, &cache, 0..300, &team);
        let copied = cache.index_bytes();
        cache.compact(&team);
        assert!(copied > 0 && cache.index_bytes() == copied, "{:?}: rows see part of a region", case.mask);
    }
}
