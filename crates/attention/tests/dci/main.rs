//! Method `dci` against exact references: everything kept is everything computed, what is found on inputs of known
//! difficulty, and one test for each fault of the published code.

mod case;

use case::{SMALL, case, one_head};
use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, DciSettings, HeadReport, KeyValueCache, KeyValueType, Mask, Method,
    Queries, Sequence, ThreadTeam,
};
use iceformer_testing::attention::Problem;
use iceformer_testing::compare::{assert_close, relative_error};
use iceformer_testing::random::Random;
use iceformer_testing::recall::RecallProbe;
use iceformer_testing::synthetic::{Inputs, Kind, Shape};
use proptest::prelude::*;

#[test]
fn everything_kept_equals_exact() {
    let masks = [
        Mask::default(),
        Mask::causal(),
        Mask { keys: Some(0..211), ..Mask::default() },
        Mask { keys: Some(90..300), ..Mask::causal() },
        Mask { keys: Some(17..290), ..Mask::default() },
        Mask { window: Some(40), ..Mask::causal() },
        Mask { window: Some(150), ..Mask::default() },
        Mask { window: Some(64), keys: Some(30..260), causal: true },
    ];
    for key_dim in [7, 64, 128] {
        for mask in &masks {
            let shape = Shape { query_tokens: 40, key_tokens: 300, ..one_head(0, key_dim) };
            // A value wider or narrower than a key, and two heads over each key head.
            let shape = Shape { query_heads: 2, kv_heads: 1, value_dim: key_dim / 2 + 9, ..shape };
            for settings in [DciSettings::PUBLISHED, SMALL, DciSettings { levels: 1, ..SMALL }] {
                case(Kind::Gauss, shape, mask.clone(), key_dim as u64).check_everything_kept(settings);
            }
        }
    }
}

#[test]
fn everything_kept_equals_exact_where_the_published_settings_search() {
    for mask in [Mask::default(), Mask::causal(), Mask { keys: Some(500..1_500), ..Mask::default() }] {
        let shape = Shape { query_tokens: 30, key_tokens: 1_500, ..one_head(0, 64) };
        case(Kind::Cluster, shape, mask, 1).check_everything_kept(DciSettings::PUBLISHED);
    }
}

#[test]
fn unequal_lengths_equal_exact() {
    for (query_tokens, key_tokens) in [(1, 1), (1, 333), (50, 20), (3, 0), (0, 30), (70, 300)] {
        for mask in [Mask::default(), Mask::causal()] {
            let shape = Shape { query_tokens, key_tokens, query_heads: 4, kv_heads: 2, key_dim: 24, value_dim: 16 };
            case(Kind::Gauss, shape, mask, 5).check_everything_kept(SMALL);
        }
    }
}

#[test]
fn prefix_masks_equal_exact() {
    // The prefix sees itself in both directions, the rest is causal: two sequences over one cache.
    let (prefix, tokens) = (120, 300);
    for key_dim in [7, 64, 128] {
        let case = case(Kind::Gauss, one_head(tokens, key_dim), Mask::causal(), 8);
        let team = ThreadTeam::new(2);
        let cache = case.cache(KeyValueType::F32, &team);
        let (first, rest) = case.inputs.queries.split_at(prefix * key_dim);
        let mut output = vec![f32::NAN; tokens * key_dim];
        let (first_output, rest_output) = output.split_at_mut(prefix * key_dim);
        let sequence = |data, first_position, mask, output| Sequence {
            queries: Queries { data, query_heads: 1, first_position },
            cache: &cache,
            mask,
            output,
            log_sum_exp: None,
        };
        let mut batch = [
            sequence(first, 0, Mask { keys: Some(0..prefix), ..Mask::default() }, first_output),
            sequence(rest, prefix, Mask::causal(), rest_output),
        ];
        let method = Method::Dci(DciSettings { kept_keys: tokens, ..SMALL });
        let attention = Attention { method, mask: Mask::default(), scale: case.scale() };
        attention.run_batch(&mut batch, &team, &mut AttentionScratch::default());
        let of_prefix = Problem { queries: first, causal: false, unpadded: Some(0..prefix), ..case.problem() };
        let of_rest = Problem { queries: rest, first_position: prefix, ..case.problem() };
        let mut expected = of_prefix.solve().output;
        expected.extend(of_rest.solve().output);
        assert_close(&output, &expected, 1e-5, format!("prefix mask at width {key_dim}"));
    }
}

