//! The calls that are timed: one over a standing cache, or a prompt read in chunks.

use std::time::Instant;

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Method, Queries, Report, ThreadTeam,
};
use iceformer_kernels::ceilings::process_cpu_seconds;
use iceformer_study::error::Row;
use iceformer_study::{Inputs, Shape};

use crate::command_line::bench::measure::Times;

/// A call shorter than this, in seconds of wall time, is repeated between two readings of the clock.
const SHORT_SECONDS: f64 = 1e-4;
/// Tokens appended at a time where no chunk is given, and read at a time of what is read first.
pub const APPENDED: usize = 512;

/// Inputs in a cache, and how they are read.
pub struct Calls<'a> {
    inputs: &'a Inputs,
    shape: Shape,
    mask: Mask,
    scale: f32,
    /// Queries of one call.
    chunk: usize,
    /// Whether every pass appends the keys of its queries anew, so that what a method keeps about them is built in it.
    rewinds: bool,
    cache: KeyValueCache,
    team: &'a ThreadTeam,
    output: Vec<f32>,
}

/// What one pass over all queries took.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    pub attention: Times,
    /// CPU seconds of appending to the cache.
    pub append_cpu_seconds: f64,
    pub report: Report,
}

impl<'a> Calls<'a> {
    /// Fills a cache of type `kv_type`. `chunk`: tokens appended and attended to at a time; `None`: all queries in one
    /// call.
    pub fn new(
        (inputs, shape): (&'a Inputs, Shape),
        mask: Mask,
        scale: f32,
        chunk: Option<usize>,
        kv_type: KeyValueType,
        team: &'a ThreadTeam,
    ) -> Self {
        let Shape { query_tokens, key_tokens, query_heads, kv_heads, key_dim, value_dim } = shape;
        let cache = KeyValueCache::new(CacheShape { kv_heads, key_dim, value_dim }, kv_type);
        let size = chunk.unwrap_or(query_tokens).min(query_tokens);
        let rewinds = chunk.is_some() || query_tokens == key_tokens;
        let output = vec![0.0; size * query_heads * value_dim];
        let mut calls = Self { inputs, shape, mask, scale, chunk: size, rewinds, cache, team, output };
        // As before a prompt.
        calls.cache.reserve(key_tokens);
        calls.append(key_tokens);
        calls
    }

    /// Reads tokens with `method`, so that it knows of them what it knows of a prompt: those that `queries`
    /// `[tokens, query_heads, key_dim]` belong to, the last before the queries of a pass.
    pub fn read_first(&mut self, method: Method, queries: &[f32], scratch: &mut AttentionScratch) {
        let Shape { query_tokens, key_tokens, query_heads, key_dim, value_dim, .. } = self.shape;
        let attention = Attention { method, mask: self.mask.clone(), scale: self.scale };
        let width = query_heads * key_dim;
        let end = key_tokens - query_tokens;
        self.cache.truncate(end - queries.len() / width);
        self.cache.reserve(key_tokens - self.cache.len());
        for queries in queries.chunks(APPENDED * width) {
            let tokens = queries.len() / width;
            let first_position = self.cache.len();
            self.append(first_position + tokens);
            let mut output = vec![0.0; tokens * query_heads * value_dim];
            let queries = Queries { data: queries, query_heads, first_position };
            attention.run(queries, &self.cache, &mut output, None, self.team, scratch);
            self.cache.compact(self.team);
        }
        self.append(key_tokens);
    }

    /// Runs all queries once. Each call is made `repeat` times between two readings of the clock, of which one counts;
    /// `outputs` is told the index of a call's first query and its output `[queries, query_heads, value_dim]`.
    pub fn pass(
        &mut self,
        method: Method,
        repeat: u32,
        scratch: &mut AttentionScratch,
        mut outputs: impl FnMut(usize, &[f32]),
    ) -> Pass {
        let Shape { query_tokens, key_tokens, query_heads, key_dim, value_dim, .. } = self.shape;
        let before = key_tokens - query_tokens;
        let attention = Attention { method, mask: self.mask.clone(), scale: self.scale };
        let mut pass = Pass::default();
        if self.rewinds {
            self.cache.truncate(before);
            self.cache.reserve(key_tokens - before);
            if !self.mask.causal {
                pass.append_cpu_seconds += self.append(key_tokens);
            }
        }
        for first in (0..query_tokens).step_by(self.chunk) {
            let count = self.chunk.min(query_tokens - first);
            pass.append_cpu_seconds += self.append(before + first + count);
            let queries = Queries {
                data: &self.inputs.queries[first * query_heads * key_dim..][..count * query_heads * key_dim],
                query_heads,
                first_position: before + first,
            };
            let output = &mut self.output[..count * query_heads * value_dim];
            let (wall, cpu) = (Instant::now(), process_cpu_seconds());
            for _ in 1..repeat {
                attention.run(queries, &self.cache, output, None, self.team, scratch);
            }
            let report = attention.run(queries, &self.cache, output, None, self.team, scratch);
            self.cache.compact(self.team);
            pass.attention.cpu_seconds += (process_cpu_seconds() - cpu) / f64::from(repeat);
            pass.attention.wall_seconds += wall.elapsed().as_secs_f64() / f64::from(repeat);
            pass.report += &report;
            outputs(first, output);
        }
        pass
    }

    /// Calls of a pass to be made between two readings of the clock, where a pass takes `wall_seconds`.
    pub fn repeats(&self, wall_seconds: f64) -> u32 {
        let call = wall_seconds / self.shape.query_tokens.div_ceil(self.chunk) as f64;
        (SHORT_SECONDS / call.max(1e-9)).ceil().clamp(1.0, 1e4) as u32
    }

    pub fn cache(&self) -> &KeyValueCache {
        &self.cache
    }

    /// Appends until the cache holds `tokens`; gives the CPU time it took.
    fn append(&mut self, tokens: usize) -> f64 {
        let (key, value) = (self.shape.kv_heads * self.shape.key_dim, self.shape.kv_heads * self.shape.value_dim);
        let cpu = process_cpu_seconds();
        while self.cache.len() < tokens {
            let (start, end) = (self.cache.len(), tokens.min(self.cache.len() + APPENDED));
            let keys = &self.inputs.keys[start * key..end * key];
            self.cache.append(keys, &self.inputs.values[start * value..end * value], self.team);
        }
        process_cpu_seconds() - cpu
    }
}

/// Keeps the output of sampled rows, which must be in order, as calls give theirs.
pub struct SampledOutputs<'a> {
    pub rows: &'a [Row],
    pub shape: Shape,
    /// `[rows][value_dim]`
    pub outputs: Vec<f32>,
}

impl SampledOutputs<'_> {
    /// Takes the rows of a call whose first query is `first`.
    pub fn take(&mut self, first: usize, output: &[f32]) {
        let Shape { query_heads, value_dim, .. } = self.shape;
        let end = first + output.len() / (query_heads * value_dim);
        let taken = self.outputs.len() / value_dim;
        for row in self.rows[taken..].iter().take_while(|row| row.token < end) {
            let place = ((row.token - first) * query_heads + row.head) * value_dim;
            self.outputs.extend_from_slice(&output[place..][..value_dim]);
        }
    }
}
