//! Queries, keys and values of one layer.

/// Shape of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Queries.
    pub query_tokens: usize,
    /// Keys and values.
    pub key_tokens: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of queries and keys.
    pub key_dim: usize,
    /// Width of values.
    pub value_dim: usize,
}

/// Queries, keys and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// `[query_tokens, query_heads, key_dim]`
    pub queries: Vec<f32>,
    /// `[key_tokens, kv_heads, key_dim]`
    pub keys: Vec<f32>,
    /// `[key_tokens, kv_heads, value_dim]`
    pub values: Vec<f32>,
}
