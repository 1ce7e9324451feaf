//! The clusters of a cache: a copy of its older keys and values in which keys that are alike lie together, with a
//! summary of each cluster.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::attention::{ClusterSummaries, KeyBlock, PANEL_CLUSTERS};
use iceformer_kernels::half::bf16;
use iceformer_kernels::rows::ROW_MULTIPLE;

use super::calibration::{Calibration, SAMPLES};
use super::clustering::{BisectionScratch, bisect};
use crate::segment::{SEGMENT_KEYS, Segment};
use crate::{CacheShape, KeyValueCache, ThreadTeam};

/// Keys of a cluster: a block that the attention kernels take at full speed.
pub(super) const CLUSTER_KEYS: usize = 64;
/// Keys that are clustered together. More give tighter clusters, and leave more recent keys that are in none yet.
pub(super) const REGION_KEYS: usize = 2048;
/// Clusters of a region.
pub(super) const REGION_CLUSTERS: usize = REGION_KEYS / CLUSTER_KEYS;
/// Clusters that lie one behind the other in memory.
pub(super) const SEGMENT_CLUSTERS: usize = SEGMENT_KEYS / CLUSTER_KEYS;
/// Keys at the start that are in no region: attention sinks are unlike all others and would spoil a cluster.
pub(super) const FIRST_KEYS: usize = 64;

const _: () = assert!(REGION_CLUSTERS.is_multiple_of(PANEL_CLUSTERS) && SEGMENT_KEYS.is_multiple_of(CLUSTER_KEYS));

/// The clusters of all heads of a cache.
#[derive(Default)]
pub(crate) struct ClusterIndex {
    heads: Vec<HeadClusters>,
}

/// The clusters of one key/value head.
#[derive(Default)]
pub(super) struct HeadClusters {
    pub regions: Vec<Region>,
    /// One for each query head that reads the head, empty before the first measurement.
    calibrations: Vec<Calibration>,
    /// Budget and regions at the last measurement.
    calibrated: (f32, usize),
}

/// Where clusters do not pay for a head, it is tried again when its keys have become so many times more.
const RETRY: usize = 4;

/// [`REGION_KEYS`] consecutive keys in clusters.
pub(super) struct Region {
    /// The keys and values, cluster after cluster.
    segments: Vec<Segment>,
    /// `[panels][key_dim][16]`
    means: AlignedBuffer<u16>,
    /// `[panels][key_dim][16]`
    variances: AlignedBuffer<u16>,
    /// `[REGION_CLUSTERS][value_dim]`
    values: AlignedBuffer<u16>,
    /// Sum of the values, channel by channel.
    value_sum: Vec<f64>,
    /// Sum of the squares of the values' norms.
    value_squares: f64,
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct IndexScratch {
    /// `[REGION_KEYS][width]`
    keys: Vec<f32>,
    order: Vec<u32>,
    bisection: BisectionScratch,
}

impl ClusterIndex {
    pub(super) fn head(&self, head: usize) -> &HeadClusters {
        &self.heads[head]
    }

    pub(super) fn heads_mut(&mut self) -> &mut [HeadClusters] {
        &mut self.heads
    }

    /// Whether there are clusters of any head.
    pub fn is_empty(&self) -> bool {
        self.heads.iter().all(|head| head.regions.is_empty())
    }

    /// Regions that `keys` keys fill.
    pub fn regions_of(keys: usize) -> usize {
        keys.saturating_sub(FIRST_KEYS) / REGION_KEYS
    }

    /// Clusters the keys of `cache` that came since: of each head one region first, the others when measurements have
    /// shown that they pay.
    pub(super) fn extend(&mut self, cache: &KeyValueCache, team: &ThreadTeam, scratch: &[Mutex<IndexScratch>]) {
        self.heads.resize_with(cache.shape().kv_heads, HeadClusters::default);
        let total = Self::regions_of(cache.len());
        let mut built: Vec<(usize, usize, Option<Region>)> = Vec::new();
        for (head, clusters) in self.heads.iter().enumerate() {
            let wanted = clusters.regions.len()..clusters.wanted(total);
            built.extend(wanted.map(|region| (head, region, None)));
        }
        if built.is_empty() {
            return;
        }
        team.run_chunks(&mut built, 1, |_, region, worker| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let (head, index, region) = &mut region[0];
            *region = Some(Region::new(cache, *head, *index, &mut scratch));
        });
        for (head, _, region) in built {
            self.heads[head].regions.extend(region);
        }
    }

