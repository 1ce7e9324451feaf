//! `study replay`: what choices of keys keep, how far off they are and what they cost, on the rows of a dump.

use std::fmt::Write;
use std::sync::Mutex;

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, DciSettings, KeyValueCache, KeyValueType, Mask, Method, Queries,
    ThreadTeam,
};
use iceformer_study::error::{Row, quantile, truths};
use iceformer_study::replay::{Choice, Layer, Limits, Outcome, Replay, Summary, standard_choices};
use iceformer_study::tile::tile;
use iceformer_study::{Dump, Shape};
use serde_json::{Value, json};

use super::arguments::ReplayArguments;
use crate::command_line::progress::Progress;
use crate::command_line::text::grouped;
use crate::command_line::{Outcome as End, print_json, print_text};

/// Runs the command.
pub fn run(arguments: &ReplayArguments) -> anyhow::Result<End> {
    let dump = Dump::open(&arguments.dump)?;
    let layers: Vec<usize> = match arguments.layer {
        None => (0..dump.layers()).collect(),
        Some(layer) => {
            let last = dump.layers() - 1;
            anyhow::ensure!(layer <= last, "--layer {layer}: {} has layers 0 to {last}", dump.name());
            vec![layer]
        }
    };
    let mut choices: Vec<Choice> = Vec::new();
    for choice in arguments.share.iter().flat_map(|&share| standard_choices(share)) {
        if !choices.contains(&choice) {
            choices.push(choice);
        }
    }
    let threads = arguments.threads.unwrap_or_else(ThreadTeam::available);
    let team = ThreadTeam::new(threads);
    let total: usize = layers.iter().map(|&layer| arguments.tiles * dump.shape(layer).kv_heads).sum();
    let progress = Mutex::new(Progress::new("replaying", "tiles", arguments.json));
    let mut all = Replay { outcomes: vec![Vec::new(); choices.len()], limits: Vec::new() };
    let mut dci = Vec::new();
    let mut before = 0;
    for &index in &layers {
        let stored = dump.read(index)?;
        anyhow::ensure!(
            stored.window.is_none(),
            "layer {index} of {} has a sliding window, which a replay does not know; choose others with --layer",
            dump.name()
        );
        let tokens = arguments.tokens.unwrap_or(stored.shape.key_tokens);
        let (inputs, shape) = tile(&stored, tokens, tokens, arguments.tile_noise, arguments.seed);
        let layer = Layer { inputs: &inputs, shape, scale: stored.scale, causal: stored.causal };
        let starts = layer.tiles(arguments.tiles, arguments.seed)?;
        let replay = layer.replay(&choices, &starts, threads, |done, _| {
            let mut progress = progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            progress.update(before + done, total);
        });
        before += starts.len() * shape.kv_heads;
        all.outcomes.iter_mut().zip(replay.outcomes).for_each(|(all, layer)| all.extend(layer));
        all.limits.extend(replay.limits);
        dci.extend(published(&layer, &layer.rows(&starts), &team));
    }
    progress.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).finish();

    let mut rows: Vec<(Value, Summary)> = Vec::new();
    for (choice, outcomes) in choices.iter().zip(&all.outcomes) {
        rows.extend(Summary::new(outcomes).map(|summary| (describe(choice), summary)));
    }
    let settings = json!({ "scorer": "dci", "share": null, "page": null, "tile": 1, "shares_group": false, "tail": "none", "delta": null });
    rows.extend(Summary::new(&dci).map(|summary| (settings, summary)));
    if arguments.json {
        print_lines(arguments, &rows, &all.limits)?
    } else {
        print_tables(&rows, &all.limits)?
    }
    Ok(End::Done)
}

/// What method `dci` with its published settings does for `rows`.
fn published(layer: &Layer<'_>, rows: &[Row], team: &ThreadTeam) -> Vec<Outcome> {
    let Shape { query_heads, kv_heads, key_dim, value_dim, .. } = layer.shape;
    let mut cache = KeyValueCache::new(CacheShape { kv_heads, key_dim, value_dim }, KeyValueType::F32);
    cache.append(&layer.inputs.keys, &layer.inputs.values, team);
    let attention = Attention {
        method: Method::Dci(DciSettings::PUBLISHED),
        mask: Mask { causal: layer.causal, ..Mask::default() },
        scale: layer.scale,
    };
    let mut scratch = AttentionScratch::default();
    let (mut output, mut log_sum_exp) = (vec![0.0; query_heads * value_dim], vec![0.0; query_heads]);
    let visible = |row: Row| 0..layer.visible(row.token);
    let all = truths(layer.inputs, layer.shape, rows, visible, f64::from(layer.scale), team.threads());
    let mut outcomes = Vec::new();
    // Rows come token by token, with all heads of each.
    for (rows, truths) in rows.chunks(query_heads).zip(all.chunks(query_heads)) {
        let token = rows[0].token;
        let width = query_heads * key_dim;
        let data = &layer.inputs.queries[token * width..(token + 1) * width];
        let queries = Queries { data, query_heads, first_position: token };
        let report = attention.run(queries, &cache, &mut output, Some(&mut log_sum_exp), team, &mut scratch);
        for (head, truth) in truths.iter().enumerate() {
            let counts = &report.heads[head];
            let (key_dim, value_dim_f64) = (key_dim as f64, value_dim as f64);
            let work = counts.evaluated_keys as f64 * key_dim + counts.kept_keys as f64 * value_dim_f64;
            outcomes.push(Outcome {
                retained: (f64::from(log_sum_exp[head]) - truth.log_sum_exp).exp(),
                error: truth.error(&output[head * value_dim..][..value_dim]),
                touched: counts.kept_keys as f64 / counts.allowed_keys as f64,
                operations: work / (counts.allowed_keys as f64 * (key_dim + value_dim_f64)),
            });
        }
    }
    outcomes
}

