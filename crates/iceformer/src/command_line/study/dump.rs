//! `study dump`: queries, keys and values of every layer of a model on a text.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use iceformer_attention::{KeyValueType, Method, ThreadTeam};
use iceformer_engine::{AttentionInputs, AttentionObserver, Model, ModelFiles, SessionError, SessionSettings};
use iceformer_study::dump::Description;
use iceformer_study::{DumpError, DumpWriter, Shape};
use serde_json::json;

use super::arguments::DumpArguments;
use crate::command_line::destination::destination;
use crate::command_line::embedded::{self, Example};
use crate::command_line::progress::Progress;
use crate::command_line::run::too_long;
use crate::command_line::text::{bytes, grouped, read_text};
use crate::command_line::{Outcome, interrupt, print_json};

/// Writes what it is shown; keeps the first error and then stops the session.
struct Recorder {
    writer: DumpWriter,
    error: Option<DumpError>,
}

/// The recorder's handle in the session, which wants to own what it calls.
struct Observer(Arc<Mutex<Recorder>>);

impl AttentionObserver for Observer {
    fn observe(&mut self, inputs: AttentionInputs<'_>) -> ControlFlow<()> {
        let mut recorder = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match recorder.writer.append(inputs.layer, inputs.queries, inputs.keys, inputs.values) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                recorder.error = Some(error);
                ControlFlow::Break(())
            }
        }
    }
}

/// Runs the command.
pub fn run(arguments: &DumpArguments) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let (text, source) = text(arguments)?;
    let (files, model_name) = match &arguments.model {
        Some(path) => (ModelFiles::open(path)?, path.display().to_string()),
        None => (embedded::model()?, embedded::NAME.to_owned()),
    };
    let tokenizer = files.tokenizer()?;
    let settings = SessionSettings {
        context: None,
        chunk: Some(arguments.chunk),
        // Exact attention over what was computed, so that each layer sees what the model means it to see.
        key_value_type: KeyValueType::F32,
        method: Method::Exact,
    };
    let context = settings.check(files.config())?;
    let mut tokens = tokenizer.encode(&text, true)?;
    tokens.truncate(arguments.tokens.unwrap_or(usize::MAX));
    if tokens.len() > context {
        let error = too_long(tokens.len(), context, files.config());
        return Err(anyhow::anyhow!("{error}, or read its first tokens only: --tokens {context}"));
    }

    let config = files.config();
    let description = Description {
        scale: 1.0 / (config.head_dim as f32).sqrt(),
        causal: true,
        windows: (0..config.layers).map(|layer| config.attention_window(layer)).collect(),
        source,
        model: model_name,
    };
    let shape = Shape {
        query_tokens: tokens.len(),
        key_tokens: tokens.len(),
        query_heads: config.query_heads,
        kv_heads: config.kv_heads,
        key_dim: config.head_dim,
        value_dim: config.head_dim,
    };
    // Before the weights are loaded: a place that cannot be written to is told at once.
    let writer = DumpWriter::create(&destination(&arguments.output)?, &description, shape, arguments.number_type)?;
    let recorder = Arc::new(Mutex::new(Recorder { writer, error: None }));

    let team = Arc::new(ThreadTeam::new(arguments.threads.unwrap_or_else(ThreadTeam::available)));
    let mut progress = Progress::new("loading", "layers", arguments.quiet || arguments.model.is_none());
    let model = Model::with_tokenizer(&files, tokenizer, None, team, |done, total| progress.update(done, total))?;
    progress.finish();
    let mut session = model.session(&settings)?;
    session.set_observer(Some(Box::new(Observer(Arc::clone(&recorder)))));
    let _guard = interrupt::guard(session.cancel());
    let mut progress = Progress::new("reading", "tokens", arguments.quiet);
    let outcome = session.read(&tokens, |done, total| progress.update(done, total));
    // The recorder stops the session too, but with an error of its own.
    let is_interrupted = outcome.is_err() && session.cancel().is_cancelled();
    if is_interrupted {
        progress.cancelled()
    } else {
        progress.finish()
    }
    // Drops the session's handle, so that the recorder can be taken.
    session.set_observer(None);
    let recorder = Arc::into_inner(recorder).expect("the session let go of the recorder");
    let recorder = recorder.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (outcome, recorder.error) {
        (_, Some(error)) => return Err(error.into()),
        (Err(SessionError::Cancelled(_)), None) => return Ok(Outcome::Interrupted),
        (outcome, None) => outcome?,
    }
    let written = recorder.writer.finish()?;

    if arguments.json {
        print_json(&json!({
            "study": "dump",
            "output": arguments.output.display().to_string(),
            "model": description.model,
            "source": description.source,
            "tokens": tokens.len(),
            "layers": config.layers,
            "heads": config.query_heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "type": arguments.number_type.name(),
            "bytes": written,
            "seconds": start.elapsed().as_secs_f64(),
        }))?;
    } else if !arguments.quiet {
        let _ = writeln!(
            std::io::stderr(),
            "{}: {} tokens, {} layers, {} ({})",
            arguments.output.display(),
            grouped(tokens.len() as u64),
            config.layers,
            bytes(written),
            arguments.number_type.name()
        );
    }
    Ok(Outcome::Done)
}

/// The text to read and what the dump calls it.
fn text(arguments: &DumpArguments) -> anyhow::Result<(String, String)> {
    let mut parts = Vec::new();
    let mut names = Vec::new();
    if let Some(path) = &arguments.file {
        parts.push(read_text(path)?);
        names.push(path.display().to_string());
    }
    if let Some(prompt) = &arguments.prompt {
        parts.push(prompt.clone());
        names.push("a prompt".to_owned());
    }
    if parts.is_empty() {
        return Ok((Example::new()?.prompt, "the built-in novel with its question".to_owned()));
    }
    let text = parts.join("\n\n");
    anyhow::ensure!(!text.is_empty(), "the text is empty; give one with --file or --prompt");
    Ok((text, names.join(" and ")))
}
