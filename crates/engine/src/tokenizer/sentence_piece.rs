//! SentencePiece's BPE: pairs of neighbours merge by the score of the token they make, the highest first
//! (Kudo and Richardson 2018, <https://arxiv.org/abs/1808.06226>).

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::bytes::byte_token;
use super::gguf::{TokenType, Vocabulary};

/// A SentencePiece vocabulary with its scores.
pub(super) struct SentencePiece {
    /// Tokens that text can merge into.
    mergeable: HashMap<String, u32>,
    pieces: Vec<String>,
    scores: Vec<f32>,
    /// Tokens written in text as they are: control, unknown and user-defined ones; found before any merging.
    written: Option<aho_corasick::AhoCorasick>,
    written_ids: Vec<u32>,
    bytes: Option<Box<[u32; 256]>>,
    unknown: Option<u32>,
    adds_space: bool,
}

impl std::fmt::Debug for SentencePiece {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "SentencePiece({} tokens)", self.pieces.len())
    }
}

impl SentencePiece {
    /// `scores` has an entry for each token.
    pub(super) fn new(
        vocabulary: &Vocabulary<'_>,
        scores: &[f32],
        unknown: Option<u32>,
        adds_space: bool,
    ) -> Result<Self, String> {
        let mut mergeable = HashMap::with_capacity(vocabulary.tokens.len());
        let (mut written_tokens, mut written_ids) = (Vec::new(), Vec::new());
        let mut byte_ids = [None; 256];
        let mut unknown_token = None;
        for (id, (token, kind)) in (0u32..).zip(vocabulary.tokens.iter().zip(&vocabulary.types)) {
            match kind {
                TokenType::Normal | TokenType::Unused => {
                    mergeable.insert(token.clone(), id);
                }
                TokenType::UserDefined | TokenType::Control | TokenType::Unknown => {
                    if *kind == TokenType::Unknown {
                        unknown_token = Some(id);
                    }
                    if !token.is_empty() {
                        written_tokens.push(token.as_str());
                        written_ids.push(id);
                    }
                }
                TokenType::Byte => match byte_token(token) {
                    Some(byte) => byte_ids[usize::from(byte)] = Some(id),
                    None => {
                        return Err(format!("tokenizer.ggml.tokens[{id}] is of type byte but not of the form <0xAB>"));
                    }
                },
            }
        }
        let unknown = unknown.or(unknown_token);
        let found = byte_ids.iter().flatten().count();
        let bytes = match found {
            256 => Some(Box::new(byte_ids.map(|id| id.unwrap_or(0)))),
            0 if unknown.is_some() => None,
            0 => return Err("tokenizer.ggml.tokens has neither byte tokens nor an unknown token".into()),
            found => return Err(format!("tokenizer.ggml.tokens has {found} of the 256 byte tokens")),
        };
        let written = match written_tokens.is_empty() {
            true => None,
            false => Some(
                aho_corasick::AhoCorasick::builder()
                    .match_kind(aho_corasick::MatchKind::LeftmostLongest)
                    .build(&written_tokens)
                    .map_err(|error| format!("tokenizer.ggml.tokens: {error}"))?,
            ),
        };
        Ok(Self {
            mergeable,
            pieces: vocabulary.tokens.to_vec(),
            scores: scores.to_vec(),
            written,
            written_ids,
            bytes,
            unknown,
            adds_space,
        })
    }

    pub(super) fn piece(&self, token: u32) -> Option<&str> {
        self.pieces.get(token as usize).map(String::as_str)
    }

    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        let id = self.mergeable.get(piece).copied();
        id.or_else(|| self.pieces.iter().position(|known| known == piece).map(|id| id as u32))
    }

    /// Token ids of `text`. A space is put before the text and, as llama.cpp does, after each written token.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let mut output = Vec::new();
        let mut position = 0;
        let matches = self.written.iter().flat_map(|written| written.find_iter(text));
        for found in matches {
            self.encode_raw(&text[position..found.start()], &mut output);
            output.push(self.written_ids[found.pattern().as_usize()]);
            position = found.end();
        }
        self.encode_raw(&text[position..], &mut output);
        output
    }

    fn encode_raw(&self, text: &str, output: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let prefix = if self.adds_space { "▁" } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', "▁"));
        Merger::new(self, &text).run(output);
    }

    fn fall_back(&self, text: &str, output: &mut Vec<u32>) {
        match (&self.bytes, self.unknown) {
            (Some(bytes), _) => output.extend(text.bytes().map(|byte| bytes[usize::from(byte)])),
            (None, unknown) => output.extend(unknown),
        }
    }
}

/// A run of text that may become a token; a list linked both ways.
struct Symbol {
    start: usize,
    /// Zero once merged into the one before.
    length: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours that make a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both together; another number means that one of them has changed since.
    length: usize,
}

impl Ord for Pair {
    /// The highest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

struct Merger<'a> {
    model: &'a SentencePiece,
    text: &'a str,
    symbols: Vec<Symbol>,
    pairs: BinaryHeap<Pair>,
}

impl<'a> Merger<'a> {
    fn new(model: &'a SentencePiece, text: &'a str) -> Self {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (index, (start, character)) in text.char_indices().enumerate() {
            let previous = index.checked_sub(1);
            symbols.push(Symbol { start, length: character.len_utf8(), previous, next: Some(index + 1) });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        Self { model, text, symbols, pairs: BinaryHeap::new() }
    }

    fn run(mut self, output: &mut Vec<u32>) {
        for right in 1..self.symbols.len() {
            self.consider(Some(right - 1), Some(right));
        }
        while let Some(pair) = self.pairs.pop() {
            let (left, right) = (&self.symbols[pair.left], &self.symbols[pair.right]);
            if left.length == 0 || right.length == 0 || left.length + right.length != pair.length {
                continue;
            }
            let next = right.next;
            self.symbols[pair.right].length = 0;
            self.symbols[pair.left].length = pair.length;
            self.symbols[pair.left].next = next;
            if let Some(next) = next {
                self.symbols[next].previous = Some(pair.left);
            }
            self.consider(self.symbols[pair.left].previous, Some(pair.left));
            self.consider(Some(pair.left), next);
        }
        let mut position = (!self.symbols.is_empty()).then_some(0);
        while let Some(index) = position {
            let symbol = &self.symbols[index];
            let text = &self.text[symbol.start..][..symbol.length];
            match self.model.mergeable.get(text) {
                Some(&id) => output.push(id),
                None => self.model.fall_back(text, output),
            }
            position = symbol.next;
        }
    }

    fn consider(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let start = self.symbols[left].start;
        let length = self.symbols[left].length + self.symbols[right].length;
        if let Some(&id) = self.model.mergeable.get(&self.text[start..][..length]) {
            self.pairs.push(Pair { score: self.model.scores[id as usize], left, right, length });
        }
    }
}
