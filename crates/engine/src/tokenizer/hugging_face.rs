//! `tokenizer.json`, read by the `tokenizers` library.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokenizers::ModelWrapper;

use super::added_tokens::{TokenFiles, add_missing};
use super::{END_OF_TURN, Encoder, TokenText, Tokenizer, TokenizerError};
use crate::config::ModelConfig;
use crate::panics::caught;
use crate::text::quoted;

/// Looks at what the library does not: the syntax, before it is at the first field, and sizes that it takes on trust.
fn outline(json: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Outline {
        #[serde(default)]
        normalizer: Value,
        model: Option<IgnoredAny>,
    }

    // A list would do for the fields in their order.
    let is_object = json.trim_ascii_start().starts_with(b"{");
    match serde_json::from_slice::<Outline>(json) {
        Err(error) if is_object || !error.is_data() => Err(format!("not valid JSON: {error}")),
        Ok(Outline { model: None, .. }) if is_object => Err("model is missing".into()),
        Ok(outline) if is_object => charsmaps(&outline.normalizer),
        _ => Err("expected an object".into()),
    }
}

/// The tables of `Precompiled` normalizers start with the size of a part, for which the library makes room unseen.
fn charsmaps(normalizer: &Value) -> Result<(), String> {
    if let Some(Value::String(map)) = normalizer.get("precompiled_charsmap") {
        let field = "normalizer.precompiled_charsmap";
        let bytes = BASE64_STANDARD.decode(map).map_err(|error| format!("{field} is not base64: {error}"))?;
        match bytes.split_first_chunk::<4>() {
            Some((size, rest)) if u32::from_le_bytes(*size) as usize <= rest.len() => {}
            _ => return Err(format!("{field} is cut off")),
        }
    }
    let steps = normalizer.get("normalizers").and_then(Value::as_array);
    steps.into_iter().flatten().try_for_each(charsmaps)
}

impl Tokenizer {
    /// Reads a `tokenizer.json`; `file` is how messages call it. Tokens that only the files `beside` it name are added.
    pub(crate) fn from_hugging_face(
        json: &[u8],
        file: &str,
        beside: &TokenFiles<'_>,
        config: &ModelConfig,
    ) -> Result<Self, TokenizerError> {
        let problem = |problem: String| TokenizerError::Read { file: file.into(), problem };
        outline(json).map_err(|words| problem(format!("not a tokenizer: {words}")))?;
        // The library panics at a decoder that is none and at pieces of a vocabulary that do not fit together, and some
        // steps that a file may ask for at any text.
        let read = caught(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(json)
                .map_err(|error| problem(format!("not a tokenizer: {}", quoted(&error.to_string()))))?;
            add_missing(&mut tokenizer, beside)?;
            let tokenizer = Self::from_library(tokenizer, file, config)?;
            if let Encoder::HuggingFace(library) = &tokenizer.encoder {
                let _ = library.encode_fast("some words", true);
            }
            Ok(tokenizer)
        });
        read.unwrap_or_else(|words| {
            Err(problem(format!("not a tokenizer: the tokenizers library panicked: {}", quoted(&words))))
        })
    }

    pub(super) fn from_library(
        mut tokenizer: tokenizers::Tokenizer,
        file: &str,
        config: &ModelConfig,
    ) -> Result<Self, TokenizerError> {
        let problem = |problem: String| TokenizerError::Read { file: file.into(), problem };
        // A length stated in the file would cut or fill prompts silently.
        tokenizer.with_truncation(None).map_err(|error| problem(error.to_string()))?;
        tokenizer.with_padding(None);
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_some_and(|dropout| dropout > 0.0)
        {
            return Err(problem("model.dropout is set, which makes token ids random; set it to null".into()));
        }
        // Tokens added to a tokenizer but not to the model are common, and harmless until a text holds one.
        match tokenizer.get_vocab(false).values().copied().max() {
            None => return Err(problem("the vocabulary is empty".into())),
            Some(id) if id as usize >= config.vocabulary => {
                return Err(TokenizerError::IdOutOfRange { file: file.into(), id, vocabulary: config.vocabulary });
            }
            Some(_) => {}
        }
        let ids = tokenizer.get_vocab(true);
        let largest = ids.values().copied().max();
        let special: BTreeSet<u32> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let mut end_of_turn_tokens = config.eos_tokens.clone();
        for id in END_OF_TURN.iter().filter_map(|name| ids.get(*name).copied()) {
            if special.contains(&id) && !end_of_turn_tokens.contains(&id) {
                end_of_turn_tokens.push(id);
            }
        }
        let kind = match tokenizer.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::Unigram(_) => "unigram",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "word level",
        };
        let token_text = token_text(&tokenizer);
        Ok(Self {
            kind: match token_text {
                TokenText::ByteLevel => format!("byte-level {kind}"),
                TokenText::SentencePiece { .. } => format!("{kind}, SentencePiece style"),
                TokenText::Plain => kind.into(),
            },
            token_text,
            vocabulary: largest.map_or(0, |id| id as usize + 1),
            model_vocabulary: config.vocabulary,
            special,
            bos: config.bos_token,
            added_before: None,
            added_after: None,
            end_tokens: config.eos_tokens.clone(),
            end_of_turn_tokens,
            encoder: Encoder::HuggingFace(Box::new(tokenizer)),
        })
    }
}

/// How the decoder of the tokenizer writes tokens.
fn token_text(tokenizer: &tokenizers::Tokenizer) -> TokenText {
    let Some(Ok(decoder)) = tokenizer.get_decoder().map(serde_json::to_value) else { return TokenText::Plain };
    let steps = match decoder.get("decoders") {
        Some(Value::Array(steps)) => steps.clone(),
        _ => vec![decoder],
    };
    let kinds: Vec<&str> = steps.iter().filter_map(|step| step.get("type")?.as_str()).collect();
    // With other parameters than these the library's decoder is asked.
    let replaces = |step: &Value| step["pattern"]["String"] == "▁" && step["content"] == " ";
    let strips = |step: &Value| step["content"] == " " && step["start"] == 1 && step["stop"] == 0;
    match kinds.as_slice() {
        ["ByteLevel"] => TokenText::ByteLevel,
        ["Metaspace"] if steps[0]["replacement"] == "▁" => {
            TokenText::SentencePiece { strips_first_space: steps[0]["prepend_scheme"] != "never" }
        }
        ["Replace", "ByteFallback", "Fuse"] if replaces(&steps[0]) => {
            TokenText::SentencePiece { strips_first_space: false }
        }
        ["Replace", "ByteFallback", "Fuse", "Strip"] if replaces(&steps[0]) && strips(&steps[3]) => {
            TokenText::SentencePiece { strips_first_space: true }
        }
        _ => TokenText::Plain,
    }
}
