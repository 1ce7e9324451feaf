//! Looking at what attention is given, from outside.

use std::ops::ControlFlow;

/// What a layer's attention is given in a pass: queries and keys after norms and rotation, before the cache rounds them
/// and before the factor on the logits.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs<'a> {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Position of the pass's first token.
    pub first_position: usize,
    /// `[tokens, query_heads, head_dim]`; those of all tokens, also where only the last ones attend.
    pub queries: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub keys: &'a [f32],
    /// `[tokens, kv_heads, head_dim]`
    pub values: &'a [f32],
}

/// Is shown the inputs of attention, layer by layer and pass by pass: for dumps and studies. A decoder without an
/// observer does nothing for it.
pub trait AttentionObserver: Send {
    /// Told before a layer attends; the pass ends as if it were cancelled when it breaks.
    fn observe(&mut self, inputs: AttentionInputs<'_>) -> ControlFlow<()>;
}
