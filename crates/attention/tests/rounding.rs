//! Keys and values that method `budgeted` may round, of callers who left their type open: when it does, and that the
//! budget is kept.

use std::ops::ControlFlow;

use iceformer_attention::{
    ArrayScratch, Arrays, Attention, BudgetSettings, Elements, ElementsMut, KeyValueType, Mask, Method, Report,
    StridedView, ThreadTeam,
};
use iceformer_kernels::InstructionSet;
use iceformer_testing::random::Random;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const QUERIES: usize = 512;
const KEYS: usize = 5_500;
const WIDTH: usize = 24;

/// Queries, keys and values, `[heads, tokens, WIDTH]` each.
struct Inputs([Vec<f32>; 3]);

impl Inputs {
    fn new() -> Self {
        let mut random = Random::new(3);
        let [keys, values] = [(); 2].map(|()| random.normals(KV_HEADS * KEYS * WIDTH, 1.0));
        // Each query looks for one key, so that it matters where a logit is off.
        let heads = keys.chunks_exact(KEYS * WIDTH).flat_map(|keys| [keys; HEADS / KV_HEADS]);
        let queries = heads.flat_map(|keys| keys[..QUERIES * WIDTH].iter().map(|value| 3.0 * value)).collect();
        Self([queries, keys, values])
    }

    /// With one channel of the keys so large, and of either sign, that one step of an integer is worth 12.
    fn with_a_loud_channel() -> Self {
        let mut inputs = Self::new();
        for (row, key) in inputs.0[1].chunks_exact_mut(WIDTH).enumerate() {
            key[5] = if row.is_multiple_of(2) { 1500.0 } else { -1500.0 };
        }
        // The queries do not look at it.
        inputs.0[0].chunks_exact_mut(WIDTH).for_each(|query| query[5] = 0.0);
        inputs
    }

    fn arrays(&self, key_value_type: Option<KeyValueType>) -> Arrays<'_> {
        let view = |values, heads, tokens| {
            let strides = [heads * tokens * WIDTH, tokens * WIDTH, WIDTH, 1];
            StridedView::new(Elements::F32(values), [1, heads, tokens, WIDTH], strides).unwrap()
        };
        let [queries, keys, values] = &self.0;
        Arrays {
            queries: view(queries, HEADS, QUERIES),
            keys: view(keys, KV_HEADS, KEYS),
            values: view(values, KV_HEADS, KEYS),
            key_value_type,
            first_position: KEYS - QUERIES,
            key_ranges: None,
            soft_cap: None,
            sinks: None,
        }
    }

    fn run(&self, method: Method, mask: Mask, key_value_type: Option<KeyValueType>) -> (Vec<f32>, Report) {
        run(&self.arrays(key_value_type), method, mask)
    }
}

fn run(arrays: &Arrays<'_>, method: Method, mask: Mask) -> (Vec<f32>, Report) {
    let attention = Attention { method, mask, scale: 0.2 };
    let run = |threads| {
        let mut output = vec![f32::NAN; arrays.output_len()];
        let (team, scratch) = (ThreadTeam::new(threads), &mut ArrayScratch::default());
        let numbers = ElementsMut::F32(&mut output);
        match attention.run_arrays(arrays, numbers, &team, scratch, &mut || ControlFlow::Continue(())) {
            ControlFlow::Continue(report) => (output, report),
            ControlFlow::Break(()) => unreachable!("nothing asked to stop"),
        }
    };
    let (one, two) = (run(1), run(2));
    let bits = |output: &[f32]| output.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(bits(&one.0) == bits(&two.0) && one.1 == two.1, "depends on the number of threads");
    one
}

/// Missed mass of the row that misses most.
fn largest_missed(exact: &[f32], output: &[f32]) -> f32 {
    // Values spread by the root of their width, in each channel by 1.
    let unit = (2.0 * WIDTH as f32).sqrt();
    let rows = exact.chunks_exact(WIDTH).zip(output.chunks_exact(WIDTH));
    let missed =
        rows.map(|(exact, output)| exact.iter().zip(output).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt() / unit);
    missed.fold(0.0, f32::max)
}

/// AVX-512 without VNNI is faster in f32.
fn multiplies_integers(level: InstructionSet) -> bool {
    level == InstructionSet::Avx2 || level >= InstructionSet::Avx512Vnni
}

fn budgeted(budget: f32) -> Method {
    Method::Budgeted(BudgetSettings { budget })
}

