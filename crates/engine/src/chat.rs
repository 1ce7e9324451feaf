//! Chat templates (Jinja), rendered as transformers renders them.
//!
//! A template comes with the model and is not trusted: it sees only the messages, and its steps and the memory it takes
//! are bounded.

mod environment;
mod filters;
mod json;
mod methods;

use std::collections::BTreeMap;

use minijinja::Value as JinjaValue;
use minijinja::value::ValueKind;
use serde::Serialize;
use serde_json::Value;

use crate::gguf::Metadata;
use crate::panics::caught;
use crate::side_file::SideFile;
use crate::text::{printable, quoted};

/// What a template may use: a step costs one, 64 bytes of data cost one. Real templates take a few dozen steps for each
/// message and copy its text a few times.
const FUEL: u64 = 200_000;
const FUEL_FOR_MESSAGE: u64 = 5_000;
const FUEL_FOR_BYTE: u64 = 1;
/// Longest template that is read, in bytes; the longest real ones have about 20 kB.
const MAXIMUM_SOURCE: usize = 1 << 20;

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    fn to_jinja(&self) -> JinjaValue {
        JinjaValue::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

/// A model's chat template (Jinja), which turns messages into the text that the model was trained on.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// The template that counts where tools are given, of models that have one of its own for them.
    tool_use: Option<String>,
    /// `bos_token`, `eos_token` and the like, by name.
    special_tokens: BTreeMap<String, String>,
}

/// The files of a Hugging Face folder that make its chat template.
#[derive(Clone, Copy)]
pub(crate) struct TemplateFiles<'a> {
    /// `chat_template.jinja`.
    pub template: SideFile<'a>,
    /// `tokenizer_config.json`.
    pub config: SideFile<'a>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: SideFile<'a>,
}

