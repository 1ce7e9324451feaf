//! Which keys a query may see.

use std::ops::Range;

/// Which keys a query may see. The conditions add up; the default lets every query see every key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query at position `p` sees keys at positions up to `p` only.
    pub causal: bool,
    /// Query at position `p` sees keys at positions above `p − window` only (and below `p + window` when not causal).
    pub window: Option<usize>,
    /// Keys that are no padding; `None`: all. Left padding is `padding..len`, right padding `0..used`. What stands there does
    /// not count, but it has to be numbers: a NaN or an infinity may show in rows that do not see it, as a weight of zero
    /// times either is no number.
    pub keys: Option<Range<usize>>,
}

impl Mask {
    /// Causal, without window or padding.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Keys among `keys` that a query at `position` sees.
    pub fn visible(&self, position: usize, keys: usize) -> Range<usize> {
        let allowed = self.keys.clone().unwrap_or(0..keys);
        let (mut start, mut end) = (allowed.start, allowed.end.min(keys));
        if self.causal {
            end = end.min(position.saturating_add(1));
        }
        if let Some(window) = self.window {
            start = start.max(position.saturating_add(1).saturating_sub(window));
            end = end.min(position.saturating_add(window));
        }
        start..end.max(start)
    }
}
