//! Attention of a whole call on a caller's arrays: `[batch, heads, tokens, width]` with any strides, f32, f16 or bf16.
//!
//! Queries are read and results written where they lie; keys and values go into a cache of their own, packed once. A few
//! queries (a decode step) do not pay for packing and read the caller's keys and values where they lie too
//! ([`few`](crate::few)).

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;

use iceformer_kernels::InstructionSet;
use iceformer_kernels::attention::multiplies_brain_floats;
use iceformer_kernels::half::slice::HalfBitsSliceExt;
use iceformer_kernels::half::{bf16, f16};

use crate::few::{self, FewScratch};
use crate::output::Output;
use crate::short::{self, ShortScratch};
use crate::strided::FromF32;
use crate::tiles::Call;
use crate::{
    Attention, AttentionScratch, BudgetSettings, CacheShape, Elements, ElementsMut, KeyValueCache, KeyValueType,
    Method, Report, StridedView, ThreadTeam, budgeted, rounding,
};

/// Numbers of the queries between two looks at whether to go on, about …
const CHUNK_NUMBERS: usize = 1 << 20;
/// … and fewest tokens: several whole tiles.
const CHUNK_TOKENS: usize = 512;
/// Largest cache that is kept for the next call, which saves that call the system's clearing of new memory.
pub(crate) const KEPT_BYTES: usize = 32 << 20;

/// What a call on arrays reads.
#[derive(Clone, Copy, Debug)]
pub struct Arrays<'a> {
    /// `[batch, query_heads, tokens, key_dim]`
    pub queries: StridedView<'a>,
    /// `[batch, kv_heads, keys, key_dim]`
    pub keys: StridedView<'a>,
    /// `[batch, kv_heads, keys, value_dim]`
    pub values: StridedView<'a>,
    /// Type that keys and values are packed in, where they are; `None`: bf16 for bf16 on a machine that is fast at it,
    /// else f32, so that nothing is rounded, unless method `budgeted` finds on some rows that a type this machine is
    /// faster with (int8, with AMX bf16) takes at most half of the budget of nearly all of them; clusters then have the
    /// rest.
    pub key_value_type: Option<KeyValueType>,
    /// Position of the first query among the keys.
    pub first_position: usize,
    /// Keys of each entry of the batch that are no padding; `None`: all.
    pub key_ranges: Option<&'a [Range<usize>]>,
    /// Limit that logits are soft-capped to (`limit · tanh(logit / limit)`, Gemma 2); every method then answers exactly,
    /// since bounds on missed mass hold for plain logits.
    pub soft_cap: Option<f32>,
    /// One more logit of each query head, `[query_heads]`, that takes its share of the softmax and has no value
    /// (attention sinks, [Xiao et al. 2023](https://arxiv.org/abs/2309.17453), as learned by GPT-OSS).
    pub sinks: Option<&'a [f32]>,
}

