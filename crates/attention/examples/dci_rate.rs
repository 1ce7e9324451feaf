//! Method `dci` against exact attention on synthetic inputs:
//! `dci_rate TOKENS HEAD_DIM THREADS [gauss|cluster|peaky] [causal|full] [f32|bf16|int8] [HEADS]`.
//!
//! One line: recall of the best 20 keys, and the softmax mass that the keys found and the best 20 carry, on sampled queries against
//! f64; keys evaluated for each query and CPU nanoseconds for each; CPU seconds to build the index, to search it, and of
//! exact attention on the same input.

use std::time::Instant;

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, DciSettings, HeadReport, KeyValueCache, KeyValueType, Mask, Method,
    Queries, ThreadTeam,
};
use iceformer_testing::recall::RecallProbe;
use iceformer_testing::synthetic::{Inputs, Kind, Shape};

/// Queries that recall and mass are measured on.
const SAMPLES: usize = 256;

/// CPU seconds of this process so far, from the kernel's accounting of each of its threads.
fn cpu_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").expect("a Linux system");
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let accounting = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        accounting.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Smallest CPU time of five measurements. The accounting ticks in milliseconds: each measurement takes some fifty.
fn measure(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    let repeats = (0.05 / start.elapsed().as_secs_f64()).ceil().max(1.0);
    let mut run = || {
        let start = cpu_seconds();
        (0..repeats as usize).for_each(|_| work());
        (cpu_seconds() - start) / repeats
    };
    (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let numbers: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let (&[tokens, width, threads] | &[tokens, width, threads, _]) = &numbers[..] else {
        eprintln!(
            "usage: dci_rate TOKENS HEAD_DIM THREADS [gauss|cluster|peaky] [causal|full] [f32|bf16|int8] [HEADS]"
        );
        std::process::exit(2);
    };
    let heads = numbers.get(3).copied().unwrap_or(1);
    let kinds = Kind::ALL.into_iter().filter(|kind| !Kind::ALL.iter().any(|kind| has(kind.name())) || has(kind.name()));
    let kind_of_cache = KeyValueType::ALL.into_iter().find(|kind| has(kind.name())).unwrap_or(KeyValueType::F32);
    let team = ThreadTeam::new(threads);
    for kind in kinds {
        for (name, mask) in [("full", Mask::default()), ("causal", Mask::causal())] {
            if (has("full") || has("causal")) && !has(name) {
                continue;
            }
            let shape = Shape {
                query_tokens: tokens,
                key_tokens: tokens,
                query_heads: heads,
                kv_heads: heads,
                key_dim: width,
                value_dim: width,
            };
            let inputs = Inputs::new(kind, shape, 1);
            let cache_shape = CacheShape { kv_heads: heads, key_dim: width, value_dim: width };
            let new_cache = || {
                let mut cache = KeyValueCache::new(cache_shape, kind_of_cache);
                cache.append(&inputs.keys, &inputs.values, &team);
                cache
            };
            let scale = 1.0 / (width as f32).sqrt();
            let dci = Attention { method: Method::Dci(DciSettings::default()), mask: mask.clone(), scale };
            let exact = Attention { method: Method::Exact, ..dci.clone() };
            let queries = Queries { data: &inputs.queries, query_heads: heads, first_position: 0 };
            let mut output = vec![0.0; tokens * heads * width];
            let mut scratch = AttentionScratch::default();

            let cache = new_cache();
            let exact_seconds = measure(|| {
                exact.run(queries, &cache, &mut output, None, &team, &mut scratch);
            });
            let last = Queries { data: &inputs.queries[..heads * width], first_position: tokens - 1, ..queries };
            let mut output_of_last = vec![0.0; heads * width];
            let mut with_index = |build: bool| {
                measure(|| {
                    let cache = new_cache();
                    if build {
                        dci.run(last, &cache, &mut output_of_last, None, &team, &mut AttentionScratch::default());
                    }
                })
            };
            let build_seconds = with_index(true) - with_index(false);
            dci.run(queries, &cache, &mut output, None, &team, &mut scratch);
            let mut report = HeadReport::default();
            let search_seconds = measure(|| {
                report = dci.run(queries, &cache, &mut output, None, &team, &mut scratch).total();
            });

            // Recall of the first head, on a cache of its own whose values make it visible.
            let sampled: Vec<usize> =
                (0..SAMPLES.min(tokens)).map(|sample| sample * tokens / SAMPLES.min(tokens)).collect();
            let of_head = |data: &[f32], token: usize| data[token * heads * width..][..width].to_vec();
            let sampled_queries: Vec<f32> = sampled.iter().flat_map(|&token| of_head(&inputs.queries, token)).collect();
            let keys: Vec<f32> = (0..tokens).flat_map(|token| of_head(&inputs.keys, token)).collect();
            let seen: Vec<_> = sampled.iter().map(|&token| mask.visible(token, tokens)).collect();
            let probe = RecallProbe::new(&sampled_queries, &keys, width, f64::from(scale), &seen, 20);
            let probe_shape = CacheShape { kv_heads: 1, key_dim: width, value_dim: sampled.len() };
            let mut probe_cache = KeyValueCache::new(probe_shape, KeyValueType::F32);
            probe_cache.append(&keys, &probe.values, &team);
            let (mut recall, mut mass) = (0.0, 0.0);
            for (sample, query) in sampled_queries.chunks_exact(width).enumerate() {
                let queries = Queries { data: query, query_heads: 1, first_position: sampled[sample] };
                let (mut output, mut log_sum_exp) = (vec![0.0; sampled.len()], [0.0]);
                dci.run(queries, &probe_cache, &mut output, Some(&mut log_sum_exp), &team, &mut scratch);
                recall += probe.recall(sample, &output, log_sum_exp[0]) / sampled.len() as f64;
                mass += probe.mass(sample, log_sum_exp[0]) / sampled.len() as f64;
            }
            let best_mass = probe.best_mass.iter().sum::<f64>() / sampled.len() as f64;
            let searches = (tokens * heads) as f64;
            println!(
                "{:7} {name:6} {:5} n {tokens:6} d {width:3}  recall@20 {:.3}  mass {:.3} of {:.4}  {:6.0} keys/query  \
                 {:5.2} ns/key  build {:8.4} s  search {search_seconds:8.4} s  exact {exact_seconds:8.4} s  \
                 dci/exact {:.2}  index {:.0} B/key",
                kind.name(),
                kind_of_cache.name(),
                recall,
                mass,
                best_mass,
                report.evaluated_keys as f64 / searches,
                search_seconds * 1e9 / report.evaluated_keys as f64,
                build_seconds,
                (build_seconds + search_seconds) / exact_seconds,
                cache.index_bytes() as f64 / searches,
            );
        }
    }
}
