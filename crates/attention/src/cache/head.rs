//! The keys and values of one head: how they are written, and how they come into the order of their clusters and back.

use std::ops::Range;

use bytemuck::Pod;
use iceformer_kernels::HugePageArena;
use iceformer_kernels::attention::PAGE_KEYS;

use super::{CacheShape, KeyValueType};
use crate::budgeted::SortedKeys;
use crate::page::{self, Int8Slot};
use crate::places::Places;
use crate::segment::{SEGMENT_KEYS, Segment};
use crate::strided::StridedView;

/// Keys and values of one head.
pub(super) struct Head {
    pub segments: Vec<Segment>,
    /// Int8 only: what is subtracted from every key. `[key_dim]`
    pub mean: Vec<f32>,
    /// Int8 only: the first keys as they came, at most [`KeyValueCache::MEAN_KEYS`]. `[keys][key_dim]`
    pub first_keys: Vec<f32>,
    /// Where the keys lie.
    pub places: Places,
}

impl Head {
    /// Writes the keys of `tokens` of row head `row_head` of `keys` to position `first` and those after it, whole pages at
    /// a time where it can.
    pub fn write_keys(
        &mut self,
        first: usize,
        keys: &StridedView<'_>,
        row_head: usize,
        tokens: Range<usize>,
        words: usize,
    ) {
        let (mut encoded, mut row) = (vec![0; PAGE_KEYS.min(tokens.len()) * words], Vec::new());
        let mut token = tokens.start;
        while token < tokens.end {
            let index = first + token - tokens.start;
            let is_page = index.is_multiple_of(PAGE_KEYS) && tokens.end - token >= PAGE_KEYS;
            let (segment, slot) = (&mut self.segments[index / SEGMENT_KEYS], index % SEGMENT_KEYS);
            if is_page
                && let Segment::F32 { keys: pages, .. } = &mut *segment
                && let Some(rows) = keys.rows_in_place(row_head, token)
            {
                // Nothing to encode.
                page::write_page(pages, slot, rows.map(bytemuck::cast_slice), words);
                token += PAGE_KEYS;
                continue;
            }
            let encoded = &mut encoded[..if is_page { PAGE_KEYS * words } else { words }];
            for (number, words) in encoded.chunks_exact_mut(words).enumerate() {
                let key = keys.row(row_head, token + number, &mut row);
                match segment {
                    Segment::F32 { .. } => page::encode_key_f32(words, key),
                    Segment::Bf16 { .. } => page::encode_key_bf16(words, key),
                    Segment::Int8 { key_scales, .. } => {
                        page::encode_key_int8(words, &mut key_scales[slot + number], key, &self.mean);
                    }
                }
            }
            match segment {
                Segment::F32 { keys, .. } => write_encoded(keys, slot, encoded, words),
                Segment::Bf16 { keys, .. } => write_encoded(keys, slot, encoded, words),
                Segment::Int8 { keys, .. } => write_encoded(keys, slot, encoded, words),
            }
            token += encoded.len() / words;
        }
    }

    pub fn write_value(&mut self, index: usize, value: &[f32], value_dim: usize) {
        let slot = index % SEGMENT_KEYS;
        match &mut self.segments[index / SEGMENT_KEYS] {
            Segment::F32 { values, .. } => page::write_value_f32(values, slot, value, value_dim),
            Segment::Bf16 { values, .. } => page::write_value_bf16(values, slot, value, value_dim),
            Segment::Int8 { values, value_scales, .. } => {
                let slot_data = Int8Slot { data: values, scale: &mut value_scales[slot] };
                page::write_value_int8(slot_data, slot, value, value_dim);
            }
        }
    }

