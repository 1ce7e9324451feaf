//! `bench attention`: one attention call of one layer.

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, HeadReport, KeyValueCache, Mask, Queries, ThreadTeam,
};
use iceformer_kernels::InstructionSet;
use serde_json::json;

use super::measure;
use crate::command_line::arguments::AttentionArguments;
use crate::command_line::{Outcome, print_json};

/// Runs the measurement.
pub fn run(arguments: &AttentionArguments) -> anyhow::Result<Outcome> {
    let AttentionArguments { ref method, tokens, heads, kv_heads, head_dim, kv_type, queries, ref common } = *arguments;
    let method = method.method()?;
    let queries = queries.unwrap_or(tokens);
    anyhow::ensure!(queries <= tokens, "--queries {queries} is above --tokens {tokens}; queries are the last tokens");
    anyhow::ensure!(heads.is_multiple_of(kv_heads), "--heads {heads} is no multiple of --kv-heads {kv_heads}");
    let largest = tokens.saturating_mul(heads).saturating_mul(head_dim);
    anyhow::ensure!(largest <= 1 << 32, "{tokens} × {heads} × {head_dim} is too large; keep it below 2³² numbers");
    let team = ThreadTeam::new(common.threads.unwrap_or_else(ThreadTeam::available));

    let mut cache = KeyValueCache::new(CacheShape { kv_heads, key_dim: head_dim, value_dim: head_dim }, kv_type);
    const APPENDED: usize = 512;
    for (chunk, first) in (0..tokens).step_by(APPENDED).enumerate() {
        let count = APPENDED.min(tokens - first) * kv_heads * head_dim;
        let seed = 2 * chunk as u64;
        cache.append(&super::random(count, seed), &super::random(count, seed + 1), &team);
    }
    let data = super::random(queries * heads * head_dim, u64::MAX);
    let mut output = vec![0.0; data.len()];
    let attention = Attention { method, mask: Mask::causal(), scale: 1.0 / (head_dim as f32).sqrt() };
    let mut scratch = AttentionScratch::default();
    let mut report = HeadReport::default();
    let (times, ceilings) = measure::beside_ceilings(&team, common.repeat, || {
        let queries = Queries { data: &data, query_heads: heads, first_position: tokens - queries };
        report = attention.run(queries, &cache, &mut output, None, &team, &mut scratch).total();
    })?;

    let rate = 4.0 * head_dim as f64 * report.allowed_keys as f64 / times.cpu_seconds * 1e-9;
    let (ceiling_name, ceiling) = measure::cache_ceiling(kv_type, &ceilings);
    let mut line = json!({
        "bench": "attention",
        "method": method.name(),
        "tokens": tokens,
        "queries": queries,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "kv_type": kv_type.name(),
        "threads": team.threads(),
        "repeat": common.repeat,
        "instruction_set": InstructionSet::current().name(),
        "kernel": method.kernel_name(kv_type),
        "cpu_seconds": times.cpu_seconds,
        "wall_seconds": times.wall_seconds,
        "allowed_keys": report.allowed_keys,
        "evaluated_keys": report.evaluated_keys,
        "kept_keys": report.kept_keys,
        "rate_per_core": rate,
        "ceiling": ceiling_name,
        "ceiling_rate_per_core": ceiling,
        "ceiling_fraction": rate / ceiling,
        "cache_bytes": cache.bytes(),
        "index_bytes": cache.index_bytes(),
    });
    if queries == 1 {
        super::add_bandwidth(&mut line, cache.bytes() as f64 / times.wall_seconds * 1e-9, &ceilings);
    }
    if common.json {
        print_json(&line)?
    } else {
        super::print_table(&line)?
    }
    Ok(Outcome::Done)
}