/// Recall of the best 20, mass kept, and keys evaluated for each query, on sampled queries over all positions.
fn search_quality(kind: Kind, tokens: usize, mask: &Mask) -> (f64, f64, f64) {
    let samples = 128;
    let dim = 128;
    let shape = Shape { query_tokens: samples, key_tokens: tokens, ..one_head(0, dim) };
    let inputs = Inputs::new(kind, shape, 1);
    let scale = 1.0 / (dim as f32).sqrt();
    let positions: Vec<usize> = (0..samples).map(|sample| (sample + 1) * tokens / samples - 1).collect();
    let seen: Vec<_> = positions.iter().map(|&position| mask.visible(position, tokens)).collect();
    let probe = RecallProbe::new(&inputs.queries, &inputs.keys, dim, f64::from(scale), &seen, 20);
    let team = ThreadTeam::new(2);
    let cache_shape = CacheShape { kv_heads: 1, key_dim: dim, value_dim: samples };
    let mut cache = KeyValueCache::new(cache_shape, KeyValueType::F32);
    cache.append(&inputs.keys, &probe.values, &team);
    let attention = Attention { method: Method::Dci(DciSettings::default()), mask: mask.clone(), scale };
    let (mut recall, mut mass, mut report) = (0.0, 0.0, HeadReport::default());
    for (sample, query) in inputs.queries.chunks_exact(dim).enumerate() {
        let queries = Queries { data: query, query_heads: 1, first_position: positions[sample] };
        let (mut output, mut log_sum_exp) = (vec![0.0; samples], [0.0]);
        let scratch = &mut AttentionScratch::default();
        report += &attention.run(queries, &cache, &mut output, Some(&mut log_sum_exp), &team, scratch).total();
        recall += probe.recall(sample, &output, log_sum_exp[0]);
        mass += probe.mass(sample, log_sum_exp[0]);
    }
    let count = samples as f64;
    (recall / count, mass / count, report.evaluated_keys as f64 / count)
}

#[test]
fn finds_what_the_published_code_finds_for_no_more_keys() {
    // Recall of the published code on an input of this difficulty, and the keys that it evaluates for a query.
    for (tokens, full, causal, published_keys) in
        [(1_024, 0.80, 0.94, 305.0), (4_096, 0.49, 0.73, 585.0), (16_384, 0.25, 0.52, 1_015.0)]
    {
        for (published, mask) in [(full, Mask::default()), (causal, Mask::causal())] {
            let (recall, mass, keys) = search_quality(Kind::Peaky, tokens, &mask);
            let what = format!("{tokens} tokens, causal {}: recall {recall}, mass {mass}, {keys} keys", mask.causal);
            assert!(recall >= published, "{what}; published {published}");
            assert!(keys <= published_keys, "{what}; published {published_keys}");
            assert!(mass <= 1.0 + 1e-4, "{what}");
        }
    }
}

#[test]
fn clusters_are_found_whole() {
    let (recall, _, keys) = search_quality(Kind::Cluster, 4_096, &Mask::default());
    assert!(recall >= 0.9 && keys <= 650.0, "recall {recall} with {keys} keys");
}

#[test]
fn narrow_windows_far_into_a_long_input_are_found() {
    let tokens = 4_096;
    let mask = Mask { window: Some(1_000), ..Mask::causal() };
    let (recall, _, keys) = search_quality(Kind::Peaky, tokens, &mask);
    assert!(recall >= 0.8 && keys <= 800.0, "recall {recall} with {keys} keys");
}

// ---- Faults of the published code, each a test.

