//! `bench attention`: attention of one layer, on synthetic inputs or those of a dump.

mod call;
mod figures;

use iceformer_attention::{AttentionScratch, Mask, Method, ThreadTeam};
use iceformer_kernels::InstructionSet;
use iceformer_kernels::ceilings::Ceilings;
use iceformer_study::error::{Row, RowError, sample_rows, truths};
use iceformer_study::tile::tile;
use iceformer_study::{Dump, Inputs, Shape};
use serde_json::{Map, Value, json};

use super::measure::{self, Times, median};
use crate::command_line::arguments::{AttentionArguments, MaskKind};
use crate::command_line::memory::{cache_bytes, ensure_room};
use crate::command_line::progress::Progress;
use crate::command_line::{Outcome, print_json, print_text};
use call::{Calls, SampledOutputs};
use figures::Figures;

/// What is measured on each layer.
struct Bench<'a> {
    arguments: &'a AttentionArguments,
    method: Method,
    team: ThreadTeam,
}

/// How far the run is, in passes.
struct Steps {
    progress: Progress,
    done: usize,
    total: usize,
}

impl Steps {
    fn step(&mut self) {
        self.done += 1;
        self.progress.update(self.done, self.total);
    }
}

/// A layer's inputs and how attention reads them.
struct Case {
    inputs: Inputs,
    /// Of the tokens before them that are read first, `[tokens, query_heads, key_dim]`.
    first_queries: Vec<f32>,
    shape: Shape,
    scale: f32,
    mask: Mask,
}

impl Case {
    /// Takes the queries of the first `read_first` of `shape.query_tokens` tokens out of `inputs`.
    fn new(mut inputs: Inputs, mut shape: Shape, read_first: usize, scale: f32, mask: Mask) -> anyhow::Result<Self> {
        let is_possible = mask.causal || read_first == 0;
        anyhow::ensure!(is_possible, "--read-first needs a causal mask: else the first queries see the last keys");
        let queries = inputs.queries.split_off(read_first * shape.query_heads * shape.key_dim);
        let first_queries = std::mem::replace(&mut inputs.queries, queries);
        shape.query_tokens -= read_first;
        Ok(Self { inputs, first_queries, shape, scale, mask })
    }
}

/// Runs the measurement.
pub fn run(arguments: &AttentionArguments) -> anyhow::Result<Outcome> {
    let method = arguments.method.method()?;
    if arguments.read_first > 0 {
        anyhow::ensure!(
            method != Method::Exact && !matches!(arguments.against, Some(Method::Budgeted(_))),
            "--read-first is for what --method learns of a text: exact learns nothing, and budgeted as --against would not \
             be told"
        );
    }
    let dump = arguments.from.as_deref().map(Dump::open).transpose()?;
    let layers = layers(arguments, dump.as_ref())?;
    let repeat = arguments.common.repeat as usize;
    let bench = Bench {
        arguments,
        method,
        team: ThreadTeam::new(arguments.common.threads.unwrap_or_else(ThreadTeam::available)),
    };
    let mut steps = Steps {
        progress: Progress::new("measuring", "passes", arguments.common.json),
        done: 0,
        total: layers.len() * (1 + repeat * (1 + usize::from(arguments.against.is_some()))),
    };
    let mut all = Figures::default();
    let mut known = None;
    for &layer in &layers {
        let case = case(arguments, dump.as_ref(), layer)?;
        let (figures, ceilings) = bench.measure(&case, known, &mut steps)?;
        let mut line = bench.description(case.shape, &case.mask);
        if dump.is_some() {
            line.insert("layer".into(), layer.into());
        }
        bench.print(line, &figures, &ceilings, case.shape)?;
        all.add(&figures);
        known = Some(ceilings);
        if layers.len() > 1 && layer == layers[layers.len() - 1] {
            let mut line = bench.description(case.shape, &case.mask);
            line.insert("layer".into(), "all".into());
            line.insert("layers".into(), layers.len().into());
            bench.print(line, &all, &ceilings, case.shape)?;
        }
    }
    steps.progress.finish();
    Ok(Outcome::Done)
}

