//! Chat templates (Jinja), rendered as transformers renders them.
//!
//! A template comes with the model and is not trusted: it sees only the messages, and its steps and the memory it takes
//! are bounded.

mod environment;
mod json;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::Value as JinjaValue;
use serde::Serialize;
use serde_json::Value;

use crate::gguf::Metadata;
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
    /// `bos_token`, `eos_token` and the like, by name.
    special_tokens: BTreeMap<String, String>,
}

/// The files of a Hugging Face folder that make its chat template.
#[derive(Clone, Copy)]
pub(crate) struct TemplateFiles<'a> {
    /// `chat_template.jinja`.
    pub template: Option<&'a [u8]>,
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
    /// The template failed.
    #[error("the model's chat template fails: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`.
    pub(crate) fn from_hugging_face(files: &TemplateFiles<'_>) -> Result<Option<Self>, ChatError> {
        let TemplateFiles { template, config, special_tokens_map } = *files;
        let read = |file: SideFile<'_>| {
            file.json().map_err(|problem| ChatError::Read { file: file.file.into(), problem })
        };
        let problem = |problem: String| ChatError::Read { file: config.file.into(), problem };
        let config = read(config)?;
        let source = match template {
            Some(bytes) => {
                let file = || "chat_template.jinja".into();
                let text = std::str::from_utf8(bytes);
                Some(text.map_err(|_| ChatError::Read { file: file(), problem: "not UTF-8".into() })?.to_owned())
            }
            None => template_of_config(&config).map_err(problem)?,
        };
        let Some(source) = source else { return Ok(None) };
        // As in transformers, the older file counts only beside a configuration that does not list the added tokens.
        let older = match config.get("added_tokens_decoder") {
            None => read(special_tokens_map)?,
            Some(_) => Value::Null,
        };
        let mut special_tokens = BTreeMap::new();
        let named = [&config, &older].into_iter().filter_map(Value::as_object).flatten();
        for (name, value) in named.filter(|(name, _)| name.ends_with("_token")) {
            // A string, or the description of an added token.
            if let Some(text) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                special_tokens.insert(name.clone(), text.to_owned());
            }
        }
        Self::new(source, special_tokens).map(Some).map_err(problem)
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
            Some((source, special_tokens)) => Self::new(source, special_tokens).map(Some).map_err(problem),
        }
    }

    fn new(source: String, special_tokens: BTreeMap<String, String>) -> Result<Self, String> {
        if source.len() > MAXIMUM_SOURCE {
            return Err(format!("chat template of {} bytes; expected at most {MAXIMUM_SOURCE}", source.len()));
        }
        let source = environment::without_generation_tags(&source);
        environment::new()
            .template_from_str(&source)
            .map_err(|error| format!("chat template: {}", printable(&error.to_string())))?;
        Ok(Self { source, special_tokens })
    }

    /// The text of a chat; with `add_generation_prompt` it ends where the assistant's answer begins. Encode it without
    /// adding special tokens: the template writes them.
    ///
    /// # Errors
    /// When the template refuses the messages (its own words are in the error), fails, or runs too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        if messages.is_empty() {
            return Err(ChatError::Render("a chat needs at least one message".into()));
        }
        let mut environment = environment::new();
        let said: usize = messages.iter().map(|message| message.content.len() + message.role.len()).sum();
        environment.set_fuel(Some(FUEL + FUEL_FOR_MESSAGE * messages.len() as u64 + FUEL_FOR_BYTE * said as u64));
        let mut context: BTreeMap<&str, JinjaValue> =
            self.special_tokens.iter().map(|(name, token)| (name.as_str(), JinjaValue::from(token))).collect();
        context.insert("messages", messages.iter().map(Message::to_jinja).collect());
        context.insert("add_generation_prompt", JinjaValue::from(add_generation_prompt));
        // transformers passes these, and templates test them.
        context.insert("tools", JinjaValue::from(()));
        context.insert("documents", JinjaValue::from(()));

        // A panic of the library must not end the program: one of its releases panicked on reversed slices.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            let template = environment.template_from_str(&self.source)?;
            template.render(context)
        }));
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

/// `chat_template` of a `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
fn template_of_config(config: &Value) -> Result<Option<String>, String> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(list)) => {
            let named = list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            match named.and_then(|entry| entry.get("template")?.as_str()) {
                Some(text) => Ok(Some(text.to_owned())),
                None => Err("chat_template lists no template of the name default".into()),
            }
        }
        Some(other) => {
            Err(format!("chat_template is {}; expected a string or a list of templates", quoted(&other.to_string())))
        }
    }
}