#[test]
fn a_batch_of_unequal_lengths_is_each_sequence_alone() {
    let team = ThreadTeam::new(2);
    let shape = |query_tokens, key_tokens| Shape {
        query_tokens,
        key_tokens,
        query_heads: 4,
        kv_heads: 2,
        key_dim: 32,
        value_dim: 20,
    };
    let cases = [
        case(Kind::Peaky, shape(50, 800), Mask { keys: Some(130..800), ..Mask::causal() }, 1),
        case(Kind::Peaky, shape(33, 33), Mask::causal(), 2),
        case(Kind::Peaky, shape(1, 900), Mask { keys: Some(0..700), ..Mask::default() }, 3),
    ];
    let caches: Vec<_> = cases.iter().map(|case| case.cache(KeyValueType::F32, &team)).collect();
    let mut outputs: Vec<Vec<f32>> = cases.iter().map(|case| vec![0.0; case.shape.query_tokens * 4 * 20]).collect();
    let parts = cases.iter().zip(&caches).zip(&mut outputs);
    let mut batch: Vec<Sequence<'_>> = parts
        .map(|((case, cache), output)| Sequence {
            queries: Queries { data: &case.inputs.queries, query_heads: 4, first_position: case.first_position },
            cache,
            mask: case.mask.clone(),
            output,
            log_sum_exp: None,
        })
        .collect();
    let method = Method::Dci(DciSettings::default());
    let attention = Attention { method, mask: Mask::default(), scale: cases[0].scale() };
    attention.run_batch(&mut batch, &team, &mut AttentionScratch::default());
    for (index, (case, output)) in cases.iter().zip(&outputs).enumerate() {
        assert!(*output == case.run(DciSettings::default(), KeyValueType::F32, 1).0, "sequence {index} differs");
    }
}

#[test]
fn padding_of_any_content_on_either_side_changes_nothing() {
    let (tokens, padding) = (700, 90);
    let team = ThreadTeam::new(1);
    let plain = case(Kind::Peaky, one_head(tokens, 32), Mask::default(), 4);
    let settings = DciSettings { kept_keys: tokens, ..DciSettings::default() };
    let expected: Vec<f64> = plain.reference().output;
    for filling in [0.0, 1e4, f32::NAN] {
        for left in [true, false] {
            let mut padded = case(Kind::Peaky, one_head(tokens, 32), Mask::default(), 4);
            let fill = vec![filling; padding * 32];
            padded.shape.key_tokens += padding;
            for data in [&mut padded.inputs.keys, &mut padded.inputs.values] {
                *data = if left { [&fill[..], data].concat() } else { [&data[..], &fill].concat() };
            }
            let range = if left { padding..padding + tokens } else { 0..tokens };
            padded.mask.keys = Some(range);
            let cache = padded.cache(KeyValueType::F32, &team);
            let (output, _, report) = padded.run_on(settings, &cache, &team, 0..tokens);
            assert_eq!(report.kept_keys, (tokens * tokens) as u64, "{filling} on the left: {left}");
            assert_close(&output, &expected, 1e-5, format!("padding of {filling} on the left: {left}"));
            let (output, _, report) = padded.run_on(DciSettings::default(), &cache, &team, 0..tokens);
            assert!(report.kept_keys == 20 * tokens as u64 && output.iter().all(|value| value.is_finite()));
        }
    }
}

#[test]
fn repeated_calls_and_any_number_of_threads_give_the_same_bits() {
    let shape = Shape { query_tokens: 900, key_tokens: 1_500, query_heads: 2, kv_heads: 1, key_dim: 32, value_dim: 16 };
    for settings in [DciSettings::default(), DciSettings { whole_node: 20, ..DciSettings::default() }] {
        for kind in KeyValueType::ALL {
            let case = case(Kind::Cluster, shape, Mask::causal(), 6);
            let team = ThreadTeam::new(2);
            let cache = case.cache(kind, &team);
            let first = case.run_on(settings, &cache, &team, 0..900);
            assert!(first == case.run_on(settings, &cache, &team, 0..900), "{}: a repeated call differs", kind.name());
            for threads in [1, 3, 8] {
                assert!(first == case.run(settings, kind, threads), "{}: {threads} threads differ", kind.name());
            }
        }
    }
}

#[test]
fn another_seed_is_another_search() {
    let case = case(Kind::Gauss, one_head(1_200, 32), Mask::default(), 7);
    let run = |seed| case.run(DciSettings { seed, ..DciSettings::default() }, KeyValueType::F32, 1);
    assert!(run(1) == run(1) && run(1) != run(2));
}

