//! A run of pages: the keys and values of one head that lie together in memory.

use std::ops::Range;

use iceformer_kernels::attention::KeyBlock;
use iceformer_kernels::{AlignedBuffer, HugePageArena};

use crate::page;
use crate::{CacheShape, KeyValueType};

/// Keys of one segment: 32 pages.
pub(crate) const SEGMENT_KEYS: usize = 512;

/// [`SEGMENT_KEYS`] keys and values of one head, in pages.
pub(crate) enum Segment {
    F32 {
        keys: AlignedBuffer<f32>,
        values: AlignedBuffer<f32>,
    },
    Bf16 {
        keys: AlignedBuffer<u16>,
        values: AlignedBuffer<u16>,
    },
    Int8 {
        keys: AlignedBuffer<u8>,
        key_scales: AlignedBuffer<f32>,
        values: AlignedBuffer<i8>,
        value_scales: AlignedBuffer<f32>,
    },
}

impl Segment {
    /// All zeros, in memory of its own.
    pub(crate) fn new(kind: KeyValueType, shape: CacheShape) -> Self {
        Self::in_arena(kind, shape, &mut HugePageArena::default())
    }

    /// All zeros, in memory of `arena`.
    pub(crate) fn in_arena(kind: KeyValueType, shape: CacheShape, arena: &mut HugePageArena) -> Self {
        let (keys, values) = (SEGMENT_KEYS * shape.padded_key_dim(), SEGMENT_KEYS * shape.padded_value_dim());
        match kind {
            KeyValueType::F32 => Self::F32 { keys: arena.zeroed(keys), values: arena.zeroed(values) },
            KeyValueType::Bf16 => Self::Bf16 { keys: arena.zeroed(keys), values: arena.zeroed(values) },
            KeyValueType::Int8 => Self::Int8 {
                keys: arena.zeroed(keys),
                key_scales: arena.zeroed(SEGMENT_KEYS),
                values: arena.zeroed(values),
                value_scales: arena.zeroed(SEGMENT_KEYS),
            },
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32 { keys, values } => keys.bytes() + values.bytes(),
            Self::Bf16 { keys, values } => keys.bytes() + values.bytes(),
            Self::Int8 { keys, key_scales, values, value_scales } => {
                keys.bytes() + values.bytes() + key_scales.bytes() + value_scales.bytes()
            }
        }
    }

    /// The keys and values at `slots`, whole pages.
    pub(crate) fn block(&self, slots: Range<usize>, shape: CacheShape) -> KeyBlock<'_> {
        let (key_dim, value_dim) = (shape.padded_key_dim(), shape.padded_value_dim());
        let key_range = slots.start * key_dim..slots.end * key_dim;
        let value_range = slots.start * value_dim..slots.end * value_dim;
        match self {
            Self::F32 { keys, values } => KeyBlock::F32 { keys: &keys[key_range], values: &values[value_range] },
            Self::Bf16 { keys, values } => KeyBlock::Bf16 { keys: &keys[key_range], values: &values[value_range] },
            Self::Int8 { keys, key_scales, values, value_scales } => KeyBlock::Int8 {
                keys: &keys[key_range],
                key_scales: &key_scales[slots.clone()],
                values: &values[value_range],
                value_scales: &value_scales[slots],
            },
        }
    }

    /// Writes the keys and values at `slots` of `source`, a segment of the same type, to the same slots. The slots are whole
    /// pages.
    pub(crate) fn copy_slots(&mut self, slots: Range<usize>, source: &Self, shape: CacheShape) {
        let (key_dim, value_dim) = (shape.padded_key_dim(), shape.padded_value_dim());
        let key_range = slots.start * key_dim..slots.end * key_dim;
        let value_range = slots.start * value_dim..slots.end * value_dim;
        match (self, source.block(slots.clone(), shape)) {
            (Self::F32 { keys, values }, KeyBlock::F32 { keys: source_keys, values: source_values }) => {
                keys[key_range].copy_from_slice(source_keys);
                values[value_range].copy_from_slice(source_values);
            }
            (Self::Bf16 { keys, values }, KeyBlock::Bf16 { keys: source_keys, values: source_values }) => {
                keys[key_range].copy_from_slice(source_keys);
                values[value_range].copy_from_slice(source_values);
            }
            (
                Self::Int8 { keys, key_scales, values, value_scales },
                KeyBlock::Int8 {
                    keys: source_keys,
                    key_scales: source_key_scales,
                    values: source_values,
                    value_scales: source_value_scales,
                },
            ) => {
                keys[key_range].copy_from_slice(source_keys);
                values[value_range].copy_from_slice(source_values);
                key_scales[slots.clone()].copy_from_slice(source_key_scales);
                value_scales[slots].copy_from_slice(source_value_scales);
            }
            _ => unreachable!("segments of one cache are of one type"),
        }
    }

    /// Writes the key and value at slot `from` of `source`, a segment of the same type, to slot `slot`, bit for bit.
    pub(crate) fn copy_slot(&mut self, slot: usize, source: &Self, from: usize, shape: CacheShape) {
        let (key_dim, value_dim) = (shape.padded_key_dim(), shape.padded_value_dim());
        match (self, source) {
            (Self::F32 { keys, values }, Self::F32 { keys: source_keys, values: source_values }) => {
                page::copy_key(keys, slot, source_keys, from, 4 * key_dim);
                values[slot * value_dim..][..value_dim]
                    .copy_from_slice(&source_values[from * value_dim..][..value_dim]);
            }
            (Self::Bf16 { keys, values }, Self::Bf16 { keys: source_keys, values: source_values }) => {
                page::copy_key(keys, slot, source_keys, from, 2 * key_dim);
                page::copy_paired_value(values, slot, source_values, from, value_dim);
            }
            (
                Self::Int8 { keys, key_scales, values, value_scales },
                Self::Int8 {
                    keys: source_keys,
                    key_scales: source_key_scales,
                    values: source_values,
                    value_scales: source_value_scales,
                },
            ) => {
                page::copy_key(keys, slot, source_keys, from, key_dim);
                page::copy_paired_value(values, slot, source_values, from, value_dim);
                key_scales[slot] = source_key_scales[from];
                value_scales[slot] = source_value_scales[from];
            }
            _ => unreachable!("segments of one cache are of one type"),
        }
    }
}
