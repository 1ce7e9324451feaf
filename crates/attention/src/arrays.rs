//! Attention of a whole call on a caller's arrays: `[batch, heads, tokens, width]` with any strides, f32, f16 or bf16.
//!
//! Queries go through in chunks of tokens, so that what is copied or widened stays in the caches; keys and values go
//! into a cache of their own, packed once. A few queries (a decode step) do not pay for packing and read the caller's
//! rows where they lie ([`few`](crate::few)).

use std::ops::{ControlFlow, Range};

use iceformer_kernels::half::slice::HalfBitsSliceExt;
use iceformer_kernels::half::{bf16, f16};

use crate::exact;
use crate::few::{self, FewScratch};
use crate::strided::FromF32;
use crate::tiles::Call;
use crate::{
    Attention, AttentionScratch, CacheShape, Elements, ElementsMut, KeyValueCache, KeyValueType, Queries, Report,
    StridedView, ThreadTeam,
};

/// Numbers of a chunk of queries, about: a few megabytes.
const CHUNK_NUMBERS: usize = 1 << 20;
/// Fewest tokens of a chunk: several whole tiles.
const CHUNK_TOKENS: usize = 512;

/// What a call on arrays reads.
#[derive(Clone, Copy, Debug)]
pub struct Arrays<'a> {
    /// `[batch, query_heads, tokens, key_dim]`
    pub queries: StridedView<'a>,
    /// `[batch, kv_heads, keys, key_dim]`
    pub keys: StridedView<'a>,
    /// `[batch, kv_heads, keys, value_dim]`
    pub values: StridedView<'a>,
    /// Type that keys and values are packed in, where they are; `None`: bf16 for bf16, else f32, so that nothing is
    /// rounded.
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
    /// Not one sink for each query head.
    #[error("there are {sinks} sinks for {heads} query heads; expected one for each")]
    Sinks {
        /// Sinks given.
        sinks: usize,
        /// Query heads.
        heads: usize,
    },
}

impl Arrays<'_> {
    /// Checks that the shapes fit together.
    ///
    /// # Errors
    /// The first that does not.
    pub fn validate(&self) -> Result<(), ArraysError> {
        let [batch, query_heads, _, query_dim] = self.queries.shape();
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
        if let Some(limit) = self.soft_cap {
            if !(limit > 0.0 && limit.is_finite()) {
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
            (Elements::Bf16(_), Elements::Bf16(_)) => KeyValueType::Bf16,
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
    queries: Vec<f32>,
    output: Vec<f32>,
    log_sum_exp: Vec<f32>,
}

/// Queries over a cache.
struct CachedCall<'a> {
    queries: StridedView<'a>,
    first_position: usize,
    soft_cap: Option<f32>,
    sinks: Option<&'a [f32]>,
}

/// The caller's output for a group of entries of the batch.
struct Target<'a, T> {
    /// `[entries, tokens, heads, value_dim]`
    output: &'a mut [T],
    tokens: usize,
    /// Numbers of one token of one entry: `heads · value_dim`.
    token_numbers: usize,
}

impl KeyValueCache {
    /// Appends the tokens of `keys` and `values`, whose row heads (the heads of all entries of the batch, entry by
    /// entry) are the heads of the cache.
    ///
    /// # Panics
    /// When heads, widths or lengths differ from the cache's or from one another.
    pub fn append_view(&mut self, keys: StridedView<'_>, values: StridedView<'_>, team: &ThreadTeam) {
        let shape = self.shape();
        assert_eq!(keys.row_heads(), shape.kv_heads, "keys of another number of heads");
        assert_eq!(values.row_heads(), shape.kv_heads, "values of another number of heads");
        let ([_, _, tokens, key_dim], [_, _, value_tokens, value_dim]) = (keys.shape(), values.shape());
        assert_eq!((key_dim, value_dim), (shape.key_dim, shape.value_dim), "keys or values of another width");
        assert_eq!(tokens, value_tokens, "values for another number of tokens than keys");
        self.append_rows(
            tokens,
            |head, token, row| keys.read_row(head, token, row),
            |head, token, row| values.read_row(head, token, row),
            team,
        );
    }
}

