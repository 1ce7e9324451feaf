//! One input with its mask, and how it is run.

use std::ops::Range;

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, DciSettings, HeadReport, KeyValueCache, KeyValueType, Mask, Method,
    Queries, ThreadTeam,
};
use iceformer_testing::attention::{Problem, Solution};
use iceformer_testing::compare::assert_close;
use iceformer_testing::synthetic::{Inputs, Kind, Shape};

/// Settings under which small inputs are searched by tree and projections, not scanned.
pub const SMALL: DciSettings = DciSettings { whole_node: 6, whole_range: 10, ..DciSettings::PUBLISHED };

pub struct Case {
    pub shape: Shape,
    pub inputs: Inputs,
    pub mask: Mask,
    pub first_position: usize,
}

pub fn case(kind: Kind, shape: Shape, mask: Mask, seed: u64) -> Case {
    let first_position = shape.key_tokens.saturating_sub(shape.query_tokens);
    Case { shape, inputs: Inputs::new(kind, shape, seed), mask, first_position }
}

pub fn one_head(tokens: usize, dim: usize) -> Shape {
    Shape { query_tokens: tokens, key_tokens: tokens, query_heads: 1, kv_heads: 1, key_dim: dim, value_dim: dim }
}

/// Output, log-sum-exp and report of a call.
pub type Outcome = (Vec<f32>, Vec<f32>, HeadReport);

impl Case {
    pub fn scale(&self) -> f32 {
        1.0 / (self.shape.key_dim as f32).sqrt()
    }

    pub fn empty_cache(&self, kind: KeyValueType) -> KeyValueCache {
        let Shape { kv_heads, key_dim, value_dim, .. } = self.shape;
        KeyValueCache::new(CacheShape { kv_heads, key_dim, value_dim }, kind)
    }

    pub fn append(&self, cache: &mut KeyValueCache, tokens: Range<usize>, team: &ThreadTeam) {
        let Shape { kv_heads, key_dim, value_dim, .. } = self.shape;
        let (key, value) = (kv_heads * key_dim, kv_heads * value_dim);
        let keys = &self.inputs.keys[tokens.start * key..tokens.end * key];
        cache.append(keys, &self.inputs.values[tokens.start * value..tokens.end * value], team);
    }

    pub fn cache(&self, kind: KeyValueType, team: &ThreadTeam) -> KeyValueCache {
        let mut cache = self.empty_cache(kind);
        self.append(&mut cache, 0..self.shape.key_tokens, team);
        cache
    }

    pub fn run_on(
        &self,
        settings: DciSettings,
        cache: &KeyValueCache,
        team: &ThreadTeam,
        tokens: Range<usize>,
    ) -> Outcome {
        let Shape { query_heads, key_dim, value_dim, .. } = self.shape;
        let attention = Attention { method: Method::Dci(settings), mask: self.mask.clone(), scale: self.scale() };
        let row = query_heads * key_dim;
        let queries = Queries {
            data: &self.inputs.queries[tokens.start * row..tokens.end * row],
            query_heads,
            first_position: self.first_position + tokens.start,
        };
        let mut output = vec![f32::NAN; tokens.len() * query_heads * value_dim];
        let mut log_sum_exp = vec![f32::NAN; tokens.len() * query_heads];
        let scratch = &mut AttentionScratch::default();
        let report = attention.run(queries, cache, &mut output, Some(&mut log_sum_exp), team, scratch);
        (output, log_sum_exp, report.total())
    }

    pub fn run(&self, settings: DciSettings, kind: KeyValueType, threads: usize) -> Outcome {
        let team = ThreadTeam::new(threads);
        self.run_on(settings, &self.cache(kind, &team), &team, 0..self.shape.query_tokens)
    }

    pub fn problem(&self) -> Problem<'_> {
        let Shape { query_heads, kv_heads, key_dim, value_dim, .. } = self.shape;
        Problem {
            queries: &self.inputs.queries,
            keys: &self.inputs.keys,
            values: &self.inputs.values,
            query_heads,
            kv_heads,
            key_dim,
            value_dim,
            scale: f64::from(self.scale()),
            first_position: self.first_position,
            causal: self.mask.causal,
            window: self.mask.window,
            unpadded: self.mask.keys.clone(),
        }
    }

    pub fn reference(&self) -> Solution {
        self.problem().solve()
    }

    /// With as many keys kept as there are, the search must find every visible key.
    pub fn check_everything_kept(&self, settings: DciSettings) {
        let expected = self.reference();
        let settings = DciSettings { kept_keys: self.shape.key_tokens.max(1), ..settings };
        for (kind, tolerance) in [(KeyValueType::F32, 1e-5), (KeyValueType::Bf16, 5e-2), (KeyValueType::Int8, 6e-2)] {
            let (output, log_sum_exp, report) = self.run(settings, kind, 2);
            let what = format!("{:?} {:?} {settings:?} with {}", self.shape, self.mask, kind.name());
            assert_eq!(report.kept_keys, report.allowed_keys, "{what}");
            assert_eq!(report.allowed_keys, expected.allowed_keys, "{what}");
            assert_close(&output, &expected.output, tolerance, format!("output of {what}"));
            assert_close(&log_sum_exp, &expected.log_sum_exp, tolerance, format!("log-sum-exp of {what}"));
        }
    }
}
