//! Where the results of a call go: a caller's array, in its own number type.

use std::ops::Range;

use crate::strided::FromF32;

/// The output of a call, or of some of its tokens. Row head `h` (a head of an entry of the batch, entry by entry) of a
/// token is head `h % heads` of entry `h / heads`.
pub(crate) struct Output<'a, T> {
    /// `[entries, all tokens, heads, value_dim]`
    numbers: &'a mut [T],
    shape: [usize; 4],
    /// The tokens of these that are meant.
    tokens: Range<usize>,
    /// One more logit of each head, without a value.
    sinks: Option<&'a [f32]>,
    /// `[tokens, heads]`, of a single entry.
    log_sum_exp: Option<&'a mut [f32]>,
}

/// The output of one token and the query heads that read one key/value head.
pub(crate) struct OutputRows<'a, T> {
    pub token: usize,
    /// Key/value head, counted as row heads are.
    pub kv_head: usize,
    /// `[group, value_dim]`
    numbers: &'a mut [T],
    /// `[group]`
    log_sum_exp: Option<&'a mut [f32]>,
    /// `[group]`
    sinks: Option<&'a [f32]>,
}

impl<'a, T: FromF32> Output<'a, T> {
    /// All of `numbers`, `[entries, tokens, heads, value_dim]`.
    pub fn new(numbers: &'a mut [T], shape: [usize; 4], sinks: Option<&'a [f32]>) -> Self {
        assert_eq!(numbers.len(), shape.iter().product::<usize>(), "an output of shape {shape:?}");
        Self { numbers, shape, tokens: 0..shape[1], sinks, log_sum_exp: None }
    }

    /// With a place for log-sum-exps, `[tokens, heads]`, of a batch of one.
    pub fn with_log_sum_exp(self, log_sum_exp: Option<&'a mut [f32]>) -> Self {
        debug_assert!(log_sum_exp.is_none() || self.shape[0] == 1);
        Self { log_sum_exp, ..self }
    }

    /// Some of the tokens.
    pub fn part(&mut self, tokens: Range<usize>) -> Output<'_, T> {
        let heads = self.shape[2];
        let log_sum_exp = self.log_sum_exp.as_deref_mut();
        Output {
            log_sum_exp: log_sum_exp.map(|numbers| &mut numbers[tokens.start * heads..tokens.end * heads]),
            tokens: self.tokens.start + tokens.start..self.tokens.start + tokens.end,
            numbers: &mut *self.numbers,
            ..*self
        }
    }

    /// Its rows, those of `group` heads together.
    pub fn into_rows(self, group: usize) -> impl Iterator<Item = OutputRows<'a, T>> {
        let [_, all_tokens, heads, value_dim] = self.shape;
        debug_assert!(heads.is_multiple_of(group), "{heads} heads of an entry in groups of {group}");
        let kv_heads = heads / group;
        let Self { numbers, tokens, sinks, log_sum_exp, .. } = self;
        let mut log_sum_exp = log_sum_exp.map(|numbers| numbers.chunks_exact_mut(group));
        let token_numbers = heads * value_dim;
        let entries = numbers.chunks_exact_mut((all_tokens * token_numbers).max(1)).enumerate();
        let rows = entries.flat_map(move |(entry, numbers)| {
            let numbers = &mut numbers[tokens.start * token_numbers..tokens.end * token_numbers];
            let groups = numbers.chunks_exact_mut(group * value_dim).enumerate();
            groups.map(move |(index, numbers)| (entry, index / kv_heads, index % kv_heads, numbers))
        });
        rows.map(move |(entry, token, kv_head, numbers)| OutputRows {
            token,
            kv_head: entry * kv_heads + kv_head,
            numbers,
            log_sum_exp: log_sum_exp.as_mut().and_then(Iterator::next),
            sinks: sinks.map(|sinks| &sinks[kv_head * group..(kv_head + 1) * group]),
        })
    }
}

impl<T: FromF32> OutputRows<'_, T> {
    /// Writes the row of head `head` of the group, `[value_dim]`, whose log-sum-exp `log_sum_exp` gives where it is
    /// needed.
    pub fn write(&mut self, head: usize, row: &mut [f32], log_sum_exp: impl FnOnce() -> f32) {
        if self.sinks.is_some() || self.log_sum_exp.is_some() {
            let log_sum_exp = log_sum_exp();
            if let Some(target) = &mut self.log_sum_exp {
                target[head] = log_sum_exp;
            }
            // A row that sees nothing gives all its mass to the sink, and is zero already.
            if let (Some(sinks), true) = (self.sinks, log_sum_exp != f32::NEG_INFINITY) {
                let share = 1.0 / (1.0 + (sinks[head] - log_sum_exp).exp());
                row.iter_mut().for_each(|value| *value *= share);
            }
        }
        T::convert(row, &mut self.numbers[head * row.len()..(head + 1) * row.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_where_the_array_has_them() {
        // [entries 2, tokens 3, heads 4, value_dim 1], read by two key/value heads.
        let mut numbers = [0.0_f32; 24];
        let mut output = Output::new(&mut numbers, [2, 3, 4, 1], None);
        for mut rows in output.part(1..3).into_rows(2) {
            for head in 0..2 {
                let (token, row_head) = (rows.token, rows.kv_head * 2 + head);
                rows.write(head, &mut [(10 * token + row_head) as f32], || unreachable!("nobody asked"));
            }
        }
        let expected = |first: f32| [0.0, 0.0, 0.0, 0.0].into_iter().chain((0..4).map(move |head| first + head as f32));
        let later = |first: f32| (0..4).map(move |head| 10.0 + first + head as f32);
        let expected: Vec<f32> = [0.0, 4.0].iter().flat_map(|&first| expected(first).chain(later(first))).collect();
        assert_eq!(numbers[..], expected[..]);
    }

    #[test]
    fn a_sink_takes_its_share_and_log_sum_exps_are_kept() {
        let (mut numbers, mut log_sum_exp) = ([0.0_f32; 4], [0.0; 4]);
        let sinks = [0.0, f32::NEG_INFINITY];
        let mut output = Output::new(&mut numbers, [1, 2, 2, 1], Some(&sinks)).with_log_sum_exp(Some(&mut log_sum_exp));
        for mut rows in output.part(1..2).into_rows(1) {
            let head = rows.kv_head as f32;
            rows.write(0, &mut [8.0], || 3.0_f32.ln() * (1.0 - head));
        }
        assert_eq!(log_sum_exp, [0.0, 0.0, 3.0_f32.ln(), 0.0]);
        assert!((numbers[2] - 6.0).abs() < 1e-5 && numbers[3] == 8.0 && numbers[..2] == [0.0; 2], "{numbers:?}");
    }
}
