//! What a choice is made of, and the choices that a study compares.

use super::pages::{Page, Pages, dot};
use super::{BLOCK_KEYS, LARGE_PAGE_KEYS, PAGE_KEYS, Tile};

/// Who tells which keys matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scorer {
    /// The true mass of each key: no method has it.
    OracleKeys,
    /// The true mass of pages of keys that lie close together.
    OraclePages,
    /// Sums along every 16th antidiagonal of blocks of 128 × 128, XAttention (Xu et al. 2025, arXiv 2503.16428).
    Antidiagonal,
    /// Mean of the keys of a page of 16 neighbours.
    PageMean,
    /// Mean of the keys of a page of 16 that lie close together.
    Centroid,
    /// Largest logit that the least and most of each channel allow, pages of 16 neighbours: Quest (Tang et al. 2024,
    /// arXiv 2406.10774).
    MinMax,
    /// True mass of pages of 16 neighbours for every 16th row of a tile.
    Representatives,
    /// Logits of all keys, rounded to 4 bits less their channel mean.
    FourBit,
    /// Mass of a page of close keys from its centroid and channel variances.
    SecondOrder,
    /// Pages by the error that their estimate is likely to make, from the same.
    SecondOrderError,
}

impl Scorer {
    /// Every scorer.
    pub const ALL: [Self; 10] = [
        Self::OracleKeys,
        Self::OraclePages,
        Self::Antidiagonal,
        Self::PageMean,
        Self::Centroid,
        Self::MinMax,
        Self::Representatives,
        Self::FourBit,
        Self::SecondOrder,
        Self::SecondOrderError,
    ];

    /// Name as tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OracleKeys => "oracle-keys",
            Self::OraclePages => "oracle-pages",
            Self::Antidiagonal => "antidiagonal",
            Self::PageMean => "page-mean",
            Self::Centroid => "centroid",
            Self::MinMax => "min-max",
            Self::Representatives => "representatives",
            Self::FourBit => "four-bit",
            Self::SecondOrder => "second-order",
            Self::SecondOrderError => "second-order-error",
        }
    }

    /// Multiply-adds of choosing for each (query, far key), with keys of `key_dim`, pages of `page` keys and choices
    /// shared by `tile` tokens.
    fn operations(self, key_dim: f64, page: usize, tile: usize) -> f64 {
        let page = page as f64;
        match self {
            Self::OracleKeys | Self::OraclePages | Self::FourBit => key_dim,
            Self::Antidiagonal => key_dim / ANTIDIAGONAL_STRIDE as f64,
            Self::PageMean | Self::Centroid => key_dim / page,
            Self::MinMax | Self::SecondOrder | Self::SecondOrderError => 2.0 * key_dim / page,
            Self::Representatives => key_dim * representatives(tile) as f64 / tile as f64,
        }
    }
}

/// Every so manyth antidiagonal is summed.
pub(super) const ANTIDIAGONAL_STRIDE: usize = 16;
const _: () = assert!(BLOCK_KEYS.is_multiple_of(ANTIDIAGONAL_STRIDE));

/// Rows of a tile that stand for all.
pub(super) fn representatives(tile: usize) -> usize {
    tile.div_ceil(16)
}

/// What is added for the pages that were dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Nothing.
    None,
    /// The value mean, with the mass `size · exp(q·c)`.
    FirstOrder,
    /// The value mean, with the mass `size · exp(q·c + ½ Σ qᵢ²sᵢ)`.
    SecondOrder,
}

/// Largest `Σ qᵢ²sᵢ` that is believed: the mean of `exp` over a page of 16 is then well known from its variance.
pub(super) const MOST_SPREAD: f32 = 12.0;

impl Tail {
    /// Name as tables show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FirstOrder => "first order",
            Self::SecondOrder => "second order",
        }
    }

    /// Logarithm of the estimated mass of a page, in nats; `None` where nothing is added.
    pub(super) fn log_mass(self, page: &Page, size: usize, query: &[f32]) -> Option<f32> {
        let first = || (size as f32).ln() + dot(query, &page.centroid);
        match self {
            Self::None => None,
            Self::FirstOrder => Some(first()),
            Self::SecondOrder => Some(first() + 0.5 * spread(page, query)),
        }
    }
}

