//! Tokenizers in the metadata of a GGUF file.

use std::collections::BTreeSet;

use super::pre_tokenizers::{self, PreTokenizer};
use super::sentence_piece::SentencePiece;
use super::{END_OF_TURN, Encoder, TokenText, Tokenizer, TokenizerError};
use crate::config::ModelConfig;
use crate::gguf::{GgufError, Metadata};
use crate::text::quoted;

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const PRE: &str = "tokenizer.ggml.pre";

/// What a token is for; numbers as SentencePiece and llama.cpp have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn from_number(number: i32) -> Option<Self> {
        Some(match number {
            // 0 is "undefined", which llama.cpp takes for a normal token.
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The arrays of a vocabulary, checked against each other.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: &'a [String],
    pub(super) types: Vec<TokenType>,
}

impl Tokenizer {
    /// Reads the metadata of a GGUF file; `file` is how messages call it.
    pub(crate) fn from_gguf(metadata: &Metadata, file: &str, config: &ModelConfig) -> Result<Self, TokenizerError> {
        read(metadata, file, config).map_err(|problem| match problem {
            Problem::Text(problem) => TokenizerError::Read { file: file.into(), problem },
            Problem::Other(error) => error,
        })
    }
}

/// A message without the file's name, or an error that has it.
enum Problem {
    Text(String),
    Other(TokenizerError),
}

impl From<GgufError> for Problem {
    fn from(error: GgufError) -> Self {
        Self::Text(error.to_string())
    }
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

fn read(metadata: &Metadata, file: &str, config: &ModelConfig) -> Result<Tokenizer, Problem> {
    let missing = |key: &str| format!("{key} is missing; a model file needs its tokenizer");
    let model = metadata.string(MODEL)?.ok_or_else(|| missing(MODEL))?;
    let tokens = metadata.strings(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
    if tokens.is_empty() {
        return Err(format!("{TOKENS} is empty").into());
    }
    if tokens.len() > config.vocabulary {
        let id = tokens.len() as u32 - 1;
        let vocabulary = config.vocabulary;
        return Err(Problem::Other(TokenizerError::IdOutOfRange { file: file.into(), id, vocabulary }));
    }
    let vocabulary = Vocabulary { tokens, types: token_types(metadata, tokens.len())? };
    for key in ["bos", "eos", "unknown", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(id) = metadata.u32(&key)?
            && id as usize >= tokens.len()
        {
            return Err(format!("{key} is {id}; expected less than the {} tokens", tokens.len()).into());
        }
    }

    let (kind, encoder, token_text, adds_bos) = match model {
        "llama" => {
            let scores = metadata.floats(SCORES)?.ok_or_else(|| missing(SCORES))?;
            same_length(SCORES, scores.len(), tokens.len())?;
            let adds_space = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let unknown = metadata.u32("tokenizer.ggml.unknown_token_id")?;
            let model = SentencePiece::new(&vocabulary, scores, unknown, adds_space)?;
            let token_text = TokenText::SentencePiece { strips_first_space: adds_space };
            ("SentencePiece BPE".to_owned(), Encoder::SentencePiece(model), token_text, true)
        }
        "gpt2" => {
            let name = metadata.string(PRE)?.unwrap_or("default");
            let pre_tokenizer = pre_tokenizers::by_name(name).ok_or_else(|| {
                format!("{PRE} {} is not known; known are {}", quoted(name), pre_tokenizers::known_names())
            })?;
            let merges = metadata.strings(MERGES)?.ok_or_else(|| missing(MERGES))?;
            let library = byte_level_bpe(&vocabulary, merges, pre_tokenizer)?;
            let encoder = Encoder::HuggingFace(Box::new(library));
            (format!("byte-level BPE, pre-tokenizer {name}"), encoder, TokenText::ByteLevel, pre_tokenizer.adds_bos)
        }
        other => return Err(format!("{MODEL} {} is not supported; known are gpt2, llama", quoted(other)).into()),
    };

    let special: BTreeSet<u32> = with_types(&vocabulary, &[TokenType::Control, TokenType::Unknown]).collect();
    let mut end_of_turn_tokens = config.eos_tokens.clone();
    for id in &special {
        if END_OF_TURN.contains(&tokens[*id as usize].as_str()) && !end_of_turn_tokens.contains(id) {
            end_of_turn_tokens.push(*id);
        }
    }
    let adds_bos = metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let adds_eos = metadata.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let eos = metadata.u32("tokenizer.ggml.eos_token_id")?;
    let stated = |adds: bool, id: Option<u32>, name: &str| match (adds, id) {
        (true, None) => Err(format!("tokenizer.ggml.add_{name}_token is true but {name}_token_id is missing")),
        (true, id) => Ok(id),
        (false, _) => Ok(None),
    };
    Ok(Tokenizer {
        kind,
        encoder,
        token_text,
        vocabulary: tokens.len(),
        model_vocabulary: config.vocabulary,
        special,
        bos: config.bos_token,
        added_before: stated(adds_bos, config.bos_token, "bos")?,
        added_after: stated(adds_eos, eos, "eos")?,
        end_tokens: config.eos_tokens.clone(),
        end_of_turn_tokens,
    })
}

fn same_length(key: &str, found: usize, expected: usize) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{key} has {found} entries for {expected} tokens in {TOKENS}")) }
}

fn token_types(metadata: &Metadata, count: usize) -> Result<Vec<TokenType>, Problem> {
    let Some(numbers) = metadata.integers(TYPES)? else { return Ok(vec![TokenType::Normal; count]) };
    same_length(TYPES, numbers.len(), count)?;
    numbers
        .iter()
        .enumerate()
        .map(|(id, &number)| {
            let unknown = || Problem::Text(format!("{TYPES}[{id}] is {number}; expected 0 to 6"));
            TokenType::from_number(number).ok_or_else(unknown)
        })
        .collect()
}

pub(super) fn with_types<'a>(vocabulary: &'a Vocabulary<'_>, types: &'a [TokenType]) -> impl Iterator<Item = u32> + 'a {
    vocabulary.types.iter().enumerate().filter(|(_, kind)| types.contains(kind)).map(|(id, _)| id as u32)
}