#[test]
fn what_fits_the_budget_is_rounded() {
    let inputs = Inputs::new();
    let (exact, report) = inputs.run(Method::Exact, Mask::causal(), None);
    assert_eq!(report.total().rounded_rows, 0);
    let (output, report) = inputs.run(budgeted(0.05), Mask::causal(), None);
    let total = report.total();
    let rounds = multiplies_integers(InstructionSet::current());
    assert_eq!(total.rounded_rows, if rounds { total.rows } else { 0 });
    assert_eq!(total.rows, (HEADS * QUERIES) as u64);
    let largest = largest_missed(&exact, &output);
    assert!(largest < 0.05, "{largest}");
    assert_eq!(rounds, exact != output, "rounding shows");
}

#[test]
fn what_does_not_fit_is_read_as_it_is() {
    let plain = Inputs::new();
    for (inputs, budget, kind) in [
        (Inputs::with_a_loud_channel(), 0.05, None),
        (plain, 0.01, None),
        (Inputs::new(), 0.05, Some(KeyValueType::F32)),
    ] {
        let (_, report) = inputs.run(budgeted(budget), Mask::causal(), kind);
        let amx = InstructionSet::current() >= InstructionSet::Amx;
        if !(amx && budget == 0.05 && kind.is_none()) {
            assert_eq!(report.total().rounded_rows, 0, "budget {budget}, {kind:?}");
        }
    }
}

/// What rounding makes of a logit grows with its query.
#[test]
fn the_longest_queries_decide() {
    let mut random = Random::new(8);
    for seed in 0..4 {
        let mut inputs = Inputs::new();
        inputs.0[0] = random.normals(HEADS * QUERIES * WIDTH, 1.0);
        // Of one head, and seldom.
        for query in inputs.0[0][..QUERIES * WIDTH].chunks_exact_mut(WIDTH).skip(20 + seed).step_by(150) {
            query.iter_mut().for_each(|value| *value *= 30.0);
        }
        let (exact, _) = inputs.run(Method::Exact, Mask::causal(), None);
        let (output, _) = inputs.run(budgeted(0.02), Mask::causal(), None);
        let largest = largest_missed(&exact, &output);
        assert!(largest <= 0.02, "{largest}");
    }
}

#[test]
fn padding_decides_nothing() {
    // Keys that nobody sees, and from which an int8 cache would take its mean, and values beside which no error is large.
    let mut inputs = Inputs::new();
    for head in 0..KV_HEADS {
        let hidden = head * KEYS * WIDTH..(head * KEYS + 64) * WIDTH;
        inputs.0[1][hidden.clone()].fill(1e4);
        inputs.0[2][hidden].iter_mut().enumerate().for_each(|(index, value)| *value = 1e6 * (index % 7) as f32);
    }
    let seen = 64..KEYS;
    let arrays = Arrays { key_ranges: Some(std::slice::from_ref(&seen)), ..inputs.arrays(None) };
    let (exact, _) = run(&arrays, Method::Exact, Mask::causal());
    let (output, report) = run(&arrays, budgeted(0.05), Mask::causal());
    let amx = InstructionSet::current() >= InstructionSet::Amx;
    assert!(amx || report.total().rounded_rows == 0);
    let largest = largest_missed(&exact, &output);
    assert!(largest < 0.05, "{largest}");
}

#[test]
fn sinks_are_not_tried() {
    let (inputs, sinks) = (Inputs::new(), [0.5; HEADS]);
    let arrays = Arrays { sinks: Some(&sinks), ..inputs.arrays(None) };
    assert_eq!(run(&arrays, budgeted(0.05), Mask::causal()).1.total().rounded_rows, 0);
}

#[test]
fn windows_too_narrow_for_clusters_are_read_as_they_are() {
    let inputs = Inputs::new();
    let narrow = Mask { window: Some(512), ..Mask::causal() };
    let (exact, _) = inputs.run(Method::Exact, narrow.clone(), None);
    let (output, report) = inputs.run(budgeted(0.05), narrow, None);
    assert_eq!(report.total().rounded_rows, 0);
    assert!(exact == output);
}

#[test]
fn broken_numbers_are_not_rounded() {
    for broken in [f32::NAN, f32::INFINITY] {
        for array in 0..3 {
            let mut inputs = Inputs::new();
            inputs.0[array][WIDTH + 3] = broken;
            let (exact, _) = inputs.run(Method::Exact, Mask::default(), None);
            let (output, report) = inputs.run(budgeted(0.05), Mask::default(), None);
            let finite = |values: &[f32]| values.iter().map(|value| value.is_finite()).collect::<Vec<_>>();
            assert_eq!(finite(&exact), finite(&output), "{broken} in array {array}");
            // A broken query that is not tried says nothing of keys and values.
            assert!(array == 0 || report.total().rounded_rows == 0, "{broken} in array {array}");
        }
    }
}
