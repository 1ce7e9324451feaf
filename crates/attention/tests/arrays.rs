//! Attention on arrays against the f64 reference: layouts, element types, batches, padding, sinks, soft caps.

use std::ops::{ControlFlow, Range};

use iceformer_attention::{
    ArrayScratch, Arrays, ArraysError, Attention, CacheShape, DciSettings, Elements, ElementsMut, KeyValueCache,
    KeyValueType, Mask, Method, StridedView, ThreadTeam,
};
use iceformer_kernels::half::{bf16, f16};
use iceformer_testing::attention::Problem;
use iceformer_testing::compare::assert_close;
use iceformer_testing::random::Random;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
}

/// How `[batch, heads, tokens, width]` lies in memory.
#[derive(Clone, Copy, Debug)]
enum Layout {
    HeadMajor,
    TokenMajor,
    /// Every dimension where it usually is not, with gaps.
    Scattered,
}

/// Numbers `[batch, heads, tokens, width]` in some layout.
struct Array {
    kind: Kind,
    wide: Vec<f32>,
    bits: Vec<u16>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Array {
    fn new(random: &mut Random, kind: Kind, layout: Layout, shape: [usize; 4]) -> Self {
        let [batch, heads, tokens, width] = shape;
        let (strides, length) = match layout {
            Layout::HeadMajor => ([heads * tokens * width, tokens * width, width, 1], batch * heads * tokens * width),
            Layout::TokenMajor => ([tokens * heads * width, width, heads * width, 1], batch * heads * tokens * width),
            Layout::Scattered => {
                ([3, batch * 3, width * heads * batch * 3, heads * batch * 3], batch * heads * tokens * width * 3)
            }
        };
        let wide = random.normals(length, 1.0);
        let bits = |round: fn(f32) -> u16| wide.iter().map(|&value| round(value)).collect();
        let bits: Vec<u16> = match kind {
            Kind::F32 => Vec::new(),
            Kind::F16 => bits(|value| f16::from_f32(value).to_bits()),
            Kind::Bf16 => bits(|value| bf16::from_f32(value).to_bits()),
        };
        Self { kind, wide, bits, shape, strides }
    }

    fn view(&self) -> StridedView<'_> {
        let elements = match self.kind {
            Kind::F32 => Elements::F32(&self.wide),
            Kind::F16 => Elements::F16(&self.bits),
            Kind::Bf16 => Elements::Bf16(&self.bits),
        };
        StridedView::new(elements, self.shape, self.strides).unwrap()
    }

    /// `[tokens, heads, width]` of one entry of the batch, as stored.
    fn entry(&self, entry: usize) -> Vec<f32> {
        let [_, heads, tokens, width] = self.shape;
        let mut values = Vec::new();
        for token in 0..tokens {
            for head in 0..heads {
                for channel in 0..width {
                    let index = [entry, head, token, channel];
                    let place: usize = index.iter().zip(&self.strides).map(|(index, stride)| index * stride).sum();
                    values.push(match self.kind {
                        Kind::F32 => self.wide[place],
                        Kind::F16 => f16::from_bits(self.bits[place]).to_f32(),
                        Kind::Bf16 => bf16::from_bits(self.bits[place]).to_f32(),
                    });
                }
            }
        }
        values
    }
}

#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    heads: (usize, usize),
    tokens: usize,
    keys: usize,
    widths: (usize, usize),
    mask: Mask,
    ranges: Option<Vec<Range<usize>>>,
    kind: Kind,
    layout: Layout,
    kept: Option<KeyValueType>,
}

impl Case {
    fn new(tokens: usize, keys: usize) -> Self {
        Self {
            batch: 2,
            heads: (4, 2),
            tokens,
            keys,
            widths: (32, 16),
            mask: Mask::causal(),
            ranges: None,
            kind: Kind::F32,
            layout: Layout::HeadMajor,
            kept: None,
        }
    }

