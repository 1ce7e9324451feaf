//! Consecutive keys of a head in clusters: an order in which keys that are alike lie together.

use std::ops::Range;

use iceformer_kernels::attention::{
    ClusterSummaries, KeyBlock, KeyMoments, MAX_BLOCK_KEYS, PAGE_KEYS, PANEL_CLUSTERS, read_keys, read_values,
    value_moments,
};
use iceformer_kernels::rows::ROW_MULTIPLE;

use super::clustering::{BisectionScratch, bisect, weighted_squared_norm};
use super::cross_covariance::CrossMoments;
use super::merging::LARGEST_KEPT;
use super::metric::QueryMetric;
use super::summaries::Summaries;
use crate::segment::{SEGMENT_KEYS, Segment};
use crate::{CacheShape, KeyValueCache};

/// Keys of the smallest region.
pub(super) const REGION_KEYS: usize = 1024;
/// Keys at the start that are in no region: attention sinks are unlike all others and would spoil a cluster.
pub(super) const FIRST_KEYS: usize = 64;
/// Keys of a cluster: whole pages.
pub(super) const CLUSTER_KEYS: usize = 64;
/// Clusters of a segment.
pub(super) const SEGMENT_CLUSTERS: usize = SEGMENT_KEYS / CLUSTER_KEYS;

const _: () = assert!((REGION_KEYS / CLUSTER_KEYS).is_multiple_of(PANEL_CLUSTERS));
const _: () = assert!(REGION_KEYS.is_multiple_of(SEGMENT_KEYS) && CLUSTER_KEYS.is_multiple_of(PAGE_KEYS));
// All regions begin at the same slot of a segment.
const _: () = assert!(FIRST_KEYS.is_multiple_of(CLUSTER_KEYS));
// Neighbouring clusters of a segment are computed as one block.
const _: () = assert!(SEGMENT_KEYS <= MAX_BLOCK_KEYS);

/// Consecutive keys in clusters.
pub(super) struct Region {
    /// Position of the first key.
    first: usize,
    len: usize,
    /// The keys and values, cluster after cluster, until they lie so in the cache itself.
    sorted: Option<SortedKeys>,
    summaries: Summaries,
    /// Sum of the values, channel by channel.
    pub value_sum: Vec<f64>,
    /// Sum of the squares of the values' norms.
    pub value_squares: f64,
    /// Variance of keys within clusters, channel by channel, the mean over the clusters.
    pub mean_variance: Vec<f32>,
    /// The same of this region or of one before it, whichever is largest.
    largest_variance: Vec<f32>,
    /// How values go with keys within clusters, until it was taken.
    cross_moments: CrossMoments,
}

/// Keys and values of a head, cluster after cluster, on their way into the cache.
pub(crate) struct SortedKeys {
    /// Their positions.
    pub keys: Range<usize>,
    /// Segments as the cache has them from the one with the first key on.
    pub segments: Vec<Segment>,
    /// Slot of the cache that each key belongs in.
    pub places: Vec<u32>,
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct RegionScratch {
    /// `[keys][width]`
    keys: Vec<f32>,
    /// Rows of the keys at the slots of a region.
    rows: Vec<u32>,
    order: Vec<u32>,
    bisection: BisectionScratch,
    /// Those of a cluster. `[CLUSTER_KEYS][value_dim]`
    values: Vec<f32>,
}

impl RegionScratch {
    /// Reads `keys` of head `head`, less their mean, in the order of their positions, wherever they lie among themselves.
    fn read_keys(&mut self, cache: &KeyValueCache, head: usize, keys: Range<usize>, width: usize) {
        self.keys.clear();
        self.keys.resize(keys.len() * width, 0.0);
        self.rows.resize(keys.len(), 0);
        for (row, key) in keys.clone().enumerate() {
            self.rows[cache.slot(head, key) - keys.start] = row as u32;
        }
        let mut first = keys.start;
        while first < keys.end {
            let end = keys.end.min((first / SEGMENT_KEYS + 1) * SEGMENT_KEYS);
            let rows = &self.rows[first - keys.start..end - keys.start];
            let block = cache.block(head, first, end - first);
            read_keys(block, cache.shape().padded_key_dim(), rows, width, &mut self.keys);
            first = end;
        }
    }
}

impl Region {
    /// Clusters `keys` of head `head` as `metric` tells them apart.
    pub fn new(
        cache: &KeyValueCache,
        head: usize,
        keys: Range<usize>,
        metric: &QueryMetric,
        scratch: &mut RegionScratch,
    ) -> Self {
        let (shape, first, len) = (cache.shape(), keys.start, keys.len());
        let width = shape.key_dim.next_multiple_of(ROW_MULTIPLE);
        scratch.read_keys(cache, head, keys.clone(), width);
        bisect(&scratch.keys, width, CLUSTER_KEYS, metric, &mut scratch.order, &mut scratch.bisection);

        let sorted = SortedKeys::new(cache, head, keys, &scratch.order);
        let mut summaries = Summaries::new(len / CLUSTER_KEYS, shape);
        let (mut value_sum, mut value_squares) = (vec![0.0; shape.value_dim], 0.0);
        let mut mean_variance = vec![0.0; width];
        let share = CLUSTER_KEYS as f32 / len as f32;
        let (key_dim, value_dim) = (shape.padded_key_dim(), shape.padded_value_dim());
        let (mut moments, mut value) = (KeyMoments::default(), vec![0.0; value_dim]);
        let mut cross_moments = CrossMoments::new(key_dim, value_dim);
        scratch.values.resize(CLUSTER_KEYS * value_dim, 0.0);
        for (cluster, members) in scratch.order.chunks_exact(CLUSTER_KEYS).enumerate() {
            moments.take(members, &scratch.keys, width);
            for (mean, variance) in mean_variance.iter_mut().zip(&moments.variance) {
                *mean += share * variance;
            }
            let block = sorted.block(first + cluster * CLUSTER_KEYS, CLUSTER_KEYS, shape);
            read_values(block, value_dim, &mut scratch.values);
            value_squares += f64::from(value_moments(&scratch.values, &mut value));
            cross_moments.add(members, &scratch.keys, &moments, &scratch.values, 1.0 / len as f32);
            for (sum, value) in value_sum.iter_mut().zip(&value) {
                *sum += CLUSTER_KEYS as f64 * f64::from(*value);
            }
            summaries.set(cluster, &moments, &value, shape);
        }
        if len > LARGEST_KEPT {
            // Seldom as large again, and more than all else a thread keeps.
            *scratch = RegionScratch::default();
        }
        Self {
            first,
            len,
            sorted: Some(sorted),
            summaries,
            value_sum,
            value_squares,
            largest_variance: mean_variance.clone(),
            mean_variance,
            cross_moments,
        }
    }

