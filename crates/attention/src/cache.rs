//! The key/value cache of one layer and one sequence.
//!
//! Keys and values of a head live in segments of [`SEGMENT_KEYS`] keys, each a run of pages in the layout that the
//! kernels read, so that a prompt, a decode step and a copy on disk share one form. Appending moves no key, but for the
//! clusters of method `budgeted`: old keys that are alike come to lie together ([`places`](crate::places)).

mod head;

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use iceformer_kernels::HugePageArena;
use iceformer_kernels::attention::{KEY_DIM_MULTIPLE, KeyBlock, PAGE_KEYS, VALUE_DIM_MULTIPLE, fetch};
use iceformer_kernels::rows::add_scaled;

use head::Head;

use crate::ThreadTeam;
use crate::budgeted::ClusterIndex;
use crate::dci::DciIndex;
use crate::page;
use crate::places::Places;
use crate::segment::{SEGMENT_KEYS, Segment};
use crate::strided::StridedView;

/// A cache that has no room left grows by one of so many parts of itself at least: little enough that what is held in vain does
/// not matter, and from some ten thousand keys on more than a segment, so that a head's keys lie in runs of them.
const GROWTH_PARTS: usize = 16;

/// Element type of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyValueType {
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// 8-bit integers with one scale per key and one per value; keys are centred on their channel mean, which the
    /// softmax does not see (SageAttention, arXiv 2410.02367, §4.2).
    Int8,
}

impl KeyValueType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// An empty block of this type, for kernels that choose by type.
    pub(crate) fn empty_block(self) -> KeyBlock<'static> {
        match self {
            Self::F32 => KeyBlock::F32 { keys: &[], values: &[] },
            Self::Bf16 => KeyBlock::Bf16 { keys: &[], values: &[] },
            Self::Int8 => KeyBlock::Int8 { keys: &[], key_scales: &[], values: &[], value_scales: &[] },
        }
    }
}

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a key (and a query).
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

impl CacheShape {
    /// Key width in a page: padded with zeros.
    pub(crate) fn padded_key_dim(self) -> usize {
        self.key_dim.next_multiple_of(KEY_DIM_MULTIPLE)
    }

    /// Words of four bytes that a key of type `kind` takes in a page.
    pub(crate) fn key_words(self, kind: KeyValueType) -> usize {
        match kind {
            KeyValueType::F32 => self.padded_key_dim(),
            KeyValueType::Bf16 => self.padded_key_dim() / 2,
            KeyValueType::Int8 => self.padded_key_dim() / 4,
        }
    }

    /// Value width in a page: padded with zeros.
    pub(crate) fn padded_value_dim(self) -> usize {
        self.value_dim.next_multiple_of(VALUE_DIM_MULTIPLE)
    }
}

/// Keys and values of one layer and one sequence, appended in place.
pub struct KeyValueCache {
    shape: CacheShape,
    kind: KeyValueType,
    len: usize,
    /// Slots before this one may hold values from before [`clear`](Self::clear).
    stale: usize,
    heads: Vec<Head>,
    /// Memory of the segments.
    arena: HugePageArena,
    search_index: RwLock<Option<DciIndex>>,
    clusters: RwLock<ClusterIndex>,
}

impl KeyValueCache {
    /// Keys from which an int8 cache takes the channel mean that it centres keys on. Their originals are kept, so the mean
    /// does not depend on how the keys came (at once, in chunks, one by one); what was attended to before all of them were
    /// there does.
    pub const MEAN_KEYS: usize = 64;

    /// An empty cache.
    ///
    /// # Panics
    /// When a number in `shape` is zero.
    pub fn new(shape: CacheShape, kind: KeyValueType) -> Self {
        assert!(shape.kv_heads > 0 && shape.key_dim > 0 && shape.value_dim > 0, "a cache of shape {shape:?}");
        let mean = if kind == KeyValueType::Int8 { vec![0.0; shape.key_dim] } else { Vec::new() };
        let head =
            || Head { segments: Vec::new(), mean: mean.clone(), first_keys: Vec::new(), places: Places::default() };
        let heads = (0..shape.kv_heads).map(|_| head()).collect();
        Self {
            shape,
            kind,
            len: 0,
            stale: 0,
            heads,
            arena: HugePageArena::default(),
            search_index: RwLock::default(),
            clusters: RwLock::default(),
        }
    }

