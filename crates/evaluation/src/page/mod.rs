//! The report: one HTML page that needs nothing else.

mod chart;
mod heat_map;

use std::io::Write;
use std::path::{Path, PathBuf};

use iceformer_attention::{HeadReport, MassHistogram};
use minijinja::{Environment, Value, context};
use tempfile::NamedTempFile;

use crate::measurement::{Place, Setup};
use crate::summary::{Quality, Results, Summary};
use chart::{Axis, Scale, Series, chart};

/// The page, light or dark as the reader's browser wants it. `facts` are names and values that stand at its top, such as
/// the command and the machine.
pub fn html(title: &str, facts: &[(&str, String)], results: &Results) -> String {
    let summaries = results.summaries();
    let mut sections = quality(results, &summaries);
    sections.extend([time(&summaries), kept(results), missed(results)]);
    sections.extend(places(results));
    let mut environment = Environment::new();
    environment.add_template("page.html", include_str!("page.html")).expect("the template is well formed");
    let page = environment.get_template("page.html").expect("it was added");
    let facts: Value = facts.iter().map(|(name, value)| list([*name, value.as_str()])).collect();
    let sections: Value = sections.into_iter().map(Section::into_value).collect();
    page.render(context! { title, facts, sections }).expect("all that the template names is there")
}

/// A file that appears when it is whole: written beside its place and then moved there.
pub struct PageFile {
    path: PathBuf,
    file: NamedTempFile,
}

impl PageFile {
    /// Makes sure that the page can be written to `path`, before any work.
    ///
    /// # Errors
    /// When `path` is a folder, or its folder does not exist or takes no files.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        if path.is_dir() {
            return Err(std::io::Error::other("is a folder; expected the name of a file"));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folder.metadata()?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".iceformer-report-");
        // Temporary files are private, but a report is to be read by whom the folder lets.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        // The error itself names the temporary file, which is not what was asked for.
        let file = builder.tempfile_in(folder).map_err(|error| error.kind())?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes the page and moves it to its place.
    ///
    /// # Errors
    /// When the disk takes it not.
    pub fn write(mut self, html: &str) -> std::io::Result<()> {
        // The file as such: errors of its wrapper name the temporary place.
        let file = self.file.as_file_mut();
        file.write_all(html.as_bytes())?;
        file.sync_all()?;
        self.file.persist(&self.path)?;
        Ok(())
    }
}

struct Section {
    title: &'static str,
    text: &'static str,
    charts: Vec<Drawing>,
    table: Table,
}

struct Drawing {
    title: String,
    /// Markup.
    drawing: String,
}

impl Section {
    /// As the template takes it.
    fn into_value(self) -> Value {
        let charts: Value = self.charts.into_iter().map(Drawing::into_value).collect();
        let rows: Value = self.table.rows.iter().map(|row| list(row.iter().map(String::as_str))).collect();
        let table = Value::from_pairs([
            ("heads", list(self.table.heads)),
            ("names", Value::from(self.table.names)),
            ("rows", rows),
        ]);
        let text = |text: &str| Value::from(text);
        Value::from_pairs([
            ("title", text(self.title)),
            ("text", text(self.text)),
            ("charts", charts),
            ("table", table),
        ])
    }
}

fn list<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

impl Drawing {
    fn new(title: impl Into<String>, drawing: String) -> Self {
        Self { title: title.into(), drawing }
    }

    fn into_value(self) -> Value {
        Value::from_pairs([("title", Value::from(self.title)), ("drawing", Value::from_safe_string(self.drawing))])
    }
}

struct Table {
    heads: Vec<&'static str>,
    /// Columns that hold names; the others hold figures.
    names: usize,
    rows: Vec<Vec<String>>,
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn whole_percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn tokens(value: f64) -> String {
    if value >= 1024.0 { format!("{:.0}k", value / 1024.0) } else { format!("{value:.0}") }
}

fn plain(value: f64) -> String {
    // Rust writes the shortest text that means the same number; figures of a chart need no more than four digits.
    if value == 0.0 { "0".into() } else { format!("{}", format!("{value:.3e}").parse::<f64>().unwrap_or(value)) }
}

fn or_dash<T>(value: Option<T>, format: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".into(), format)
}

const TOKENS: Axis = Axis { label: "tokens", scale: Scale::Doubling, range: None, format: tokens };

/// Method and set-up as a line of a chart, and its colour: that of the method.
fn line(summary: &Summary, methods: &[String]) -> (String, usize) {
    let label = summary.label();
    let color = methods.iter().position(|method| *method == label).unwrap_or(0);
    match label.as_str() {
        "exact" => (label, color),
        _ => (format!("{label}, {}", summary.setup.name()), color),
    }
}

/// One line for each method and set-up among `summaries`, in the order of their tokens.
fn lines<'a>(
    summaries: impl Iterator<Item = &'a Summary>,
    methods: &[String],
    value: impl Fn(&Summary) -> Option<f64>,
) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for summary in summaries {
        let Some(value) = value(summary) else { continue };
        let (name, color) = line(summary, methods);
        let point = (summary.tokens, value);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => {
                let dashed = summary.setup == Setup::QuestionExact;
                series.push(Series { name, color, dashed, points: vec![point] });
            }
        }
    }
    series.iter_mut().for_each(|series| series.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    series
}