    fn arrays(&self) -> [Array; 3] {
        let mut random = Random::new(self.tokens as u64 * 1000 + self.keys as u64);
        let mut array = |shape| Array::new(&mut random, self.kind, self.layout, shape);
        [
            array([self.batch, self.heads.0, self.tokens, self.widths.0]),
            array([self.batch, self.heads.1, self.keys, self.widths.0]),
            array([self.batch, self.heads.1, self.keys, self.widths.1]),
        ]
    }

    fn first_position(&self) -> usize {
        self.keys.saturating_sub(self.tokens)
    }

    fn attention(&self, method: Method) -> Attention {
        Attention { method, mask: self.mask.clone(), scale: 0.2 }
    }

    fn input<'a>(&'a self, [queries, keys, values]: &'a [Array; 3]) -> Arrays<'a> {
        Arrays {
            queries: queries.view(),
            keys: keys.view(),
            values: values.view(),
            key_value_type: self.kept,
            first_position: self.first_position(),
            key_ranges: self.ranges.as_deref(),
            soft_cap: None,
            sinks: None,
        }
    }

    fn expected(&self, arrays: &[Array; 3]) -> Vec<f64> {
        let (mut output, all) = (Vec::new(), self.mask.keys.clone());
        for entry in 0..self.batch {
            let [queries, keys, values] = [0, 1, 2].map(|index| arrays[index].entry(entry));
            let problem = Problem {
                queries: &queries,
                keys: &keys,
                values: &values,
                query_heads: self.heads.0,
                kv_heads: self.heads.1,
                key_dim: self.widths.0,
                value_dim: self.widths.1,
                scale: f64::from(0.2_f32),
                first_position: self.first_position(),
                causal: self.mask.causal,
                window: self.mask.window,
                unpadded: self.ranges.as_ref().map(|ranges| ranges[entry].clone()).or(all.clone()),
            };
            output.extend(problem.solve().output);
        }
        output
    }

    fn run(&self, arrays: &Arrays<'_>, threads: usize) -> Vec<f32> {
        run(&self.attention(Method::Exact), arrays, threads)
    }

    fn check(&self) {
        let arrays = self.arrays();
        let expected = self.expected(&arrays);
        let output = self.run(&self.input(&arrays), 2);
        let tolerance = match (self.kind, self.kept) {
            (_, Some(KeyValueType::Int8)) => 6e-2,
            (Kind::Bf16, _) => 3e-2,
            _ => 3e-6,
        };
        assert_close(&output, &expected, tolerance, format!("{self:?}"));
        assert!(output == self.run(&self.input(&arrays), 1), "{self:?} depends on the number of threads");
    }
}

fn run(attention: &Attention, arrays: &Arrays<'_>, threads: usize) -> Vec<f32> {
    run_with(attention, arrays, threads, &mut ArrayScratch::default())
}

fn run_with(attention: &Attention, arrays: &Arrays<'_>, threads: usize, scratch: &mut ArrayScratch) -> Vec<f32> {
    let mut output = vec![f32::NAN; arrays.output_len()];
    let (team, numbers) = (ThreadTeam::new(threads), ElementsMut::F32(&mut output));
    let flow = attention.run_arrays(arrays, numbers, &team, scratch, &mut || ControlFlow::Continue(()));
    assert!(flow.is_continue());
    output
}

#[test]
fn every_layout_and_element_type() {
    for layout in [Layout::HeadMajor, Layout::TokenMajor, Layout::Scattered] {
        for kind in [Kind::F32, Kind::F16, Kind::Bf16] {
            for (tokens, keys) in [(1, 1), (1, 300), (3, 70), (37, 37), (30, 300)] {
                Case { layout, kind, ..Case::new(tokens, keys) }.check();
            }
        }
    }
}

#[test]
fn a_few_queries_over_every_number_of_keys() {
    for keys in 1..=70 {
        Case::new(1, keys).check();
        Case { mask: Mask::default(), heads: (6, 1), ..Case::new(2, keys) }.check();
    }
    // Ranges of keys in several tasks, and the lengths around their edges.
    for keys in [1023, 1024, 1025, 2049, 5000] {
        Case { batch: 1, heads: (2, 1), ..Case::new(1, keys) }.check();
        Case { batch: 1, heads: (2, 1), kind: Kind::F16, ..Case::new(2, keys) }.check();
    }
}

