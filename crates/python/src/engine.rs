//! Whole models: loading, generating.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use iceformer_attention::KeyValueType;
use iceformer_engine::{
    Cancel, GenerationSettings, Model, ModelFiles, Sampler, SamplerError, SamplerSettings, Session, SessionSettings,
    generate,
};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::{settings, teams};

/// A loaded model.
#[pyclass(frozen, module = "iceformer._core")]
pub struct Engine {
    model: Arc<Model>,
    settings: SessionSettings,
    context: usize,
    threads: usize,
    /// The session of the last generation, when no other has it: what it holds need not be read again.
    idle: Arc<Mutex<Option<Session>>>,
}

/// How to generate.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Request {
    max_tokens: Option<usize>,
    stop: Vec<String>,
    ignore_end: bool,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    repetition_window: usize,
    seed: u64,
}

/// What a generation tells while it runs.
enum Event {
    Read { done: usize, total: usize },
    Text(String),
    Done(Box<Finished>),
    Failed(String),
}

/// A finished generation.
struct Finished {
    text: String,
    tokens: Vec<u32>,
    finish: &'static str,
    prompt_tokens: usize,
    kept_tokens: usize,
    prompt_seconds: f64,
    decode_seconds: f64,
}

fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymethods]
impl Engine {
    /// Loads the model at `path`; `progress(done, total)` is told about each layer.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "called by name from the Python half only")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        threads: usize,
        context: Option<usize>,
        chunk: Option<usize>,
        kv_type: &str,
        method: &str,
        budget: Option<f32>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let settings = SessionSettings {
            context,
            chunk,
            key_value_type: settings::key_value_type(kv_type)?.unwrap_or(KeyValueType::Int8),
            method: settings::method(method, budget)?,
        };
        let mut failure = None;
        let loaded = py.detach(|| {
            let files = ModelFiles::open(&path).map_err(value_error)?;
            let context = settings.check(files.config()).map_err(value_error)?;
            let tell = |done: usize, total: usize| {
                let Some(progress) = &progress else { return };
                let told = Python::attach(|py| {
                    py.check_signals()?;
                    progress.call1(py, (done, total))
                });
                failure = failure.take().or(told.err());
            };
            let model = Model::from_files(&files, teams::team(threads), tell).map_err(value_error)?;
            Ok::<_, PyErr>((model, context))
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
        let (model, context) = loaded?;
        Ok(Self { model: Arc::new(model), settings, context, threads, idle: Arc::default() })
    }

    /// Tokens of a text, with the model's own first token where it has one.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        py.detach(|| self.model.tokenizer().encode(text, true)).map_err(value_error)
    }

    /// Text of tokens.
    fn decode(&self, py: Python<'_>, tokens: Vec<u32>) -> String {
        py.detach(|| self.model.tokenizer().decode(&tokens))
    }

    /// Tokens of a chat, a JSON list of messages, through the model's template with a JSON object of `variables`.
    fn encode_chat(&self, py: Python<'_>, messages: &str, variables: &str) -> PyResult<Vec<u32>> {
        let Some(template) = self.model.chat_template().map_err(value_error)? else {
            return Err(PyValueError::new_err("this model has no chat template; give a text instead of messages"));
        };
        py.detach(|| {
            let text = template.render_json(messages, variables, true).map_err(value_error)?;
            self.model.tokenizer().encode(&text, false).map_err(value_error)
        })
    }

    /// Whether the model has a chat template.
    #[getter]
    fn has_chat_template(&self) -> bool {
        matches!(self.model.chat_template(), Ok(Some(_)))
    }

    /// Most tokens of prompt and answer together.
    #[getter]
    fn context(&self) -> usize {
        self.context
    }

    /// Threads that the engine uses.
    #[getter]
    fn threads(&self) -> usize {
        self.threads
    }

    /// Size of the vocabulary.
    #[getter]
    fn vocabulary_size(&self) -> usize {
        self.model.decoder().config().vocabulary
    }

    /// Starts a generation behind `tokens`.
    fn generate(&self, tokens: Vec<u32>, chat: bool, request: Request) -> PyResult<Generation> {
        let sampler = Sampler::new(SamplerSettings {
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            min_p: request.min_p,
            repetition_penalty: request.repetition_penalty,
            repetition_window: request.repetition_window,
            seed: request.seed,
        })
        .map_err(|error| match error {
            SamplerError::OutOfRange { setting, value, expected } => {
                let name = setting.replace(['-', ' '], "_");
                PyValueError::new_err(format!("{name} is {value}; expected {expected}"))
            }
            SamplerError::NotANumber => value_error(error),
        })?;
        let settings = GenerationSettings {
            max_tokens: request.max_tokens,
            stop: request.stop,
            chat,
            ignore_end: request.ignore_end,
        };
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut session = match idle {
            Some(session) => session,
            None => self.model.session(&self.settings).map_err(value_error)?,
        };
        // Of this generation alone: who holds an earlier one must not stop it.
        let cancel = Cancel::default();
        session.set_cancel(cancel.clone());
        // A receiver that lags holds the model up rather than memory.
        let (sender, events) = sync_channel(64);
        let (model, idle) = (Arc::clone(&self.model), Arc::clone(&self.idle));
        let work = Work { model, session, sampler, settings, tokens };
        std::thread::Builder::new()
            .name("iceformer-generate".into())
            .spawn(move || work.run(&sender, &idle))
            .map_err(|error| PyRuntimeError::new_err(format!("no thread to generate on: {error}")))?;
        Ok(Generation { state: Mutex::new(Some(events)), cancel })
    }
}

