//! Which regions of a head become larger ones.
//!
//! Clusters are as tight as the keys of their region allow. Where keys are of a few dozen kinds all over a text, as the
//! columns of a table are, those of more keys are much tighter. Mostly they hardly are, and a head that looks at a
//! neighbourhood finds it in a few clusters of one small region where a large one has spread it over hundreds. So regions
//! are merged only where that was found to make their clusters much tighter.

use std::ops::Range;

use super::index::HeadClusters;
use super::region::{FIRST_KEYS, REGION_KEYS, Region};

/// Sizes of regions that are merged, in units of [`REGION_KEYS`] keys. As many of one size as make the next may become one,
/// which is clustered anew.
pub(super) const MERGED_UNITS: [usize; 4] = [FEWEST_MERGED_UNITS, 16, 64, 256];
/// The smallest of them.
pub(super) const FEWEST_MERGED_UNITS: usize = 4;
/// Keys of the largest region that a thread keeps its buffers for.
pub(super) const LARGEST_KEPT: usize = FEWEST_MERGED_UNITS * REGION_KEYS;
/// Mean square of what the logits of two keys of a cluster differ by, in relation to what it is in the regions that are
/// merged, up to which they are.
const TIGHTER: f32 = 0.75;
/// The next size is tried again when there are so many times as many keys as when it was tried last.
const RETRY: usize = 2;

/// Up to which size the regions of a head are merged.
#[derive(Default)]
pub(super) struct Merging {
    /// Units of the largest size that was found to be worth it; 0: none was.
    units: usize,
    /// Units of settled keys when the next size was tried last.
    tried: usize,
}

impl Merging {
    /// Forgets what was tried on more than `units` units of keys.
    pub fn truncate(&mut self, units: usize) {
        self.tried = self.tried.min(units);
    }
}

/// Units that the first `len` keys of a text are enough for.
pub(super) fn units_of(len: usize) -> usize {
    len.saturating_sub(FIRST_KEYS) / REGION_KEYS
}

/// Keys of the `size` units from `unit` on.
pub(super) fn keys_of(unit: usize, size: usize) -> Range<usize> {
    let first = FIRST_KEYS + unit * REGION_KEYS;
    first..first + size * REGION_KEYS
}

impl HeadClusters {
    /// The keys on which to try whether regions of `size` units have tighter clusters, where that is not known: the last of
    /// the first `settled` units, the clustered ones.
    pub fn tried(&self, size: usize, settled: usize) -> Option<Range<usize>> {
        let is_next = MERGED_UNITS.iter().find(|units| **units > self.merging.units) == Some(&size);
        let is_due = settled >= RETRY * self.merging.tried;
        self.groups(size, if is_next && is_due { settled } else { 0 }).last()
    }

    /// Takes what was [tried](Self::tried), if it is worth it.
    pub fn try_merged(&mut self, size: usize, merged: Region) {
        let keys = merged.keys();
        let spread = |region: &Region| self.metric.spread(&region.mean_variance);
        let parts = self.regions[self.parts(&keys)].iter();
        let before: f32 = parts.map(|part| spread(part) * part.keys().len() as f32 / keys.len() as f32).sum();
        if spread(&merged) <= TIGHTER * before {
            self.merging = Merging { units: size, tried: 0 };
            self.put(merged);
        } else {
            self.merging.tried = units_of(keys.end);
        }
    }

    /// The keys of regions of `size` units that are to be made of the first `settled` units.
    pub fn mergeable(&self, size: usize, settled: usize) -> impl Iterator<Item = Range<usize>> {
        self.groups(size, if size <= self.merging.units { settled } else { 0 })
    }

    /// The keys of all groups of `size` units, of the first `settled`, that are clustered and are not one region or of a larger
    /// one.
    fn groups(&self, size: usize, settled: usize) -> impl Iterator<Item = Range<usize>> {
        let groups = (0..settled.min(self.clustered_units()) / size).map(move |group| keys_of(group * size, size));
        groups.filter(|keys| self.parts(keys).len() > 1)
    }

    /// Numbers of the regions that have some of `keys`.
    fn parts(&self, keys: &Range<usize>) -> Range<usize> {
        let first = self.regions.partition_point(|region| region.keys().end <= keys.start);
        first..self.regions.partition_point(|region| region.keys().start < keys.end)
    }

    /// Puts `region` in the place of the regions that had its keys, or behind all where none had.
    pub fn put(&mut self, mut region: Region) {
        let parts = self.parts(&region.keys());
        if let Some(before) = parts.start.checked_sub(1) {
            region.follow(&self.regions[before]);
        }
        self.cross_covariance.learn(&region.take_cross_moments(), region.keys().len(), parts.is_empty());
        self.regions.splice(parts, [region]);
    }
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;
    use crate::budgeted::metric::QueryMetric;
    use crate::budgeted::region::RegionScratch;
    use crate::{CacheShape, KeyValueCache, KeyValueType, ThreadTeam};

