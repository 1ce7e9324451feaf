//! What is known of clusters: the mean, variances and farthest of their keys, and the mean of their values.

use iceformer_kernels::AlignedBuffer;
use iceformer_kernels::attention::{ClusterSummaries, KeyMoments, PANEL_CLUSTERS};
use iceformer_kernels::brain_bits;

use super::region::CLUSTER_KEYS;
use crate::CacheShape;

/// What is known of clusters, as brain floats.
pub(super) struct Summaries {
    /// `[panels][key_dim / 2][16][2]`
    means: AlignedBuffer<u16>,
    /// `[panels][key_dim / 2][16][2]`
    variances: AlignedBuffer<u16>,
    /// `[panels][key_dim / 2][16][2]`
    farthest: AlignedBuffer<u16>,
    /// `[clusters / 2][value_dim][2]`
    values: AlignedBuffer<u16>,
}

impl Summaries {
    pub fn new(clusters: usize, shape: CacheShape) -> Self {
        Self {
            means: AlignedBuffer::zeroed(clusters * shape.padded_key_dim()),
            variances: AlignedBuffer::zeroed(clusters * shape.padded_key_dim()),
            farthest: AlignedBuffer::zeroed(clusters * shape.padded_key_dim()),
            values: AlignedBuffer::zeroed(clusters * shape.padded_value_dim()),
        }
    }

    /// Sets what is known of cluster `cluster`: the moments of its keys, and its mean value `[padded_value_dim]`.
    pub fn set(&mut self, cluster: usize, moments: &KeyMoments, value: &[f32], shape: CacheShape) {
        let panel = cluster / PANEL_CLUSTERS * PANEL_CLUSTERS * shape.padded_key_dim();
        let lane = cluster % PANEL_CLUSTERS;
        for channel in 0..shape.key_dim {
            let place = panel + 2 * (channel / 2 * PANEL_CLUSTERS + lane) + channel % 2;
            self.means[place] = brain_bits(moments.mean[channel]);
            self.variances[place] = brain_bits(moments.variance[channel]);
            self.farthest[place] = brain_bits(moments.farthest[channel]);
        }
        set_value(&mut self.values, cluster, value);
    }

    pub fn view(&self) -> ClusterSummaries<'_> {
        let Self { means, variances, farthest, values } = self;
        ClusterSummaries { keys: CLUSTER_KEYS, means, variances, farthest, values }
    }

    pub fn bytes(&self) -> usize {
        self.means.bytes() + self.variances.bytes() + self.farthest.bytes() + self.values.bytes()
    }
}

/// Sets number `number` of `values` `[values / 2][value_dim][2]`, brain floats, to `value` `[value_dim]`.
pub(super) fn set_value(values: &mut [u16], number: usize, value: &[f32]) {
    let pair = &mut values[number / 2 * 2 * value.len()..];
    let target = pair.iter_mut().skip(number % 2).step_by(2);
    target.zip(value).for_each(|(target, value)| *target = brain_bits(*value));
}
