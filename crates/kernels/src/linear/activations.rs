//! Activations in the layouts of the micro-kernels: row tiles one after another, rows of a tile side by side.

/// How rows are cut into tiles: as few as possible, of heights that differ by one at most.
#[derive(Clone, Copy)]
pub(super) struct RowTiles {
    rows: usize,
    pub count: usize,
}

impl RowTiles {
    /// `rows` rows in tiles of at most `most`.
    pub fn new(rows: usize, most: usize) -> Self {
        Self { rows, count: rows.div_ceil(most) }
    }

    /// First row of tile `tile`; the number of rows for `tile = count`.
    pub fn start(&self, tile: usize) -> usize {
        tile * (self.rows / self.count) + tile.min(self.rows % self.count)
    }

    /// Rows of the tallest tile.
    pub fn tallest(&self) -> usize {
        self.rows.div_ceil(self.count)
    }

    /// Rows of tile `tile`.
    pub fn height(&self, tile: usize) -> usize {
        self.start(tile + 1) - self.start(tile)
    }
}

/// f32 `[k][rows]` of rows `[rows][in_features]`; inputs past `in_features` are zero.
pub(super) fn interleave_f32(input: &[f32], in_features: usize, output: &mut [u32]) {
    let rows = input.len() / in_features;
    for (row, values) in input.chunks_exact(in_features).enumerate() {
        for (value, step) in values.iter().zip(output.chunks_exact_mut(rows)) {
            step[row] = value.to_bits();
        }
    }
    output[in_features * rows..].fill(0);
}