/// The layers to measure, and all that can be wrong with the arguments before inputs are made.
fn layers(arguments: &AttentionArguments, dump: Option<&Dump>) -> anyhow::Result<Vec<usize>> {
    let &AttentionArguments { heads, kv_heads, head_dim, layer, .. } = arguments;
    let layers = match (dump, layer) {
        (None, _) => vec![0],
        (Some(dump), None) => (0..dump.layers()).collect(),
        (Some(dump), Some(layer)) => {
            anyhow::ensure!(
                layer < dump.layers(),
                "--layer {layer}: {} has layers 0 to {}",
                dump.name(),
                dump.layers() - 1
            );
            vec![layer]
        }
    };
    if dump.is_none() {
        anyhow::ensure!(heads.is_multiple_of(kv_heads), "--heads {heads} is no multiple of --kv-heads {kv_heads}");
    }
    for &layer in &layers {
        let tokens = tokens(arguments, dump, layer);
        let queries = arguments.queries.unwrap_or(tokens);
        anyhow::ensure!(
            queries <= tokens,
            "--queries {queries} is above --tokens {tokens}; queries are the last tokens"
        );
        anyhow::ensure!(
            arguments.read_first <= tokens - queries,
            "--read-first {}: there are {} of {tokens} tokens before {queries} queries",
            arguments.read_first,
            tokens - queries
        );
        let (heads, kv_heads, head_dim) = dump.map_or((heads, kv_heads, head_dim), |dump| {
            let shape = dump.shape(layer);
            (shape.query_heads, shape.kv_heads, shape.key_dim)
        });
        let largest = tokens.saturating_mul(heads).saturating_mul(head_dim);
        anyhow::ensure!(largest <= 1 << 32, "{tokens} × {heads} × {head_dim} is too large; keep it below 2³² numbers");
        // Queries, outputs of one call, keys and values, all of them f32, and the cache.
        let call = arguments.chunk.unwrap_or(queries).min(queries).max(arguments.read_first.min(call::APPENDED));
        let own = 4 * ((queries + arguments.read_first + call) * heads + 2 * tokens * kv_heads) * head_dim;
        let cache = cache_bytes(arguments.kv_type, tokens * kv_heads * head_dim);
        let what = format!("attention of {queries} queries to {tokens} keys, {heads} heads of {head_dim},");
        ensure_room(own as u64 + cache, &what)?;
    }
    Ok(layers)
}

fn tokens(arguments: &AttentionArguments, dump: Option<&Dump>, layer: usize) -> usize {
    arguments.tokens.unwrap_or_else(|| dump.map_or(8192, |dump| dump.shape(layer).key_tokens))
}

/// The inputs of a layer.
fn case(arguments: &AttentionArguments, dump: Option<&Dump>, layer: usize) -> anyhow::Result<Case> {
    let tokens = tokens(arguments, dump, layer);
    let read_first = arguments.read_first;
    let queries = arguments.queries.unwrap_or(tokens) + read_first;
    let asked = arguments.mask.map(|mask| mask == MaskKind::Causal);
    let Some(dump) = dump else {
        let head_dim = arguments.head_dim;
        let shape = Shape {
            query_tokens: queries,
            key_tokens: tokens,
            query_heads: arguments.heads,
            kv_heads: arguments.kv_heads,
            key_dim: head_dim,
            value_dim: head_dim,
        };
        let mask = Mask { causal: asked.unwrap_or(true), ..Mask::default() };
        let inputs = Inputs::new(arguments.generator, shape, arguments.seed);
        return Case::new(inputs, shape, read_first, 1.0 / (head_dim as f32).sqrt(), mask);
    };
    let stored = dump.read(layer)?;
    let mask = Mask { causal: asked.unwrap_or(stored.causal), window: stored.window, keys: None };
    let (inputs, shape) = tile(&stored, tokens, queries, arguments.tile_noise, arguments.seed);
    Case::new(inputs, shape, read_first, stored.scale, mask)
}