/// Each once, in the order of their first appearance.
fn distinct<T: PartialEq>(names: impl Iterator<Item = T>) -> Vec<T> {
    let mut distinct = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}

/// The columns that name a row of summaries.
fn names(summary: &Summary) -> Vec<String> {
    let own = [summary.task.clone(), summary.group.clone(), summary.label()];
    [&own[..], &[summary.setup.name().into(), summary.cases.to_string(), format!("{:.0}", summary.tokens)]].concat()
}

const NAMES: [&str; 6] = ["task", "length", "method", "reads", "cases", "tokens"];

fn quality(results: &Results, summaries: &[Summary]) -> Vec<Section> {
    let Some(first) = summaries.first() else { return Vec::new() };
    let methods = distinct(summaries.iter().map(Summary::label));
    let tasks = distinct(summaries.iter().map(|summary| summary.task.as_str()));
    let of = |task: &str| summaries.iter().filter(move |summary| summary.task == task).collect::<Vec<_>>();
    let drawn = |axis: &Axis, value: fn(&Quality) -> Option<f64>| -> Vec<Drawing> {
        let one = |task: &&str| {
            let series = lines(of(task).into_iter(), &methods, |summary| value(&summary.quality));
            let title = if axis.label == "accuracy" { (*task).to_owned() } else { format!("{task}: {}", axis.label) };
            Drawing::new(title, chart(&TOKENS, axis, &series))
        };
        tasks.iter().map(one).collect()
    };
    let share = |label| Axis { label, scale: Scale::Linear, range: Some((0.0, 1.0)), format: whole_percent };
    let mut heads = NAMES.to_vec();
    let mut sections = Vec::new();
    let (title, text, charts) = match first.quality {
        Quality::Accuracy { .. } => {
            heads.extend(["accuracy", "of exact"]);
            let charts = drawn(&share("accuracy"), |quality| match quality {
                Quality::Accuracy { accuracy, .. } => Some(*accuracy),
                _ => None,
            });
            ("Accuracy against length", "Share of what was asked for that the answers hold.", charts)
        }
        Quality::Agreement { .. } => {
            heads.extend(["same", "differs after"]);
            let charts = drawn(&share("same continuation"), |quality| match quality {
                Quality::Agreement { same_share, .. } => Some(*same_share),
                _ => None,
            });
            ("Agreement against length", "Share of the prompts that are continued as by exact attention.", charts)
        }
        Quality::Likelihood { .. } => {
            heads.extend(["perplexity", "of exact", "divergence", "p99", "same token"]);
            let ratio = Axis { label: "perplexity of exact", scale: Scale::Linear, range: None, format: percent };
            let nats = Axis { label: "divergence, nats", scale: Scale::Logarithmic, range: None, format: plain };
            let mut charts = drawn(&ratio, |quality| match quality {
                Quality::Likelihood { perplexity_ratio, .. } => *perplexity_ratio,
                _ => None,
            });
            charts.extend(drawn(&nats, |quality| match quality {
                Quality::Likelihood { divergence, .. } => Some(*divergence).filter(|&nats| nats > 0.0),
                _ => None,
            }));
            let text = "Perplexity divided by that of exact attention, and Kullback-Leibler divergence from it for each \
                        scored token.";
            ("Perplexity against length", text, charts)
        }
    };
    let cells = |quality: &Quality| match *quality {
        Quality::Accuracy { accuracy, retention } => vec![percent(accuracy), or_dash(retention, percent)],
        Quality::Agreement { same_share, mean_first_difference } => {
            vec![percent(same_share), or_dash(mean_first_difference, |tokens| format!("{tokens:.1} tokens"))]
        }
        Quality::Likelihood { perplexity, perplexity_ratio, divergence, divergence_p99, same_likeliest } => vec![
            format!("{perplexity:.3}"),
            or_dash(perplexity_ratio, |ratio| format!("{:.2} %", 100.0 * ratio)),
            format!("{divergence:.5}"),
            format!("{divergence_p99:.4}"),
            format!("{:.2} %", 100.0 * same_likeliest),
        ],
    };
    let rows = summaries.iter().map(|summary| [names(summary), cells(&summary.quality)].concat()).collect();
    sections.push(Section { title, text, charts, table: Table { heads, names: 4, rows } });

    let retentions = results.retentions();
    if !retentions.is_empty() {
        let row = |retention: &crate::Retention| {
            vec![
                retention.label(),
                retention.setup.name().into(),
                retention.least_at.clone(),
                retention.tasks.to_string(),
                percent(retention.mean),
                percent(retention.least),
            ]
        };
        let heads = vec!["method", "reads", "least at", "tasks and lengths", "mean", "least"];
        let table = Table { heads, names: 3, rows: retentions.iter().map(row).collect() };
        let text = "Accuracy divided by that of exact attention, over the tasks and lengths that exact attention does at \
                    least half right.";
        sections.push(Section { title: "Retention", text, charts: Vec::new(), table });
    }
    sections
}