impl Attention {
    /// Attention on arrays. Writes `output`, contiguous `[batch, tokens, query_heads, value_dim]`, and calls `proceed`
    /// between chunks of queries, so that a long call can be stopped. The result does not depend on the number of
    /// threads. Positions, masks and heads are as in [`run`](Self::run); the keys of `self.mask` are those of every
    /// entry that [`Arrays::key_ranges`] says nothing of.
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
        let numbers = heads * arrays.values.shape()[3];
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
                return masked(first).run_together(
                    &Arrays { key_ranges: None, ..*arrays },
                    Target { output, tokens, token_numbers: numbers },
                    team,
                    scratch,
                    proceed,
                );
            }
            Some(ranges) => ranges,
            None => {
                let target = Target { output, tokens, token_numbers: numbers };
                return self.run_together(arrays, target, team, scratch, proceed);
            }
        };
        let mut total = Report::default();
        for (entry, output) in (0..batch).zip(output.chunks_exact_mut(tokens * numbers)) {
            let target = Target { output, tokens, token_numbers: numbers };
            let attention = masked(&one_by_one[entry]);
            total += &attention.run_together(&arrays.entry(entry), target, team, scratch, proceed)?;
        }
        ControlFlow::Continue(total)
    }

    /// Runs all entries under `self.mask`.
    fn run_together<T: FromF32>(
        &self,
        arrays: &Arrays<'_>,
        mut target: Target<'_, T>,
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, heads, tokens, key_dim] = arrays.queries.shape();
        let row_heads = batch * heads;
        // Keys that no query sees are not packed: the unused end of a cache of fixed size, padding on the right.
        let last = self.mask.visible(arrays.first_position + tokens - 1, arrays.keys.shape()[2]);
        let first = self.mask.visible(arrays.first_position, arrays.keys.shape()[2]);
        let used = last.end.max(first.end);
        let (keys, values) = (arrays.keys.first_tokens(used), arrays.values.first_tokens(used));
        let value_dim = values.shape()[3];

        if let Some(rows) = few::Rows::new(&Arrays { keys, values, ..*arrays }) {
            scratch.output.resize(tokens * row_heads * value_dim, 0.0);
            scratch.log_sum_exp.resize(tokens * row_heads, 0.0);
            let (output, log_sum_exp) = (&mut scratch.output, &mut scratch.log_sum_exp);
            let mut report = few::run(self, &rows, output, log_sum_exp, team, &mut scratch.few);
            add_sinks(arrays.sinks, output, log_sum_exp, value_dim);
            target.write(0, &scratch.output, batch, team);
            report.fold_batch(batch);
            return ControlFlow::Continue(report);
        }

        let kv_heads = keys.row_heads();
        let mut cache = KeyValueCache::new(CacheShape { kv_heads, key_dim, value_dim }, arrays.packed_type());
        cache.append_view(keys, values, team);
        let call = CachedCall {
            queries: arrays.queries,
            first_position: arrays.first_position,
            soft_cap: arrays.soft_cap,
            sinks: arrays.sinks,
        };
        self.run_chunks(&call, &cache, target, team, scratch, proceed)
    }

    /// As [`run`](Self::run), for `queries` `[batch, query_heads, tokens, key_dim]` with any strides, whose row heads
    /// (those of all entries of the batch, entry by entry) are a multiple of the heads of the cache; `first_position` is
    /// that of the first query among the keys. `output` and `proceed` are as in [`run_arrays`](Self::run_arrays).
    ///
    /// # Errors
    /// `Break` when `proceed` asked to stop; the output is then incomplete.
    ///
    /// # Panics
    /// When heads or widths do not fit the cache, `output` has another length than the queries take, or the method's
    /// settings are out of range.
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
        let token_numbers = heads * shape.value_dim;
        assert_eq!(output.len(), batch * tokens * token_numbers, "output is [batch, tokens, query_heads, value_dim]");
        if output.is_empty() {
            return ControlFlow::Continue(Report::default());
        }
        let call = CachedCall { queries, first_position, soft_cap: None, sinks: None };
        match output {
            ElementsMut::F32(output) => {
                self.run_chunks(&call, cache, Target { output, tokens, token_numbers }, team, scratch, proceed)
            }
            ElementsMut::F16(bits) => {
                let output = bits.reinterpret_cast_mut::<f16>();
                self.run_chunks(&call, cache, Target { output, tokens, token_numbers }, team, scratch, proceed)
            }
            ElementsMut::Bf16(bits) => {
                let output = bits.reinterpret_cast_mut::<bf16>();
                self.run_chunks(&call, cache, Target { output, tokens, token_numbers }, team, scratch, proceed)
            }
        }
    }

    /// Queries over a cache, chunk by chunk.
    fn run_chunks<T: FromF32>(
        &self,
        call: &CachedCall<'_>,
        cache: &KeyValueCache,
        mut target: Target<'_, T>,
        team: &ThreadTeam,
        scratch: &mut ArrayScratch,
        proceed: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> ControlFlow<(), Report> {
        let [batch, _, tokens, key_dim] = call.queries.shape();
        let (row_heads, value_dim) = (call.queries.row_heads(), cache.shape().value_dim);
        let in_place = call.queries.token_major_f32();
        let chunk = (CHUNK_NUMBERS / (row_heads * key_dim.max(value_dim))).max(CHUNK_TOKENS);
        let mut report = Report::default();
        for first in (0..tokens).step_by(chunk) {
            if first > 0 {
                proceed()?;
            }
            let count = chunk.min(tokens - first);
            let data = match in_place {
                Some(data) => &data[first * row_heads * key_dim..][..count * row_heads * key_dim],
                None => {
                    scratch.queries.resize(count * row_heads * key_dim, 0.0);
                    team.run_chunks(&mut scratch.queries, 4 * row_heads * key_dim, |part, rows, _| {
                        for (index, row) in rows.chunks_exact_mut(key_dim).enumerate() {
                            let token = first + part * 4 + index / row_heads;
                            call.queries.read_row(index % row_heads, token, row);
                        }
                    });
                    &scratch.queries
                }
            };
            let queries = Queries { data, query_heads: row_heads, first_position: call.first_position + first };
            scratch.output.resize(count * row_heads * value_dim, 0.0);
            let log_sum_exp = call.sinks.map(|_| {
                scratch.log_sum_exp.resize(count * row_heads, 0.0);
                &mut scratch.log_sum_exp[..]
            });
            let (output, buffers) = (&mut scratch.output, &mut scratch.attention);
            report += &match call.soft_cap {
                None => self.run(queries, cache, output, log_sum_exp, team, buffers),
                soft_cap => {
                    let call = Call { attention: self, queries, cache, soft_cap };
                    exact::run(&call, output, log_sum_exp, team, buffers)
                }
            };
            add_sinks(call.sinks, &mut scratch.output, &scratch.log_sum_exp, value_dim);
            target.write(first, &scratch.output, batch, team);
        }
        report.fold_batch(batch);
        ControlFlow::Continue(report)
    }
}