impl Bench<'_> {
    /// Measures the methods in turn, and the error of the first; the ceilings in turn with them, where they are not `known`
    /// from another layer.
    fn measure(&self, case: &Case, known: Option<Ceilings>, steps: &mut Steps) -> anyhow::Result<(Figures, Ceilings)> {
        let Case { shape, .. } = *case;
        let arguments = self.arguments;
        let mut calls = Calls::new(
            (&case.inputs, shape),
            case.mask.clone(),
            case.scale,
            arguments.chunk,
            arguments.kv_type,
            &self.team,
        );
        let contestants: Vec<Method> = [Some(self.method), arguments.against].into_iter().flatten().collect();
        let mut scratches: Vec<_> = contestants.iter().map(|_| AttentionScratch::default()).collect();

        // What is read first stays known: passes rewind to its end.
        // The first pass warms caches and buffers, gives the outputs, and tells how many passes make a measurement.
        let rows = sample_rows(shape.query_tokens, shape.query_heads, arguments.samples, arguments.seed);
        let mut sampled = SampledOutputs { rows: &rows, shape, outputs: Vec::new() };
        if !case.first_queries.is_empty() {
            calls.read_first(self.method, &case.first_queries, &mut scratches[0]);
        }
        let first = calls.pass(self.method, 1, &mut scratches[0], |at, output| sampled.take(at, output));
        // Before another method starts the cache anew.
        let cache = calls.cache();
        let (cache_bytes, occupied_bytes, index_bytes) = (cache.bytes(), cache.occupied_bytes(), cache.index_bytes());
        steps.step();

        let mut ceilings = Vec::new();
        let mut times = vec![Vec::new(); contestants.len()];
        let mut appends = Vec::new();
        for _ in 0..arguments.common.repeat {
            if known.is_none() {
                ceilings.push(measure::measure_ceilings(&self.team)?);
            }
            for (index, &method) in contestants.iter().enumerate() {
                let (time, append) = measure_passes(&mut calls, method, &mut scratches[index]);
                times[index].push(time);
                if index == 0 {
                    appends.push(append);
                }
                steps.step();
            }
        }
        let figures = Figures {
            attention: medians(&times[0]),
            append_cpu_seconds: median(appends.into_iter()),
            against: times.get(1).map(|times| medians(times)),
            report: first.report.total(),
            operations: 2.0 * (shape.key_dim + shape.value_dim) as f64 * first.report.total().allowed_keys as f64,
            errors: errors(case, &rows, &sampled.outputs, self.team.threads()),
            cache_bytes,
            occupied_bytes,
            index_bytes,
        };
        Ok((figures, known.unwrap_or_else(|| measure::median_ceilings(&ceilings))))
    }

    /// The fields that tell what is measured.
    fn description(&self, shape: Shape, mask: &Mask) -> Map<String, Value> {
        let arguments = self.arguments;
        let mut line = json!({
            "bench": "attention",
            "method": self.method.name(),
            "budget": match self.method {
                Method::Budgeted(settings) => Some(super::as_typed(settings.budget)),
                _ => None,
            },
        });
        match &arguments.from {
            None => line["generator"] = arguments.generator.name().into(),
            Some(path) => {
                line["from"] = path.display().to_string().into();
                line["tile_noise"] = super::as_typed(arguments.tile_noise).into();
            }
        }
        let rest = json!({
            "seed": arguments.seed,
            "tokens": shape.key_tokens,
            "queries": shape.query_tokens,
            "chunk": arguments.chunk,
            "read_first": arguments.read_first,
            "mask": if mask.causal { "causal" } else { "full" },
            "window": mask.window,
            "heads": shape.query_heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.key_dim,
            "kv_type": arguments.kv_type.name(),
            "threads": self.team.threads(),
            "repeat": arguments.common.repeat,
            "instruction_set": InstructionSet::current().name(),
            "kernel": self.method.kernel_name(arguments.kv_type),
        });
        let mut fields = Map::new();
        for part in [line, rest] {
            fields.extend(part.as_object().cloned().unwrap_or_default());
        }
        fields
    }

    /// Prints a line, or a table for people.
    fn print(
        &self,
        description: Map<String, Value>,
        figures: &Figures,
        ceilings: &Ceilings,
        shape: Shape,
    ) -> anyhow::Result<()> {
        let arguments = self.arguments;
        let mut fields = description;
        let kernel = self.method.kernel_name(arguments.kv_type);
        fields.extend(figures.fields(arguments.against.map(Method::name), kernel, ceilings));
        let mut line = Value::Object(fields);
        // What a sparse method reads of the cache is not counted.
        if shape.query_tokens == 1 && self.method == Method::Exact {
            let read = figures.occupied_bytes as f64 / figures.attention.wall_seconds * 1e-9;
            super::add_bandwidth(&mut line, read, ceilings);
        }
        if arguments.common.json {
            print_json(&line)
        } else {
            super::print_table(&line)?;
            if arguments.from.is_some() {
                print_text("\n")?;
            }
            Ok(())
        }
    }
}

/// Medians are taken over measurements, each of as many passes as make it long enough.
fn measure_passes(calls: &mut Calls<'_>, method: Method, scratch: &mut AttentionScratch) -> (Times, f64) {
    let (mut total, mut append, mut passes, mut repeat) = (Times::default(), 0.0, 0.0, 1);
    loop {
        let pass = calls.pass(method, repeat, scratch, |_, _| {});
        if passes == 0.0 && repeat == 1 {
            repeat = calls.repeats(pass.attention.wall_seconds);
            if repeat > 1 {
                // Too short for the clock: this one only told so.
                continue;
            }
        }
        total.cpu_seconds += pass.attention.cpu_seconds;
        total.wall_seconds += pass.attention.wall_seconds;
        append += pass.append_cpu_seconds;
        passes += 1.0;
        if f64::from(repeat) * total.wall_seconds >= measure::LEAST_SECONDS {
            let times = Times { cpu_seconds: total.cpu_seconds / passes, wall_seconds: total.wall_seconds / passes };
            return (times, append / passes);
        }
    }
}

fn medians(times: &[Times]) -> Times {
    Times {
        cpu_seconds: median(times.iter().map(|times| times.cpu_seconds)),
        wall_seconds: median(times.iter().map(|times| times.wall_seconds)),
    }
}

/// True errors of the sampled rows that see a key.
fn errors(case: &Case, rows: &[Row], outputs: &[f32], threads: usize) -> Vec<RowError> {
    let Shape { query_tokens, key_tokens, value_dim, .. } = case.shape;
    let visible = |row: Row| case.mask.visible(key_tokens - query_tokens + row.token, key_tokens);
    let truths = truths(&case.inputs, case.shape, rows, visible, f64::from(case.scale), threads);
    truths.iter().zip(outputs.chunks_exact(value_dim)).map(|(truth, output)| truth.error(output)).collect()
}