fn time(summaries: &[Summary]) -> Section {
    let methods = distinct(summaries.iter().map(Summary::label));
    let seconds = |label| Axis { label, scale: Scale::Logarithmic, range: None, format: plain };
    // Both set-ups of a method share the text, and tasks of one length cost the same: means over a group.
    let by_group = |value: &dyn Fn(&Summary) -> Option<f64>, setups: &[Setup]| -> Vec<Series> {
        let mut groups: Vec<Summary> = Vec::new();
        let mut sums: Vec<(f64, f64, usize)> = Vec::new();
        for summary in summaries.iter().filter(|summary| setups.contains(&summary.setup)) {
            let Some(value) = value(summary) else { continue };
            let same = |other: &Summary| {
                (other.label(), other.setup, &other.group) == (summary.label(), summary.setup, &summary.group)
            };
            match groups.iter().position(same) {
                Some(index) => {
                    let sum = &mut sums[index];
                    *sum = (sum.0 + summary.tokens, sum.1 + value, sum.2 + 1);
                }
                None => {
                    groups.push(summary.clone());
                    sums.push((summary.tokens, value, 1));
                }
            }
        }
        let mut values = Vec::new();
        for (group, (tokens, value, count)) in groups.iter_mut().zip(sums) {
            group.tokens = tokens / count as f64;
            values.push((group.tokens, group.label(), group.setup, value / count as f64));
        }
        lines(groups.iter(), &methods, |summary| {
            let label = summary.label();
            let own = |entry: &&(f64, String, Setup, f64)| {
                (entry.0, entry.1.as_str(), entry.2) == (summary.tokens, label.as_str(), summary.setup)
            };
            values.iter().find(own).map(|entry| entry.3)
        })
    };
    let text = by_group(&|summary| Some(summary.text.cpu_seconds), &[Setup::Everything]);
    let decode = by_group(
        &|summary| {
            let answer = &summary.answer;
            (answer.tokens > 0).then(|| answer.cpu_seconds / answer.tokens as f64 * 1e3)
        },
        &[Setup::Everything, Setup::QuestionExact],
    );
    let mut charts = vec![Drawing::new("Reading the text", chart(&TOKENS, &seconds("CPU seconds"), &text))];
    if !decode.is_empty() {
        charts.push(Drawing::new("Decoding the answer", chart(&TOKENS, &seconds("CPU ms for each token"), &decode)));
    }
    let row = |summary: &Summary| {
        let costs = [&summary.text, &summary.question, &summary.answer];
        let figures = costs.iter().flat_map(|cost| [cost.seconds, cost.cpu_seconds]).map(|s| format!("{s:.3}"));
        let mut row = names(summary);
        row.extend(figures);
        row.extend([percent(summary.kept_share), percent(summary.fallback_share)]);
        row
    };
    let mut heads = NAMES.to_vec();
    heads.extend(["text s", "CPU s", "question s", "CPU s", "answer s", "CPU s", "kept", "fell back"]);
    let text = "Means over cases. CPU time is that of the process, all threads together. The text is read once for both \
                set-ups of a method.";
    let table = Table { heads, names: 4, rows: summaries.iter().map(row).collect() };
    Section { title: "Time against length", text, charts, table }
}