#[test]
fn appended_keys_are_as_if_always_there() {
    // Tokens one by one, in chunks, and truncated and refilled between calls: the index must not depend on the way, nor
    // on the final length, and later keys with ever larger norms must be found.
    let shape = Shape { query_tokens: 600, key_tokens: 600, query_heads: 2, kv_heads: 1, key_dim: 32, value_dim: 32 };
    let mut case = case(Kind::Peaky, shape, Mask::causal(), 9);
    for (position, key) in case.inputs.keys.chunks_exact_mut(32).enumerate() {
        let growth = 1.0 + position as f32 / 100.0;
        key.iter_mut().for_each(|value| *value *= growth);
    }
    let team = ThreadTeam::new(2);
    for settings in [SMALL, DciSettings { whole_node: 40, whole_range: 100, ..DciSettings::PUBLISHED }] {
        for kind in KeyValueType::ALL {
            let whole = case.run(settings, kind, 2);
            for chunk in [1, 7, 250] {
                let mut cache = case.empty_cache(kind);
                let mut output = Vec::new();
                // The mean of an int8 cache settles with its first keys, and with it what earlier queries see.
                case.append(&mut cache, 0..64, &team);
                let start = if kind == KeyValueType::Int8 { 64 } else { 0 };
                if start == 0 {
                    cache.truncate(0);
                }
                for first in (start..600).step_by(chunk) {
                    let tokens = first..600.min(first + chunk);
                    case.append(&mut cache, tokens.clone(), &team);
                    output.extend(case.run_on(settings, &cache, &team, tokens.clone()).0);
                    if first % 3 == 1 {
                        // Take back some of it, with the index, and bring it again.
                        let kept = tokens.end - 60.min(tokens.end - start);
                        cache.truncate(kept);
                        if kept == 0 || kept % 2 == 1 {
                            case.run_on(settings, &cache, &team, tokens.clone());
                        }
                        case.append(&mut cache, kept..tokens.end, &team);
                    }
                }
                assert!(output == whole.0[start * 64..], "{} by {chunk} differs, {settings:?}", kind.name());
            }
        }
    }
}

#[test]
fn a_later_key_with_a_larger_norm_is_found_at_once() {
    let case = case(Kind::Gauss, one_head(2_000, 64), Mask::causal(), 10);
    let team = ThreadTeam::new(1);
    let mut cache = case.cache(KeyValueType::F32, &team);
    case.run_on(DciSettings::default(), &cache, &team, 0..2_000);
    let query = &case.inputs.queries[1_999 * 64..];
    for length in [10.0, 1e3, 1e5] {
        let key: Vec<f32> = query.iter().map(|value| value * length).collect();
        cache.append(&key, &[length; 64], &team);
        let attention =
            Attention { method: Method::Dci(DciSettings::default()), mask: Mask::causal(), scale: case.scale() };
        let mut output = [0.0; 64];
        let queries = Queries { data: query, query_heads: 1, first_position: cache.len() - 1 };
        attention.run(queries, &cache, &mut output, None, &team, &mut AttentionScratch::default());
        assert!(output.iter().all(|value| (value - length).abs() < 1e-3 * length), "{length}: {output:?}");
    }
}

#[test]
fn the_index_copies_keys_once_and_nothing_else() {
    let shape = Shape { query_tokens: 1, key_tokens: 4_096, query_heads: 2, kv_heads: 2, key_dim: 64, value_dim: 64 };
    let case = case(Kind::Gauss, shape, Mask::default(), 11);
    let team = ThreadTeam::new(1);
    for (kind, of_key) in [(KeyValueType::F32, 4), (KeyValueType::Bf16, 2), (KeyValueType::Int8, 2)] {
        let cache = case.cache(kind, &team);
        assert_eq!(cache.index_bytes(), 0, "before the first call");
        case.run_on(DciSettings::default(), &cache, &team, 0..1);
        let keys = of_key * case.inputs.keys.len();
        // Room to grow, up to as much again, and positions, norms and nodes.
        assert!((keys..keys * 3).contains(&cache.index_bytes()), "{} bytes for {keys}", cache.index_bytes());
    }
}

