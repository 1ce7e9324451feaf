//! Writes GGUF files byte by byte, wrong ones too.
#![allow(dead_code, missing_docs)]

/// A value of the metadata; `Raw` is a type number and the bytes behind it.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(&'static str),
    Strings(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Raw(u32, Vec<u8>),
}

/// A tensor's entry in the header.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub dimensions: Vec<u64>,
    pub kind: u32,
    pub offset: u64,
}

/// A GGUF file to be written.
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub value_count: Option<u64>,
    pub values: Vec<(String, Value)>,
    pub tensors: Vec<Entry>,
    pub alignment: usize,
    pub data_bytes: usize,
}

pub fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text);
    bytes
}

impl Gguf {
    /// A model of one layer that opens.
    pub fn tiny() -> Self {
        let tokens: Vec<String> = ["<s>", "</s>", "a", "b", "ab", "Ġ", "Ċ", "<unk>"].map(String::from).to_vec();
        let values = [
            ("general.architecture", Value::String("llama")),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", Value::U32(8)),
            ("llama.block_count", Value::U32(1)),
            ("llama.feed_forward_length", Value::U32(16)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.attention.head_count_kv", Value::U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.model", Value::String("gpt2")),
            ("tokenizer.ggml.pre", Value::String("llama-bpe")),
            ("tokenizer.ggml.tokens", Value::Strings(tokens)),
            ("tokenizer.ggml.token_type", Value::I32s(vec![3, 3, 1, 1, 1, 1, 4, 2])),
            ("tokenizer.ggml.merges", Value::Strings(vec!["a b".into()])),
            ("tokenizer.ggml.bos_token_id", Value::U32(0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(1)),
        ];
        let shapes: [(&str, &[u64]); 11] = [
            ("token_embd", &[8, 8]),
            ("output_norm", &[8]),
            ("blk.0.attn_norm", &[8]),
            ("blk.0.ffn_norm", &[8]),
            ("blk.0.attn_q", &[8, 8]),
            ("blk.0.attn_k", &[8, 4]),
            ("blk.0.attn_v", &[8, 4]),
            ("blk.0.attn_output", &[8, 8]),
            ("blk.0.ffn_gate", &[8, 16]),
            ("blk.0.ffn_up", &[8, 16]),
            ("blk.0.ffn_down", &[16, 8]),
        ];
        let mut tensors = Vec::new();
        let mut offset = 0;
        for (name, dimensions) in shapes {
            tensors.push(Entry { name: format!("{name}.weight"), dimensions: dimensions.to_vec(), kind: 0, offset });
            offset += dimensions.iter().product::<u64>() * 4;
        }
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            value_count: None,
            values: values.map(|(key, value)| (key.to_owned(), value)).to_vec(),
            tensors,
            alignment: 32,
            data_bytes: offset as usize,
        }
    }

    /// Puts a value in place of that of the same key.
    pub fn set(&mut self, key: &str, value: Value) {
        self.remove(key);
        self.values.push((key.into(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.values.retain(|(known, _)| known != key);
    }

    pub fn tensor(&mut self, name: &str) -> &mut Entry {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn header(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        bytes.extend(self.value_count.unwrap_or(self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            bytes.extend(string(key.as_bytes()));
            let (kind, content) = match value {
                Value::U32(value) => (4, value.to_le_bytes().to_vec()),
                Value::F32(value) => (6, value.to_le_bytes().to_vec()),
                Value::Bool(value) => (7, vec![u8::from(*value)]),
                Value::String(text) => (8, string(text.as_bytes())),
                Value::Strings(strings) => {
                    (9, array(8, strings.len(), strings.iter().flat_map(|text| string(text.as_bytes()))))
                }
                Value::I32s(numbers) => (9, array(5, numbers.len(), numbers.iter().flat_map(|n| n.to_le_bytes()))),
                Value::F32s(numbers) => (9, array(6, numbers.len(), numbers.iter().flat_map(|n| n.to_le_bytes()))),
                Value::Raw(kind, content) => (*kind, content.clone()),
            };
            bytes.extend(u32::to_le_bytes(kind));
            bytes.extend(content);
        }
        for tensor in &self.tensors {
            bytes.extend(string(tensor.name.as_bytes()));
            bytes.extend((tensor.dimensions.len() as u32).to_le_bytes());
            bytes.extend(tensor.dimensions.iter().flat_map(|length| length.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        bytes
    }

    pub fn write(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend((0..self.data_bytes / 4).flat_map(|index| (index as f32).to_le_bytes()));
        bytes
    }
}

/// An array's element type, count and elements.
pub fn array(kind: u32, count: usize, elements: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend((count as u64).to_le_bytes());
    bytes.extend(elements);
    bytes
}
