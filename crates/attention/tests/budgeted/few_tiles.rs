//! Calls of so few tiles that what they choose is cut into pieces.

use iceformer_attention::{AttentionScratch, KeyValueType, Mask, Method, ThreadTeam};
use iceformer_testing::random::Random;

use crate::case::{BUDGET, BUDGETED, Case, assert_kept, shape, topical};

const KEYS: usize = 9_000;
/// Those that are appended a few at a time.
const QUERIES: usize = 1_000;

/// A text of topics, which one key/value head does not see: its queries look for single keys, whichever their clusters.
fn half_hopeless() -> Case {
    let mut case = topical(shape(QUERIES, KEYS, 64, 64), Mask::causal());
    let mut random = Random::new(8);
    for key in case.inputs.keys.chunks_exact_mut(2 * 64) {
        key[..64].copy_from_slice(&random.normals(64, 1.0));
    }
    for query in case.inputs.queries.chunks_exact_mut(4 * 64) {
        query[..2 * 64].copy_from_slice(&random.normals(2 * 64, 5.0));
    }
    case
}

/// Reads the queries of `case` as some calls, small and larger ones; `before` is told the buffers before each call.
fn read(
    case: &Case,
    method: Method,
    kind: KeyValueType,
    team: &ThreadTeam,
    mut before: impl FnMut(&mut AttentionScratch),
) -> (Vec<f32>, Vec<f32>, f64, f32) {
    let first = KEYS - QUERIES;
    let mut cache = case.cache(kind, 0..first, team);
    let mut scratch = AttentionScratch::default();
    let (mut output, mut sums, mut kept, mut audited, mut token) = (Vec::new(), Vec::new(), 0.0, 0.0_f32, 0);
    // A chunk of eighteen tiles, one of a few, and decoded tokens, one to five at a time.
    let decoded = (0..60).map(|index| 1 + index % 5);
    for count in [800, 15].into_iter().chain(decoded) {
        let tokens = token..QUERIES.min(token + count);
        case.append(&mut cache, first + tokens.start..first + tokens.end, team);
        before(&mut scratch);
        let (rows, log_sum_exp, report) =
            case.run_in(&mut scratch, first + token, &case.mask, method, &cache, tokens.clone(), team);
        output.extend(rows);
        sums.extend(log_sum_exp);
        kept += report.kept_share() * tokens.len() as f64 / QUERIES as f64;
        audited = audited.max(report.audited_missed_mass.quantile(1.0).unwrap_or(0.0));
        cache.compact(team);
        token = tokens.end;
    }
    assert!(token > 980, "{token} queries were read");
    (output, sums, kept, audited)
}

#[test]
fn neither_threads_nor_earlier_calls_change_a_bit() {
    let (case, kind) = (half_hopeless(), KeyValueType::Int8);
    let one = read(&case, BUDGETED, kind, &ThreadTeam::new(1), |_| ());
    for threads in [2, 3, 4] {
        let several = read(&case, BUDGETED, kind, &ThreadTeam::new(threads), |_| ());
        assert!(several == one, "{threads} threads");
    }
    // In buffers in which tiles that are exact here have chosen clusters.
    let team = ThreadTeam::new(2);
    let other = topical(shape(100, 8_100, 64, 64), Mask::causal());
    let other_cache = other.cache(kind, 0..8_100, &team);
    let behind_others = read(&case, BUDGETED, kind, &team, |scratch| {
        let (_, _, report) = other.run_in(scratch, 8_000, &other.mask, BUDGETED, &other_cache, 0..90, &team);
        assert!(report.kept_share() < 0.9, "the other chooses clusters of both heads");
    });
    assert!(behind_others == one);
}

#[test]
fn pieces_come_together_to_what_exact_attention_gives() {
    let team = ThreadTeam::new(2);
    let mut case = half_hopeless();
    for mask in [
        Mask::causal(),
        Mask { window: Some(6_000), ..Mask::causal() },
        Mask { keys: Some(300..KEYS), ..Mask::causal() },
    ] {
        case.mask = mask;
        for kind in KeyValueType::ALL {
            let (exact, exact_sums, ..) = read(&case, Method::Exact, kind, &team, |_| ());
            let (output, sums, kept, audited) = read(&case, BUDGETED, kind, &team, |_| ());
            let what = format!("{:?}, {}", case.mask, kind.name());
            assert_kept(&case.missed(&exact, &output), &what);
            assert!((0.5..0.95).contains(&kept), "{what}: one head keeps all, the other less: {kept}");
            assert!(audited <= 1.2 * BUDGET, "{what}: audited {audited}");
            // The head that keeps all has the same log-sum-exps, too.
            for (exact, sums) in exact_sums.chunks_exact(4).zip(sums.chunks_exact(4)) {
                let difference = (exact[0] - sums[0]).abs().max((exact[1] - sums[1]).abs());
                assert!(difference < 1e-4, "{what}: {difference}");
            }
        }
    }
}
