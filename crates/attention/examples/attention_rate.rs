//! Rate of exact attention: `attention_rate TOKENS QUERIES HEADS KV_HEADS HEAD_DIM THREADS [TYPE]`.
//! `iceformer bench attention` measures the same beside the machine's ceilings.

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, KeyValueCache, KeyValueType, Mask, Method, Queries, ThreadTeam,
};
use iceformer_kernels::ceilings::process_cpu_seconds;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let &[tokens, count, heads, kv_heads, width, threads] = &numbers[..] else {
        eprintln!("usage: attention_rate TOKENS QUERIES HEADS KV_HEADS HEAD_DIM THREADS [f32|bf16|int8]");
        std::process::exit(2);
    };
    let team = ThreadTeam::new(threads);
    let mut state = 1_u32;
    let mut values = |count: usize| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    };
    let shape = CacheShape { kv_heads, key_dim: width, value_dim: width };
    let (keys, queries) = (values(tokens * kv_heads * width), values(count * heads * width));
    // A measurement takes some tens of milliseconds, also of a single query.
    let repeats = (2e9 / (4.0 * (count * heads * width * tokens) as f64)).ceil() as usize;
    for kind in KeyValueType::ALL.into_iter().filter(|kind| arguments.len() < 7 || arguments[6] == kind.name()) {
        let mut cache = KeyValueCache::new(shape, kind);
        cache.append(&keys, &keys, &team);
        let attention = Attention { method: Method::Exact, mask: Mask::causal(), scale: 1.0 / (width as f32).sqrt() };
        let queries = Queries { data: &queries, query_heads: heads, first_position: tokens - count };
        let mut output = vec![0.0; count * heads * width];
        let mut scratch = AttentionScratch::default();
        let mut seconds = Vec::new();
        let mut pairs = 0;
        for _ in 0..7 {
            let start = process_cpu_seconds();
            for _ in 0..repeats {
                pairs = attention.run(queries, &cache, &mut output, None, &team, &mut scratch).total().kept_keys;
            }
            seconds.push((process_cpu_seconds() - start) / repeats as f64);
        }
        seconds.sort_by(f64::total_cmp);
        let rate = 4.0 * width as f64 * pairs as f64 / seconds[3] / 1e9;
        let bytes = cache.bytes() as f64 / seconds[3] / 1e9;
        println!(
            "{:5} {:24} {:9.3} ms  {rate:7.1} GFLOP/s  {bytes:6.2} GB/s  best {:7.1}",
            kind.name(),
            Attention::kernel_name(kind),
            seconds[3] * 1e3,
            rate * seconds[3] / seconds[0]
        );
    }
}