    /// An empty cache, with the memory of `earlier` where that fits.
    pub(crate) fn reusing(earlier: Option<Self>, shape: CacheShape, kind: KeyValueType) -> Self {
        match earlier {
            Some(mut cache) if cache.shape == shape && cache.kind == kind => {
                cache.clear();
                cache
            }
            _ => Self::new(shape, kind),
        }
    }

    /// Appends `keys` `[tokens, kv_heads, key_dim]` and `values` `[tokens, kv_heads, value_dim]`.
    ///
    /// # Panics
    /// When a slice is no whole number of tokens, or the two differ in it.
    pub fn append(&mut self, keys: &[f32], values: &[f32], team: &ThreadTeam) {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        let tokens = keys.len() / (kv_heads * key_dim);
        assert_eq!(keys.len(), tokens * kv_heads * key_dim, "keys are no whole number of tokens");
        assert_eq!(values.len(), tokens * kv_heads * value_dim, "values for another number of tokens than keys");
        self.append_view(
            StridedView::token_major(keys, tokens, kv_heads, key_dim),
            StridedView::token_major(values, tokens, kv_heads, value_dim),
            team,
        );
    }

    /// Appends the tokens of `keys` and `values`, whose row heads (the heads of all entries of the batch, entry by
    /// entry) are the heads of the cache.
    ///
    /// # Panics
    /// When heads, widths or lengths differ from the cache's or from one another.
    pub fn append_view(&mut self, keys: StridedView<'_>, values: StridedView<'_>, team: &ThreadTeam) {
        self.compact(team);
        let shape = self.shape;
        assert_eq!(keys.row_heads(), shape.kv_heads, "keys of another number of heads");
        assert_eq!(values.row_heads(), shape.kv_heads, "values of another number of heads");
        let ([_, _, tokens, key_dim], [_, _, value_tokens, value_dim]) = (keys.shape(), values.shape());
        assert_eq!((key_dim, value_dim), (shape.key_dim, shape.value_dim), "keys or values of another width");
        assert_eq!(tokens, value_tokens, "values for another number of tokens than keys");
        let (kind, before) = (self.kind, self.len);
        let padded_value_dim = shape.padded_value_dim();
        let after = before + tokens;
        self.make_room(after);
        // A stale value in a page in use would still meet a weight of zero, and NaN · 0 is NaN.
        let cleared = after..self.stale.min(after.next_multiple_of(PAGE_KEYS));
        let zeros = if cleared.is_empty() { Vec::new() } else { vec![0.0; padded_value_dim] };
        let append_head = |index: usize, head: &mut Head| {
            let mut row = Vec::new();
            let mut first = 0;
            if kind == KeyValueType::Int8 && before < KeyValueCache::MEAN_KEYS && tokens > 0 {
                first = tokens.min(KeyValueCache::MEAN_KEYS - before);
                for token in 0..first {
                    head.first_keys.extend_from_slice(keys.row(index, token, &mut row));
                }
                head.centre_first_keys(shape);
            }
            head.write_keys(before + first, &keys, index, first..tokens, shape.key_words(kind));
            head.write_values(before, &values, index, tokens, padded_value_dim);
            cleared.clone().for_each(|index| head.write_value(index, &zeros, padded_value_dim));
        };
        if tokens < 16 {
            // A decode step: waking the team costs more than the copy.
            self.heads.iter_mut().enumerate().for_each(|(index, head)| append_head(index, head));
        } else {
            team.run_chunks(&mut self.heads, 1, |index, head, _| append_head(index, &mut head[0]));
        }
        self.len = after;
    }