#[test]
fn masks_and_padding() {
    // A few queries, heads that fit one tile, and heads that do not.
    for (tokens, keys, heads) in
        [(1, 90, (4, 2)), (4, 90, (4, 2)), (90, 90, (4, 2)), (20, 90, (4, 2)), (90, 90, (4, 1))]
    {
        for window in [None, Some(1), Some(20)] {
            for causal in [false, true] {
                let mask = Mask { causal, window, keys: None };
                let case = Case { mask, batch: 3, heads, ..Case::new(tokens, keys) };
                case.check();
                for ranges in
                    [[0..90, 0..90, 0..90], [7..90, 7..90, 7..90], [30..90, 0..60, 5..5], [0..1, 89..90, 0..90]]
                {
                    Case { ranges: Some(ranges.to_vec()), ..case.clone() }.check();
                }
            }
        }
    }
}

#[test]
fn more_tokens_than_a_chunk() {
    let wide = Case { batch: 3, heads: (8, 2), widths: (80, 48), ..Case::new(1200, 1200) };
    wide.check();
    Case { layout: Layout::TokenMajor, batch: 1, ..wide }.check();
}

#[test]
fn what_an_earlier_call_left_in_memory_does_not_show() {
    for kept in KeyValueType::ALL {
        let mut scratch = ArrayScratch::default();
        for keys in [600, 37, 300, 64, 513, 5, 601] {
            let case = Case { kept: Some(kept), ..Case::new(keys, keys) };
            let arrays = case.arrays();
            let attention = case.attention(Method::Exact);
            let fresh = case.run(&case.input(&arrays), 2);
            assert!(run_with(&attention, &case.input(&arrays), 2, &mut scratch) == fresh, "{keys} keys of {kept:?}");
            // What comes next must not meet these.
            let spoilt = arrays.map(|mut array| {
                array.wide.fill(f32::NAN);
                array
            });
            run_with(&attention, &case.input(&spoilt), 2, &mut scratch);
        }
    }
}

/// `heads` query heads of each of `batch` entries over a cache of `kv_heads` heads.
fn run_over_a_cache(batch: usize, heads: usize, kv_heads: usize) -> Vec<f32> {
    let team = ThreadTeam::new(1);
    let mut cache = KeyValueCache::new(CacheShape { kv_heads, key_dim: 1, value_dim: 1 }, KeyValueType::F32);
    let numbers: Vec<f32> = (0..kv_heads).map(|head| head as f32).collect();
    cache.append(&numbers, &numbers, &team);
    let queries = vec![1.0; batch * heads];
    let queries = StridedView::new(Elements::F32(&queries), [batch, heads, 1, 1], [heads, 1, 1, 1]).unwrap();
    let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 1.0 };
    let mut output = vec![f32::NAN; batch * heads];
    let (numbers, mut scratch) = (ElementsMut::F32(&mut output), ArrayScratch::default());
    let mut proceed = || ControlFlow::Continue(());
    assert!(attention.run_cached(queries, 0, &cache, numbers, &team, &mut scratch, &mut proceed).is_continue());
    output
}

