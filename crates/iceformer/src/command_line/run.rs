//! `iceformer run`: reads a prompt, continues it, tells the figures.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use iceformer_attention::{Method, ThreadTeam};
use iceformer_engine::{
    ChatTemplate, Finish, Generation, GenerationSettings, Message, Model, ModelConfig, ModelFiles, RopeScaling,
    Sampler, SamplerSettings, Session, SessionError, SessionSettings, Tokenizer, generate,
};
use serde_json::{Map, Value};

use super::arguments::{MachineArguments, RunArguments, SamplingArguments};
use super::attention_figures::AttentionFigures;
use super::chat::{Given, Opening};
use super::embedded::{self, Example};
use super::memory;
use super::progress::Progress;
use super::report::{Figures, per_second};
use super::text::read_text;
use super::unread_input::tell_of_unread_input;
use super::{Outcome, chat, interrupt, print_json};

/// The arguments as meant: checked, and the text read.
pub struct Plan {
    /// `None`: the built-in reference model.
    pub model: Option<PathBuf>,
    /// `None`: a chat waits for its first message.
    text: Option<String>,
    /// Text of files that the first message of a chat is to begin with.
    opening: Option<String>,
    /// Whether the chat goes on after the text is answered.
    goes_on: bool,
    example: Option<Example>,
    pub system: Option<String>,
    /// Whether standard input was left alone.
    leaves_input: bool,
    /// Whether the chat template was asked for (`true`) or refused (`false`).
    wants_template: Option<bool>,
    /// Variables of the chat template.
    variables: Map<String, Value>,
    pub sampler: SamplerSettings,
    pub generation: GenerationSettings,
    pub session: SessionSettings,
    pub threads: usize,
    json: bool,
    pub quiet: bool,
}

impl Plan {
    fn new(arguments: RunArguments) -> anyhow::Result<Self> {
        let RunArguments { model, file, prompt, example, system, chat, no_chat, .. } = arguments;
        let sampler = sampler_settings(&arguments.sampling);
        Sampler::new(sampler.clone())?;
        let example = if example { Some(Example::new()?) } else { None };
        let goes_on = chat && !arguments.json && std::io::stdin().is_terminal();
        let waits = goes_on && prompt.is_none() && !file.is_empty();
        let is_read = file.iter().any(|path| path.as_os_str() == "-") || (file.is_empty() && prompt.is_none());
        let given = match &example {
            Some(example) => Some(example.prompt.clone()),
            None => input(&file, prompt)?,
        };
        let (text, opening) = if waits { (None, given) } else { (given, None) };
        let stop = arguments.stop.into_iter().chain(example.as_ref().map(|_| embedded::STOP.to_owned())).collect();
        Ok(Self {
            model,
            text,
            opening,
            goes_on,
            leaves_input: example.is_none() && !is_read,
            system,
            wants_template: match (chat, no_chat) {
                (true, _) => Some(true),
                (_, true) => Some(false),
                _ => None,
            },
            variables: variables(arguments.template_variable)?,
            sampler,
            generation: GenerationSettings {
                max_tokens: Some(arguments.max_tokens),
                stop,
                chat: false,
                ignore_end: arguments.ignore_end,
            },
            session: session_settings(&arguments.machine, arguments.method.method()?),
            threads: arguments.machine.threads.unwrap_or_else(ThreadTeam::available),
            json: arguments.json,
            quiet: arguments.quiet,
            example,
        })
    }

    /// The chat template of `files` to use.
    fn template(&self, files: &ModelFiles) -> anyhow::Result<Option<ChatTemplate>> {
        anyhow::ensure!(
            self.text.is_some() || !self.json,
            "--json needs a text; give one with --prompt, --file or standard input"
        );
        anyhow::ensure!(
            self.text.is_some() || self.wants_template != Some(false),
            "--no-chat needs a text; give one with --prompt, --file or standard input"
        );
        if self.wants_template == Some(false) {
            return Ok(None);
        }
        let template = files.chat_template().map_err(|error| match self.text.is_some() {
            true => anyhow::anyhow!("{error}; --no-chat gives the text to the model as it is"),
            false => error.into(),
        })?;
        let needed = self.wants_template == Some(true)
            || self.system.is_some()
            || self.text.is_none()
            || !self.variables.is_empty();
        anyhow::ensure!(
            template.is_some() || !needed,
            "this model has no chat template; give a text with --prompt or --file, and neither --chat nor --system nor \
             --template-variable"
        );
        Ok(template)
    }

    /// The messages that a chat starts with.
    pub fn messages(&self) -> Vec<Message> {
        self.system.iter().map(|system| Message { role: "system".into(), content: system.clone() }).collect()
    }

