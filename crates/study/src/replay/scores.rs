//! The scorers: a number for each page (or key), and the best of them.

use std::ops::Range;

use super::choice::{ANTIDIAGONAL_STRIDE, Choice, Scorer, Tail, representatives, spread};
use super::pages::{Pages, dot};
use super::{Row, TILE, Tile, logits, softmax};

/// What was chosen.
pub struct Kept {
    /// Far keys kept.
    pub keys: Vec<usize>,
    /// Pages dropped, of those that the scorer chooses among; none where it chooses single keys.
    pub dropped: Vec<usize>,
}

impl Tile<'_> {
    /// The far keys that the tokens from `first` on and the query heads `heads` share.
    pub(super) fn choose(&self, choice: &Choice, first: usize, heads: Range<usize>) -> Kept {
        let rows: Vec<Row> = (first..(first + choice.tile).min(self.start + TILE))
            .flat_map(|token| heads.clone().map(move |head| Row { token, head }))
            .collect();
        let scorer = choice.scorer;
        if matches!(scorer, Scorer::OracleKeys | Scorer::FourBit) {
            let scores = self.key_scores(scorer, &rows);
            let best = best(&scores, choice.share);
            return Kept { keys: best.iter().map(|&key| self.far.start + key).collect(), dropped: Vec::new() };
        }
        let pages = choice.pages(self);
        let scores = match scorer {
            Scorer::Antidiagonal => self.antidiagonal(pages, &rows, heads.len()),
            Scorer::OraclePages => self.true_masses(pages, &rows),
            Scorer::Representatives => {
                let every = choice.tile / representatives(choice.tile) * heads.len();
                let chosen: Vec<Row> =
                    rows.chunks(every).flat_map(|rows| rows[rows.len() - heads.len()..].iter().copied()).collect();
                self.true_masses(pages, &chosen)
            }
            _ => self.estimates(scorer, pages, &rows),
        };
        let best = best(&scores, choice.share);
        let mut is_kept = vec![false; scores.len()];
        best.iter().for_each(|&page| is_kept[page] = true);
        Kept {
            keys: best.iter().flat_map(|&page| pages.keys_of(page).iter().copied()).collect(),
            dropped: (0..scores.len()).filter(|&page| !is_kept[page]).collect(),
        }
    }

    /// Mass of each far key, summed over `rows`: the true one, or from rounded keys.
    fn key_scores(&self, scorer: Scorer, rows: &[Row]) -> Vec<f32> {
        let rounded = (scorer == Scorer::FourBit).then(|| self.four_bit_keys());
        let mut scores = vec![0.0; self.far.len()];
        for &row in rows {
            let query = self.head.query(row);
            let mut logits = logits(self.head, &query, self.head.layer.visible(row.token));
            if let Some((mean, keys)) = &rounded {
                let centre = dot(&query, mean);
                for (key, logit) in keys.chunks_exact(query.len()).zip(&mut logits[self.far.clone()]) {
                    *logit = centre + dot(&query, key);
                }
            }
            let weights = softmax(&logits);
            scores.iter_mut().zip(&weights[self.far.clone()]).for_each(|(score, weight)| *score += weight);
        }
        scores
    }

    /// Channel mean of the far keys, and what is left of each key, rounded to 4 bits with one scale for each.
    fn four_bit_keys(&self) -> (Vec<f32>, Vec<f32>) {
        let width = self.head.layer.shape.key_dim;
        let mut mean = vec![0.0; width];
        for key in self.far.clone() {
            mean.iter_mut().zip(self.head.key(key)).for_each(|(mean, value)| *mean += value / self.far.len() as f32);
        }
        let mut rounded = Vec::with_capacity(self.far.len() * width);
        for key in self.far.clone() {
            let rest: Vec<f32> = self.head.key(key).iter().zip(&mean).map(|(value, mean)| value - mean).collect();
            let scale = rest.iter().fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs())) / 7.0;
            rounded.extend(rest.iter().map(|value| (value / scale).round() * scale));
        }
        (mean, rounded)
    }

    /// True mass of each far page, summed over `rows`.
    fn true_masses(&self, pages: &Pages, rows: &[Row]) -> Vec<f32> {
        let mut scores = vec![0.0; self.far_pages(pages)];
        for &row in rows {
            let weights = softmax(&logits(self.head, &self.head.query(row), self.head.layer.visible(row.token)));
            for (page, score) in scores.iter_mut().enumerate() {
                *score += pages.keys_of(page).iter().map(|&key| weights[key]).sum::<f32>();
            }
        }
        scores
    }

    /// What the scorer makes of the summaries of each far page, over `rows`.
    fn estimates(&self, scorer: Scorer, pages: &Pages, rows: &[Row]) -> Vec<f32> {
        let count = self.far_pages(pages);
        let mut scores = vec![0.0; count];
        for &row in rows {
            let query = self.head.query(row);
            let visible = self.head.layer.visible(row.token);
            let near: Vec<f32> = self.always_kept(visible).map(|key| dot(&query, self.head.key(key))).collect();
            let log_mass = |page: usize| {
                let page = &pages.pages[page];
                match scorer {
                    Scorer::MinMax => {
                        let bound = query.iter().zip(page.least.iter().zip(&page.most));
                        bound.map(|(query, (least, most))| (query * least).max(query * most)).sum()
                    }
                    Scorer::SecondOrder | Scorer::SecondOrderError => {
                        Tail::SecondOrder.log_mass(page, pages.size, &query).unwrap_or_default()
                    }
                    _ => Tail::FirstOrder.log_mass(page, pages.size, &query).unwrap_or_default(),
                }
            };
            let all: Vec<f32> = (0..count).map(log_mass).chain(near).collect();
            for ((page, score), mass) in scores.iter_mut().enumerate().zip(softmax(&all)) {
                *score += match scorer {
                    // Keys scatter around the centroid: what the estimate misses grows with the spread of their
                    // logits, and averages out within the page. Errors of rows add as squares.
                    Scorer::SecondOrderError => mass * mass * spread(&pages.pages[page], &query) / pages.size as f32,
                    _ => mass,
                };
            }
        }
        scores
    }

    /// Mass of each far block as sums along antidiagonals tell it: groups of rows against groups of keys.
    fn antidiagonal(&self, blocks: &Pages, rows: &[Row], heads: usize) -> Vec<f32> {
        let count = self.far_pages(blocks);
        let mut scores = vec![0.0; count];
        for head in 0..heads {
            let queries: Vec<Vec<f32>> =
                rows.iter().skip(head).step_by(heads).map(|&row| self.head.query(row)).collect();
            for group in queries.chunks(ANTIDIAGONAL_STRIDE) {
                let sum = |keys: &[usize]| {
                    let pairs = group.iter().zip(keys.iter().rev());
                    pairs.map(|(query, &key)| dot(query, self.head.key(key))).sum::<f32>() / group.len() as f32
                };
                let logits: Vec<f32> =
                    (0..count).flat_map(|block| blocks.keys_of(block).chunks(ANTIDIAGONAL_STRIDE).map(sum)).collect();
                for (index, weight) in softmax(&logits).into_iter().enumerate() {
                    scores[index / (blocks.size / ANTIDIAGONAL_STRIDE)] += weight;
                }
            }
        }
        scores
    }
}

/// Indices of the best `share` of `scores`, at least one where the share is above 0; of equals the first.
fn best(scores: &[f32], share: f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate((share * scores.len() as f64).ceil() as usize);
    order
}
