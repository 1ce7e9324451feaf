//! `bench prompt`: a whole prompt through a whole model, and tokens after it.

use std::sync::Arc;
use std::time::Instant;

use iceformer_attention::{HeadReport, Method, ThreadTeam};
use iceformer_engine::{
    Decoder, Family, LayerTensor, ModelConfig, ModelFiles, PartTimes, RandomWeights, RopeConfig, RopeScaling, Sampler,
    SamplerSettings, Session, SessionSettings, TensorName,
};
use iceformer_kernels::InstructionSet;
use iceformer_kernels::ceilings::process_cpu_seconds;
use iceformer_kernels::linear::{LinearWeights, WeightType};
use serde_json::json;

use super::measure::{self, median};
use crate::command_line::arguments::{PromptArguments, Shape};
use crate::command_line::memory::{cache_bytes, ensure_room, peak_resident_bytes};
use crate::command_line::report::{kernels, per_second, shares};
use crate::command_line::{Outcome, interrupt, print_json};

/// Figures of one repeat.
struct Measured {
    prompt_cpu: f64,
    prompt_wall: f64,
    prompt_times: PartTimes,
    decode_cpu: f64,
    decode_wall: f64,
    cache_bytes: usize,
    /// What the method keeps beside the cache.
    index_bytes: usize,
    /// What attention did for the prompt.
    prompt_report: HeadReport,
    /// Bytes of keys and values that the mask allowed in decoding, each token's for itself.
    decode_cache_bytes: f64,
    peak_resident_bytes: Option<u64>,
}