/// Gives each head's sink its share: rows are `[tokens, row heads, value_dim]`, log-sum-exps `[tokens, row heads]`.
fn add_sinks(sinks: Option<&[f32]>, output: &mut [f32], log_sum_exp: &[f32], value_dim: usize) {
    let Some(sinks) = sinks else { return };
    for (row, (output, log_sum_exp)) in output.chunks_exact_mut(value_dim).zip(log_sum_exp).enumerate() {
        // A row that sees nothing gives all its mass to the sink, and is zero already.
        if *log_sum_exp != f32::NEG_INFINITY {
            let share = 1.0 / (1.0 + (sinks[row % sinks.len()] - log_sum_exp).exp());
            output.iter_mut().for_each(|value| *value *= share);
        }
    }
}

impl<T: FromF32> Target<'_, T> {
    /// Writes `source`, `[tokens, entries · heads, value_dim]`, to the tokens from `first` on.
    fn write(&mut self, first: usize, source: &[f32], entries: usize, team: &ThreadTeam) {
        const TOKENS: usize = 16;
        let numbers = self.token_numbers;
        let count = source.len() / (entries * numbers);
        let mut parts: Vec<(usize, usize, &mut [T])> = Vec::new();
        for (entry, output) in self.output.chunks_exact_mut(self.tokens * numbers).enumerate() {
            let output = &mut output[first * numbers..(first + count) * numbers];
            parts.extend(output.chunks_mut(TOKENS * numbers).enumerate().map(|(part, rows)| (entry, part, rows)));
        }
        let write = |(entry, part, rows): &mut (usize, usize, &mut [T])| {
            for (offset, row) in rows.chunks_exact_mut(numbers).enumerate() {
                let token = *part * TOKENS + offset;
                T::convert(&source[(token * entries + *entry) * numbers..][..numbers], row);
            }
        };
        if source.len() < 1 << 14 {
            parts.iter_mut().for_each(write);
        } else {
            team.run_chunks(&mut parts, 4, |_, parts, _| parts.iter_mut().for_each(write));
        }
    }
}