    /// Writes the first `tokens` values of row head `row_head` of `values` to position `first` and those after it, in
    /// pairs where it can.
    pub fn write_values(
        &mut self,
        first: usize,
        values: &StridedView<'_>,
        row_head: usize,
        tokens: usize,
        value_dim: usize,
    ) {
        let mut rows = [Vec::new(), Vec::new()];
        let mut token = 0;
        while token < tokens {
            let index = first + token;
            if index % 2 == 1 || tokens - token == 1 {
                self.write_value(index, values.row(row_head, token, &mut rows[0]), value_dim);
                token += 1;
                continue;
            }
            let [one, other] = &mut rows;
            let pair = [values.row(row_head, token, one), values.row(row_head, token + 1, other)];
            let slot = index % SEGMENT_KEYS;
            match &mut self.segments[index / SEGMENT_KEYS] {
                Segment::F32 { values, .. } => {
                    pair.iter().zip(slot..).for_each(|(row, slot)| page::write_value_f32(values, slot, row, value_dim));
                }
                Segment::Bf16 { values, .. } => page::write_value_pair_bf16(values, slot, pair, value_dim),
                Segment::Int8 { values, value_scales, .. } => {
                    page::write_value_pair_int8(values, &mut value_scales[slot..slot + 2], slot, pair, value_dim);
                }
            }
            token += 2;
        }
    }

    /// Gives back to `arena` the segments behind those of the first `len` keys.
    pub fn drop_segments(&mut self, len: usize, arena: &mut HugePageArena) {
        let dropped = self.segments.drain(len.div_ceil(SEGMENT_KEYS)..);
        arena.returned(dropped.map(|segment| segment.bytes()).sum());
    }

    /// Moves the keys of `sorted` to where it has them.
    pub fn take_sorted(&mut self, sorted: &SortedKeys, shape: CacheShape) {
        let first = sorted.keys.start;
        for (number, segment) in sorted.segments.iter().enumerate() {
            let start = first / SEGMENT_KEYS * SEGMENT_KEYS + number * SEGMENT_KEYS;
            let slots = first.max(start) - start..(sorted.keys.end - start).min(SEGMENT_KEYS);
            self.segments[start / SEGMENT_KEYS].copy_slots(slots, segment, shape);
        }
        self.places.set(first, &sorted.places);
    }

    /// Moves the keys of `keys` to their own positions; nothing later is kept. No key before `keys` lies among them.
    pub fn restore_order(&mut self, keys: Range<usize>, kind: KeyValueType, shape: CacheShape) {
        let moved = self.places.moved();
        let first = keys.start.max(moved.start);
        let numbers = first / SEGMENT_KEYS..moved.end.min(keys.end.max(first)).max(first).div_ceil(SEGMENT_KEYS);
        let in_order = |number: usize| {
            let mut segment = Segment::new(kind, shape);
            for slot in 0..SEGMENT_KEYS {
                let index = number * SEGMENT_KEYS + slot;
                // What lies before the first stays as it is, sorted or not.
                let from = if index < first { index } else { self.places.slot(index) };
                segment.copy_slot(slot, &self.segments[from / SEGMENT_KEYS], from % SEGMENT_KEYS, shape);
            }
            segment
        };
        let restored: Vec<_> = numbers.clone().map(in_order).collect();
        self.segments.splice(numbers, restored);
        self.places.truncate(first);
    }

    /// Takes the mean of the first keys anew and writes them again.
    pub fn centre_first_keys(&mut self, shape: CacheShape) {
        let key_dim = shape.key_dim;
        let first_keys = std::mem::take(&mut self.first_keys);
        let count = first_keys.len() / key_dim;
        self.mean.fill(0.0);
        for key in first_keys.chunks_exact(key_dim) {
            self.mean.iter_mut().zip(key).for_each(|(mean, value)| *mean += value / count as f32);
        }
        let keys = StridedView::token_major(&first_keys, count, 1, key_dim);
        self.write_keys(0, &keys, 0, 0..count, shape.key_words(KeyValueType::Int8));
        self.first_keys = first_keys;
    }
}

/// Writes the keys of `encoded`, one or sixteen, `words` words each, to `slot` and those after it.
fn write_encoded<T: Pod>(keys: &mut [T], slot: usize, encoded: &[u32], words: usize) {
    match encoded.len() == words {
        true => page::write_key(keys, slot, encoded),
        false => {
            let key = |key: usize| &encoded[key * words..(key + 1) * words];
            page::write_page(keys, slot, std::array::from_fn(key), words);
        }
    }
}