/// Runs the measurement.
pub fn run(arguments: &PromptArguments) -> anyhow::Result<Outcome> {
    let &PromptArguments { tokens, generate, kv_type, .. } = arguments;
    let team = Arc::new(ThreadTeam::new(arguments.threads.unwrap_or_else(ThreadTeam::available)));
    let start = Instant::now();
    let method = arguments.method.method()?;
    let (name, weight_type, decoder) = match (&arguments.model, arguments.shape) {
        (Some(path), _) => {
            let files = ModelFiles::open(path)?;
            let context = files.config().context_length;
            anyhow::ensure!(
                tokens + generate <= context,
                "--tokens {tokens} and --generate {generate} are {} together, but the model takes {context}",
                tokens + generate
            );
            let name = path.display().to_string();
            ensure_fits(&format!("--model {name}"), files.summary().bytes, files.config(), arguments)?;
            // The type of the feed-forward layers, which are most of the weights.
            let up = files.tensor(TensorName::Layer(0, LayerTensor::Up))?.weight_type();
            (name, up, Decoder::load(&files, &team, |_, _| {})?)
        }
        (None, shape) => {
            let (name, config) = shape.unwrap_or(Shape::Small).config(tokens + generate);
            let what = format!("--shape {name} --weights {}", arguments.weights.name());
            ensure_fits(&what, weight_bytes(&config, arguments.weights), &config, arguments)?;
            let source = RandomWeights::new(config, arguments.weights, 1).map_err(anyhow::Error::msg)?;
            (name.to_owned(), arguments.weights, Decoder::load(&source, &team, |_, _| {})?)
        }
    };
    let load_seconds = start.elapsed().as_secs_f64();
    let decoder = Arc::new(decoder);
    let settings = SessionSettings { context: None, chunk: arguments.chunk, key_value_type: kv_type, method };
    let chunk = settings.chunk();

    let (mut measured, mut ceilings) = (Vec::new(), Vec::new());
    for _ in 0..arguments.repeat {
        let mut session = Session::new(Arc::clone(&decoder), Arc::clone(&team), &settings)?;
        let _guard = interrupt::guard(session.cancel());
        let Some(figures) = measure(&mut session, tokens, generate)? else { return Ok(Outcome::Interrupted) };
        drop(session);
        measured.push(figures);
        // Behind the prompt, so that the memory it takes is not part of the first repeat's peak.
        ceilings.push(measure::measure_ceilings(&team)?);
    }

    let of = |field: fn(&Measured) -> f64| median(measured.iter().map(field));
    let (prompt_cpu, prompt_wall) = (of(|m| m.prompt_cpu), of(|m| m.prompt_wall));
    let (decode_cpu, decode_wall) = (of(|m| m.decode_cpu), of(|m| m.decode_wall));
    let ceilings = measure::median_ceilings(&ceilings);
    let linear = decoder.prompt_linear_operations(tokens);
    let report = &measured[0].prompt_report;
    let attention = 4.0 * decoder.config().head_dim as f64 * report.allowed_keys as f64;
    // Seconds of one core that the same operations take at the ceilings.
    let linear_kernel = linear_kernel(weight_type, decoder.config().hidden_size, chunk.min(tokens), &team)?;
    let (_, linear_ceiling) = measure::kernel_ceiling(linear_kernel, &ceilings);
    let (_, attention_ceiling) = measure::kernel_ceiling(method.kernel_name(kv_type), &ceilings);
    let least_cpu = 1e-9 * (linear / linear_ceiling + attention / attention_ceiling);
    let read = decoder.weight_bytes_per_token() as f64 * generate as f64 + measured[0].decode_cache_bytes;
    let mut line = json!({
        "bench": "prompt",
        "model": name,
        "weights": weight_type.name(),
        "kv_type": kv_type.name(),
        "method": method.name(),
        "budget": match method {
            Method::Budgeted(settings) => Some(super::as_typed(settings.budget)),
            _ => None,
        },
        "tokens": tokens,
        "generate": generate,
        "threads": team.threads(),
        "chunk": chunk,
        "repeat": arguments.repeat,
        "instruction_set": InstructionSet::current().name(),
        "kernel": kernels(&decoder, &[method], kv_type).join(", "),
        "load_seconds": load_seconds,
        "prompt_cpu_seconds": prompt_cpu,
        "prompt_wall_seconds": prompt_wall,
        "prompt_tokens_per_second": per_second(tokens, prompt_wall),
        "decode_cpu_seconds": decode_cpu,
        "decode_wall_seconds": decode_wall,
        "decode_tokens_per_second": per_second(generate, decode_wall),
        "attention_share": of(|m| shares(&m.prompt_times)[0]),
        "linear_share": of(|m| shares(&m.prompt_times)[1]),
        "rest_share": of(|m| shares(&m.prompt_times)[2]),
        "kept_share": report.kept_share(),
        "fallback_share": report.fallback_share(),
        "rate_per_core": 1e-9 * (linear + attention) / prompt_cpu,
        "ceiling_fraction": least_cpu / prompt_cpu,
        "cpu_seconds": prompt_cpu + decode_cpu,
        "wall_seconds": prompt_wall + decode_wall,
        "weight_bytes": decoder.weight_bytes(),
        "cache_bytes": measured[0].cache_bytes,
        "index_bytes": measured[0].index_bytes,
        "peak_resident_bytes": measured[0].peak_resident_bytes,
    });
    // What a sparse method reads of the cache is not counted.
    if generate > 0 && method == Method::Exact {
        super::add_bandwidth(&mut line, read / decode_wall * 1e-9, &ceilings);
    }
    if arguments.json {
        print_json(&line)?
    } else {
        super::print_table(&line)?
    }
    Ok(Outcome::Done)
}

