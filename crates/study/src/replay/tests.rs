use super::*;
use crate::synthetic::Kind;

const TOKENS: usize = 2_800;

fn shape(tokens: usize) -> Shape {
    Shape { query_tokens: tokens, key_tokens: tokens, query_heads: 2, kv_heads: 1, key_dim: 16, value_dim: 8 }
}

fn summaries(layer: &Layer<'_>, choices: &[Choice]) -> Vec<Summary> {
    let starts = layer.tiles(3, 1).unwrap();
    let replay = layer.replay(choices, &starts, 2, |_, _| {});
    replay.outcomes.iter().map(|outcomes| Summary::new(outcomes).unwrap()).collect()
}

#[test]
fn a_choice_of_everything_is_exact() {
    let inputs = Inputs::new(Kind::Cluster, shape(TOKENS), 1);
    let layer = Layer { inputs: &inputs, shape: shape(TOKENS), scale: 0.25, causal: true };
    for (choice, summary) in standard_choices(1.0).iter().zip(summaries(&layer, &standard_choices(1.0))) {
        if choice.share < 1.0 {
            continue;
        }
        assert_eq!(summary.rows, 3 * 4 * 2);
        assert!((summary.retained[0] - 1.0).abs() < 1e-4, "{choice:?} retains {:?}", summary.retained);
        assert!(summary.missed_mass[2] < 1e-4 && (summary.touched - 1.0).abs() < 1e-9, "{choice:?}: {summary:?}");
        assert!(summary.operations >= 1.0, "{choice:?} costs {}", summary.operations);
    }
}

#[test]
fn the_oracle_retains_most_and_the_tail_helps() {
    let inputs = Inputs::new(Kind::Cluster, shape(TOKENS), 2);
    let layer = Layer { inputs: &inputs, shape: shape(TOKENS), scale: 0.25, causal: true };
    let choices = standard_choices(0.1);
    let summaries = summaries(&layer, &choices);
    let of = |scorer, tail| {
        let found = choices.iter().position(|choice| {
            choice.scorer == scorer
                && choice.tail == tail
                && choice.page == PAGE_KEYS
                && choice.delta.is_none()
                && !choice.shares_group
        });
        &summaries[found.unwrap()]
    };
    let oracle = of(Scorer::OracleKeys, Tail::None);
    for (choice, summary) in choices.iter().zip(&summaries).filter(|(choice, _)| choice.scorer != Scorer::OracleKeys) {
        assert!(summary.retained[1] <= oracle.retained[1] + 0.01, "{choice:?}: {summary:?}");
    }
    let (plain, estimated) = (of(Scorer::Centroid, Tail::None), of(Scorer::Centroid, Tail::FirstOrder));
    assert!(estimated.missed_mass[0] < plain.missed_mass[0], "{estimated:?} {plain:?}");
    assert!(estimated.operations > plain.operations && plain.operations < 1.0);
    // Keys of one centre lie together, whatever their order: clusters find them where neighbours do not.
    assert!(plain.retained[2] > of(Scorer::PageMean, Tail::None).retained[2] + 0.1);
}

#[test]
fn threads_do_not_matter() {
    let inputs = Inputs::new(Kind::Peaky, shape(TOKENS), 3);
    let layer = Layer { inputs: &inputs, shape: shape(TOKENS), scale: 0.25, causal: true };
    let starts = layer.tiles(2, 5).unwrap();
    assert_eq!(starts[1], TOKENS - TILE, "the last tile is the end");
    let replay = |threads| layer.replay(&standard_choices(0.2)[..3], &starts, threads, |_, _| {});
    let (one, three) = (replay(1), replay(3));
    assert_eq!((one.outcomes, one.limits), (three.outcomes, three.limits));
}

#[test]
fn delta_takes_off_an_error_that_rows_share() {
    // All queries are one: the error of the row computed exactly is that of every row.
    let mut inputs = Inputs::new(Kind::Gauss, shape(512), 4);
    let (first, rest) = inputs.queries.split_at_mut(2 * 16);
    rest.chunks_exact_mut(2 * 16).for_each(|queries| queries.copy_from_slice(first));
    let layer = Layer { inputs: &inputs, shape: shape(512), scale: 1.0, causal: false };
    let plain = Choice {
        scorer: Scorer::PageMean,
        share: 0.1,
        page: PAGE_KEYS,
        tile: 128,
        shares_group: false,
        tail: Tail::None,
        delta: None,
    };
    let summaries = summaries(&layer, &[plain, Choice { delta: Some(64), ..plain }]);
    assert!(summaries[0].missed_mass[0] > 0.01, "{:?}", summaries[0]);
    assert!(summaries[1].missed_mass[2] < 1e-5, "{:?}", summaries[1]);
}

#[test]
fn a_row_that_keeps_nothing_says_nothing() {
    let inputs = Inputs::new(Kind::Gauss, shape(256), 6);
    let layer = Layer { inputs: &inputs, shape: shape(256), scale: 0.25, causal: false };
    let nothing = Choice { share: 0.0, tail: Tail::None, ..standard_choices(0.0)[0] };
    let summary = summaries(&layer, &[nothing])[0];
    assert_eq!((summary.retained, summary.touched), ([0.0; 3], 0.0));
    assert!((summary.relative_error - 1.0).abs() < 1e-9, "{summary:?}");
}

#[test]
fn an_oracle_needs_most_keys_of_a_diffuse_softmax() {
    let needed = |kind| {
        let inputs = Inputs::new(kind, shape(TOKENS), 5);
        let layer = Layer { inputs: &inputs, shape: shape(TOKENS), scale: 0.25, causal: true };
        let limits = layer.replay(&[], &layer.tiles(2, 1).unwrap(), 1, |_, _| {}).limits;
        for limits in &limits {
            assert_eq!((limits.needed.len(), limits.union.len(), limits.error_sum.len()), (8, 2, 8));
            let most = limits.needed.iter().copied().fold(0.0, f64::max);
            assert!(limits.union.iter().any(|&union| union >= most), "a union holds its parts");
        }
        let all: Vec<f64> = limits.iter().flat_map(|limits| limits.needed.clone()).collect();
        quantile(&all, 0.5).unwrap()
    };
    assert!(needed(Kind::Gauss) > 0.5);
    assert!(needed(Kind::Peaky) < 0.02);
}

#[test]
fn short_inputs_are_refused() {
    let inputs = Inputs::new(Kind::Gauss, shape(300), 1);
    let layer = |causal| Layer { inputs: &inputs, shape: shape(300), scale: 1.0, causal };
    let error = layer(true).tiles(4, 0).unwrap_err().to_string();
    assert!(error.contains("300 tokens") && error.contains("2704"), "{error}");
    assert_eq!(layer(false).tiles(4, 0).unwrap().len(), 4);
}
