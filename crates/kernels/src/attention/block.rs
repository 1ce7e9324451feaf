//! Keys and values as a tile is handed them.

/// Whole pages of keys and values, one after another, in the layouts of the [module](super).
#[derive(Clone, Copy)]
pub enum KeyBlock<'a> {
    /// 32-bit floats.
    F32 {
        /// `[pages][key_dim][16]`.
        keys: &'a [f32],
        /// `[pages][16][value_dim]`.
        values: &'a [f32],
    },
    /// Brain floats as their bits.
    Bf16 {
        /// `[pages][key_dim / 2][16][2]`.
        keys: &'a [u16],
        /// `[pages][8][value_dim][2]`.
        values: &'a [u16],
    },
    /// Integers with one scale per key: `key[c] = key_scale · (keys[c] − 128)`, `value[c] = value_scale · values[c]`.
    Int8 {
        /// `[pages][key_dim / 4][16][4]`.
        keys: &'a [u8],
        /// `[pages · 16]`.
        key_scales: &'a [f32],
        /// `[pages][8][value_dim][2]`.
        values: &'a [i8],
        /// `[pages · 16]`.
        value_scales: &'a [f32],
    },
}

impl KeyBlock<'_> {
    /// Addresses of the keys and of the values.
    pub(super) fn addresses(self) -> (usize, usize) {
        match self {
            Self::F32 { keys, values } => (keys.as_ptr().addr(), values.as_ptr().addr()),
            Self::Bf16 { keys, values } => (keys.as_ptr().addr(), values.as_ptr().addr()),
            Self::Int8 { keys, values, .. } => (keys.as_ptr().addr(), values.as_ptr().addr()),
        }
    }

    /// Addresses of the scales of keys and of values, where there are any.
    pub(super) fn scale_addresses(self) -> [usize; 2] {
        match self {
            Self::F32 { .. } | Self::Bf16 { .. } => [0; 2],
            Self::Int8 { key_scales, value_scales, .. } => [key_scales.as_ptr().addr(), value_scales.as_ptr().addr()],
        }
    }
}