/// What is wrong with a chat template.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file cannot be read or is malformed.
    #[error("{file}: {problem}")]
    Read {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// The template refused the messages, with its own words.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// What a template was to be given is not what it should be.
    #[error("{0}")]
    Inputs(String),
    /// The template failed.
    #[error("the model's chat template fails: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`.
    pub(crate) fn from_hugging_face(files: &TemplateFiles<'_>) -> Result<Option<Self>, ChatError> {
        let TemplateFiles { template, config, special_tokens_map } = *files;
        let read =
            |file: SideFile<'_>| file.json().map_err(|problem| ChatError::Read { file: file.file.into(), problem });
        let file = if template.bytes.is_some() { template.file } else { config.file };
        let problem = |problem: String| ChatError::Read { file: file.into(), problem };
        let config = read(config)?;
        let sources = match template.bytes {
            Some(bytes) => {
                let text = std::str::from_utf8(bytes).map_err(|_| problem("not UTF-8".into()))?;
                Some((text.to_owned(), None))
            }
            None => templates_of_config(&config).map_err(problem)?,
        };
        let Some((source, tool_use)) = sources else { return Ok(None) };
        // As in transformers, the older file counts only beside a configuration that does not list the added tokens.
        let older = match config.get("added_tokens_decoder") {
            None => read(special_tokens_map)?,
            Some(_) => Value::Null,
        };
        let mut special_tokens = BTreeMap::new();
        let named = [&config, &older].into_iter().filter_map(Value::as_object).flatten();
        let named = named.filter(|(name, _)| name.ends_with("_token"));
        // Some models name tokens of their own there; others list them without names.
        let own = config.get("extra_special_tokens").and_then(Value::as_object);
        for (name, value) in named.chain(own.into_iter().flatten()) {
            // A string, or the description of an added token.
            if let Some(text) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                special_tokens.insert(name.clone(), text.to_owned());
            }
        }
        Self::new(source, tool_use, special_tokens).map(Some).map_err(problem)
    }

    /// Reads the template in the metadata of a GGUF file.
    pub(crate) fn from_gguf(metadata: &Metadata, file: &str) -> Result<Option<Self>, ChatError> {
        let problem = |problem: String| ChatError::Read { file: file.into(), problem };
        let read = || -> Result<_, crate::gguf::GgufError> {
            let Some(source) = metadata.string("tokenizer.chat_template")? else { return Ok(None) };
            let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
            let mut special_tokens = BTreeMap::new();
            for (name, key) in
                [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
            {
                let id = metadata.u32(&format!("tokenizer.ggml.{key}_token_id"))?;
                if let Some(token) = id.and_then(|id| tokens.get(id as usize)) {
                    special_tokens.insert(name.to_owned(), token.clone());
                }
            }
            Ok(Some((source.to_owned(), special_tokens)))
        };
        match read().map_err(|error| problem(error.to_string()))? {
            None => Ok(None),
            Some((source, special_tokens)) => Self::new(source, None, special_tokens).map(Some).map_err(problem),
        }
    }

    fn new(source: String, tool_use: Option<String>, special_tokens: BTreeMap<String, String>) -> Result<Self, String> {
        let checked = |source: String| {
            if source.len() > MAXIMUM_SOURCE {
                return Err(format!("chat template of {} bytes; expected at most {MAXIMUM_SOURCE}", source.len()));
            }
            // Jinja does so before it compiles.
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            let source = environment::without_generation_tags(&source);
            environment::new()
                .template_from_str(&source)
                .map_err(|error| format!("chat template: {}", printable(&error.to_string())))?;
            Ok(source)
        };
        Ok(Self { source: checked(source)?, tool_use: tool_use.map(checked).transpose()?, special_tokens })
    }

    /// The text of a chat; with `add_generation_prompt` it ends where the assistant's answer begins. Encode it without
    /// adding special tokens: the template writes them.
    ///
    /// # Errors
    /// When the template refuses the messages (its own words are in the error), fails, or runs too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let bytes = messages.iter().map(|message| message.content.len() + message.role.len()).sum();
        self.run(messages.iter().map(Message::to_jinja).collect(), BTreeMap::new(), bytes, add_generation_prompt)
    }

    /// As [`render`](Self::render), of a JSON list of messages with whatever keys the template knows (`tool_calls`,
    /// `reasoning_content`), and a JSON object of variables that it tests (`tools`, `documents`, `enable_thinking`).
    ///
    /// # Errors
    /// As [`render`](Self::render), and when a text is no such JSON.
    pub fn render_json(
        &self,
        messages: &str,
        variables: &str,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let bytes = messages.len() + variables.len();
        // Not maps of Rust: the order of the keys is what `tojson` writes.
        let messages: Vec<JinjaValue> = serde_json::from_str(messages)
            .map_err(|error| ChatError::Inputs(format!("the messages are no JSON list: {error}")))?;
        if let Some(index) = messages.iter().position(|message| message.kind() != ValueKind::Map) {
            return Err(ChatError::Inputs(format!("message {index} is no object; expected one with role and content")));
        }
        let variables: BTreeMap<String, JinjaValue> = serde_json::from_str(variables)
            .map_err(|error| ChatError::Inputs(format!("the template's variables are no JSON object: {error}")))?;
        for name in ["messages", "add_generation_prompt"] {
            if variables.contains_key(name) {
                return Err(ChatError::Inputs(format!("the template's variable {name} is set already; leave it out")));
            }
        }
        self.run(messages, variables, bytes, add_generation_prompt)
    }

    /// Renders `messages`, which take about `bytes` bytes with the variables.
    fn run(
        &self,
        messages: Vec<JinjaValue>,
        variables: BTreeMap<String, JinjaValue>,
        bytes: usize,
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::Render("a chat needs at least one message".into()));
        }
        let mut environment = environment::new();
        environment.set_fuel(Some(FUEL + FUEL_FOR_MESSAGE * messages.len() as u64 + FUEL_FOR_BYTE * bytes as u64));
        let has_tools = variables.get("tools").is_some_and(|tools| !tools.is_none());
        let source = self.tool_use.as_ref().filter(|_| has_tools).unwrap_or(&self.source);
        let mut context: BTreeMap<String, JinjaValue> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), JinjaValue::from(token))).collect();
        // transformers passes these, and templates test them.
        context.insert("tools".into(), JinjaValue::from(()));
        context.insert("documents".into(), JinjaValue::from(()));
        context.extend(variables);
        context.insert("messages".into(), JinjaValue::from(messages));
        context.insert("add_generation_prompt".into(), JinjaValue::from(add_generation_prompt));

        // A panic of the library must not end the program: one of its releases panicked on reversed slices.
        let rendered = caught(|| {
            let template = environment.template_from_str(source)?;
            template.render(context)
        });
        let rendered = rendered.map_err(|_| ChatError::Render("the template library panicked".into()))?;
        rendered.map_err(|error| {
            if let Some(words) = environment::refusal(&error) {
                return ChatError::Refused(printable(&words));
            }
            ChatError::Render(printable(&error.to_string()))
        })
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// `chat_template` of a `tokenizer_config.json`: a string, or named ones (a list, or an object in folders written by hand)
/// of which `default` is taken, and `tool_use` where tools are given.
fn templates_of_config(config: &Value) -> Result<Option<(String, Option<String>)>, String> {
    let templates = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => return Ok(Some((text.clone(), None))),
        Some(templates @ (Value::Array(_) | Value::Object(_))) => templates,
        Some(other) => {
            let other = quoted(&other.to_string());
            return Err(format!("chat_template is {other}; expected a string or a list of templates"));
        }
    };
    let named = |name: &str| {
        let template = match templates {
            Value::Array(list) => list
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
                .and_then(|entry| entry.get("template")),
            object => object.get(name),
        };
        template.and_then(Value::as_str).map(str::to_owned)
    };
    match named("default") {
        Some(text) => Ok(Some((text, named("tool_use")))),
        None => Err("chat_template lists no template of the name default".into()),
    }
}