#[test]
fn entries_of_a_batch_share_the_heads_of_a_cache_evenly() {
    assert_eq!(run_over_a_cache(1, 4, 2), [0.0, 0.0, 1.0, 1.0]);
    assert_eq!(run_over_a_cache(2, 2, 4), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(run_over_a_cache(2, 4, 4), [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
}

#[test]
#[should_panic(expected = "2 · 2 query heads for 1 key/value heads of a cache")]
fn a_head_of_a_cache_is_not_shared_between_entries() {
    run_over_a_cache(2, 2, 1);
}

#[test]
fn packed_types_are_chosen_by_the_caller() {
    for kept in KeyValueType::ALL {
        Case { kept: Some(kept), kind: Kind::Bf16, ..Case::new(1, 200) }.check();
        Case { kept: Some(kept), kind: Kind::Bf16, ..Case::new(60, 60) }.check();
        Case { kept: Some(kept), kind: Kind::Bf16, ..Case::new(200, 200) }.check();
    }
}

#[test]
fn heads_packed_one_by_one_give_the_bits_of_a_cache() {
    for kept in KeyValueType::ALL {
        for (tokens, keys, mask) in [(7, 7, Mask::causal()), (40, 333, Mask::causal()), (90, 1000, Mask::default())] {
            let case = Case { kept: Some(kept), mask, batch: 1, layout: Layout::TokenMajor, ..Case::new(tokens, keys) };
            let arrays = case.arrays();
            let shape = CacheShape { kv_heads: case.heads.1, key_dim: case.widths.0, value_dim: case.widths.1 };
            let (team, mut scratch) = (ThreadTeam::new(2), ArrayScratch::default());
            let mut cache = KeyValueCache::new(shape, kept);
            cache.append_view(arrays[1].view(), arrays[2].view(), &team);
            let mut output = vec![f32::NAN; tokens * case.heads.0 * case.widths.1];
            let flow = case.attention(Method::Exact).run_cached(
                arrays[0].view(),
                keys - tokens,
                &cache,
                ElementsMut::F32(&mut output),
                &team,
                &mut scratch,
                &mut || ControlFlow::Continue(()),
            );
            assert!(flow.is_continue());
            assert!(output == case.run(&case.input(&arrays), 2), "{tokens} tokens of {kept:?}");
        }
    }
}

#[test]
fn outputs_are_rounded_to_nearest() {
    for case in [Case::new(1, 50), Case::new(50, 50)] {
        let arrays = case.arrays();
        let input = case.input(&arrays);
        let wide = case.run(&input, 2);
        let mut bits = vec![0_u16; wide.len()];
        let (team, attention) = (ThreadTeam::new(2), case.attention(Method::Exact));
        let narrow = |output: ElementsMut<'_>| {
            let scratch = &mut ArrayScratch::default();
            assert!(
                attention.run_arrays(&input, output, &team, scratch, &mut || ControlFlow::Continue(())).is_continue()
            );
        };
        narrow(ElementsMut::F16(&mut bits));
        assert!(bits.iter().zip(&wide).all(|(bits, value)| *bits == f16::from_f32(*value).to_bits()));
        narrow(ElementsMut::Bf16(&mut bits));
        assert!(bits.iter().zip(&wide).all(|(bits, value)| *bits == bf16::from_f32(*value).to_bits()));
    }
}

#[test]
fn sinks_take_their_share() {
    // A sink is a key with a value of zero and a logit of its own: one key more, which the reference can be given.
    for tokens in [1, 40] {
        let case = Case { batch: 1, heads: (2, 2), mask: Mask::default(), ..Case::new(tokens, 40) };
        let [queries, keys, values] = case.arrays();
        let arrays = [queries, keys, values];
        let sinks = [0.7, -1.3];
        let output = case.run(&Arrays { sinks: Some(&sinks), ..case.input(&arrays) }, 2);
        let plain = case.expected(&arrays);
        let problem_logits = |token: usize, head: usize| {
            let (queries, keys) = (arrays[0].entry(0), arrays[1].entry(0));
            (0..40).map(move |key| {
                let query = &queries[(token * 2 + head) * 32..][..32];
                let key = &keys[(key * 2 + head) * 32..][..32];
                query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * f64::from(0.2_f32)
            })
        };
        let mut expected = Vec::new();
        for token in 0..tokens {
            for head in 0..2 {
                let sum: f64 = problem_logits(token, head).map(f64::exp).sum();
                let share = sum / (sum + f64::from(sinks[head]).exp());
                expected.extend(plain[(token * 2 + head) * 16..][..16].iter().map(|value| value * share));
            }
        }
        assert_close(&output, &expected, 3e-6, format!("{tokens} tokens"));
    }
}

#[test]
fn soft_capped_logits() {
    for (tokens, kind) in [(1, Kind::F32), (40, Kind::F32), (40, Kind::Bf16)] {
        let case = Case { batch: 1, heads: (2, 2), kind, ..Case::new(tokens, 40) };
        let arrays = case.arrays();
        let capped = Arrays { soft_cap: Some(0.8), ..case.input(&arrays) };
        let [queries, keys, values] = [0, 1, 2].map(|index| arrays[index].entry(0));
        let mut expected = Vec::new();
        for token in 0..tokens {
            for head in 0..2 {
                let weights: Vec<f64> = (0..=case.first_position() + token)
                    .map(|key| {
                        let pairs = queries[(token * 2 + head) * 32..][..32].iter().zip(&keys[(key * 2 + head) * 32..]);
                        let logit: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        (0.8 * (logit * f64::from(0.2_f32) / 0.8).tanh()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                expected.extend((0..16).map(|channel| {
                    let terms = weights.iter().enumerate();
                    terms.map(|(key, weight)| weight * f64::from(values[(key * 2 + head) * 16 + channel])).sum::<f64>()
                        / sum
                }));
            }
        }
        let output = case.run(&capped, 2);
        assert_close(&output, &expected, 3e-6, format!("{tokens} tokens, {kind:?}"));
        // Bounds of other methods do not hold for capped logits: they answer exactly.
        let dci = case.attention(Method::Dci(DciSettings { whole_range: 1, kept_keys: 2, ..DciSettings::PUBLISHED }));
        assert!(run(&dci, &capped, 2) == output);
    }
}

#[test]
fn nothing_in_nothing_out() {
    let none = Case { batch: 0, ..Case::new(3, 5) };
    assert!(none.run(&none.input(&none.arrays()), 2).is_empty());
    let none = Case::new(0, 5);
    assert!(none.run(&none.input(&none.arrays()), 2).is_empty());
    for tokens in [1, 3, 30] {
        let no_keys = Case { mask: Mask::default(), ..Case::new(tokens, 0) };
        assert!(no_keys.run(&no_keys.input(&no_keys.arrays()), 2).iter().all(|&value| value == 0.0));
    }
}

#[test]
fn a_long_call_stops_between_chunks() {
    let case = Case { batch: 1, ..Case::new(20_000, 64) };
    let arrays = case.arrays();
    let mut output = vec![0.0; case.input(&arrays).output_len()];
    let mut asked = 0;
    let flow = Attention { mask: Mask::default(), ..case.attention(Method::Exact) }.run_arrays(
        &case.input(&arrays),
        ElementsMut::F32(&mut output),
        &ThreadTeam::new(1),
        &mut ArrayScratch::default(),
        &mut || {
            asked += 1;
            ControlFlow::Break(())
        },
    );
    assert!(flow.is_break() && asked == 1);
    assert_eq!(output.last(), Some(&0.0));
}

#[test]
fn a_batch_stops_between_entries_of_their_own_masks() {
    let case = Case { ranges: Some(vec![0..64, 1..64, 2..64]), batch: 3, ..Case::new(64, 64) };
    let arrays = case.arrays();
    let mut output = vec![0.0; case.input(&arrays).output_len()];
    let mut asked = 0;
    let mut proceed = || {
        asked += 1;
        if asked == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let numbers = ElementsMut::F32(&mut output);
    let (team, scratch) = (ThreadTeam::new(1), &mut ArrayScratch::default());
    let flow = case.attention(Method::Exact).run_arrays(&case.input(&arrays), numbers, &team, scratch, &mut proceed);
    assert!(flow.is_break() && asked == 2);
    let entry = output.len() / 3;
    assert!(output[entry..2 * entry].iter().any(|&value| value != 0.0), "the second entry ran");
    assert!(output[2 * entry..].iter().all(|&value| value == 0.0), "the third did not");
}

#[test]
fn queries_whose_window_begins_behind_the_last_key() {
    for tokens in [1, 2, 4, 5, 40] {
        for first_position in [18, 20, 22, 23, 24, 25, 100, 10_000] {
            for causal in [true, false] {
                let mask = Mask { causal, window: Some(5), keys: None };
                let case = Case { mask, ..Case::new(tokens, 20) };
                let arrays = case.arrays();
                let output = case.run(&Arrays { first_position, ..case.input(&arrays) }, 2);
                let row = case.heads.0 * case.widths.1;
                for (token, output) in output.chunks_exact(row).enumerate().map(|(row, output)| (row % tokens, output))
                {
                    let sees_none = case.mask.visible(first_position + token, 20).is_empty();
                    let what = format!("{tokens} tokens from {first_position}, token {token}");
                    assert_eq!(output.iter().all(|&value| value == 0.0), sees_none, "{what}");
                    assert!(output.iter().all(|value| value.is_finite()), "{what}");
                }
            }
        }
    }
}

/// The shares of ranges of keys add up to one however large the logits are.
#[test]
fn large_logits_over_several_ranges_of_keys() {
    for (tokens, kept) in [(1, None), (2, None), (40, None), (40, Some(KeyValueType::F32))] {
        let case = Case { batch: 1, heads: (2, 1), mask: Mask::default(), kept, ..Case::new(tokens, 5_000) };
        let mut arrays = case.arrays();
        let size = |logit: f32| (logit / 0.2 / case.widths.0 as f32).sqrt();
        for logit in [1.0, 1e3, 1e5] {
            arrays[0].wide.fill(size(logit));
            arrays[1].wide.fill(size(logit));
            arrays[2].wide.fill(1.0);
            for value in case.run(&case.input(&arrays), 2) {
                assert!((value - 1.0).abs() < 1e-5, "{tokens} tokens, logits of {logit}: {value}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let case = Case::new(3, 5);
    let arrays = case.arrays();
    let input = case.input(&arrays);
    let message = |arrays: Arrays<'_>| arrays.validate().unwrap_err().to_string();
    let keys = input.keys.entry(0);
    assert_eq!(
        message(Arrays { keys, ..input }),
        "queries have a batch of 2, keys of 1 and values of 2; expected one size"
    );
    assert!(message(Arrays { keys: input.queries, ..input }).contains("heads"));
    assert_eq!(
        message(Arrays { keys: input.keys.first_tokens(4), ..input }),
        "there are 4 keys and 5 values; expected as many of both"
    );
    assert_eq!(
        message(Arrays { keys: input.values, ..input }),
        "queries have width 32 and keys 16; expected one width"
    );
    assert!(message(Arrays { sinks: Some(&[1.0]), ..input }).contains("1 sinks for 4 query heads"));
    assert!(message(Arrays { key_ranges: Some(&[]), ..input }).contains("0 key ranges for a batch of 2"));
    assert_eq!(Arrays { soft_cap: Some(-1.0), ..input }.validate(), Err(ArraysError::SoftCap { limit: -1.0 }));
    let int8 = Arrays { soft_cap: Some(1.0), key_value_type: Some(KeyValueType::Int8), ..input };
    assert_eq!(int8.validate(), Err(ArraysError::SoftCapInt8));
    let position = |first_position| Arrays { first_position, ..input }.validate().map_err(|error| error.to_string());
    let expected = format!(
        "the first position is {0} for 3 queries; expected a sum of both of at most {1}",
        usize::MAX - 2,
        usize::MAX
    );
    assert_eq!(position(usize::MAX - 2), Err(expected));
    assert_eq!(position(usize::MAX - 3), Ok(()));
}

#[test]
fn queries_at_the_last_positions_there_are() {
    // Beside all keys, and with a window far behind the last of them.
    for method in Method::ALL {
        for (tokens, keys) in [(1, 40), (3, 5_200), (60, 200)] {
            let arrays = Case::new(tokens, keys).arrays();
            let case = Case::new(tokens, keys);
            let input = Arrays { first_position: usize::MAX - tokens, ..case.input(&arrays) };
            let unmasked = run(&Attention { mask: Mask::default(), ..case.attention(Method::Exact) }, &input, 1);
            let causal = run(&Attention { mask: Mask::causal(), ..case.attention(Method::Exact) }, &input, 1);
            assert_eq!(causal, unmasked);
            let mask = Mask { window: Some(7), ..Mask::default() };
            let nothing = run(&Attention { mask, ..case.attention(method) }, &input, 1);
            assert!(nothing.iter().all(|value| *value == 0.0), "{}: {tokens} tokens", method.name());
        }
    }
}
