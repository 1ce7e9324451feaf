//! Tokens that the files beside `tokenizer.json` name and it does not: added as transformers adds them.
//!
//! A model that was fine-tuned for chats often comes with the `tokenizer.json` of its base model. Without these tokens
//! every marker of its chat template would fall into pieces.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tokenizers::AddedToken;

use super::TokenizerError;
use crate::side_file::SideFile;
use crate::text::quoted;

/// The files that name tokens.
#[derive(Clone, Copy)]
pub(crate) struct TokenFiles<'a> {
    /// `tokenizer_config.json`.
    pub config: SideFile<'a>,
    /// `special_tokens_map.json`, of older folders.
    pub special_tokens_map: SideFile<'a>,
    /// `added_tokens.json`, of older folders.
    pub added_tokens: SideFile<'a>,
}

/// Special tokens that every tokenizer may have, in the order in which transformers adds them.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds the tokens of `files` that `tokenizer` lacks.
pub(super) fn add_missing(tokenizer: &mut tokenizers::Tokenizer, files: &TokenFiles<'_>) -> Result<(), TokenizerError> {
    let problem = |file: &str, problem: String| TokenizerError::Read { file: file.into(), problem };
    let read = |file: SideFile<'_>| file.json().map_err(|error| problem(file.file, error));
    let config = read(files.config)?;
    // As in transformers, the older files count only beside a configuration that does not list the added tokens.
    let is_listed = config.get("added_tokens_decoder").is_some();
    let (map, source) = match is_listed {
        true => (Value::Null, files.config.file),
        false => (read(files.special_tokens_map)?, files.added_tokens.file),
    };
    let named = named_tokens(&config, &map);
    let extra = extra_tokens(&config, &map).map_err(|error| problem(files.config.file, error))?;
    let stated = match is_listed {
        true => listed_tokens(&config["added_tokens_decoder"]),
        false => {
            let special: BTreeSet<&str> = named.iter().chain(&extra).map(|token| token.content.as_str()).collect();
            older_tokens(&read(files.added_tokens)?, &special)
        }
    };
    let mut stated = stated.map_err(|error| problem(source, error))?;

    let present = tokenizer.get_added_tokens_decoder();
    if !is_listed {
        stated.retain(|id, _| !present.contains_key(id));
    }
    stated.retain(|_, token| !present.values().any(|known| known == token));
    let names: BTreeSet<String> = named.iter().map(|token| token.content.clone()).collect();
    let new_ids: Vec<(u32, String)> = stated
        .iter()
        .filter(|(_, token)| tokenizer.token_to_id(&token.content).is_none())
        .map(|(&id, token)| (id, token.content.clone()))
        .collect();
    let mut known: BTreeSet<String> = present.into_values().map(|token| token.content).collect();
    known.extend(stated.values().map(|token| token.content.clone()));
    let mut adding: Vec<AddedToken> = stated.into_values().collect();
    for token in named.into_iter().chain(extra) {
        if known.insert(token.content.clone()) {
            adding.push(token);
        }
    }
    for token in &mut adding {
        token.special |= names.contains(&token.content);
    }
    if adding.is_empty() {
        return Ok(());
    }
    // Ids go on behind the largest, whatever a file states. Another one would stand for another row of the embedding
    // than the one that was trained.
    tokenizer.add_tokens(&adding);
    for (id, content) in new_ids {
        match tokenizer.token_to_id(&content) {
            Some(given) if given != id => {
                let content = quoted(&content);
                return Err(problem(
                    source,
                    format!(
                        "token {content} has id {id}, but the next free id behind tokenizer.json is {given}; \
                         use the tokenizer.json that was saved with this model, or put the token into it"
                    ),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// `added_tokens_decoder` of a `tokenizer_config.json`: descriptions by id.
fn listed_tokens(list: &Value) -> Result<BTreeMap<u32, AddedToken>, String> {
    let Some(list) = list.as_object() else {
        return match list {
            Value::Null => Ok(BTreeMap::new()),
            _ => Err("added_tokens_decoder is no object; expected tokens by their ids".into()),
        };
    };
    let token = |(id, token): (&String, &Value)| {
        let number = id.parse().map_err(|_| format!("added_tokens_decoder has {}; expected a token id", quoted(id)))?;
        let token = token.is_object().then(|| description(token)).flatten().ok_or_else(|| {
            format!("added_tokens_decoder.{} is no added token; expected an object with content", quoted(id))
        })?;
        Ok((number, token))
    };
    list.iter().map(token).collect()
}

/// An `added_tokens.json`: ids by token.
fn older_tokens(list: &Value, special: &BTreeSet<&str>) -> Result<BTreeMap<u32, AddedToken>, String> {
    let Some(list) = list.as_object() else {
        return match list {
            Value::Null => Ok(BTreeMap::new()),
            _ => Err("expected an object with the ids of tokens".into()),
        };
    };
    let token = |(content, id): (&String, &Value)| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| format!("token {} has no id; expected a whole number", quoted(content)))?;
        Ok((id, AddedToken::from(content, special.contains(content.as_str()))))
    };
    list.iter().map(token).collect()
}

/// The tokens of `bos_token` and the like, and those of names of the model's own such as `image_token`.
fn named_tokens(config: &Value, map: &Value) -> Vec<AddedToken> {
    let value = |name: &str| map.get(name).filter(|value| !value.is_null()).or_else(|| config.get(name));
    let standard = NAMES.iter().filter_map(|name| value(name));
    let own = [config, map].into_iter().filter_map(Value::as_object).flatten();
    let own = own.filter(|(name, _)| name.ends_with("_token") && !NAMES.contains(&name.as_str()));
    let groups = ["extra_special_tokens", "model_specific_special_tokens"].into_iter();
    let grouped = groups.filter_map(|name| value(name)?.as_object()).flatten();
    // `add_bos_token` and the like are true or false.
    standard.chain(own.chain(grouped).map(|(_, value)| value)).filter_map(description).collect()
}

/// Special tokens without a name.
fn extra_tokens(config: &Value, map: &Value) -> Result<Vec<AddedToken>, String> {
    for (file, name) in [config, map]
        .into_iter()
        .flat_map(|file| ["extra_special_tokens", "additional_special_tokens"].map(|name| (file, name)))
    {
        let Some(list) = file.get(name).and_then(Value::as_array).filter(|list| !list.is_empty()) else { continue };
        let token = |(index, token)| {
            description(token)
                .ok_or_else(|| format!("{name}[{index}] is no token; expected a string or an added token"))
        };
        return list.iter().enumerate().map(token).collect();
    }
    Ok(Vec::new())
}

/// A special token given by its text, or the description of an added token.
fn description(value: &Value) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(AddedToken::from(content, true));
    }
    let content = value.get("content")?.as_str()?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    Some(AddedToken {
        content: content.into(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}