    /// The text of a chat, up to where the next answer begins.
    pub fn render(&self, template: &ChatTemplate, messages: &[Message]) -> anyhow::Result<String> {
        if self.variables.is_empty() {
            return Ok(template.render(messages, true)?);
        }
        let (messages, variables) = (serde_json::to_string(messages)?, serde_json::to_string(&self.variables)?);
        Ok(template.render_json(&messages, &variables, true)?)
    }
}

fn sampler_settings(arguments: &SamplingArguments) -> SamplerSettings {
    SamplerSettings {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        min_p: arguments.min_p,
        repetition_penalty: arguments.repetition_penalty,
        repetition_window: arguments.repetition_window,
        seed: arguments.seed,
    }
}

fn session_settings(arguments: &MachineArguments, method: Method) -> SessionSettings {
    SessionSettings { context: arguments.context, chunk: arguments.chunk, key_value_type: arguments.kv_type, method }
}

/// Template variables by name.
fn variables(given: Vec<(String, Value)>) -> anyhow::Result<Map<String, Value>> {
    let mut variables = Map::new();
    for (name, value) in given {
        anyhow::ensure!(!variables.contains_key(&name), "--template-variable {name} is given twice");
        variables.insert(name, value);
    }
    Ok(variables)
}

/// Files, prompt or standard input as one text; `None` where a person sits at the terminal.
fn input(files: &[PathBuf], prompt: Option<String>) -> anyhow::Result<Option<String>> {
    let streams = files.iter().filter(|path| path.as_os_str() == "-").count();
    anyhow::ensure!(streams < 2, "--file - is given {streams} times; standard input can be read once");
    let mut parts = files.iter().map(|path| read_text(path)).collect::<anyhow::Result<Vec<_>>>()?;
    parts.extend(prompt);
    if parts.is_empty() {
        if std::io::stdin().is_terminal() {
            return Ok(None);
        }
        parts.push(read_text(Path::new("-"))?);
    }
    parts.retain(|part| !part.is_empty());
    let text = parts.join("\n\n");
    anyhow::ensure!(!text.is_empty(), "the prompt is empty; give text with --prompt, --file or standard input");
    Ok(Some(text))
}

/// Runs the command.
pub fn run(arguments: RunArguments) -> anyhow::Result<Outcome> {
    let plan = Plan::new(arguments)?;
    if let Some(example) = plan.example.as_ref().filter(|_| !plan.quiet) {
        example.introduce();
    }
    let start = Instant::now();
    let files = match &plan.model {
        Some(path) => ModelFiles::open(path)?,
        None => embedded::model()?,
    };
    let tokenizer = files.tokenizer()?;
    // What is wrong with the prompt is told before the weights are loaded.
    let context = plan.session.check(files.config())?;
    let template = plan.template(&files)?;
    let given = plan.text.as_ref().or(plan.opening.as_ref());
    let prompt = given.map(|text| encode(&plan, &tokenizer, template.as_ref(), text)).transpose()?.unwrap_or_default();
    if prompt.len() > context {
        return Err(too_long(prompt.len(), context, files.config()));
    }
    if plan.leaves_input && !plan.quiet {
        tell_of_unread_input();
    }

    let chat = template.is_some();
    let mut progress = Progress::new("loading", "layers", plan.quiet || plan.model.is_none());
    let team = Arc::new(ThreadTeam::new(plan.threads));
    let model = Model::with_tokenizer(&files, tokenizer, template, team, |done, total| progress.update(done, total))?;
    progress.finish();
    let load_seconds = start.elapsed().as_secs_f64();
    let opening = match (&plan.text, &plan.opening) {
        (Some(_), _) if !plan.goes_on => return answer(&plan, &model, &prompt, chat, load_seconds),
        (Some(text), _) => Opening::Ask(Given { text: text.clone(), tokens: prompt }),
        (None, Some(text)) => Opening::Read(Given { text: text.clone(), tokens: prompt }),
        (None, None) => Opening::Nothing,
    };
    chat::run(&plan, &model, opening)
}

/// Memory that a byte of text takes while it is encoded: of English 115 to 125 bytes were measured, of line breaks 328.
const ENCODING_BYTES: u64 = 130;

/// The tokens of a text, through the chat template where there is one.
fn encode(plan: &Plan, tokenizer: &Tokenizer, template: Option<&ChatTemplate>, text: &str) -> anyhow::Result<Vec<u32>> {
    memory::ensure_room(ENCODING_BYTES * text.len() as u64, "encoding a text of this length")?;
    let Some(template) = template else { return Ok(tokenizer.encode(text, true)?) };
    let mut messages = plan.messages();
    messages.push(Message { role: "user".into(), content: text.into() });
    Ok(tokenizer.encode(&plan.render(template, &messages)?, false)?)
}

