//! `iceformer eval`: what methods keep of a model's accuracy, beside their time.

pub mod arguments;
mod facts;
mod table;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use iceformer_attention::{Method, Report, ThreadTeam};
use iceformer_engine::{Cancel, Model, ModelFiles, SessionSettings};
use iceformer_evaluation::needle::{NeedleSettings, Task};
use iceformer_evaluation::page::{self, PageFile};
use iceformer_evaluation::{
    AgreementSettings, Driver, Encoder, EvaluationError, Measurement, Observer, PerplexitySettings, Results,
    SourceText, longeval, needle, run_agreement, run_perplexity,
};
use serde::Serialize;

use super::destination::destination;
use super::progress::Progress;
use super::text::read_text;
use super::{Outcome, embedded, interrupt, print_json};
use arguments::{AgreementArguments, Eval, EvalCommon, LongevalArguments, NeedleArguments, PerplexityArguments};

/// Takes in measurements as they come: to the results, and with `--json` to standard output.
struct Told {
    results: Results,
    progress: Progress,
    json: bool,
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
}

/// Runs the command.
pub fn run(what: &Eval) -> anyhow::Result<Outcome> {
    let common = what.common();
    let methods = common.contestants(matches!(what, Eval::Perplexity(_) | Eval::Agreement(_)))?;
    let settings =
        SessionSettings { context: None, chunk: common.chunk, key_value_type: common.kv_type, method: Method::Exact };
    let source = source(common)?;
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
    let asks = matches!(what, Eval::Longeval(_) | Eval::Needle(_));
    let template = match asks && !common.no_chat {
        true => model.chat_template().map_err(|error| anyhow::anyhow!("{error}; --no-chat goes without it"))?,
        false => None,
    };
    let encoder = Encoder { tokenizer: model.tokenizer(), template };
    let driver = Driver { model: &model, settings, chat: encoder.is_chat(), methods: &methods, cancel: cancel.clone() };
    let mut told = Told {
        results: Results::default(),
        progress: Progress::new(what.name(), "", common.quiet),
        json: common.json,
        failure: None,
        cancel,
    };
    let outcome = match what {
        Eval::Longeval(arguments) => run_longeval(arguments, &driver, encoder, &source, &mut told),
        Eval::Needle(arguments) => run_needle(arguments, &driver, encoder, &source, &mut told),
        Eval::Perplexity(arguments) => perplexity(arguments, &driver, &source, &mut told),
        Eval::Agreement(arguments) => agreement(arguments, &driver, &source, &mut told),
    };
    told.progress.finish();
    if let Some(failure) = told.failure {
        return Err(failure);
    }
    let interrupted = match outcome {
        Ok(()) => false,
        Err(EvaluationError::Cancelled) => true,
        Err(error) => return Err(error.into()),
    };
    if let Some((path, file)) = page {
        let mut facts = facts::facts(&files, &model, &methods, common.kv_type);
        facts.push(("text", source.name.clone()));
        if interrupted {
            facts.push(("state", "interrupted: cases are missing".into()));
        }
        let title = format!("{}: {}", what.name(), files.summary().name);
        let html = page::html(&title, &facts, &told.results);
        file.write(&html).with_context(|| format!("--report {}", path.display()))?;
    }
    close(&told.results, common)?;
    Ok(if interrupted { Outcome::Interrupted } else { Outcome::Done })
}

fn page_file(path: &Path) -> anyhow::Result<PageFile> {
    PageFile::create(&destination(path)?).with_context(|| format!("--report {}", path.display()))
}

/// The text that prompts are made from, and how errors call it.
struct Source {
    name: String,
    text: String,
}

fn source(common: &EvalCommon) -> anyhow::Result<Source> {
    if common.text.is_empty() {
        return Ok(Source { name: embedded::NOVEL_NAME.into(), text: embedded::NOVEL.into() });
    }
    let texts = common.text.iter().map(|path| read_text(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let stem = |path: &Path| path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let names: Vec<_> = common.text.iter().map(|path| stem(path)).collect();
    Ok(Source { name: names.join(" + "), text: texts.join("\n\n") })
}

fn run_longeval(
    arguments: &LongevalArguments,
    driver: &Driver<'_>,
    encoder: Encoder<'_>,
    source: &Source,
    told: &mut Told,
) -> Result<(), EvaluationError> {
    if let Some(path) = &arguments.data {
        let cases = longeval::plan_read(longeval::read_cases(path, arguments.cases, &encoder)?);
        return driver.run_cases("longeval", &cases, told);
    }
    let source = SourceText::new(&source.name, &source.text)?;
    let seed = arguments.common.seed;
    let plan = |&length: &usize| longeval::plan(&source, encoder, seed, length, arguments.cases);
    let cases: Vec<_> = arguments.lengths.iter().flat_map(plan).collect();
    driver.run_cases("longeval", &cases, told)
}

fn run_needle(
    arguments: &NeedleArguments,
    driver: &Driver<'_>,
    encoder: Encoder<'_>,
    source: &Source,
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let source = SourceText::new(&source.name, &source.text)?;
    let settings = NeedleSettings {
        tasks: if arguments.tasks.is_empty() { Task::ALL.to_vec() } else { arguments.tasks.clone() },
        lengths: arguments.lengths.clone(),
        depths: arguments.depths.clone(),
        cases: arguments.cases,
        seed: arguments.common.seed,
    };
    driver.run_cases("needle", &needle::plan(&source, encoder, &settings)?, told)
}

fn agreement(
    arguments: &AgreementArguments,
    driver: &Driver<'_>,
    source: &Source,
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let settings = AgreementSettings {
        lengths: arguments.lengths.clone(),
        cases: arguments.cases,
        generate: arguments.generate,
        seed: arguments.common.seed,
    };
    run_agreement(driver, &source.name, &source.text, &settings, told)
}

fn perplexity(
    arguments: &PerplexityArguments,
    driver: &Driver<'_>,
    source: &Source,
    told: &mut Told,
) -> Result<(), EvaluationError> {
    let settings = PerplexitySettings {
        lengths: arguments.lengths.clone(),
        stride: arguments.stride,
        scored: arguments.scored,
        windows: arguments.cases,
    };
    run_perplexity(driver, &source.name, &source.text, &settings, told)
}

/// Writes the table, or its rows as JSON.
fn close(results: &Results, common: &EvalCommon) -> anyhow::Result<()> {
    if common.json {
        for summary in results.summaries() {
            print_json(&Line { record: "summary", fields: &summary })?;
        }
        for retention in results.retentions() {
            print_json(&Line { record: "retention", fields: &retention })?;
        }
        return Ok(());
    }
    std::io::stdout().lock().write_all(table::table(results).as_bytes())?;
    Ok(())
}
