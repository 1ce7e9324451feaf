//! How the queries of a key/value head tell keys apart: what keys differ in and no query looks at need not be told apart.

use iceformer_kernels::rows::{ROW_MULTIPLE, Rows, add_scaled, dot_rows};

use super::clustering::squared_norm;
use crate::tiles::Call;

/// Tokens of a call whose queries are looked at.
const TOKENS: usize = 64;
/// Tokens that count as many as the guess that is made before any was seen: that queries look at all channels alike.
const GUESSED_TOKENS: f32 = 16.0;

/// Second moments of queries: those of each head of the group in relation to its own norm, so that a sharp head counts no
/// more than a diffuse one. Where two keys differ by `δ` the mean square of what their logits differ by is in proportion to
/// `δᵀ M δ`.
#[derive(Default)]
pub(super) struct QueryMetric {
    /// `[width][width]`, of trace 1; empty before any query was seen.
    moments: Vec<f32>,
    width: usize,
    /// Tokens that the moments stand for.
    tokens: f32,
}

impl QueryMetric {
    /// Takes in the queries of `call` to key/value head `kv_head`: of tokens spread over it. Later ones count as much as
    /// all before.
    pub fn learn(&mut self, call: &Call<'_>, kv_head: usize) {
        let (group, width) = (call.group(), call.cache.shape().key_dim.next_multiple_of(ROW_MULTIPLE));
        let count = TOKENS.min(call.tokens());
        let (mut query, mut padded) = (Vec::new(), vec![0.0; width]);
        let mut learnt = vec![0.0; width * width];
        for head in kv_head * group..(kv_head + 1) * group {
            let mut moments = vec![0.0; width * width];
            let mut norms = 0.0;
            for index in 0..count {
                let query = call.query(head, index * call.tokens() / count, &mut query);
                padded[..query.len()].copy_from_slice(query);
                norms += squared_norm(&padded);
                for (row, value) in moments.chunks_exact_mut(width).zip(&padded) {
                    add_scaled(row, *value, &padded);
                }
            }
            // Queries that are zero, or no numbers, tell nothing.
            let share = 1.0 / (norms * group as f32);
            if !(share > 0.0 && share.is_normal()) {
                return;
            }
            add_scaled(&mut learnt, share, &moments);
        }
        if !learnt.iter().all(|value| value.is_finite()) {
            return;
        }
        if self.moments.is_empty() {
            (self.moments, self.width, self.tokens) = (vec![0.0; width * width], width, GUESSED_TOKENS);
            self.moments.iter_mut().step_by(width + 1).for_each(|value| *value = 1.0 / width as f32);
        }
        let share = count as f32 / (self.tokens + count as f32);
        self.moments.iter_mut().for_each(|value| *value *= 1.0 - share);
        add_scaled(&mut self.moments, share, &learnt);
        self.tokens = (self.tokens + count as f32).min(TOKENS as f32);
    }

    /// Replaces `direction`, along which keys differ, by that in which queries see it: `M · direction`.
    pub fn apply(&self, direction: &mut Vec<f32>, buffer: &mut Vec<f32>) {
        if self.moments.is_empty() {
            return;
        }
        buffer.resize(self.width, 0.0);
        dot_rows(direction, Rows::F32(&self.moments), buffer);
        std::mem::swap(direction, buffer);
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.moments)
    }
}