/// Where in the texts the cases lie, of evaluations that cut them from texts.
fn places(results: &Results) -> Option<Section> {
    let places = results.measurements.iter().map(|measurement| &measurement.place);
    let row = |place: &Place| {
        let (source, first_token) = (place.source.clone()?, place.first_token?);
        let numbers = [place.case, first_token, place.tokens].map(|number| number.to_string());
        Some([&[source, place.group.clone()][..], &numbers].concat())
    };
    let rows = distinct(places.filter_map(row));
    let heads = vec!["text", "length", "case", "first token", "tokens"];
    let text = "Which part of which text each case reads; tokens of a text count from 0.";
    let table = Table { heads, names: 2, rows };
    (!table.rows.is_empty()).then(|| Section { title: "Places in the texts", text, charts: Vec::new(), table })
}

fn kept(results: &Results) -> Section {
    let (mut charts, mut rows) = (Vec::new(), Vec::new());
    // Exact attention keeps all; it is shown where it stands alone.
    let shown = |method: &str| method != "exact" || results.heads.len() == 1;
    for (method, layers) in results.heads.iter().filter(|(method, _)| shown(method)) {
        let shares: Vec<Vec<f64>> =
            layers.iter().map(|layer| layer.heads.iter().map(HeadReport::kept_share).collect()).collect();
        for (layer, report) in layers.iter().enumerate() {
            let total = report.total();
            let own = &shares[layer];
            let ends = (own.iter().copied().fold(1.0, f64::min), own.iter().copied().fold(0.0, f64::max));
            rows.push(vec![
                method.clone(),
                layer.to_string(),
                percent(total.kept_share()),
                percent(ends.0),
                percent(ends.1),
                percent(total.fallback_share()),
            ]);
        }
        charts.push(Drawing::new(method.as_str(), heat_map::heat_map(&shares)));
    }
    let text = "Share of the keys that the mask allows whose own value entered the output, over all cases where \
                everything was read by the method. Layers go down, query heads across.";
    let heads = vec!["method", "layer", "kept", "least head", "most head", "fell back"];
    Section { title: "Kept share by layer and head", text, charts, table: Table { heads, names: 2, rows } }
}

fn missed(results: &Results) -> Section {
    const SHARES: [f64; 15] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999];
    let (mut series, mut rows) = (Vec::new(), Vec::new());
    for (color, (method, layers)) in results.heads.iter().enumerate() {
        let mut all = HeadReport::default();
        layers.iter().for_each(|layer| all += &layer.total());
        for (name, histogram, dashed) in
            [("estimated", &all.estimated_missed_mass, false), ("audited", &all.audited_missed_mass, true)]
        {
            let at = |share: f64| histogram.quantile(share).map(|mass| (f64::from(mass), share));
            let points: Vec<(f64, f64)> = SHARES.into_iter().filter_map(at).collect();
            if !points.is_empty() {
                series.push(Series { name: format!("{method}, {name}"), color, dashed, points });
            }
        }
        let cells = |histogram: &MassHistogram| -> Vec<String> {
            [0.5, 0.95, 0.99].map(|share| or_dash(histogram.quantile(share), |mass| format!("{mass:.2e}"))).to_vec()
        };
        let parts = layers.iter().enumerate().map(|(layer, report)| (layer.to_string(), report.total()));
        for (layer, total) in parts.chain([("all".to_owned(), all)]) {
            let counts = [total.estimated_missed_mass.count(), total.audited_missed_mass.count()];
            let mut row = vec![method.clone(), layer, total.rows.to_string()];
            row.push(counts[0].to_string());
            row.extend(cells(&total.estimated_missed_mass));
            row.push(counts[1].to_string());
            row.extend(cells(&total.audited_missed_mass));
            rows.push(row);
        }
    }
    let mass = Axis { label: "missed mass", scale: Scale::Logarithmic, range: None, format: plain };
    let share =
        Axis { label: "share of rows below", scale: Scale::Linear, range: Some((0.0, 1.0)), format: whole_percent };
    let text = "Softmax mass that a row (one query of one head) misses: as the method estimates it, and of the rows that \
                were also computed exactly to audit the others. Methods that do not estimate it have no line.";
    let charts = vec![Drawing::new("", chart(&mass, &share, &series))];
    let heads = vec!["method", "layer", "rows", "estimated", "p50", "p95", "p99", "audited", "p50", "p95", "p99"];
    Section { title: "Missed mass", text, charts, table: Table { heads, names: 2, rows } }
}