/// Arrays that do not fit together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ArraysError {
    /// Batches of another size.
    #[error("queries have a batch of {queries}, keys of {keys} and values of {values}; expected one size")]
    Batch {
        /// Entries of the queries.
        queries: usize,
        /// Entries of the keys.
        keys: usize,
        /// Entries of the values.
        values: usize,
    },
    /// Heads that cannot share key/value heads.
    #[error(
        "queries have {queries} heads, keys {keys} and values {values}; expected as many of values as of keys, and a multiple of them of queries"
    )]
    Heads {
        /// Heads of the queries.
        queries: usize,
        /// Heads of the keys.
        keys: usize,
        /// Heads of the values.
        values: usize,
    },
    /// Keys and values of different length.
    #[error("there are {keys} keys and {values} values; expected as many of both")]
    Keys {
        /// Tokens of the keys.
        keys: usize,
        /// Tokens of the values.
        values: usize,
    },
    /// Queries and keys of different width.
    #[error("queries have width {queries} and keys {keys}; expected one width")]
    Width {
        /// Width of the queries.
        queries: usize,
        /// Width of the keys.
        keys: usize,
    },
    /// A width of zero.
    #[error("{what} have width 0; expected at least 1")]
    NoWidth {
        /// Keys or values.
        what: &'static str,
    },
    /// Not one range for each entry of the batch.
    #[error("there are {ranges} key ranges for a batch of {batch}; expected one for each")]
    Ranges {
        /// Ranges given.
        ranges: usize,
        /// Entries of the batch.
        batch: usize,
    },
    /// A limit that is no limit.
    #[error("the soft cap is {limit}; expected a finite number above 0")]
    SoftCap {
        /// Limit given.
        limit: f32,
    },
    /// Keys centred on their mean cannot be capped.
    #[error("soft-capped logits need keys and values of f32 or bf16, not int8")]
    SoftCapInt8,
    /// Queries at positions that no number stands for.
    #[error(
        "the first position is {first_position} for {tokens} queries; expected a sum of both of at most {}",
        usize::MAX
    )]
    Position {
        /// Position of the first query.
        first_position: usize,
        /// Tokens of the queries.
        tokens: usize,
    },
    /// Not one sink for each query head.
    #[error("there are {sinks} sinks for {heads} query heads; expected one for each")]
    Sinks {
        /// Sinks given.
        sinks: usize,
        /// Query heads.
        heads: usize,
    },
}

impl ArraysError {
    /// Checks that `tokens` queries from `first_position` on have positions.
    pub(crate) fn check_positions(first_position: usize, tokens: usize) -> Result<(), Self> {
        match first_position.checked_add(tokens) {
            Some(_) => Ok(()),
            None => Err(Self::Position { first_position, tokens }),
        }
    }
}

impl Arrays<'_> {
    /// Checks that the shapes fit together.
    ///
    /// # Errors
    /// The first that does not.
    pub fn validate(&self) -> Result<(), ArraysError> {
        let [batch, query_heads, tokens, query_dim] = self.queries.shape();
        let [key_batch, key_heads, keys, key_dim] = self.keys.shape();
        let [value_batch, value_heads, values, value_dim] = self.values.shape();
        if batch != key_batch || batch != value_batch {
            return Err(ArraysError::Batch { queries: batch, keys: key_batch, values: value_batch });
        }
        if key_heads != value_heads || key_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(key_heads) {
            return Err(ArraysError::Heads { queries: query_heads, keys: key_heads, values: value_heads });
        }
        if keys != values {
            return Err(ArraysError::Keys { keys, values });
        }
        if query_dim != key_dim {
            return Err(ArraysError::Width { queries: query_dim, keys: key_dim });
        }
        for (what, width) in [("keys", key_dim), ("values", value_dim)] {
            if width == 0 {
                return Err(ArraysError::NoWidth { what });
            }
        }
        ArraysError::check_positions(self.first_position, tokens)?;
        if let Some(limit) = self.soft_cap {
            // The kernels divide by it.
            if !(limit >= f32::MIN_POSITIVE && limit.is_finite()) {
                return Err(ArraysError::SoftCap { limit });
            }
            if self.key_value_type == Some(KeyValueType::Int8) {
                return Err(ArraysError::SoftCapInt8);
            }
        }
        match self.key_ranges {
            Some(ranges) if ranges.len() != batch => return Err(ArraysError::Ranges { ranges: ranges.len(), batch }),
            _ => {}
        }
        match self.sinks {
            Some(sinks) if sinks.len() != query_heads => {
                Err(ArraysError::Sinks { sinks: sinks.len(), heads: query_heads })
            }
            _ => Ok(()),
        }
    }

    /// Numbers of the output, `[batch, tokens, query_heads, value_dim]`.
    pub fn output_len(&self) -> usize {
        let [batch, heads, tokens, _] = self.queries.shape();
        batch * heads * tokens * self.values.shape()[3]
    }

    /// The type that keys and values are packed in.
    fn packed_type(&self) -> KeyValueType {
        self.key_value_type.unwrap_or(match (self.keys.elements(), self.values.elements()) {
            (Elements::Bf16(_), Elements::Bf16(_)) if multiplies_brain_floats(InstructionSet::current()) => {
                KeyValueType::Bf16
            }
            _ => KeyValueType::F32,
        })
    }

    /// One entry of the batch alone.
    fn entry(&self, index: usize) -> Self {
        Self {
            queries: self.queries.entry(index),
            keys: self.keys.entry(index),
            values: self.values.entry(index),
            key_ranges: None,
            ..*self
        }
    }
}