// ---- Beyond the published code.

#[test]
fn narrower_caches_change_little() {
    let case = case(Kind::Cluster, one_head(1_500, 64), Mask::causal(), 12);
    let wide = case.run(DciSettings::default(), KeyValueType::F32, 2).0;
    let wide: Vec<f64> = wide.into_iter().map(f64::from).collect();
    for kind in [KeyValueType::Bf16, KeyValueType::Int8] {
        let narrow = case.run(DciSettings::default(), kind, 2).0;
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let distance = squares(&mut narrow.iter().zip(&wide).map(|(&a, b)| f64::from(a) - b));
        let error = (distance / squares(&mut wide.iter().copied())).sqrt();
        assert!(error < 0.25, "{}: {error}", kind.name());
    }
}

#[test]
fn large_and_shared_key_offsets_cost_int8_nothing() {
    let mut case = case(Kind::Gauss, one_head(900, 64), Mask::default(), 13);
    for key in case.inputs.keys.chunks_exact_mut(64) {
        key[3] += 200.0;
    }
    let expected = case.reference();
    let settings = DciSettings { kept_keys: 900, ..DciSettings::default() };
    let (output, log_sum_exp, _) = case.run(settings, KeyValueType::Int8, 1);
    assert!(relative_error(&output, &expected.output) < 2e-2);
    assert!(relative_error(&log_sum_exp, &expected.log_sum_exp) < 1e-3);
}

#[test]
fn nan_and_infinity_show_and_do_not_spread() {
    let team = ThreadTeam::new(1);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut broken = case(Kind::Gauss, one_head(900, 16), Mask::default(), 14);
        broken.inputs.queries[3 * 16 + 5] = bad;
        let (output, _, _) = broken.run(DciSettings::default(), KeyValueType::F32, 1);
        assert!(output[3 * 16..4 * 16].iter().all(|value| value.is_nan()), "{bad} in a query is lost");
        assert!(output[4 * 16..].iter().all(|value| value.is_finite()), "{bad} spreads to another query");

        // Keys that no query may see, among those that lead the search.
        let mut broken = case(Kind::Gauss, one_head(900, 16), Mask { keys: Some(100..900), ..Mask::default() }, 14);
        broken.inputs.keys[..100 * 16].fill(bad);
        let cache = broken.cache(KeyValueType::F32, &team);
        let (output, _, report) = broken.run_on(DciSettings::default(), &cache, &team, 0..900);
        assert!(output.iter().all(|value| value.is_finite()) && report.kept_keys == 900 * 20);
    }
}

#[test]
fn keys_that_are_no_number_do_not_crowd_out_others() {
    // Mean log-sum-exp behind so many of them, which no query sees.
    let found = |hidden: usize| {
        let (team, tokens, mut random) = (ThreadTeam::new(1), 16_000, Random::new(22));
        let shape = Shape { query_tokens: 64, ..one_head(hidden + tokens, 32) };
        let mut case = case(Kind::Gauss, shape, Mask { keys: Some(hidden..hidden + tokens), ..Mask::default() }, 0);
        case.inputs.keys[..hidden * 32].fill(f32::NAN);
        case.inputs.keys[hidden * 32..].copy_from_slice(&random.normals(tokens * 32, 3.0));
        case.inputs.queries.copy_from_slice(&random.normals(64 * 32, 1.0));
        let cache = case.cache(KeyValueType::F32, &team);
        let (_, log_sum_exp, report) = case.run_on(DciSettings::default(), &cache, &team, 0..64);
        assert_eq!(report.kept_keys, 64 * 20);
        log_sum_exp.iter().sum::<f32>() / 64.0
    };
    let (alone, behind) = (found(0), found(28_000));
    assert!(behind >= alone - 0.3, "mean log-sum-exp {behind} behind keys that are no number, {alone} without them");
}