    const WIDTH: usize = 16;
    const UNITS: usize = 32;

    /// A head whose keys are near the centres that `centre` numbers by position, in regions of one unit each.
    fn head(centre: impl Fn(&mut Random, usize) -> usize) -> (KeyValueCache, HeadClusters) {
        let mut random = Random::new(8);
        let centres = random.normals(UNITS * 40 * WIDTH, 1.0);
        let mut keys = random.normals(keys_of(0, UNITS).end * WIDTH, 0.1);
        for (position, key) in keys.chunks_exact_mut(WIDTH).enumerate() {
            let centre = &centres[centre(&mut random, position) * WIDTH..][..WIDTH];
            key.iter_mut().zip(centre).for_each(|(value, centre)| *value += centre);
        }
        let shape = CacheShape { kv_heads: 1, key_dim: WIDTH, value_dim: WIDTH };
        let mut cache = KeyValueCache::new(shape, KeyValueType::F32);
        cache.append(&keys, &keys, &ThreadTeam::new(1));
        let mut head = HeadClusters::default();
        (0..UNITS).for_each(|unit| head.put(region(&cache, keys_of(unit, 1))));
        (cache, head)
    }

    fn region(cache: &KeyValueCache, keys: Range<usize>) -> Region {
        Region::new(cache, 0, keys, &QueryMetric::default(), &mut RegionScratch::default())
    }

    #[test]
    fn regions_of_keys_of_a_few_kinds_are_merged() {
        let (cache, mut head) = head(|random, _| random.below(40));
        assert_eq!(head.mergeable(4, UNITS).count(), 0, "nothing is known");
        assert_eq!(head.tried(16, UNITS), None, "one size after the other");
        assert_eq!(head.tried(4, 3), None, "too few are settled");
        assert_eq!(head.tried(4, 15), Some(keys_of(8, 4)));
        head.try_merged(4, region(&cache, keys_of(8, 4)));
        assert_eq!(head.regions.len(), UNITS - 3);
        let groups: Vec<_> = head.mergeable(4, 18).collect();
        assert_eq!(groups, [keys_of(0, 4), keys_of(4, 4), keys_of(12, 4)]);
        groups.into_iter().for_each(|keys| head.put(region(&cache, keys)));
        assert_eq!(head.tried(4, 18), None);
        let keys = head.tried(16, 18).expect("a larger size");
        assert_eq!(keys, keys_of(0, 16));
        head.try_merged(16, region(&cache, keys));
        let units: Vec<_> = head.regions.iter().map(|region| region.keys().len() / REGION_KEYS).collect();
        assert_eq!(units, [&[16][..], &[1; 16]].concat());
        for (before, after) in head.regions.iter().zip(&head.regions[1..]) {
            assert_eq!(before.keys().end, after.keys().start);
        }
        assert_eq!(head.mergeable(4, UNITS).count(), 4, "those that came later");
        assert_eq!(head.tried(64, UNITS), None);
    }

    #[test]
    fn regions_of_neighbourhoods_stay_as_they_are() {
        // One matter after another.
        let (cache, mut head) = head(|_, position| position / 32);
        for settled in [10, UNITS] {
            let keys = head.tried(4, settled).expect("not tried on so many yet");
            head.try_merged(4, region(&cache, keys));
            assert_eq!((head.regions.len(), head.mergeable(4, UNITS).count()), (UNITS, 0));
            assert_eq!(head.tried(4, UNITS.min(2 * settled - 5)), None, "tried on {settled}");
        }
        // Of a text that was cut off, less is known.
        head.merging.truncate(8);
        assert_eq!((head.tried(4, 15), head.tried(4, 16)), (None, Some(keys_of(12, 4))));
    }

    #[test]
    fn a_query_is_as_sharp_as_in_the_regions_before() {
        // The first unit is of many kinds, the others of one.
        let (cache, mut head) = head(|random, position| if position < 1_088 { random.below(400) } else { 0 });
        let spread = |region: &Region| region.logit_spread(&[1.0; WIDTH], 0.5);
        assert!(spread(&region(&cache, keys_of(1, 4))) < 0.5 * spread(&head.regions[0]));
        head.put(region(&cache, keys_of(1, 4)));
        let first = spread(&head.regions[0]);
        assert!(head.regions.iter().all(|region| spread(region) >= first));
    }
}