/// Variance of the logits of a page, `Σ qᵢ²sᵢ`, in nats², at most [`MOST_SPREAD`].
pub(super) fn spread(page: &Page, query: &[f32]) -> f32 {
    let sum: f32 = query.iter().zip(&page.variance).map(|(query, variance)| query * query * variance).sum();
    sum.min(MOST_SPREAD)
}

/// One way to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Who tells which keys matter.
    pub scorer: Scorer,
    /// Share of the far keys that is kept.
    pub share: f64,
    /// Keys of a page of close keys, [`PAGE_KEYS`] or [`LARGE_PAGE_KEYS`]; scorers of other pages have their own.
    pub page: usize,
    /// Consecutive tokens that share their keys, at most [`TILE`](super::TILE).
    pub tile: usize,
    /// Whether the query heads of a key/value head share their keys.
    pub shares_group: bool,
    /// What is added for the pages dropped.
    pub tail: Tail,
    /// Every so manyth row is also computed exactly, and its error taken off the rows behind it.
    pub delta: Option<usize>,
}

impl Choice {
    /// The pages that are chosen among; scorers of single keys have them for nothing but their name.
    pub(super) fn pages<'a>(&self, tile: &Tile<'a>) -> &'a Pages {
        match self.scorer {
            Scorer::Antidiagonal => tile.blocks,
            Scorer::PageMean | Scorer::MinMax | Scorer::Representatives => tile.neighbours,
            _ if self.page == LARGE_PAGE_KEYS => tile.large_clusters,
            _ => tile.clusters,
        }
    }

    /// Keys that are kept or left out together.
    pub fn page_keys(&self) -> usize {
        match self.scorer {
            Scorer::OracleKeys | Scorer::FourBit => 1,
            Scorer::Antidiagonal => BLOCK_KEYS,
            Scorer::PageMean | Scorer::MinMax | Scorer::Representatives => PAGE_KEYS,
            _ => self.page,
        }
    }

    /// Multiply-adds of choosing for each (query, far key), with keys of `key_dim`.
    pub(super) fn operations(&self, key_dim: f64) -> f64 {
        self.scorer.operations(key_dim, self.page_keys(), self.tile)
    }
}

/// The choices that a study compares when each keeps `share` of the far keys: scorers, tails, tiles, group sharing and
/// delta rows, one varied at a time; and what estimates alone do, keeping no far key. Scorers that need rows of a tile
/// have a tile.
pub fn standard_choices(share: f64) -> Vec<Choice> {
    let plain =
        |scorer| Choice { scorer, share, page: PAGE_KEYS, tile: 1, shares_group: false, tail: Tail::None, delta: None };
    let mut choices: Vec<Choice> = Scorer::ALL.map(plain).into();
    for choice in &mut choices {
        if matches!(choice.scorer, Scorer::Antidiagonal | Scorer::Representatives) {
            choice.tile = 128;
        }
    }
    for tail in [Tail::FirstOrder, Tail::SecondOrder] {
        choices.push(Choice { tail, ..plain(Scorer::PageMean) });
        choices.push(Choice { tail, ..plain(Scorer::Centroid) });
    }
    let chosen = Choice { tail: Tail::SecondOrder, ..plain(Scorer::SecondOrderError) };
    choices.push(Choice { tail: Tail::SecondOrder, ..plain(Scorer::SecondOrder) });
    choices.push(chosen);
    choices.push(Choice { shares_group: true, ..chosen });
    for tile in [6, 16, 64, 128] {
        choices.push(Choice { tile, shares_group: true, ..chosen });
    }
    let large = Choice { page: LARGE_PAGE_KEYS, ..chosen };
    choices.push(large);
    choices.push(Choice { tile: 6, shares_group: true, ..large });
    choices.push(Choice { share: 0.0, ..large });
    choices.push(Choice { tile: 128, shares_group: true, tail: Tail::None, ..chosen });
    choices.push(Choice { tile: 128, shares_group: true, delta: Some(64), tail: Tail::None, ..chosen });
    choices.push(Choice { tile: 128, shares_group: true, delta: Some(64), ..chosen });
    let representatives = Choice { tile: 128, shares_group: true, ..plain(Scorer::Representatives) };
    choices.push(representatives);
    choices.push(Choice { tail: Tail::SecondOrder, ..representatives });
    for tail in [Tail::None, Tail::FirstOrder, Tail::SecondOrder] {
        choices.push(Choice { share: 0.0, tail, ..chosen });
    }
    choices
}