    /// Forgets regions with keys from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.heads.iter_mut().for_each(|head| head.regions.truncate(Self::regions_of(len)));
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.heads.iter().flat_map(|head| &head.regions).map(Region::bytes).sum()
    }
}

impl HeadClusters {
    /// Regions that the head should have, of `total` that the keys fill.
    fn wanted(&self, total: usize) -> usize {
        let regions = self.regions.len();
        match regions {
            0 => total.min(1),
            _ if self.pays() || self.was_out_of_sight() || total >= RETRY * regions => total,
            _ => regions,
        }
    }

    /// Whether no query could be measured, because none saw the regions there were.
    fn was_out_of_sight(&self) -> bool {
        !self.calibrations.is_empty() && self.calibrations.iter().all(|calibration| calibration.samples == 0)
    }

    /// What was measured of query head `head` of the group; the default before any measurement.
    pub fn calibration(&self, head: usize) -> Calibration {
        self.calibrations.get(head).copied().unwrap_or_default()
    }

    /// Whether clusters pay for a query head.
    pub fn pays(&self) -> bool {
        self.calibrations.iter().any(|calibration| calibration.limit > 0.0)
    }

    /// Whether queries should be measured, because too few were, or the keys have become many more or a good deal fewer.
    pub fn wants_calibration(&self, budget: f32) -> bool {
        let unmeasured = |calibration: &Calibration| calibration.samples < SAMPLES;
        !self.regions.is_empty() && (self.is_stale(budget) || self.calibrations.iter().any(unmeasured))
    }

    fn is_stale(&self, budget: f32) -> bool {
        let (calibrated_budget, regions) = self.calibrated;
        calibrated_budget != budget || self.regions.len() < regions || 4 * self.regions.len() > 5 * regions
    }

    /// Takes measurements of every query head of the group, made now at `budget`.
    pub fn take(&mut self, budget: f32, measured: Vec<Calibration>) {
        if self.is_stale(budget) {
            self.calibrations.clear();
            self.calibrated = (budget, self.regions.len());
        }
        let before = std::mem::take(&mut self.calibrations);
        let before = before.into_iter().chain(std::iter::repeat(Calibration::default()));
        self.calibrations = before.zip(measured).map(|(before, measured)| before.merge(measured)).collect();
    }

    /// Root mean square distance of the first `regions` regions' values from their mean.
    pub fn value_spread(&self, regions: usize) -> f32 {
        let regions = &self.regions[..regions];
        let Some(width) = regions.first().map(|region| region.value_sum.len()) else { return 0.0 };
        let count = (regions.len() * REGION_KEYS) as f64;
        let squares: f64 = regions.iter().map(|region| region.value_squares).sum();
        let mean_square: f64 = (0..width)
            .map(|channel| (regions.iter().map(|region| region.value_sum[channel]).sum::<f64>() / count).powi(2))
            .sum();
        (squares / count - mean_square).max(0.0).sqrt() as f32
    }
}