/// Reads `tokens` tokens, then `generate` one by one; `None` when Ctrl-C stopped it.
fn measure(session: &mut Session, tokens: usize, generate: usize) -> anyhow::Result<Option<Measured>> {
    let vocabulary = session.decoder().config().vocabulary;
    let token = |index: usize| (index * 7919 % vocabulary) as u32;
    let prompt: Vec<u32> = (0..tokens).map(token).collect();
    let cancel = session.cancel();

    let (wall, cpu) = (Instant::now(), process_cpu_seconds());
    let outcome = session.read(&prompt, |_, _| {});
    if cancel.is_cancelled() {
        return Ok(None);
    }
    outcome?;
    let (prompt_cpu, prompt_wall) = (process_cpu_seconds() - cpu, wall.elapsed().as_secs_f64());
    let (prompt_times, prompt_report) = (session.times(), session.report());

    let (wall, cpu) = (Instant::now(), process_cpu_seconds());
    for index in 0..generate {
        let outcome = session.read(&[token(tokens + index)], |_, _| {});
        if cancel.is_cancelled() {
            return Ok(None);
        }
        outcome?;
    }
    let (decode_cpu, decode_wall) = (process_cpu_seconds() - cpu, wall.elapsed().as_secs_f64());
    // What damaged weights compute is no measurement: fails as a run would.
    Sampler::new(SamplerSettings::default())?.sample(session.logits(), session.tokens())?;
    let config = session.decoder().config();
    // Query heads that share a key/value head read its keys together.
    let keys = (config.layers * config.query_heads * (tokens + generate)) as f64;
    let allowed = (session.report().allowed_keys - prompt_report.allowed_keys) as f64;
    Ok(Some(Measured {
        prompt_cpu,
        prompt_wall,
        prompt_times,
        decode_cpu,
        decode_wall,
        cache_bytes: session.cache_bytes(),
        index_bytes: session.index_bytes(),
        prompt_report,
        decode_cache_bytes: session.occupied_cache_bytes() as f64 * allowed / keys,
        peak_resident_bytes: peak_resident_bytes(),
    }))
}

/// Refuses a model that memory does not hold beside its cache.
fn ensure_fits(what: &str, weights: u64, config: &ModelConfig, arguments: &PromptArguments) -> anyhow::Result<()> {
    let tokens = arguments.tokens + arguments.generate;
    let cache = cache_bytes(arguments.kv_type, config.layers * config.kv_heads * config.head_dim * tokens);
    ensure_room(weights.saturating_add(cache), &format!("{what} with a cache of {tokens} tokens"))
}

/// Bytes of a model's weights where all matrices are of one type.
fn weight_bytes(config: &ModelConfig, weight_type: WeightType) -> u64 {
    let matrices = TensorName::all(config).filter(|name| !name.is_vector());
    let of = |(rows, columns): (usize, usize)| (rows * weight_type.row_bytes(columns).unwrap_or(0)) as u64;
    matrices.filter_map(|name| name.shape(config)).map(of).sum()
}

/// Name of the kernel that runs for `rows` rows of `inputs` on weights of this type.
fn linear_kernel(
    weight_type: WeightType,
    inputs: usize,
    rows: usize,
    team: &ThreadTeam,
) -> anyhow::Result<&'static str> {
    let row = vec![0; weight_type.row_bytes(inputs).unwrap_or(0)];
    Ok(LinearWeights::pack(weight_type, 1, inputs, |_| &row[..], team)?.kernel_name(rows))
}

impl Shape {
    /// Name and configuration, for at least `context` tokens.
    fn config(self, context: usize) -> (&'static str, ModelConfig) {
        let llama = |hidden_size, intermediate_size, layers, query_heads, kv_heads, head_dim, vocabulary| ModelConfig {
            family: Family::Llama,
            hidden_size,
            intermediate_size,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            vocabulary,
            norm_epsilon: 1e-5,
            rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
            sliding_window: None,
            sliding_layers: vec![false; layers],
            context_length: context.max(131_072),
            tied_embeddings: true,
            attention_bias: false,
            output_bias: false,
            feed_forward_bias: false,
            query_key_norm: false,
            bos_token: None,
            eos_tokens: Vec::new(),
        };
        match self {
            Self::Small => ("small", llama(1024, 2816, 8, 16, 4, 64, 32_000)),
            Self::Llama1B => ("llama-1b", llama(2048, 8192, 16, 32, 8, 64, 32_000)),
            Self::Llama8B => {
                ("llama-8b", ModelConfig { tied_embeddings: false, ..llama(4096, 14_336, 32, 32, 8, 128, 128_256) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_counted_before_they_are_made() {
        let (_, config) = Shape::Llama8B.config(1);
        // Llama 3.1 8B has 8.03 billion parameters, of which 266,240 are norms.
        assert_eq!(weight_bytes(&config, WeightType::Bf16), 2 * (8_030_261_248 - 266_240));
        let (_, config) = Shape::Small.config(1);
        assert_eq!(weight_bytes(&config, WeightType::F32), 2 * weight_bytes(&config, WeightType::F16));
    }
}
