//! What the micro-tiles of a tile compute of the regions that they see from afar.

/// Clusters that each micro-tile computes, or all keys.
#[derive(Default)]
pub(super) struct Chosen {
    /// Numbers of the clusters of all micro-tiles, one micro-tile's behind the other's.
    selections: Vec<u32>,
    /// How many of them are those of each.
    counts: Vec<usize>,
    /// Micro-tiles that compute everything.
    exact: Vec<bool>,
}

impl Chosen {
    /// Starts anew, with nothing to compute.
    pub fn begin(&mut self, micro_tiles: usize) {
        self.selections.clear();
        self.exact.clear();
        self.exact.resize(micro_tiles, false);
        self.counts.clear();
        self.counts.resize(micro_tiles, 0);
    }

    /// Has a micro-tile compute the clusters with these numbers, ascending. Those before it have been asked.
    pub fn select(&mut self, micro_tile: usize, selected: &[u32]) {
        self.counts[micro_tile] = selected.len();
        self.selections.extend_from_slice(selected);
    }

    /// Has a micro-tile compute everything.
    pub fn compute_all(&mut self, micro_tile: usize) {
        self.exact[micro_tile] = true;
    }

    /// The clusters that each micro-tile computes, ascending: none where it computes everything.
    pub fn selections(&self) -> impl Iterator<Item = &[u32]> {
        self.counts.iter().scan(&self.selections[..], |rest, &count| {
            let (selected, others) = rest.split_at(count);
            *rest = others;
            Some(selected)
        })
    }

    /// How many clusters all micro-tiles compute together.
    pub fn selected(&self) -> usize {
        self.selections.len()
    }

    /// Whether a micro-tile computes everything.
    pub fn is_exact(&self, micro_tile: usize) -> bool {
        self.exact[micro_tile]
    }

    /// Whether some micro-tile does.
    pub fn any_is_exact(&self) -> bool {
        self.exact.contains(&true)
    }

    /// Of micro-tiles with these selections.
    #[cfg(test)]
    pub fn of_selections(selections: &[&[u32]]) -> Self {
        let mut chosen = Self::default();
        chosen.begin(selections.len());
        selections.iter().enumerate().for_each(|(micro_tile, selected)| chosen.select(micro_tile, selected));
        chosen
    }
}