    /// Makes room for `tokens` more than are held, those of each head together. No result depends on it: a decode step reads
    /// each head's keys and values in order, and faster where they lie so. [`truncate`](Self::truncate) gives back what is not
    /// used.
    ///
    /// # Panics
    /// When that is more tokens than can be counted, or memory holds.
    pub fn reserve(&mut self, tokens: usize) {
        self.make_room(self.len.checked_add(tokens).expect("a number of tokens that can be counted"));
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.segments() * SEGMENT_KEYS
    }

    /// Segments of each head.
    fn segments(&self) -> usize {
        self.heads[0].segments.len()
    }

    /// Makes room for `tokens` in all.
    fn make_room(&mut self, tokens: usize) {
        let (before, wanted) = (self.segments(), tokens.div_ceil(SEGMENT_KEYS));
        if wanted <= before {
            return;
        }
        let wanted = wanted.max(before + before / GROWTH_PARTS);
        // Ordinary memory is given back piece by piece, huge pages once nothing of them is left: so the first segments of all
        // heads lie in ordinary memory, not all those of the first head.
        let mut segments = before;
        while segments < wanted {
            segments = if self.arena.is_small() { segments + 1 } else { wanted };
            for head in &mut self.heads {
                while head.segments.len() < segments {
                    head.segments.push(Segment::in_arena(self.kind, self.shape, &mut self.arena));
                }
            }
        }
    }

