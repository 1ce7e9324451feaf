//! `iceformer eval`: what methods keep of a model's accuracy, beside their time.

pub mod arguments;
mod facts;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use iceformer_attention::{Method, Report, ThreadTeam};
use iceformer_engine::{Cancel, Model, ModelFiles, SessionSettings};
use iceformer_evaluation::needle::{NeedleSettings, Task};
use iceformer_evaluation::page::{self, PageFile};
use iceformer_evaluation::{
    AgreementSettings, Driver, Encoder, EvaluationError, Measurement, NamedText, Observer, PerplexitySettings, Results,
    SourceText, longeval, needle, run_agreement, run_perplexity,
};
use serde::Serialize;

use super::arguments::once;
use super::destination::destination;
use super::progress::Progress;
use super::text::read_text;
use super::{Outcome, embedded, interrupt, print_json, print_text};
use arguments::{AgreementArguments, Eval, EvalCommon, LongevalArguments, NeedleArguments, PerplexityArguments};

/// Takes in measurements as they come: to the results, and with `--json` to standard output.
struct Told {
    results: Results,
    progress: Progress,
    json: bool,
    quiet: bool,
    /// Cases that are done, and all of them.
    cases: (usize, usize),
    /// What the measurements do not tell.
    notes: Vec<String>,
    /// Why standard output could not be written.
    failure: Option<anyhow::Error>,
    cancel: Cancel,
}

/// A line of the JSON output.
#[derive(Serialize)]
struct Line<'a, T> {
    /// `case`, `summary` or `retention`.
    record: &'static str,
    #[serde(flatten)]
    fields: &'a T,
}

impl Observer for Told {
    fn progress(&mut self, done: f64, total: f64) {
        self.progress.update_share(done / total);
    }

    fn cases(&mut self, done: usize, of: usize) {
        self.cases = (done, of);
        self.progress.count(done, of);
    }

    fn measured(&mut self, measurement: Measurement, reports: &[Report]) {
        if self.json
            && self.failure.is_none()
            && let Err(error) = print_json(&Line { record: "case", fields: &measurement })
        {
            // Nobody reads on: what is left would be in vain.
            self.failure = Some(error);
            self.cancel.cancel();
        }
        self.results.add(measurement, reports);
    }

    fn note(&mut self, note: String) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "note: {note}");
        }
        self.notes.push(note);
    }
}

/// Runs the command.
pub fn run(what: &Eval) -> anyhow::Result<Outcome> {
    let common = what.common();
    let methods = common.contestants(matches!(what, Eval::Perplexity(_) | Eval::Agreement(_)))?;
    let settings =
        SessionSettings { context: None, chunk: common.chunk, key_value_type: common.kv_type, method: Method::Exact };
    let data = match what {
        Eval::Longeval(arguments) => arguments.data.as_deref(),
        _ => None,
    };
    let texts = if data.is_some() { Vec::new() } else { texts(common)? };
    // What is wrong with the report's place is told before hours of work.
    let page = common.report.as_deref().map(|path| Ok::<_, anyhow::Error>((path, page_file(path)?))).transpose()?;
    let files = match &common.model {
        Some(path) => ModelFiles::open(path)?,
        None => embedded::model()?,
    };
    let mut progress = Progress::new("loading", "layers", common.quiet || common.model.is_none());
    let team = Arc::new(ThreadTeam::new(common.threads.unwrap_or_else(ThreadTeam::available)));
    let model = Model::from_files(&files, team, |done, total| progress.update(done, total))?;
    progress.finish();

    let cancel = Cancel::default();
    let _guard = interrupt::guard(cancel.clone());
    let asks = match what {
        Eval::Longeval(LongevalArguments { asked, .. }) | Eval::Needle(NeedleArguments { asked, .. }) => !asked.no_chat,
        Eval::Perplexity(_) | Eval::Agreement(_) => false,
    };
    let template = match asks {
        true => model.chat_template().map_err(|error| anyhow::anyhow!("{error}; --no-chat goes without it"))?,
        false => None,
    };
    let encoder = Encoder { tokenizer: model.tokenizer(), template };
    let driver = Driver { model: &model, settings, chat: encoder.is_chat(), methods: &methods, cancel: cancel.clone() };
    let mut told = Told {
        results: Results::default(),
        progress: Progress::new(what.name(), "cases", common.quiet),
        json: common.json,
        quiet: common.quiet,
        cases: (0, 0),
        notes: Vec::new(),
        failure: None,
        cancel,
    };
    let outcome = match what {
        Eval::Longeval(arguments) => run_longeval(arguments, &driver, encoder, &texts, &mut told),
        Eval::Needle(arguments) => run_needle(arguments, &driver, encoder, &texts, &mut told),
        Eval::Perplexity(arguments) => perplexity(arguments, &driver, &texts, &mut told),
        Eval::Agreement(arguments) => agreement(arguments, &driver, &texts, &mut told),
    };
    // Where nobody reads on, nobody pressed Ctrl-C either.
    match outcome {
        Err(EvaluationError::Cancelled) if told.failure.is_none() => told.progress.cancelled(),
        _ => told.progress.finish(),
    }
    let (done, of) = told.cases;
    let interrupted = match outcome {
        Ok(()) => None,
        Err(EvaluationError::Cancelled) => Some(format!("interrupted: {done} of {of} cases are done by all methods")),
        Err(error) => return Err(error.into()),
    };
    if let Some((path, file)) = page {
        let mut facts = facts::facts(&files, &model, &methods, common.kv_type);
        facts.push(match data {
            Some(path) => ("data", path.display().to_string()),
            None => ("text", joined(&texts).name),
        });
        facts.extend(told.notes.iter().map(|note| ("note", note.clone())));
        facts.extend(interrupted.iter().map(|state| ("state", state.clone())));
        let title = format!("{}: {}", what.name(), files.summary().name);
        let html = page::html(&title, &facts, &told.results);
        file.write(&html).with_context(|| format!("--report {}", path.display()))?;
    }
    // The page holds what was done, also where the reader of standard output went away.
    if let Some(failure) = told.failure {
        return Err(failure);
    }
    close(&told.results, interrupted.as_deref(), common)?;
    Ok(if interrupted.is_some() { Outcome::Interrupted } else { Outcome::Done })
}