/// Builds the library's tokenizer from tokens and merges (`first second`, in order of rank).
fn byte_level_bpe(
    vocabulary: &Vocabulary<'_>,
    merges: &[String],
    pre_tokenizer: &PreTokenizer,
) -> Result<tokenizers::Tokenizer, String> {
    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

    let ids: tokenizers::models::bpe::Vocab =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
    let mut pairs = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        // The first token is not empty, and may itself be a space in vocabularies that are not byte-level.
        let split = merge.char_indices().skip(1).find(|&(_, character)| character == ' ');
        let Some((first, second)) = split.map(|(position, _)| (&merge[..position], &merge[position + 1..])) else {
            return Err(format!("{MERGES}[{rank}] is {}; expected two tokens with a space between", quoted(merge)));
        };
        for part in [first, second, &format!("{first}{second}")] {
            if !ids.contains_key(part) {
                return Err(format!("{MERGES}[{rank}] needs token {}, which is not in {TOKENS}", quoted(part)));
            }
        }
        pairs.push((first.to_owned(), second.to_owned()));
    }
    let model = BPE::builder()
        .vocab_and_merges(ids, pairs)
        .ignore_merges(pre_tokenizer.whole_words_first)
        .build()
        .map_err(|error| format!("{MERGES}: {error}"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);

    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in pre_tokenizer.patterns {
        let split = Split::new(SplitPattern::Regex((*pattern).into()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| format!("{PRE}: {error}"))?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::default()));

    let added = |types: &[TokenType], special| -> Vec<AddedToken> {
        with_types(vocabulary, types)
            .map(|id| &vocabulary.tokens[id as usize])
            .filter(|token| !token.is_empty())
            .map(|token| AddedToken::from(token.clone(), special).normalized(false))
            .collect()
    };
    tokenizer.add_tokens(&added(&[TokenType::UserDefined], false));
    tokenizer.add_special_tokens(&added(&[TokenType::Control, TokenType::Unknown], true));
    Ok(tokenizer)
}