/// Buffers reused from call to call.
#[derive(Default)]
pub struct ArrayScratch {
    attention: AttentionScratch,
    few: FewScratch,
    /// One per thread.
    short: Vec<Mutex<ShortScratch>>,
    /// The last call's cache, for its memory.
    cache: Option<KeyValueCache>,
}

impl ArrayScratch {
    /// An empty cache, with the last one's memory where it fits.
    fn take_cache(&mut self, shape: CacheShape, kind: KeyValueType) -> KeyValueCache {
        let fitting = self.cache.take_if(|cache| cache.shape() == shape && cache.kind() == kind);
        KeyValueCache::reusing(fitting, shape, kind)
    }

    /// Keeps the memory of the keys and values of `cache`, but not its indexes.
    fn keep_cache(&mut self, mut cache: KeyValueCache) {
        cache.clear();
        self.cache = (cache.bytes() <= KEPT_BYTES).then_some(cache);
    }
}

impl Attention {
    /// Attention on arrays. Writes `output`, contiguous `[batch, tokens, query_heads, value_dim]`, and calls `proceed`
    /// between chunks of queries, and between entries of a batch that have their own masks, so that a long call can be
    /// stopped. The result does not depend on the number of threads. Positions, masks and heads are as in
    /// [`run`](Self::run); an entry sees the keys that both `self.mask` and its range in [`Arrays::key_ranges`] have.
    ///
    /// With few queries (a decode step) every method answers exactly: reading all keys once is less work than packing
    /// or indexing them for a single use.
    ///
    /// # Errors
    /// `Break` when `proceed` asked to stop; the output is then incomplete.
    ///
    /// # Panics
    /// When [`Arrays::validate`] fails, `output` has another length than [`Arrays::output_len`], or the method's
    /// settings are out of range.
    pub fn run_arrays(
        &self,
        arrays: &Arrays<'_>,
        output: ElementsMut<'_>,
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        arrays.validate().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(output.len(), arrays.output_len(), "output is [batch, tokens, query_heads, value_dim]");
        self.method.validate().unwrap_or_else(|error| panic!("{error}"));
        match output {
            ElementsMut::F32(output) => self.run_entries(arrays, output, team, scratch, proceed),
            ElementsMut::F16(bits) => {
                self.run_entries(arrays, bits.reinterpret_cast_mut::<f16>(), team, scratch, proceed)
            }
            ElementsMut::Bf16(bits) => {
                self.run_entries(arrays, bits.reinterpret_cast_mut::<bf16>(), team, scratch, proceed)
            }
        }
    }

