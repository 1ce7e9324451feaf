//! Keys in pages, and what is kept about a page.

use std::ops::Range;

use super::Head;

/// The far keys of a head in pages of equal size.
pub struct Pages {
    /// Keys of a page.
    pub size: usize,
    /// Index of each key: page by page.
    pub keys: Vec<usize>,
    pub pages: Vec<Page>,
}

/// What is kept about a page.
pub struct Page {
    /// Mean of the keys. `[key_dim]`
    pub centroid: Vec<f32>,
    /// Variance of the keys, channel by channel. `[key_dim]`
    pub variance: Vec<f32>,
    /// Smallest and largest of each channel of the keys. `[key_dim]`
    pub least: Vec<f32>,
    pub most: Vec<f32>,
    /// Mean of the values. `[value_dim]`
    pub value_mean: Vec<f32>,
}

impl Pages {
    /// Pages of `size` neighbours, or of keys that lie close together among each `segment` keys. Keys at the end of
    /// `range` that fill no page are left out.
    pub fn new(head: &Head<'_>, range: Range<usize>, size: usize, segment: Option<usize>) -> Self {
        let mut keys: Vec<usize> = range.collect();
        keys.truncate(keys.len() / size * size);
        if let Some(segment) = segment {
            keys.chunks_mut(segment).for_each(|keys| bisect(head, keys, size));
        }
        let pages = keys.chunks_exact(size).map(|keys| Page::new(head, keys)).collect();
        Self { size, keys, pages }
    }

    /// Keys of page `page`.
    pub fn keys_of(&self, page: usize) -> &[usize] {
        &self.keys[page * self.size..(page + 1) * self.size]
    }

    /// Pages whose keys all lie before `end`, which must be a boundary of segments: the first ones.
    pub fn before(&self, start: usize, end: usize) -> usize {
        end.saturating_sub(start).min(self.keys.len()) / self.size
    }
}

impl Page {
    fn new(head: &Head<'_>, keys: &[usize]) -> Self {
        let count = keys.len() as f32;
        let centroid = mean(keys.iter().map(|&key| head.key(key)));
        let mut variance = vec![0.0; centroid.len()];
        let (mut least, mut most) = (vec![f32::INFINITY; centroid.len()], vec![f32::NEG_INFINITY; centroid.len()]);
        for &key in keys {
            for (channel, &value) in head.key(key).iter().enumerate() {
                variance[channel] += (value - centroid[channel]).powi(2) / count;
                least[channel] = least[channel].min(value);
                most[channel] = most[channel].max(value);
            }
        }
        Self { centroid, variance, least, most, value_mean: mean(keys.iter().map(|&key| head.value(key))) }
    }
}

/// Mean of rows of one width.
fn mean<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>) -> Vec<f32> {
    let count = rows.len() as f32;
    let mut mean = Vec::new();
    for row in rows {
        mean.resize(row.len(), 0.0);
        mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += value / count);
    }
    mean
}

/// Orders `keys` so that each run of `size` lies close together: halves them again and again across the direction in
/// which they vary most.
fn bisect(head: &Head<'_>, keys: &mut [usize], size: usize) {
    if keys.len() <= size {
        return;
    }
    let centre = mean(keys.iter().map(|&key| head.key(key)));
    let offset = |key: usize| head.key(key).iter().zip(&centre).map(|(a, b)| a - b).collect::<Vec<f32>>();
    let offsets: Vec<Vec<f32>> = keys.iter().map(|&key| offset(key)).collect();
    let length = |row: &Vec<f32>| dot(row, row);
    let mut direction = offsets.iter().max_by(|a, b| length(a).total_cmp(&length(b))).cloned().unwrap_or_default();
    // Power iteration on the covariance, from the offset that is longest.
    for _ in 0..4 {
        let mut next = vec![0.0; direction.len()];
        for row in &offsets {
            let along = dot(row, &direction);
            next.iter_mut().zip(row).for_each(|(next, value)| *next += along * value);
        }
        let norm = dot(&next, &next).sqrt().max(f32::MIN_POSITIVE);
        direction = next.into_iter().map(|value| value / norm).collect();
    }
    let mut order: Vec<(f32, usize)> =
        offsets.iter().zip(keys.iter()).map(|(row, &key)| (dot(row, &direction), key)).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    keys.iter_mut().zip(order).for_each(|(key, (_, ordered))| *key = ordered);
    let half = (keys.len() / size).div_ceil(2) * size;
    let (low, high) = keys.split_at_mut(half);
    bisect(head, low, size);
    bisect(head, high, size);
}

/// `Σ a·b`, with independent sums so that the processor need not wait for each.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}