fn page_file(path: &Path) -> anyhow::Result<PageFile> {
    PageFile::create(&destination(path)?).with_context(|| format!("--report {}", path.display()))
}

/// The texts that prompts are made from, each once.
fn texts(common: &EvalCommon) -> anyhow::Result<Vec<NamedText>> {
    if common.text.is_empty() {
        return Ok(vec![NamedText { name: embedded::NOVEL_NAME.into(), text: embedded::NOVEL.into() }]);
    }
    let paths = once(&common.text);
    let names = names(&paths);
    paths.into_iter().zip(names).map(|(path, name)| Ok(NamedText { name, text: read_text(path)? })).collect()
}

/// How reports call files: by their stems, or by their paths where stems are the same.
fn names(paths: &[&PathBuf]) -> Vec<String> {
    let stem = |path: &PathBuf| path.file_stem().unwrap_or(path.as_os_str()).to_owned();
    let is_only = |path: &PathBuf| paths.iter().filter(|other| stem(other) == stem(path)).count() == 1;
    let name = |path: &PathBuf| if is_only(path) { stem(path) } else { path.clone().into_os_string() };
    paths.iter().map(|path| name(path).to_string_lossy().into_owned()).collect()
}

/// All texts as one, with an empty line between.
fn joined(texts: &[NamedText]) -> NamedText {
    let all = |field: fn(&NamedText) -> &str, between| texts.iter().map(field).collect::<Vec<_>>().join(between);
    NamedText { name: all(|text| &text.name, " + "), text: all(|text| &text.text, "\n\n") }
}

fn source(texts: &[NamedText]) -> Result<SourceText, EvaluationError> {
    let NamedText { name, text } = joined(texts);
    SourceText::new(&name, &text)
}

fn run_longeval(
    arguments: &LongevalArguments,
    driver: &Driver<'_>,
    encoder: Encoder<'_>,
    texts: &[NamedText],
    told: &mut Told,
) -> Result<(), EvaluationError> {
    if let Some(path) = &arguments.data {
        let cases = longeval::plan_read(longeval::read_cases(path, arguments.cases, &encoder)?);
        return driver.run_cases("longeval", &cases, told);
    }
    let source = source(texts)?;
    let seed = arguments.generated.seed;
    let plan = |length| longeval::plan(&source, encoder, seed, length, arguments.cases);
    let cases: Vec<_> = once(arguments.lengths.clone()).into_iter().flat_map(plan).collect();
    driver.run_cases("longeval", &cases, told)
}

fn run_needle(
    arguments: &NeedleArguments,
    driver: &Driver<'_>,
    encoder: Encoder<'_>,
    texts: &[NamedText],
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let source = source(texts)?;
    let settings = NeedleSettings {
        tasks: if arguments.tasks.is_empty() { Task::ALL.to_vec() } else { once(arguments.tasks.clone()) },
        lengths: once(arguments.lengths.clone()),
        depths: arguments.depths.clone(),
        cases: arguments.cases,
        seed: arguments.generated.seed,
    };
    driver.run_cases("needle", &needle::plan(&source, encoder, &settings)?, told)
}

fn agreement(
    arguments: &AgreementArguments,
    driver: &Driver<'_>,
    texts: &[NamedText],
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let settings = AgreementSettings {
        lengths: once(arguments.lengths.clone()),
        cases: arguments.cases,
        generate: arguments.generate,
        seed: arguments.generated.seed,
    };
    let NamedText { name, text } = joined(texts);
    run_agreement(driver, &name, &text, &settings, told)
}

fn perplexity(
    arguments: &PerplexityArguments,
    driver: &Driver<'_>,
    texts: &[NamedText],
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let settings = PerplexitySettings {
        lengths: once(arguments.lengths.clone()),
        stride: arguments.stride,
        scored: arguments.scored,
        windows: arguments.cases,
    };
    run_perplexity(driver, texts, &settings, told)
}

/// Writes the table and whether it is whole, or its rows as JSON.
fn close(results: &Results, interrupted: Option<&str>, common: &EvalCommon) -> anyhow::Result<()> {
    if common.json {
        for summary in results.summaries() {
            print_json(&Line { record: "summary", fields: &summary })?;
        }
        for retention in results.retentions() {
            print_json(&Line { record: "retention", fields: &retention })?;
        }
        return Ok(());
    }
    let state = interrupted.map(|state| format!("\n{state}\n")).unwrap_or_default();
    print_text(&(table::table(results) + &state))
}