#[test]
fn queries_that_go_down_together_find_what_each_finds_alone() {
    let team = ThreadTeam::new(1);
    let wide = DciSettings { kept_keys: 4_000, ..DciSettings::PUBLISHED };
    for (tokens, queries, settings) in [(1_500, 130, SMALL), (1_500, 130, DciSettings::PUBLISHED), (6_000, 70, wide)] {
        for (mask, kind) in [(Mask::causal(), KeyValueType::F32), (Mask::default(), KeyValueType::Bf16)] {
            let shape = Shape { query_tokens: queries, ..one_head(tokens, 16) };
            let mut case = case(Kind::Gauss, shape, mask, 23);
            // Keys that are equal, products that are, and numbers that are none.
            case.inputs.keys[200 * 16..700 * 16].fill(0.25);
            case.inputs.keys[700 * 16..900 * 16].iter_mut().for_each(|value| *value = value.round());
            case.inputs.keys[30 * 16] = f32::NAN;
            case.inputs.queries[2 * 16..4 * 16].fill(0.0);
            case.inputs.queries[5 * 16] = f32::INFINITY;
            let cache = case.cache(kind, &team);
            let (output, log_sum_exp, report) = case.run_on(settings, &cache, &team, 0..queries);
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
            let (mut evaluated, mut kept) = (0, 0);
            for token in 0..queries {
                let (alone, log_sum_exp_alone, report) = case.run_on(settings, &cache, &team, token..token + 1);
                let what = format!("query {token} of {tokens} tokens, {settings:?}");
                assert_eq!(bits(&alone), bits(&output[token * 16..][..16]), "{what}");
                assert_eq!(bits(&log_sum_exp_alone), bits(&log_sum_exp[token..][..1]), "{what}");
                evaluated += report.evaluated_keys;
                kept += report.kept_keys;
            }
            assert_eq!((evaluated, kept), (report.evaluated_keys, report.kept_keys));
        }
    }
}

#[test]
fn negative_scale_and_zero_keys_work() {
    let mut case = case(Kind::Gauss, one_head(300, 16), Mask::causal(), 15);
    case.inputs.keys[100 * 16..200 * 16].fill(0.0);
    let attention = |method| Attention { method, mask: Mask::causal(), scale: -0.3 };
    let team = ThreadTeam::new(1);
    let cache = case.cache(KeyValueType::F32, &team);
    let run = |method| {
        let mut output = vec![0.0; 300 * 16];
        let queries = Queries { data: &case.inputs.queries, query_heads: 1, first_position: 0 };
        attention(method).run(queries, &cache, &mut output, None, &team, &mut AttentionScratch::default());
        output
    };
    let expected: Vec<f64> = run(Method::Exact).into_iter().map(f64::from).collect();
    let found = run(Method::Dci(DciSettings { kept_keys: 300, ..SMALL }));
    assert_close(&found, &expected, 1e-5, "negative scale");
    case.inputs.keys.fill(0.0);
    let (output, _, _) = case.run(SMALL, KeyValueType::F32, 1);
    assert!(output.iter().all(|value| value.is_finite()), "all keys zero");
}

#[test]
fn several_settings_take_turns_on_one_cache() {
    let case = case(Kind::Peaky, one_head(900, 32), Mask::causal(), 16);
    let team = ThreadTeam::new(1);
    let cache = case.cache(KeyValueType::F32, &team);
    let settings = [
        DciSettings::default(),
        DciSettings { kept_keys: 5, ..DciSettings::default() },
        DciSettings { levels: 2, ..DciSettings::default() },
        DciSettings { query_beam: Some(3), ..DciSettings::default() },
    ];
    let alone = settings.map(|settings| case.run(settings, KeyValueType::F32, 1));
    for round in 0..2 {
        for (settings, alone) in settings.iter().zip(&alone) {
            let shared = case.run_on(*settings, &cache, &team, 0..900);
            assert!(shared == *alone, "round {round}, {settings:?}");
        }
    }
    assert!(alone[3].2.evaluated_keys < alone[0].2.evaluated_keys, "a narrow beam evaluates less");
}

#[test]
fn calls_on_one_cache_may_overlap() {
    let case = case(Kind::Peaky, one_head(900, 32), Mask::causal(), 17);
    let cache = case.cache(KeyValueType::F32, &ThreadTeam::new(1));
    let alone = case.run(DciSettings::default(), KeyValueType::F32, 1);
    std::thread::scope(|scope| {
        let run = || case.run_on(DciSettings::default(), &cache, &ThreadTeam::new(1), 0..900);
        let threads = [(); 3].map(|()| scope.spawn(run));
        for thread in threads {
            assert!(thread.join().expect("no panic") == alone);
        }
    });
}

