//! One attention call: queries against a cache under a mask, by a method.

use std::ops::Range;

use crate::{KeyValueCache, ThreadTeam};

/// How the keys of a query are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// All keys the mask allows: tiled, online softmax.
    #[default]
    Exact,
}

impl Method {
    /// Every method, in the order reports list them.
    pub const ALL: [Self; 1] = [Self::Exact];

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
        }
    }
}

/// Which keys a query may see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query at position `p` sees keys at positions up to `p` only.
    pub causal: bool,
    /// Query at position `p` sees keys at positions above `p − window` only (and below `p + window` when not causal).
    pub window: Option<usize>,
    /// Keys that are no padding; `None`: all. Left padding is `padding..len`, right padding `0..used`.
    pub keys: Option<Range<usize>>,
}

impl Mask {
    /// Causal, without window or padding.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }
}

/// Queries of one call.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[tokens, query_heads, key_dim]`.
    pub data: &'a [f32],
    /// Query heads, a multiple of the cache's `kv_heads`; head `h` reads key/value head `h / (query_heads / kv_heads)`.
    pub query_heads: usize,
    /// Position of the first query among the keys of the cache. After appending a chunk: cache length − chunk length.
    pub first_position: usize,
}

/// Settings of an attention step.
#[derive(Clone, Debug)]
pub struct Attention {
    /// How keys are chosen.
    pub method: Method,
    /// Which keys may be seen.
    pub mask: Mask,
    /// Factor on the logits, usually `1/√key_dim`.
    pub scale: f32,
}

/// Buffers reused from call to call.
#[derive(Default)]
pub struct AttentionScratch {}

/// What a call did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// (query, head, key) triples the mask allows.
    pub allowed_keys: u64,
    /// (query, head, key) triples computed.
    pub kept_keys: u64,
}

impl Attention {
    /// Writes `output` `[tokens, query_heads, value_dim]` and, where asked for, `log_sum_exp` `[tokens, query_heads]`
    /// (nats; −∞ for a query that sees no key, whose output is zero).
    ///
    /// # Panics
    /// When a slice has another length than its shape takes, or `query_heads` is no multiple of `kv_heads`.
    pub fn run(
        &self,
        queries: Queries<'_>,
        cache: &KeyValueCache,
        output: &mut [f32],
        mut log_sum_exp: Option<&mut [f32]>,
        _team: &ThreadTeam,
        _scratch: &mut AttentionScratch,
    ) -> Report {
        let shape = cache.shape();
        let heads = queries.query_heads;
        let (d, dv) = (shape.key_dim, shape.value_dim);
        let tokens = queries.data.len() / (heads * d);
        let mut report = Report::default();
        for token in 0..tokens {
            let position = queries.first_position + token;
            for head in 0..heads {
                let query = &queries.data[(token * heads + head) * d..][..d];
                let kv = head / (heads / shape.kv_heads);
                let out = &mut output[(token * heads + head) * dv..][..dv];
                out.fill(0.0);
                let seen: Vec<usize> = (0..cache.len())
                    .filter(|&k| {
                        (!self.mask.causal || k <= position)
                            && self
                                .mask
                                .window
                                .is_none_or(|w| k + w > position && (self.mask.causal || k < position + w))
                            && self.mask.keys.as_ref().is_none_or(|r| r.contains(&k))
                    })
                    .collect();
                report.allowed_keys += seen.len() as u64;
                let logits: Vec<f32> = seen
                    .iter()
                    .map(|&k| {
                        let key = &cache.keys[(k * shape.kv_heads + kv) * d..][..d];
                        self.scale * query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>()
                    })
                    .collect();
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = logits.iter().map(|l| (l - max).exp()).sum();
                for (&k, logit) in seen.iter().zip(&logits) {
                    let value = &cache.values[(k * shape.kv_heads + kv) * dv..][..dv];
                    let weight = (logit - max).exp() / sum;
                    out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
                if let Some(lse) = log_sum_exp.as_deref_mut() {
                    lse[token * heads + head] = if seen.is_empty() { f32::NEG_INFINITY } else { max + sum.ln() };
                }
            }
        }
        report.kept_keys = report.allowed_keys;
        report
    }
}
