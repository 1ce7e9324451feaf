//! Where the keys of a head lie in its pages: at their own positions, but for old ones that were sorted into clusters.

use std::ops::Range;

/// The slot of every key.
#[derive(Default)]
pub(crate) struct Places {
    /// First key that may lie elsewhere than at its own position.
    first: usize,
    /// Slots of the keys from [`first`](Self::first) on that may: a permutation of their positions.
    slots: Vec<u32>,
}

impl Places {
    /// The slot that holds key `index`.
    pub fn slot(&self, index: usize) -> usize {
        let moved = index.checked_sub(self.first).and_then(|offset| self.slots.get(offset));
        moved.map_or(index, |slot| *slot as usize)
    }

    /// Keys that may lie elsewhere than at their own positions; no other key lies at one of theirs.
    pub fn moved(&self) -> Range<usize> {
        self.first..self.first + self.slots.len()
    }

    /// Notes that the keys from `first` on now lie at `slots`, a permutation of their positions. They follow, or lie among,
    /// those that were moved before.
    pub fn set(&mut self, first: usize, slots: &[u32]) {
        if self.slots.is_empty() {
            self.first = first;
        }
        let offset = first - self.first;
        assert!(offset <= self.slots.len(), "keys between {:?} and {first} were never moved", self.moved());
        let len = self.slots.len().max(offset + slots.len());
        self.slots.reserve_exact(len - self.slots.len());
        self.slots.resize(len, 0);
        self.slots[offset..][..slots.len()].copy_from_slice(slots);
    }

    /// The keys from `first` on at their own positions.
    pub fn truncate(&mut self, first: usize) {
        self.slots.truncate(first.saturating_sub(self.first));
        if self.slots.is_empty() {
            // A cache may become shorter than where they began.
            self.first = 0;
        }
    }

    /// Every key at its own position.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    pub fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_lie_where_they_were_moved_to() {
        let mut places = Places::default();
        assert_eq!((places.slot(0), places.slot(9), places.moved().len()), (0, 9, 0));
        places.set(2, &[3, 2]);
        places.set(4, &[5, 4]);
        assert_eq!((0..7).map(|index| places.slot(index)).collect::<Vec<_>>(), [0, 1, 3, 2, 5, 4, 6]);
        // Sorted again, together.
        places.set(2, &[5, 4, 3, 2]);
        assert_eq!((0..7).map(|index| places.slot(index)).collect::<Vec<_>>(), [0, 1, 5, 4, 3, 2, 6]);
        assert_eq!(places.moved(), 2..6);
        places.truncate(4);
        assert_eq!((places.moved(), places.slot(2), places.slot(5)), (2..4, 5, 5));
        places.truncate(1);
        assert_eq!((places.moved(), places.slot(2)), (0..0, 2), "none is left");
        places.set(7, &[8, 7]);
        assert_eq!((places.moved(), places.slot(7)), (7..9, 8));
        places.clear();
        assert_eq!(places.slot(3), 3);
    }
}
