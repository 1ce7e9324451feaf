//! Attention tiles over many blocks, by way of their public interface.

use iceformer_kernels::attention::{AttentionTile, KeyBlock, MAX_BLOCK_KEYS, TileShape};
use iceformer_kernels::{InstructionSet, brain_bits};

/// A block whose keys are zeros and whose values are all `value`, of each type.
struct Blocks {
    zeros: Vec<f32>,
    values: Vec<f32>,
    zero_bits: Vec<u16>,
    value_bits: Vec<u16>,
    zero_bytes: Vec<u8>,
    value_bytes: Vec<i8>,
    scales: Vec<f32>,
}

const WIDTH: usize = 64;

impl Blocks {
    fn new(value: f32) -> Self {
        let numbers = MAX_BLOCK_KEYS * WIDTH;
        Self {
            zeros: vec![0.0; numbers],
            values: vec![value; numbers],
            zero_bits: vec![0; numbers],
            value_bits: vec![brain_bits(value); numbers],
            zero_bytes: vec![128; numbers],
            value_bytes: vec![(127.0 * value) as i8; numbers],
            scales: vec![1.0 / 127.0; MAX_BLOCK_KEYS],
        }
    }

    fn of_each_type(&self) -> [KeyBlock<'_>; 3] {
        [
            KeyBlock::F32 { keys: &self.zeros, values: &self.values },
            KeyBlock::Bf16 { keys: &self.zero_bits, values: &self.value_bits },
            KeyBlock::Int8 {
                keys: &self.zero_bytes,
                key_scales: &self.scales,
                values: &self.value_bytes,
                value_scales: &self.scales,
            },
        ]
    }
}

/// A factor a little below one on what was summed up, once a block, would halve the weight of the first keys of a long
/// context.
#[test]
fn the_first_keys_of_many_weigh_as_much_as_the_last() {
    let (first, rest) = (Blocks::new(1.0), Blocks::new(0.0));
    let blocks = 128;
    for (first, rest) in first.of_each_type().into_iter().zip(rest.of_each_type()) {
        for rows in [1, 2, 3, 4, 5, 6, 24] {
            let mut tile = AttentionTile::default();
            tile.begin(InstructionSet::current(), TileShape { rows, key_dim: WIDTH, value_dim: WIDTH }, first);
            for row in 0..rows {
                tile.set_row(row, &[1.0; WIDTH], 0.125, (0, blocks * MAX_BLOCK_KEYS));
            }
            for number in 0..blocks {
                tile.accumulate(number * MAX_BLOCK_KEYS, if number == 0 { first } else { rest }, None);
            }
            let mut output = [0.0; WIDTH];
            for row in 0..rows {
                tile.finish_row(row, &mut output);
                for share in output {
                    let share = share * blocks as f32;
                    assert!((share - 1.0).abs() < 1e-3, "row {row} of {rows}: {share} of its share");
                }
            }
        }
    }
}