    /// Positions of the keys.
    pub fn keys(&self) -> Range<usize> {
        self.first..self.first + self.len
    }

    pub fn clusters(&self) -> usize {
        self.len / CLUSTER_KEYS
    }

    pub fn summaries(&self) -> ClusterSummaries<'_> {
        self.summaries.view()
    }

    /// The keys and values of `clusters`, of one segment, of the region of head `head` of `cache`.
    pub fn block<'a>(&'a self, clusters: Range<usize>, cache: &'a KeyValueCache, head: usize) -> KeyBlock<'a> {
        assert!(clusters.end <= self.clusters(), "clusters {clusters:?} of {}", self.clusters());
        let (first, keys) = (self.first + clusters.start * CLUSTER_KEYS, clusters.len() * CLUSTER_KEYS);
        match &self.sorted {
            Some(sorted) => sorted.block(first, keys, cache.shape()),
            None => cache.block(head, first, keys),
        }
    }

    /// The keys and values, until they were taken: they are to be laid in the cache then.
    pub fn take_sorted(&mut self) -> Option<SortedKeys> {
        self.sorted.take()
    }

    /// How values go with keys within clusters. It is not kept.
    pub fn take_cross_moments(&mut self) -> CrossMoments {
        std::mem::take(&mut self.cross_moments)
    }

    /// Notes that this region follows `before`.
    pub fn follow(&mut self, before: &Self) {
        let pairs = self.largest_variance.iter_mut().zip(&before.largest_variance);
        pairs.for_each(|(variance, before)| *variance = variance.max(*before));
    }

    /// By how much the logits of a query (`scale` is its factor) with the keys of a cluster vary, of this region or of one
    /// before it (keys of one may be all the same): half their variance in a cluster of the largest mean channel variances.
    pub fn logit_spread(&self, query: &[f32], scale: f32) -> f32 {
        0.5 * scale * scale * weighted_squared_norm(query, &self.largest_variance)
    }

    pub fn bytes(&self) -> usize {
        let sums = 8 * self.value_sum.len() + 4 * (self.mean_variance.len() + self.largest_variance.len());
        self.sorted.as_ref().map_or(0, SortedKeys::bytes) + self.summaries.bytes() + sums
    }
}

impl SortedKeys {
    /// Copies `keys` of head `head` in the order `order`, which counts from the first of them.
    fn new(cache: &KeyValueCache, head: usize, keys: Range<usize>, order: &[u32]) -> Self {
        let shape = cache.shape();
        let first_segment = keys.start / SEGMENT_KEYS;
        let new_segment = |_| Segment::new(cache.kind(), shape);
        let mut segments: Vec<_> = (first_segment..keys.end.div_ceil(SEGMENT_KEYS)).map(new_segment).collect();
        let mut places = vec![0; keys.len()];
        for (slot, &member) in keys.clone().zip(order) {
            let (source, from) = cache.place(head, keys.start + member as usize);
            segments[slot / SEGMENT_KEYS - first_segment].copy_slot(slot % SEGMENT_KEYS, source, from, shape);
            places[member as usize] = slot as u32;
        }
        Self { keys, segments, places }
    }

    /// What lies in `keys` slots of the cache-to-be from `first` on, of one segment.
    fn block(&self, first: usize, keys: usize, shape: CacheShape) -> KeyBlock<'_> {
        let slots = first % SEGMENT_KEYS..first % SEGMENT_KEYS + keys;
        self.segments[first / SEGMENT_KEYS - self.keys.start / SEGMENT_KEYS].block(slots, shape)
    }

    fn bytes(&self) -> usize {
        self.segments.iter().map(Segment::bytes).sum::<usize>() + size_of_val(&*self.places)
    }
}

/// Whether cluster `cluster`, counted over whole regions, does not lie behind the one before: it is the first of a segment,
/// or may be of a region.
pub(super) fn begins_block(cluster: u32) -> bool {
    let cluster = cluster as usize;
    (FIRST_KEYS / CLUSTER_KEYS + cluster).is_multiple_of(SEGMENT_CLUSTERS)
        || cluster.is_multiple_of(REGION_KEYS / CLUSTER_KEYS)
}
