//! Where rows are measured and audited: anywhere in each of the stretches that a text is cut into.
//!
//! At regular distances the rows of a text of regular parts (records, rows of a table) would all be of the same part, and
//! nothing would be known of the others.

/// One of `count` places of stretch `stretch` (0 where there is none), the same each time: the lower bits of a number mixed as
/// SplitMix64 does (Steele et al. 2014).
pub(crate) fn anywhere_in(stretch: usize, count: usize) -> usize {
    let mut mixed = (stretch as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) % count.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_that_follow_one_another_have_their_places_all_over() {
        // As calls of 512 tokens would ask for them.
        for step in [1, 32, 512] {
            let mut found = [0; 32];
            (0..3200).for_each(|stretch| found[anywhere_in(step * stretch, 256) % 32] += 1);
            assert!(found.iter().all(|count| (50..150).contains(count)), "{found:?}");
        }
        assert_eq!(anywhere_in(5, 0), 0);
        assert_eq!(anywhere_in(5, 1), 0);
    }
}
