//! The closing table.

use std::fmt::Write;

use iceformer_evaluation::{Quality, Results, Summary};

use crate::command_line::text::grouped;

/// Rows of text as aligned columns: the first four to the left, figures to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    const LEFT: usize = 4;
    let width = |column: usize| {
        rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column < LEFT {
            true => format!("{cell:width$}"),
            false => format!("{cell:>width$}"),
        });
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// A share as a percentage.
pub fn percent(share: f64, digits: usize) -> String {
    format!("{:.digits$} %", 100.0 * share)
}

fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "–".into())
}

/// Column heads of the quality of summaries like this one.
fn quality_heads(quality: &Quality) -> &'static [&'static str] {
    match quality {
        Quality::Accuracy { .. } => &["accuracy", "of exact"],
        Quality::Agreement { .. } => &["same", "differs after"],
        Quality::Likelihood { .. } => &["perplexity", "of exact", "divergence", "p99", "same token"],
    }
}

fn quality_cells(quality: &Quality) -> Vec<String> {
    match *quality {
        Quality::Accuracy { accuracy, retention } => {
            vec![percent(accuracy, 1), or_dash(retention.map(|share| percent(share, 1)))]
        }
        Quality::Agreement { same_share, mean_first_difference } => {
            vec![percent(same_share, 1), or_dash(mean_first_difference.map(|tokens| format!("{tokens:.1} tokens")))]
        }
        Quality::Likelihood { perplexity, perplexity_ratio, divergence, divergence_p99, same_likeliest } => vec![
            format!("{perplexity:.3}"),
            or_dash(perplexity_ratio.map(|ratio| percent(ratio, 2))),
            format!("{divergence:.5}"),
            format!("{divergence_p99:.4}"),
            percent(same_likeliest, 2),
        ],
    }
}

fn row(summary: &Summary) -> Vec<String> {
    let named = summary.group.parse::<u64>().map_or_else(|_| summary.group.clone(), grouped);
    let answer = summary.question.seconds + summary.answer.seconds;
    let cpu = summary.text.cpu_seconds + summary.question.cpu_seconds + summary.answer.cpu_seconds;
    let mut row = vec![
        format!("{} {named}", summary.task),
        grouped(summary.tokens.round() as u64),
        summary.label(),
        summary.setup.name().to_owned(),
        summary.cases.to_string(),
    ];
    row.extend(quality_cells(&summary.quality));
    row.extend([
        percent(summary.kept_share, 1),
        percent(summary.fallback_share, 1),
        format!("{:.3}", summary.text.seconds),
        format!("{answer:.3}"),
        format!("{cpu:.3}"),
    ]);
    row
}

/// The table of all summaries, and what each method keeps of the accuracy over all.
pub fn table(results: &Results) -> String {
    let summaries = results.summaries();
    let Some(first) = summaries.first() else { return "nothing was measured\n".into() };
    let mut heads = vec!["task", "tokens", "method", "reads", "cases"];
    heads.extend(quality_heads(&first.quality));
    heads.extend(["kept", "fell back", "text s", "answer s", "CPU s"]);
    let mut rows = vec![heads.into_iter().map(str::to_owned).collect()];
    rows.extend(summaries.iter().map(row));
    let mut text = aligned(&rows);
    for (index, retention) in results.retentions().iter().enumerate() {
        let _ = writeln!(
            text,
            "{}{}, {}: {} of the accuracy of exact attention over {} task{}; least {} ({})",
            if index == 0 { "\n" } else { "" },
            retention.label(),
            retention.setup.name(),
            percent(retention.mean, 1),
            retention.tasks,
            if retention.tasks == 1 { "" } else { "s" },
            percent(retention.least, 1),
            retention.least_at,
        );
    }
    text
}