fn describe(choice: &Choice) -> Value {
    json!({
        "scorer": choice.scorer.name(),
        "share": choice.share,
        "page": choice.page_keys(),
        "tile": choice.tile,
        "shares_group": choice.shares_group,
        "tail": choice.tail.name(),
        "delta": choice.delta,
    })
}

/// The far keys an oracle needs and how errors of pages add: quartiles over rows.
fn limits_line(limits: &[Limits]) -> Value {
    let quartiles = |values: Vec<f64>| [0.25, 0.5, 0.75].map(|share| quantile(&values, share));
    let of = |field: fn(&Limits) -> &Vec<f64>| quartiles(limits.iter().flat_map(field).copied().collect());
    let far = limits.iter().map(|limits| limits.far_keys as f64).sum::<f64>() / limits.len().max(1) as f64;
    json!({
        "far_keys": far,
        "needed_share": of(|limits| &limits.needed),
        "union_share": of(|limits| &limits.union),
        "error_sum": of(|limits| &limits.error_sum),
    })
}

fn print_lines(arguments: &ReplayArguments, rows: &[(Value, Summary)], limits: &[Limits]) -> anyhow::Result<()> {
    let head = json!({
        "study": "replay",
        "dump": arguments.dump.display().to_string(),
        "layer": arguments.layer,
        "tokens": arguments.tokens,
        "tiles": arguments.tiles,
        "seed": arguments.seed,
    });
    let print = |parts: &[&Value]| {
        let objects = parts.iter().filter_map(|part| part.as_object());
        let fields: serde_json::Map<_, _> = objects.flat_map(|part| part.clone()).collect();
        print_json(&fields)
    };
    for (choice, summary) in rows {
        let [retained_p1, retained_p5, retained_p50] = summary.retained;
        let [missed_mass_p50, missed_mass_p95, missed_mass_p99] = summary.missed_mass;
        let figures = json!({
            "rows": summary.rows,
            "retained_p1": retained_p1,
            "retained_p5": retained_p5,
            "retained_p50": retained_p50,
            "missed_mass_p50": missed_mass_p50,
            "missed_mass_p95": missed_mass_p95,
            "missed_mass_p99": missed_mass_p99,
            "relative_error": summary.relative_error,
            "touched": summary.touched,
            "operations": summary.operations,
        });
        print(&[&head, choice, &figures])?;
    }
    print(&[&head, &limits_line(limits)])
}

fn print_tables(rows: &[(Value, Summary)], limits: &[Limits]) -> anyhow::Result<()> {
    let mut table = String::new();
    let _ = writeln!(
        table,
        "{:20}{:>6}{:>6}{:>6}{:>7}  {:13}{:>6}{:>21}{:>21}{:>10}{:>9}{:>8}",
        "scorer",
        "share",
        "page",
        "tile",
        "group",
        "tail",
        "delta",
        "retained p1/p5/p50",
        "missed p50/p95/p99",
        "rel. err.",
        "touched",
        "work"
    );
    for (choice, summary) in rows {
        let text = |name: &str| match &choice[name] {
            Value::Null => "–".to_owned(),
            Value::String(text) => text.clone(),
            Value::Bool(value) => (if *value { "yes" } else { "no" }).to_owned(),
            other => other.to_string(),
        };
        let three = |values: [f64; 3]| values.map(|value| format!("{value:.3}")).join(" ");
        let _ = writeln!(
            table,
            "{:20}{:>6}{:>6}{:>6}{:>7}  {:13}{:>6}{:>21}{:>21}{:>10.3}{:>9.3}{:>8.3}",
            text("scorer"),
            text("share"),
            text("page"),
            text("tile"),
            text("shares_group"),
            text("tail"),
            text("delta"),
            three(summary.retained),
            three(summary.missed_mass),
            summary.relative_error,
            summary.touched,
            summary.operations
        );
    }
    let line = limits_line(limits);
    let three = |name: &str| {
        let values = line[name].as_array().into_iter().flatten();
        values
            .map(|value| value.as_f64().map_or("–".into(), |value| format!("{value:.2}")))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let _ = writeln!(
        table,
        "\nFar keys of a row: {} on average. Share of them that an oracle needs to leave out no more than 2 % of the mass, \
         quartiles over rows: {}; union over a tile: {}.\nWith every far page estimated, the sum of the pages' errors is so \
         many times the root of the sum of their squares (1: independent): {}.",
        grouped(line["far_keys"].as_f64().unwrap_or_default().round() as u64),
        three("needed_share"),
        three("union_share"),
        three("error_sum")
    );
    print_text(&table)
}
