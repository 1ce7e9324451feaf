//! The key/value cache of one layer and one sequence.

use crate::ThreadTeam;

/// Element type of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyValueType {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// 8-bit integers with one scale per key and head; keys are centred on their channel mean.
    Int8,
}

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a key (and a query).
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

/// Keys and values of one layer and one sequence, appended in place.
pub struct KeyValueCache {
    shape: CacheShape,
    kind: KeyValueType,
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl KeyValueCache {
    /// An empty cache.
    pub fn new(shape: CacheShape, kind: KeyValueType) -> Self {
        Self { shape, kind, keys: Vec::new(), values: Vec::new() }
    }

    /// Appends `keys` `[tokens, kv_heads, key_dim]` and `values` `[tokens, kv_heads, value_dim]`.
    pub fn append(&mut self, keys: &[f32], values: &[f32], _team: &ThreadTeam) {
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.keys.len() / (self.shape.kv_heads * self.shape.key_dim)
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops all tokens from `len` on; nothing happens when fewer are held.
    pub fn truncate(&mut self, len: usize) {
        self.keys.truncate(len * self.shape.kv_heads * self.shape.key_dim);
        self.values.truncate(len * self.shape.kv_heads * self.shape.value_dim);
    }

    /// Bytes held for keys and values.
    pub fn bytes(&self) -> usize {
        (self.keys.len() + self.values.len()) * 4
    }

    /// Shape given at creation.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Element type given at creation.
    pub fn kind(&self) -> KeyValueType {
        self.kind
    }
}