#[test]
#[should_panic(expected = "dci setting kept_keys is 0; expected a whole number from 1 to 4294967295")]
fn settings_out_of_range_are_refused() {
    let case = case(Kind::Gauss, one_head(3, 4), Mask::default(), 1);
    case.run(DciSettings { kept_keys: 0, ..DciSettings::default() }, KeyValueType::F32, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_mask_and_settings(
        (query_tokens, key_tokens) in (0_usize..40, 0_usize..300),
        (kv_heads, group) in (1_usize..3, 1_usize..4),
        (key_dim, value_dim) in (1_usize..80, 1_usize..80),
        (causal, window, padding) in
            (any::<bool>(), prop::option::of(1_usize..200), prop::option::of((0_usize..300, 0_usize..300))),
        first_position in 0_usize..350,
        (levels, simple_indices, composite_indices) in (1_usize..9, 1_usize..6, 1_usize..4),
        query_beam in prop::option::of(prop_oneof![1_usize..50, Just(u32::MAX as usize)]),
        (build_beam, build_share, query_share) in (1_usize..9, 0.001_f32..1.0, 0.001_f32..1.0),
        (whole_node, whole_range) in (0_usize..40, 0_usize..80),
        seed in any::<u64>(),
    ) {
        let shape =
            Shape { query_tokens, key_tokens, query_heads: kv_heads * group, kv_heads, key_dim, value_dim };
        let mask = Mask { causal, window, keys: padding.map(|(a, b)| a.min(b)..a.max(b)) };
        let mut case = case(Kind::Gauss, shape, mask, seed);
        case.first_position = first_position;
        let settings = DciSettings {
            levels, simple_indices, composite_indices, build_beam, build_share, query_share, whole_node, whole_range, seed,
            query_beam, kept_keys: 1,
        };
        case.check_everything_kept(settings);
        // Fewer kept than seen: a softmax over some of them, never more mass than there is.
        let (_, log_sum_exp, report) = case.run(DciSettings { kept_keys: 3, ..settings }, KeyValueType::F32, 2);
        let seen = |token| case.mask.visible(first_position + token, key_tokens).len().min(3);
        prop_assert_eq!(report.kept_keys as usize, (0..query_tokens).map(seen).sum::<usize>() * kv_heads * group);
        for (found, all) in log_sum_exp.iter().zip(case.reference().log_sum_exp) {
            prop_assert_eq!(found.is_finite(), all.is_finite());
            let sum_of_none = all == f64::NEG_INFINITY;
            prop_assert!(sum_of_none || f64::from(*found) <= all + 1e-4 * all.abs().max(1.0), "{found} of {all}");
        }
    }

    #[test]
    fn rows_read_back_are_what_was_appended(
        tokens in 1_usize..400,
        (key_dim, value_dim) in (1_usize..70, 1_usize..70),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let (keys, values) = (random.normals(tokens * 2 * key_dim, 1.0), random.normals(tokens * 2 * value_dim, 1.0));
        for (kind, tolerance) in [(KeyValueType::F32, 0.0), (KeyValueType::Bf16, 4e-3), (KeyValueType::Int8, 1e-2)] {
            let mut cache = KeyValueCache::new(CacheShape { kv_heads: 2, key_dim, value_dim }, kind);
            cache.append(&keys, &values, &ThreadTeam::new(1));
            for row in 0..tokens * 2 {
                let (mut key, mut value) = (vec![f32::NAN; key_dim], vec![f32::NAN; value_dim]);
                cache.read_key(row % 2, row / 2, &mut key);
                cache.read_value(row % 2, row / 2, &mut value);
                for (read, written) in [(&key, &keys[row * key_dim..]), (&value, &values[row * value_dim..])] {
                    for (read, written) in read.iter().zip(written) {
                        prop_assert!((read - written).abs() <= tolerance * 5.0, "{}: {read} for {written}", kind.name());
                    }
                }
            }
        }
    }
}