    /// Runs the entries of the batch that have one mask together, as heads of one call; else one by one.
    fn run_entries<T: FromF32>(
        &self,
        arrays: &Arrays<'_>,
        output: &mut [T],
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, heads, tokens, _] = arrays.queries.shape();
        let value_dim = arrays.values.shape()[3];
        if output.is_empty() {
            // No rows, or none of any width.
            return ControlFlow::Continue(Report::default());
        }
        let masked = |keys: &Range<usize>| {
            let mut attention = self.clone();
            let all = attention.mask.keys.clone().unwrap_or(0..usize::MAX);
            attention.mask.keys = Some(keys.start.max(all.start)..keys.end.min(all.end));
            attention
        };
        let one_by_one = match arrays.key_ranges {
            Some([first, others @ ..]) if others.iter().all(|range| range == first) => {
                let arrays = Arrays { key_ranges: None, ..*arrays };
                return masked(first).run_together(&arrays, output, team, scratch, proceed);
            }
            Some(ranges) => ranges,
            None => return self.run_together(arrays, output, team, scratch, proceed),
        };
        let mut total = Report::default();
        for (entry, output) in (0..batch).zip(output.chunks_exact_mut(tokens * heads * value_dim)) {
            if entry > 0 {
                proceed()?;
            }
            let attention = masked(&one_by_one[entry]);
            total += &attention.run_together(&arrays.entry(entry), output, team, scratch, proceed)?;
        }
        ControlFlow::Continue(total)
    }

    /// Runs all entries under `self.mask`. Writes `output`, `[batch, tokens, query_heads, value_dim]`.
    fn run_together<T: FromF32>(
        &self,
        arrays: &Arrays<'_>,
        output: &mut [T],
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, heads, tokens, key_dim] = arrays.queries.shape();
        // Keys that no query sees are not packed: the unused end of a cache of fixed size, padding on the right.
        let last = self.mask.visible(arrays.first_position + tokens - 1, arrays.keys.shape()[2]);
        let first = self.mask.visible(arrays.first_position, arrays.keys.shape()[2]);
        let used = last.end.max(first.end);
        let (keys, values) = (arrays.keys.first_tokens(used), arrays.values.first_tokens(used));
        let value_dim = values.shape()[3];
        let output = Output::new(output, [batch, tokens, heads, value_dim], arrays.sinks);

        if let Some(rows) = few::Rows::new(&Arrays { keys, values, ..*arrays }) {
            let mut report = few::run(self, &rows, output, team, &mut scratch.few);
            report.fold_batch(batch);
            return ControlFlow::Continue(report);
        }

        let arrays = &Arrays { keys, values, ..*arrays };
        if self.is_exact(arrays) && short::fits(arrays) {
            let mut report = short::run(self, arrays, arrays.packed_type(), output, team, &mut scratch.short);
            report.fold_batch(batch);
            return ControlFlow::Continue(report);
        }
        let shape = CacheShape { kv_heads: keys.row_heads(), key_dim, value_dim };
        if let Some((kind, budget)) = self.narrower_type(arrays) {
            let mut cache = scratch.take_cache(shape, kind);
            cache.append_view(keys, values, team);
            let rest = Method::Budgeted(BudgetSettings { budget: rounding::rest_of(budget) });
            let attention = Self { method: rest, ..self.clone() };
            let call = attention.call(arrays, &cache);
            if rounding::is_within(budget, arrays, &call, team, &mut scratch.attention) {
                let mut report = attention.run_chunks(&call, output, team, &mut scratch.attention, proceed);
                scratch.keep_cache(cache);
                if let ControlFlow::Continue(report) = &mut report {
                    report.heads.iter_mut().for_each(|head| head.rounded_rows = head.rows);
                }
                return report;
            }
        }
        let mut cache = scratch.take_cache(shape, arrays.packed_type());
        cache.append_view(keys, values, team);
        let report = self.run_chunks(&self.call(arrays, &cache), output, team, &mut scratch.attention, proceed);
        scratch.keep_cache(cache);
        report
    }

    /// Whether `arrays` are attended to exactly, whatever the method.
    fn is_exact(&self, arrays: &Arrays<'_>) -> bool {
        match self.method {
            _ if arrays.soft_cap.is_some() => true,
            Method::Exact => true,
            Method::Budgeted(_) => !budgeted::makes_clusters(&self.mask, arrays.keys.shape()[2]),
            Method::Dci(_) => false,
        }
    }

    /// Type that the keys and values of `arrays` may be rounded to where that stays within a budget, and the budget.
    fn narrower_type(&self, arrays: &Arrays<'_>) -> Option<(KeyValueType, f32)> {
        match self.method {
            Method::Budgeted(BudgetSettings { budget })
                if arrays.key_value_type.is_none() && arrays.sinks.is_none() && !self.is_exact(arrays) =>
            {
                let queries = arrays.queries.shape()[2];
                rounding::faster_type(arrays.packed_type(), budget, queries).map(|kind| (kind, budget))
            }
            _ => None,
        }
    }

    fn call<'a>(&'a self, arrays: &Arrays<'a>, cache: &'a KeyValueCache) -> Call<'a> {
        let Arrays { queries, first_position, soft_cap, .. } = *arrays;
        Call { attention: self, queries, first_position, cache, soft_cap }
    }

    /// As [`run`](Self::run), for `queries` `[batch, query_heads, tokens, key_dim]` with any strides, whose row heads
    /// (those of all entries of the batch, entry by entry) read the heads of the cache, as many of them for each entry;
    /// `first_position` is that of the first query among the keys. `output` and `proceed` are as in [`run_arrays`](Self::run_arrays).
    ///
    /// # Errors
    /// `Break` when `proceed` asked to stop; the output is then incomplete.
    ///
    /// # Panics
    /// When heads or widths do not fit the cache, `output` has another length than the queries take, the last query would
    /// have a position beyond [`usize::MAX`], or the method's settings are out of range.
    #[expect(clippy::too_many_arguments, reason = "the arguments of `Attention::run`")]
    pub fn run_cached(
        &self,
        queries: StridedView<'_>,
        first_position: usize,
        cache: &KeyValueCache,
        output: ElementsMut<'_>,
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, heads, tokens, width] = queries.shape();
        let shape = cache.shape();
        assert_eq!(width, shape.key_dim, "queries of another width than keys");
        ArraysError::check_positions(first_position, tokens).unwrap_or_else(|error| panic!("{error}"));
        self.method.validate().unwrap_or_else(|error| panic!("{error}"));
        let fits = batch == 0 || shape.kv_heads.is_multiple_of(batch) && heads.is_multiple_of(shape.kv_heads / batch);
        assert!(fits, "{batch} · {heads} query heads for {} key/value heads of a cache", shape.kv_heads);
        let output_shape = [batch, tokens, heads, shape.value_dim];
        let numbers: usize = output_shape.iter().product();
        assert_eq!(output.len(), numbers, "output is [batch, tokens, query_heads, value_dim]");
        if output.is_empty() {
            return ControlFlow::Continue(Report::default());
        }
        let call = Call { attention: self, queries, first_position, cache, soft_cap: None };
        let scratch = &mut scratch.attention;
        match output {
            ElementsMut::F32(output) => {
                self.run_chunks(&call, Output::new(output, output_shape, None), team, scratch, proceed)
            }
            ElementsMut::F16(bits) => {
                let output = Output::new(bits.reinterpret_cast_mut::<f16>(), output_shape, None);
                self.run_chunks(&call, output, team, scratch, proceed)
            }
            ElementsMut::Bf16(bits) => {
                let output = Output::new(bits.reinterpret_cast_mut::<bf16>(), output_shape, None);
                self.run_chunks(&call, output, team, scratch, proceed)
            }
        }
    }

    /// Runs `call` chunk by chunk.
    fn run_chunks<T: FromF32>(
        &self,
        call: &Call<'_>,
        mut output: Output<'_, T>,
        team: &ThreadTeam,
        scratch: &mut AttentionScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, _, tokens, key_dim] = call.queries.shape();
        let width = call.query_heads() * key_dim.max(call.cache.shape().value_dim);
        let chunk = (CHUNK_NUMBERS / width).max(CHUNK_TOKENS);
        let mut report = Report::default();
        for first in (0..tokens).step_by(chunk) {
            if first > 0 {
                proceed()?;
            }
            let part = first..tokens.min(first + chunk);
            report += &self.run_call(&call.part(part.clone()), output.part(part), team, scratch);
        }
        report.fold_batch(batch);
        ControlFlow::Continue(report)
    }
}