fn answer(plan: &Plan, model: &Model, tokens: &[u32], chat: bool, load_seconds: f64) -> anyhow::Result<Outcome> {
    let mut session = model.session(&plan.session)?;
    let mut sampler = Sampler::new(plan.sampler.clone())?;
    let generation_settings = GenerationSettings { chat, ..plan.generation.clone() };

    let _guard = interrupt::guard(session.cancel());
    let start = Instant::now();
    match read(&mut session, tokens, plan.quiet) {
        Ok(Some(_)) => {}
        Ok(None) => return Ok(Outcome::Interrupted),
        Err(SessionError::TooLong { tokens, held: 0, context }) => {
            return Err(too_long(tokens, context, model.decoder().config()));
        }
        Err(error) => return Err(error.into()),
    }
    let prompt_seconds = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let generation = stream(&mut session, model, &mut sampler, &generation_settings, !plan.json)?;
    let decode_seconds = start.elapsed().as_secs_f64();

    let passes = session.tokens().len() - tokens.len();
    let mut figures = Figures {
        model: plan.model.as_deref().map_or(embedded::NAME.into(), |path| path.display().to_string()),
        finish: generation.finish.name(),
        load_seconds,
        prompt_tokens: tokens.len(),
        prompt_seconds,
        prompt_tokens_per_second: per_second(tokens.len(), prompt_seconds),
        generated_tokens: generation.tokens.len(),
        decode_seconds,
        decode_tokens_per_second: per_second(passes, decode_seconds),
        attention_share: 0.0,
        linear_share: 0.0,
        rest_share: 0.0,
        attention: AttentionFigures::new(plan.session.method, session.reports()),
        peak_resident_bytes: None,
        weight_bytes: 0,
        cache_bytes: session.cache_bytes(),
        kv_type: "",
        threads: plan.threads,
        instruction_set: "",
        kernels: Vec::new(),
        seed: plan.sampler.seed,
        expected: plan.example.as_ref().map(|_| embedded::PLANTED),
        text: generation.text,
    };
    figures.observe(model.decoder(), plan.session.method, plan.session.key_value_type, &session.times());
    if plan.json {
        print_json(&figures)?;
    }
    if !plan.quiet {
        if let Some(example) = &plan.example {
            example.judge(&figures.text);
        }
        figures.print_table();
    }
    Ok(if generation.finish == Finish::Cancelled { Outcome::Interrupted } else { Outcome::Done })
}

/// A text that does not fit a session that holds nothing.
pub fn too_long(tokens: usize, context: usize, config: &ModelConfig) -> anyhow::Error {
    let dynamic = match config.rope.scaling {
        RopeScaling::Dynamic { .. } if context == config.context_length => {
            " (it asks for dynamic rope scaling beyond that, which is not supported)"
        }
        _ => "",
    };
    anyhow::anyhow!(
        "the prompt has {tokens} tokens; the context takes {context}{dynamic}: shorten the text or use a model with a longer \
         context"
    )
}

/// Reads `tokens` as the whole content of the session, with progress. Gives how many of them it had; `None` when Ctrl-C
/// stopped it.
pub fn read(session: &mut Session, tokens: &[u32], quiet: bool) -> Result<Option<usize>, SessionError> {
    let mut progress = Progress::new("reading", "tokens", quiet);
    let outcome = session.read_from_start(tokens, |done, total| progress.update(done, total));
    if let Err(SessionError::Cancelled(_)) = outcome {
        progress.cancelled();
        return Ok(None);
    }
    progress.finish();
    outcome.map(Some)
}

/// Generates, writing text to standard output as it comes where `show` says so.
pub fn stream(
    session: &mut Session,
    model: &Model,
    sampler: &mut Sampler,
    settings: &GenerationSettings,
    show: bool,
) -> anyhow::Result<Generation> {
    let mut output = std::io::stdout().lock();
    let mut failure = None;
    let mut write = |text: &str| output.write_all(text.as_bytes()).and_then(|()| output.flush());
    let generation = generate(session, model.tokenizer(), sampler, settings, |text| {
        if show && let Err(error) = write(text) {
            failure = Some(error);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    if show && failure.is_none() {
        failure = write("\n").err();
    }
    match failure {
        Some(error) => Err(error).context("standard output"),
        None => Ok(generation),
    }
}