    /// Gives back the memory of keys and values that are held twice since method `budgeted` has clustered them: they are
    /// sorted into their clusters in the pages of the cache. Reads stay the same, results but for rounding.
    /// [`append`](Self::append) does it too; to call it after each call keeps the most memory in use small. A cache that was
    /// read with a window or with padding keeps its copies.
    pub fn compact(&mut self, team: &ThreadTeam) {
        let shape = self.shape;
        let clusters = self.clusters.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<_> = self.heads.iter_mut().zip(clusters.take_sorted_keys()).collect();
        sorted.retain(|(_, sorted)| !sorted.is_empty());
        if sorted.is_empty() {
            return;
        }
        team.run_chunks(&mut sorted, 1, |_, pair, _| {
            let (head, sorted) = &mut pair[0];
            sorted.drain(..).for_each(|sorted| head.take_sorted(&sorted, shape));
        });
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops all tokens from `len` on, if as many are held, and all room that is not used.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            self.heads.iter_mut().for_each(|head| head.drop_segments(self.len, &mut self.arena));
            return;
        }
        let (kind, shape) = (self.kind, self.shape);
        let clusters = self.clusters.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (index, head) in self.heads.iter_mut().enumerate() {
            if let Some(first) = clusters.truncate(index, len) {
                head.restore_order(first..len, kind, shape);
            }
            debug_assert!(head.places.moved().end <= len, "only keys of clusters were moved");
            head.drop_segments(len, &mut self.arena);
            // A dropped value left in a page in use would still meet a weight of zero, and NaN · 0 is NaN.
            let zeros = vec![0.0; shape.padded_value_dim()];
            for index in len..self.len.min(len.next_multiple_of(SEGMENT_KEYS)) {
                head.write_value(index, &zeros, shape.padded_value_dim());
            }
            if kind == KeyValueType::Int8 && len < KeyValueCache::MEAN_KEYS {
                head.first_keys.truncate(len * shape.key_dim);
                head.centre_first_keys(shape);
            }
        }
        self.len = len;
        let keys_are_final = self.keys_are_final();
        let index = self.search_index.get_mut().unwrap_or_else(PoisonError::into_inner);
        match index {
            Some(index) if keys_are_final => index.truncate(len),
            _ => *index = None,
        }
    }

    /// Drops all tokens, but not the memory that held them: as good as new, and quicker.
    pub(crate) fn clear(&mut self) {
        self.stale = self.stale.max(self.len);
        self.len = 0;
        for head in &mut self.heads {
            head.mean.fill(0.0);
            head.first_keys.clear();
            head.places.clear();
        }
        self.search_index = RwLock::default();
        self.clusters = RwLock::default();
    }

    /// Bytes held for keys and values, those that there is [room](Self::capacity) for included.
    pub fn bytes(&self) -> usize {
        self.heads.iter().flat_map(|head| &head.segments).map(Segment::bytes).sum()
    }

    /// Those of pages that hold keys and values: what is read for a query that sees all of them.
    pub fn occupied_bytes(&self) -> usize {
        match self.capacity() {
            0 => 0,
            capacity => self.bytes() / capacity * self.len.next_multiple_of(PAGE_KEYS),
        }
    }

    /// Shape given at creation.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Element type given at creation.
    pub fn kind(&self) -> KeyValueType {
        self.kind
    }

    /// Writes key `index` of head `head` to `key` `[key_dim]`, as the cache holds it: rounded to its type.
    ///
    /// # Panics
    /// When there is no such head or key, or `key` has another length.
    pub fn read_key(&self, head: usize, index: usize, key: &mut [f32]) {
        self.read_centred_key(head, index, key);
        key.iter_mut().zip(&self.heads[head].mean).for_each(|(key, mean)| *key += mean);
    }

    /// As [`read_key`](Self::read_key), less [`key_mean`](Self::key_mean).
    pub(crate) fn read_centred_key(&self, head: usize, index: usize, key: &mut [f32]) {
        self.check_head(head);
        assert!(index < self.len, "key {index} of a cache of {}", self.len);
        assert_eq!(key.len(), self.shape.key_dim, "a key is [key_dim]");
        let ((segment, slot), width) = (self.place(head, index), self.shape.padded_key_dim());
        match segment {
            Segment::F32 { keys, .. } => page::read_key_f32(keys, slot, width, key),
            Segment::Bf16 { keys, .. } => page::read_key_bf16(keys, slot, width, key),
            Segment::Int8 { keys, key_scales, .. } => page::read_key_int8(keys, key_scales[slot], slot, width, key),
        }
    }

    /// Writes value `index` of head `head` to `value` `[value_dim]`, as the cache holds it: rounded to its type.
    ///
    /// # Panics
    /// When there is no such head or value, or `value` has another length.
    pub fn read_value(&self, head: usize, index: usize, value: &mut [f32]) {
        self.check_head(head);
        assert!(index < self.len, "value {index} of a cache of {}", self.len);
        assert_eq!(value.len(), self.shape.value_dim, "a value is [value_dim]");
        let ((segment, slot), width) = (self.place(head, index), self.shape.padded_value_dim());
        match segment {
            Segment::F32 { values, .. } => page::read_value_f32(values, slot, width, value),
            Segment::Bf16 { values, .. } => page::read_value_bf16(values, slot, width, value),
            Segment::Int8 { values, value_scales, .. } => {
                page::read_value_int8(values, value_scales[slot], slot, width, value);
            }
        }
    }

    /// Adds value `index` of head `head` times `weight` to `output` `[value_dim]`; `room` is for a value.
    pub(crate) fn add_value(&self, head: usize, index: usize, weight: f32, output: &mut [f32], room: &mut Vec<f32>) {
        assert!(index < self.len, "value {index} of a cache of {}", self.len);
        match self.place(head, index) {
            (Segment::F32 { values, .. }, slot) => {
                let value = page::value_f32(values, slot, self.shape.padded_value_dim());
                add_scaled(output, weight, &value[..self.shape.value_dim]);
            }
            _ => {
                room.resize(self.shape.value_dim, 0.0);
                self.read_value(head, index, room);
                add_scaled(output, weight, room);
            }
        }
    }

    /// Asks for the addresses of the segment that holds slot `slot` of head `head`, if there is one: in a long walk they have
    /// left the processor's caches.
    pub(crate) fn fetch_segment(&self, head: usize, slot: usize) {
        let segments = &self.heads[head].segments;
        let segment = (slot / SEGMENT_KEYS).min(segments.len());
        fetch(&segments[segment..segments.len().min(segment + 1)]);
    }

    /// Asks for value `index` of head `head` ahead of its use.
    pub(crate) fn fetch_value(&self, head: usize, index: usize) {
        let (segment, slot) = self.place(head, index);
        let width = self.shape.padded_value_dim();
        match segment {
            Segment::F32 { values, .. } => fetch(page::value_f32(values, slot, width)),
            Segment::Bf16 { values, .. } => fetch(page::paired_value(values, slot, width)),
            Segment::Int8 { values, .. } => fetch(page::paired_value(values, slot, width)),
        }
    }

    fn check_head(&self, head: usize) {
        assert!(head < self.heads.len(), "head {head} of a cache of {} key/value heads", self.heads.len());
    }

    /// Whether the keys held will read the same after further appends. Those of an int8 cache do once the channel mean
    /// is settled.
    pub(crate) fn keys_are_final(&self) -> bool {
        self.kind != KeyValueType::Int8 || self.len >= KeyValueCache::MEAN_KEYS
    }

    /// The search index of method `dci` over these keys, kept from call to call.
    pub(crate) fn search_index(&self) -> &RwLock<Option<DciIndex>> {
        &self.search_index
    }

    /// The clusters of method `budgeted` over these keys, kept from call to call.
    pub(crate) fn clusters(&self) -> &RwLock<ClusterIndex> {
        &self.clusters
    }

    /// Bytes held by what methods `budgeted` and `dci` find keys with and by copies of keys and values
    /// ([`compact`](Self::compact)), beside [`bytes`](Self::bytes); 0 before their first call.
    pub fn index_bytes(&self) -> usize {
        let search = self.search_index.read().unwrap_or_else(PoisonError::into_inner);
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        let places: usize = self.heads.iter().map(|head| head.places.bytes()).sum();
        search.as_ref().map_or(0, DciIndex::bytes) + clusters.bytes() + places
    }

    /// What head `head` subtracts from its keys (empty: nothing); their logits lack `scale · query · mean`.
    pub(crate) fn key_mean(&self, head: usize) -> &[f32] {
        &self.heads[head].mean
    }

    /// Whatever keys of head `head` lie in the `keys` slots from `first` on, both multiples of [`PAGE_KEYS`], within one
    /// segment.
    pub(crate) fn block(&self, head: usize, first: usize, keys: usize) -> KeyBlock<'_> {
        let slots = first % SEGMENT_KEYS..first % SEGMENT_KEYS + keys;
        self.heads[head].segments[first / SEGMENT_KEYS].block(slots, self.shape)
    }

    /// As [`block`](Self::block), of the keys at these positions, which come to lie in `buffer`.
    pub(crate) fn block_in_order<'a>(
        &self,
        head: usize,
        first: usize,
        keys: usize,
        buffer: &'a mut Option<Segment>,
    ) -> KeyBlock<'a> {
        let shape = self.shape;
        let buffer = buffer.get_or_insert_with(|| Segment::new(self.kind, shape));
        for slot in 0..keys {
            let (segment, from) = self.place(head, first + slot);
            buffer.copy_slot(slot, segment, from, shape);
        }
        buffer.block(0..keys, shape)
    }

    /// Keys of head `head` that may lie elsewhere than at their own positions, in one another's places.
    pub(crate) fn moved(&self, head: usize) -> Range<usize> {
        self.heads[head].places.moved()
    }

    /// The segment of head `head` that holds key `index`, and its slot there.
    pub(crate) fn place(&self, head: usize, index: usize) -> (&Segment, usize) {
        let slot = self.slot(head, index);
        (&self.heads[head].segments[slot / SEGMENT_KEYS], slot % SEGMENT_KEYS)
    }

    /// The slot of key and value `index` of head `head`, counted over all segments.
    pub(crate) fn slot(&self, head: usize, index: usize) -> usize {
        self.heads[head].places.slot(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small cache that is cut and grows again, as between two questions on one text, stays in small pages.
    #[test]
    fn memory_that_was_cut_off_does_not_count() {
        let team = ThreadTeam::new(1);
        let tokens = 3 * SEGMENT_KEYS;
        for kind in KeyValueType::ALL {
            let mut cache = KeyValueCache::new(CacheShape { kv_heads: 2, key_dim: 8, value_dim: 16 }, kind);
            for kept in [0, 1, SEGMENT_KEYS, SEGMENT_KEYS + 1, 2 * SEGMENT_KEYS] {
                let (keys, values) = (vec![1.0; tokens * 2 * 8], vec![1.0; tokens * 2 * 16]);
                cache.append(&keys, &values, &team);
                assert_eq!(cache.arena.held(), cache.bytes(), "{}", kind.name());
                cache.truncate(kept);
                assert_eq!(cache.arena.held(), cache.bytes(), "{} cut to {kept}", kind.name());
            }
        }
    }

    #[test]
    fn room_grows_by_a_part_of_itself_and_can_be_made_before() {
        let team = ThreadTeam::new(1);
        let shape = CacheShape { kv_heads: 2, key_dim: 4, value_dim: 16 };
        let (keys, values) = (vec![1.0; SEGMENT_KEYS * 2 * 4], vec![1.0; SEGMENT_KEYS * 2 * 16]);
        for is_asked in [false, true] {
            let mut cache = KeyValueCache::new(shape, KeyValueType::Bf16);
            let mut grown = 0;
            for segment in 1..200 {
                let before = cache.capacity();
                if is_asked {
                    // As a session does before it reads one token.
                    cache.reserve(SEGMENT_KEYS);
                }
                cache.append(&keys, &values, &team);
                assert_eq!(cache.len(), segment * SEGMENT_KEYS);
                assert!(cache.capacity() >= cache.len(), "{} for {}", cache.capacity(), cache.len());
                assert!(
                    cache.capacity() <= cache.len() + cache.len() / GROWTH_PARTS,
                    "{segment}: {}",
                    cache.capacity()
                );
                grown += usize::from(cache.capacity() > before);
            }
            assert!(grown < 80, "grown {grown} times");
            assert_eq!(cache.bytes(), 2 * cache.capacity() * (4 + 16) * 2);
            assert_eq!(cache.occupied_bytes(), 2 * cache.len() * (4 + 16) * 2);
        }

        let mut cache = KeyValueCache::new(shape, KeyValueType::Bf16);
        assert_eq!(cache.occupied_bytes(), 0);
        cache.reserve(1);
        assert_eq!((cache.len(), cache.capacity()), (0, SEGMENT_KEYS));
        cache.append(&keys, &values, &team);
        cache.reserve(100 * SEGMENT_KEYS - 1);
        assert_eq!(cache.capacity(), 101 * SEGMENT_KEYS);
        cache.reserve(0);
        for _ in 0..100 {
            cache.append(&keys, &values, &team);
        }
        assert_eq!(cache.capacity(), 101 * SEGMENT_KEYS);
        cache.truncate(SEGMENT_KEYS + 1);
        assert_eq!(cache.capacity(), 2 * SEGMENT_KEYS, "what was cut off is given back");
        cache.reserve(5 * SEGMENT_KEYS);
        cache.truncate(SEGMENT_KEYS + 1);
        assert_eq!(cache.capacity(), 2 * SEGMENT_KEYS, "and what was not used");
        assert_eq!(cache.arena.held(), cache.bytes());
    }

    /// Small memory holds the first keys of all heads; beyond, those of one head lie one behind the other.
    #[test]
    fn the_keys_of_a_head_lie_together() {
        let shape = CacheShape { kv_heads: 4, key_dim: 64, value_dim: 64 };
        for appended in [1, 100] {
            let mut cache = KeyValueCache::new(shape, KeyValueType::Bf16);
            (0..100 / appended).for_each(|_| {
                cache.reserve(appended * SEGMENT_KEYS);
                cache.len += appended * SEGMENT_KEYS;
            });
            let bytes = cache.heads[0].segments[0].bytes();
            let together = |head: &Head| {
                let first = |segment: &Segment| match segment {
                    Segment::Bf16 { keys, .. } => keys.as_ptr().addr(),
                    _ => unreachable!("a cache of bf16"),
                };
                head.segments.windows(2).filter(|pair| first(&pair[1]).wrapping_sub(first(&pair[0])) == bytes).count()
            };
            let (least, most) = if appended == 100 { (70, 90) } else { (15, 75) };
            for (number, head) in cache.heads.iter().enumerate() {
                let together = together(head);
                assert!((least..most).contains(&together), "head {number}, {appended} appended: {together} of 99");
            }
        }
    }
}