impl Region {
    /// Clusters region `index` of head `head`.
    fn new(cache: &KeyValueCache, head: usize, index: usize, scratch: &mut IndexScratch) -> Self {
        let shape = cache.shape();
        let first = FIRST_KEYS + index * REGION_KEYS;
        let width = shape.key_dim.next_multiple_of(ROW_MULTIPLE);
        scratch.keys.clear();
        scratch.keys.resize(REGION_KEYS * width, 0.0);
        for (offset, key) in scratch.keys.chunks_exact_mut(width).enumerate() {
            cache.read_centred_key(head, first + offset, &mut key[..shape.key_dim]);
        }
        bisect(&scratch.keys, width, CLUSTER_KEYS, &mut scratch.order, &mut scratch.bisection);

        let mut region = Self {
            segments: Vec::with_capacity(REGION_KEYS / SEGMENT_KEYS),
            means: AlignedBuffer::zeroed(REGION_CLUSTERS * shape.padded_key_dim()),
            variances: AlignedBuffer::zeroed(REGION_CLUSTERS * shape.padded_key_dim()),
            values: AlignedBuffer::zeroed(REGION_CLUSTERS * shape.padded_value_dim()),
            value_sum: vec![0.0; shape.value_dim],
            value_squares: 0.0,
        };
        for members in scratch.order.chunks_exact(SEGMENT_KEYS) {
            let mut segment = Segment::new(cache.kind(), shape.padded_key_dim(), shape.padded_value_dim());
            for (slot, &member) in members.iter().enumerate() {
                let key = first + member as usize;
                segment.copy_slot(slot, cache.segment(head, key), key % SEGMENT_KEYS, shape);
            }
            region.segments.push(segment);
        }
        for (cluster, members) in scratch.order.chunks_exact(CLUSTER_KEYS).enumerate() {
            region.summarise_keys(cluster, members, &scratch.keys, width, shape);
            region.summarise_values(cluster, members, first, head, cache);
        }
        region
    }

    fn summarise_keys(&mut self, cluster: usize, members: &[u32], keys: &[f32], width: usize, shape: CacheShape) {
        let (mut mean, mut variance) = (vec![0.0_f32; width], vec![0.0_f32; width]);
        let key = |member: &u32| &keys[*member as usize * width..][..width];
        for member in members {
            mean.iter_mut().zip(key(member)).for_each(|(mean, value)| *mean += value);
        }
        mean.iter_mut().for_each(|mean| *mean /= members.len() as f32);
        for member in members {
            for ((variance, mean), value) in variance.iter_mut().zip(&mean).zip(key(member)) {
                *variance += (value - mean) * (value - mean);
            }
        }
        let panel = cluster / PANEL_CLUSTERS * PANEL_CLUSTERS * shape.padded_key_dim();
        for channel in 0..shape.key_dim {
            let place = panel + channel * PANEL_CLUSTERS + cluster % PANEL_CLUSTERS;
            self.means[place] = bf16::from_f32(mean[channel]).to_bits();
            self.variances[place] = bf16::from_f32(variance[channel] / members.len() as f32).to_bits();
        }
    }

    fn summarise_values(&mut self, cluster: usize, members: &[u32], first: usize, head: usize, cache: &KeyValueCache) {
        let shape = cache.shape();
        let (mut mean, mut value) = (vec![0.0_f32; shape.value_dim], vec![0.0_f32; shape.value_dim]);
        for &member in members {
            cache.read_value(head, first + member as usize, &mut value);
            mean.iter_mut().zip(&value).for_each(|(mean, value)| *mean += value);
            self.value_squares += f64::from(value.iter().map(|value| value * value).sum::<f32>());
        }
        let target = &mut self.values[cluster * shape.padded_value_dim()..][..shape.value_dim];
        for ((sum, target), mean) in self.value_sum.iter_mut().zip(target).zip(&mean) {
            *sum += f64::from(*mean);
            *target = bf16::from_f32(*mean / members.len() as f32).to_bits();
        }
    }

    /// Mean value of cluster `cluster`, `[value_dim]`.
    pub fn value(&self, cluster: usize, shape: CacheShape) -> impl Iterator<Item = f32> {
        let values = &self.values[cluster * shape.padded_value_dim()..][..shape.value_dim];
        values.iter().map(|bits| bf16::from_bits(*bits).to_f32())
    }

    pub fn summaries(&self) -> ClusterSummaries<'_> {
        ClusterSummaries { means: &self.means, variances: &self.variances, values: &self.values }
    }

    /// The keys and values of `clusters`, which lie in one segment.
    pub fn block(&self, clusters: Range<usize>, shape: CacheShape) -> KeyBlock<'_> {
        let first = clusters.start % SEGMENT_CLUSTERS * CLUSTER_KEYS;
        let slots = first..first + clusters.len() * CLUSTER_KEYS;
        self.segments[clusters.start / SEGMENT_CLUSTERS].block(slots, shape)
    }

    fn bytes(&self) -> usize {
        let segments: usize = self.segments.iter().map(Segment::bytes).sum();
        segments + self.means.bytes() + self.variances.bytes() + self.values.bytes() + 8 * self.value_sum.len()
    }
}