/// A generation about to run on a thread of its own.
struct Work {
    model: Arc<Model>,
    session: Session,
    sampler: Sampler,
    settings: GenerationSettings,
    tokens: Vec<u32>,
}

impl Work {
    fn run(mut self, events: &SyncSender<Event>, idle: &Mutex<Option<Session>>) {
        let outcome = self.generate(events);
        // Back before the last event: who has read that may start the next generation at once.
        *idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.session);
        // A receiver that is gone wants to know nothing.
        let _ = events.send(match outcome {
            Ok(finished) => Event::Done(Box::new(finished)),
            Err(message) => Event::Failed(message),
        });
    }

    fn generate(&mut self, events: &SyncSender<Event>) -> Result<Finished, String> {
        let start = Instant::now();
        let tell = |done, total| {
            // Progress that nobody waits for is dropped.
            let _ = events.try_send(Event::Read { done, total });
        };
        let kept_tokens = match self.session.read_from_start(&self.tokens, tell) {
            Ok(kept) => kept,
            Err(iceformer_engine::SessionError::Cancelled(_)) => {
                return Ok(Finished {
                    text: String::new(),
                    tokens: Vec::new(),
                    finish: "cancelled",
                    prompt_tokens: self.tokens.len(),
                    kept_tokens: 0,
                    prompt_seconds: start.elapsed().as_secs_f64(),
                    decode_seconds: 0.0,
                });
            }
            Err(error) => return Err(error.to_string()),
        };
        let prompt_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let generation = generate(
            &mut self.session,
            self.model.tokenizer(),
            &mut self.sampler,
            &self.settings,
            |piece| match events.send(Event::Text(piece.to_owned())) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            },
        )
        .map_err(|error| error.to_string())?;
        Ok(Finished {
            text: generation.text,
            tokens: generation.tokens,
            finish: generation.finish.name(),
            prompt_tokens: self.tokens.len(),
            kept_tokens,
            prompt_seconds,
            decode_seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// A running generation.
#[pyclass(frozen, module = "iceformer._core")]
pub struct Generation {
    state: Mutex<Option<Receiver<Event>>>,
    cancel: Cancel,
}

#[pymethods]
impl Generation {
    /// The next event: `("read", done, total)`, `("text", piece)` or, last, `("done", figures)`; None afterwards.
    fn next_event<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        loop {
            let event = py.detach(|| {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(events) = &*state else { return Ok(None) };
                match events.recv_timeout(std::time::Duration::from_millis(100)) {
                    Ok(event @ (Event::Done(_) | Event::Failed(_))) => {
                        *state = None;
                        Ok(Some(event))
                    }
                    Ok(event) => Ok(Some(event)),
                    Err(error) => Err(error),
                }
            });
            py.check_signals().inspect_err(|_| self.cancel.cancel())?;
            return Ok(Some(match event {
                Ok(None) => return Ok(None),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => continue,
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(PyRuntimeError::new_err("the generation ended without a result"));
                }
                Ok(Some(Event::Read { done, total })) => ("read", done, total).into_pyobject(py)?.into_any(),
                Ok(Some(Event::Text(piece))) => ("text", piece).into_pyobject(py)?.into_any(),
                Ok(Some(Event::Failed(message))) => return Err(PyValueError::new_err(message)),
                Ok(Some(Event::Done(finished))) => ("done", finished.figures(py)?).into_pyobject(py)?.into_any(),
            }));
        }
    }

    /// Stops the generation at the next layer.
    fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.take().is_some() {
            self.cancel.cancel();
        }
    }
}

impl Finished {
    fn figures<'py>(self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let figures = PyDict::new(py);
        figures.set_item("text", self.text)?;
        figures.set_item("tokens", self.tokens)?;
        figures.set_item("finish", self.finish)?;
        figures.set_item("prompt_tokens", self.prompt_tokens)?;
        figures.set_item("kept_tokens", self.kept_tokens)?;
        figures.set_item("prompt_seconds", self.prompt_seconds)?;
        figures.set_item("decode_seconds", self.decode_seconds)?;
        Ok(figures)
    }
}
