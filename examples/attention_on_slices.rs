//! Attention on plain slices, without a model: append keys and values as they come, ask with queries.
//!
//! `cargo run --release --example attention_on_slices`

use iceformer::attention::{
    Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Method, Queries, ThreadTeam,
};

fn main() {
    let (query_heads, kv_heads, head_dim) = (8, 2, 64);
    let team = ThreadTeam::new(ThreadTeam::available());
    let shape = CacheShape { kv_heads, key_dim: head_dim, value_dim: head_dim };
    let mut cache = KeyValueCache::new(shape, KeyValueType::Bf16);
    let attention = Attention {
        method: Method::Exact,
        mask: Mask { window: Some(4096), ..Mask::causal() },
        scale: 1.0 / (head_dim as f32).sqrt(),
    };
    let mut scratch = AttentionScratch::default();

    // A prompt in chunks: each chunk's keys and values join the cache before its queries are answered.
    let wave = |count: usize, step: f32| (0..count).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    for chunk_tokens in [512, 512, 300, 1] {
        let keys = wave(chunk_tokens * kv_heads * head_dim, 0.37);
        let values = wave(chunk_tokens * kv_heads * head_dim, 0.11);
        cache.append(&keys, &values, &team);

        let data = wave(chunk_tokens * query_heads * head_dim, 0.23);
        let queries = Queries { data: &data, query_heads, first_position: cache.len() - chunk_tokens };
        let mut output = vec![0.0; chunk_tokens * query_heads * head_dim];
        let report = attention.run(queries, &cache, &mut output, None, &team, &mut scratch);
        println!(
            "{chunk_tokens:4} queries, {:5} keys held, {:9} (query, head, key) triples, first output {:+.4}",
            cache.len(),
            report.total().kept_keys,
            output[0]
        );
    }
}
