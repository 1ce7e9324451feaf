//! 8-bit micro-kernels with AVX-512 VNNI: 6 rows × 2 panels, a block of 32 inputs a step (`vpdpbusd`).
//!
//! Weights are unsigned codes (value + offset), activations signed 8-bit integers with one scale for each block of
//! 32. The integer sum of a block starts at −offset · Σ activations, which takes the offset away exactly; then it is
//! scaled and added in f32. Types with minima subtract minimum · scale · Σ activations.
//!
//! One kernel serves all types: [`PackedBlocks`] says how to read codes and scales. A few rows read the packed bits
//! directly, so that each byte of weights crosses the memory bus once; many rows first expand a panel to one byte a
//! code ([`Expanded`]), so that the unpacking is paid once and not once a tile.
//!
//! Activations of a block, in 32-bit words: `[8][rows]` quads of codes, `[rows]` f32 scale, `[2][rows]` corrections:
//! one i32 −offset · sum (two for two scales, each of 16 inputs), or one f32 scale · sum.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::WeightType;
use super::blocks::{has_minima, offset};
use super::float::{load_avx512, store_avx512};
use super::packed::{BLOCK, codes_offset, fifths_offset, group_blocks, group_bytes};
use super::tile::{TILE_ROWS, Tile, TileKernel, TileKernels, TileTable};

/// 32-bit words that a row of activations takes for each block.
pub(super) const BLOCK_WORDS: usize = BLOCK / 4 + 3;

/// How the blocks of 32 weights of 16 columns lie in memory.
///
/// # Safety
/// Every method needs `group` to point at `GROUP_BYTES` readable bytes, `slot < GROUP_BLOCKS`, `quad < 8`,
/// `half < SCALES`, and a processor with AVX-512 VNNI (level [`crate::InstructionSet::Avx512Vnni`]).
unsafe trait PackedBlocks {
    /// Scales of a block and column.
    const SCALES: usize;
    /// Whether a minimum is subtracted (and codes have no offset).
    const MINIMA: bool;
    const GROUP_BLOCKS: usize;
    const GROUP_BYTES: usize;
    /// How far ahead to ask for weights, in bytes; 0 where the processor fetches them in time by itself (measured:
    /// asking slows the other types by a fifth).
    const FETCH_AHEAD: usize;

    /// Codes of quad `quad`: byte `4 · column + i` belongs to input `4 · quad + i`.
    unsafe fn codes(group: *const u8, slot: usize, quad: usize) -> __m512i;
    /// Scales of the 16 columns.
    unsafe fn scale(group: *const u8, slot: usize, half: usize) -> __m512;
    /// Minima of the 16 columns.
    unsafe fn minimum(group: *const u8, slot: usize) -> __m512;
}

macro_rules! load {
    ($group:ident, $offset:expr) => {
        _mm512_loadu_si512($group.add($offset).cast())
    };
}

/// f32 of 16 f16.
macro_rules! load_f16 {
    ($group:ident, $offset:expr) => {
        _mm512_cvtph_ps(_mm256_loadu_si256($group.add($offset).cast()))
    };
}

/// f32 of 16 u8.
macro_rules! load_u8 {
    ($group:ident, $offset:expr) => {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128($group.add($offset).cast())))
    };
}

/// Low (quads 0–3) or high (4–7) four bits of each byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(bytes: __m512i, quad: usize) -> __m512i {
    let bytes = if quad < 4 { bytes } else { _mm512_srli_epi16(bytes, 4) };
    _mm512_and_si512(bytes, _mm512_set1_epi8(15))
}

/// Codes of four bits of a type, and a fifth that lies apart.
macro_rules! load_nibbles {
    ($type:expr, $group:ident, $slot:ident, $quad:ident) => {
        nibbles(load!($group, codes_offset($type) + ($slot * 4 + $quad % 4) * 64), $quad)
    };
}
macro_rules! load_five_bits {
    ($type:expr, $group:ident, $slot:ident, $quad:ident) => {{
        let fifth = $group.add(fifths_offset($type) + $slot * 64 + $quad * 8).cast::<u64>().read_unaligned();
        let codes = load_nibbles!($type, $group, $slot, $quad);
        _mm512_mask_add_epi8(codes, fifth, codes, _mm512_set1_epi8(16))
    }};
}

macro_rules! packed_blocks {
    ($name:ident, $type:expr, $scales:literal, $fetch_ahead:literal, |$group:ident, $slot:ident, $quad:ident| $codes:expr,
     |$half:ident| $scale:expr, $minimum:expr) => {
        struct $name;
        // SAFETY: offsets are those of `packed`, inside `group_bytes`.
        unsafe impl PackedBlocks for $name {
            const SCALES: usize = $scales;
            const MINIMA: bool = has_minima($type);
            const GROUP_BLOCKS: usize = group_blocks($type);
            const GROUP_BYTES: usize = group_bytes($type);
            const FETCH_AHEAD: usize = $fetch_ahead;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
            unsafe fn codes($group: *const u8, $slot: usize, $quad: usize) -> __m512i {
                // SAFETY: inside the group, as the trait asks.
                unsafe { $codes }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
            unsafe fn scale($group: *const u8, $slot: usize, $half: usize) -> __m512 {
                let _ = ($slot, $half);
                // SAFETY: inside the group, as the trait asks.
                unsafe { $scale }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
            unsafe fn minimum($group: *const u8, $slot: usize) -> __m512 {
                let _ = ($group, $slot);
                #[allow(unused_unsafe)]
                // SAFETY: inside the group, as the trait asks.
                unsafe {
                    $minimum
                }
            }
        }
    };
}

packed_blocks!(
    Q80,
    WeightType::Q8_0,
    1,
    0,
    |group, slot, quad| load!(group, codes_offset(WeightType::Q8_0) + (slot * 8 + quad) * 64),
    |half| load_f16!(group, slot * 32),
    _mm512_setzero_ps()
);
packed_blocks!(
    Q40,
    WeightType::Q4_0,
    1,
    0,
    |group, slot, quad| load_nibbles!(WeightType::Q4_0, group, slot, quad),
    |half| load_f16!(group, slot * 32),
    _mm512_setzero_ps()
);
packed_blocks!(
    Q41,
    WeightType::Q4_1,
    1,
    0,
    |group, slot, quad| load_nibbles!(WeightType::Q4_1, group, slot, quad),
    |half| load_f16!(group, slot * 32),
    load_f16!(group, 64 + slot * 32)
);
packed_blocks!(
    Q50,
    WeightType::Q5_0,
    1,
    0,
    |group, slot, quad| load_five_bits!(WeightType::Q5_0, group, slot, quad),
    |half| load_f16!(group, slot * 32),
    _mm512_setzero_ps()
);
packed_blocks!(
    Q51,
    WeightType::Q5_1,
    1,
    0,
    |group, slot, quad| load_five_bits!(WeightType::Q5_1, group, slot, quad),
    |half| load_f16!(group, slot * 32),
    load_f16!(group, 64 + slot * 32)
);
packed_blocks!(
    Q4K,
    WeightType::Q4_K,
    1,
    0,
    |group, slot, quad| load_nibbles!(WeightType::Q4_K, group, slot, quad),
    |half| _mm512_mul_ps(load_f16!(group, 0), load_u8!(group, 64 + slot * 16)),
    _mm512_mul_ps(load_f16!(group, 32), load_u8!(group, 192 + slot * 16))
);
packed_blocks!(
    Q5K,
    WeightType::Q5_K,
    1,
    768,
    |group, slot, quad| load_five_bits!(WeightType::Q5_K, group, slot, quad),
    |half| _mm512_mul_ps(load_f16!(group, 0), load_u8!(group, 64 + slot * 16)),
    _mm512_mul_ps(load_f16!(group, 32), load_u8!(group, 192 + slot * 16))
);
packed_blocks!(
    Q6K,
    WeightType::Q6_K,
    2,
    0,
    |group, slot, quad| {
        let codes = nibbles(load!(group, codes_offset(WeightType::Q6_K) + (slot * 6 + quad % 4) * 64), quad);
        let pairs = load!(group, codes_offset(WeightType::Q6_K) + (slot * 6 + 4 + quad / 4) * 64);
        let high = match quad % 4 {
            0 => _mm512_slli_epi16(pairs, 4),
            1 => _mm512_slli_epi16(pairs, 2),
            2 => pairs,
            _ => _mm512_srli_epi16(pairs, 2),
        };
        // codes | (high & 0x30)
        _mm512_ternarylogic_epi32(codes, high, _mm512_set1_epi8(0x30), 0b1111_1000)
    },
    |half| {
        let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(group.add(64 + (slot * 2 + half) * 16).cast()));
        _mm512_mul_ps(load_f16!(group, 0), _mm512_cvtepi32_ps(scales))
    },
    _mm512_setzero_ps()
);

/// Blocks of a packed type spread out: f32 scales (and minima) of 16 columns, then `[8][16][4]` codes.
struct Expanded<W>(PhantomData<W>);

// SAFETY: offsets lie inside `GROUP_BYTES`.
unsafe impl<W: PackedBlocks> PackedBlocks for Expanded<W> {
    const SCALES: usize = W::SCALES;
    const MINIMA: bool = W::MINIMA;
    const GROUP_BLOCKS: usize = 1;
    const GROUP_BYTES: usize = 64 * (W::SCALES + W::MINIMA as usize + 8);
    const FETCH_AHEAD: usize = 0;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
    unsafe fn codes(group: *const u8, _: usize, quad: usize) -> __m512i {
        // SAFETY: inside the group, as the trait asks.
        unsafe { load!(group, 64 * (W::SCALES + W::MINIMA as usize + quad)) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
    unsafe fn scale(group: *const u8, _: usize, half: usize) -> __m512 {
        // SAFETY: inside the group, as the trait asks.
        unsafe { _mm512_loadu_ps(group.add(64 * half).cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
    unsafe fn minimum(group: *const u8, _: usize) -> __m512 {
        // SAFETY: inside the group, as the trait asks.
        unsafe { _mm512_loadu_ps(group.add(64 * W::SCALES).cast()) }
    }
}

/// # Safety
/// The preconditions of [`Tile`]; `steps` is a multiple of `GROUP_BLOCKS`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
unsafe fn multiply<W: PackedBlocks, const R: usize, const P: usize>(tile: &Tile) {
    // SAFETY: preconditions 3 and 4.
    let mut sums = unsafe { load_avx512::<R, P>(tile) };
    let mut activations = tile.activations;
    let mut group = tile.weights;
    for _ in 0..tile.steps / W::GROUP_BLOCKS {
        for slot in 0..W::GROUP_BLOCKS {
            // SAFETY: `activations` and `group` stay inside what preconditions 1 and 2 give: `steps` blocks of
            // `BLOCK_WORDS · R` words, and `steps / GROUP_BLOCKS` groups of each panel.
            unsafe {
                add_block::<W, R, P>(tile.panel_stride, activations, group, slot, &mut sums);
                activations = activations.add(BLOCK_WORDS * R);
            }
        }
        group = group.wrapping_add(W::GROUP_BYTES);
    }
    // SAFETY: preconditions 3 and 4.
    unsafe { store_avx512(tile, &sums) }
}

/// # Safety
/// `activations` points at `BLOCK_WORDS · R` words, `group + p · panel_stride` at a group of panel `p < P`; otherwise
/// as [`PackedBlocks`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
unsafe fn add_block<W: PackedBlocks, const R: usize, const P: usize>(
    panel_stride: usize,
    activations: *const u32,
    group: *const u8,
    slot: usize,
    sums: &mut [[__m512; P]; R],
) {
    if W::FETCH_AHEAD > 0 {
        let block_bytes = W::GROUP_BYTES / W::GROUP_BLOCKS;
        for panel in 0..P {
            let ahead = group.wrapping_add(panel * panel_stride + slot * block_bytes + W::FETCH_AHEAD);
            for line in 0..block_bytes.div_ceil(64) {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * 64).cast());
            }
        }
    }
    // SAFETY: all word offsets are below `BLOCK_WORDS · R`; the rest as the caller promises.
    unsafe {
        let word = |at: usize| _mm512_set1_epi32(*activations.add(at) as i32);
        for half in 0..W::SCALES {
            let mut dots = [[_mm512_setzero_si512(); P]; R];
            if !W::MINIMA {
                for row in 0..R {
                    dots[row] = [word((9 + half) * R + row); P];
                }
            }
            for quad in half * 8 / W::SCALES..(half + 1) * 8 / W::SCALES {
                let mut codes = [_mm512_setzero_si512(); P];
                for panel in 0..P {
                    codes[panel] = W::codes(group.add(panel * panel_stride), slot, quad);
                }
                for row in 0..R {
                    let activation = word(quad * R + row);
                    for panel in 0..P {
                        dots[row][panel] = _mm512_dpbusd_epi32(dots[row][panel], codes[panel], activation);
                    }
                }
            }
            for panel in 0..P {
                let scale = W::scale(group.add(panel * panel_stride), slot, half);
                for row in 0..R {
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[row][panel]), scale);
                    let activation_scale = _mm512_castsi512_ps(word(8 * R + row));
                    sums[row][panel] = _mm512_fmadd_ps(scaled, activation_scale, sums[row][panel]);
                }
            }
        }
        if W::MINIMA {
            for panel in 0..P {
                let minimum = W::minimum(group.add(panel * panel_stride), slot);
                for row in 0..R {
                    let sum = _mm512_castsi512_ps(word(9 * R + row));
                    sums[row][panel] = _mm512_fnmadd_ps(minimum, sum, sums[row][panel]);
                }
            }
        }
    }
}

/// Spreads `blocks` blocks of a panel out, from block `first` on.
///
/// # Safety
/// `panel` points at whole groups that hold block `first + blocks − 1`; the processor has AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
unsafe fn expand<W: PackedBlocks>(panel: *const u8, first: usize, output: &mut [u8]) {
    let bytes = <Expanded<W> as PackedBlocks>::GROUP_BYTES;
    for (index, output) in output.chunks_exact_mut(bytes).enumerate() {
        let (group, slot) = ((first + index) / W::GROUP_BLOCKS, (first + index) % W::GROUP_BLOCKS);
        // SAFETY: the group lies inside the panel, as the caller promises; `output` has `GROUP_BYTES` bytes.
        unsafe {
            let group = panel.add(group * W::GROUP_BYTES);
            let mut output = output.as_mut_ptr();
            for half in 0..W::SCALES {
                _mm512_storeu_ps(output.cast(), W::scale(group, slot, half));
                output = output.add(64);
            }
            if W::MINIMA {
                _mm512_storeu_ps(output.cast(), W::minimum(group, slot));
                output = output.add(64);
            }
            for quad in 0..8 {
                _mm512_storeu_si512(output.cast(), W::codes(group, slot, quad));
                output = output.wrapping_add(64);
            }
        }
    }
}

/// The kernels of one GGML type.
pub(super) struct Int8Kernels {
    /// For a few rows: reads the packed bits.
    pub direct: TileKernels,
    /// For many rows; `None` for Q8_0, whose packed codes are bytes already.
    pub expanded: Option<ExpandedKernels>,
}

/// Kernels that read expanded panels.
pub(super) struct ExpandedKernels {
    pub kernels: TileKernels,
    /// Bytes of an expanded block of 32 inputs of a panel.
    pub block_bytes: usize,
    expand: unsafe fn(*const u8, usize, &mut [u8]),
    weight_type: WeightType,
}

macro_rules! tile_kernels {
    ($weights:ty, $name:literal) => {{
        static TABLE: [&[TileKernel]; TILE_ROWS] = [
            &[multiply::<$weights, 1, 1>, multiply::<$weights, 1, 2>],
            &[multiply::<$weights, 2, 1>, multiply::<$weights, 2, 2>],
            &[multiply::<$weights, 3, 1>, multiply::<$weights, 3, 2>],
            &[multiply::<$weights, 4, 1>, multiply::<$weights, 4, 2>],
            &[multiply::<$weights, 5, 1>, multiply::<$weights, 5, 2>],
            &[multiply::<$weights, 6, 1>, multiply::<$weights, 6, 2>],
        ];
        TileKernels { table: TileTable::Vectors(&TABLE), name: $name }
    }};
}

macro_rules! kernels {
    ($weights:ty, $type:expr, $name:literal) => {
        Int8Kernels {
            direct: tile_kernels!($weights, $name),
            expanded: Some(ExpandedKernels {
                kernels: tile_kernels!(Expanded<$weights>, $name),
                block_bytes: <Expanded<$weights> as PackedBlocks>::GROUP_BYTES,
                expand: expand::<$weights>,
                weight_type: $type,
            }),
        }
    };
}

/// The kernels of a GGML type.
pub(super) fn kernels(weight_type: WeightType) -> Int8Kernels {
    match weight_type {
        WeightType::Q8_0 => Int8Kernels { direct: tile_kernels!(Q80, "avx512-vnni-q8_0-6x32"), expanded: None },
        WeightType::Q4_0 => kernels!(Q40, WeightType::Q4_0, "avx512-vnni-q4_0-6x32"),
        WeightType::Q4_1 => kernels!(Q41, WeightType::Q4_1, "avx512-vnni-q4_1-6x32"),
        WeightType::Q5_0 => kernels!(Q50, WeightType::Q5_0, "avx512-vnni-q5_0-6x32"),
        WeightType::Q5_1 => kernels!(Q51, WeightType::Q5_1, "avx512-vnni-q5_1-6x32"),
        WeightType::Q4_K => kernels!(Q4K, WeightType::Q4_K, "avx512-vnni-q4_k-6x32"),
        WeightType::Q5_K => kernels!(Q5K, WeightType::Q5_K, "avx512-vnni-q5_k-6x32"),
        WeightType::Q6_K => kernels!(Q6K, WeightType::Q6_K, "avx512-vnni-q6_k-6x32"),
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => unreachable!("floats have no 8-bit kernel"),
    }
}

impl ExpandedKernels {
    /// Spreads blocks of a panel out, from block `first` on, as many as `output` takes.
    ///
    /// # Safety
    /// The processor has AVX-512 VNNI.
    pub unsafe fn expand(&self, panel: &[u8], first: usize, output: &mut [u8]) {
        let blocks = output.len() / self.block_bytes;
        let groups = (first + blocks).div_ceil(group_blocks(self.weight_type));
        assert!(groups * group_bytes(self.weight_type) <= panel.len(), "blocks lie inside the panel");
        // SAFETY: checked above.
        unsafe { (self.expand)(panel.as_ptr(), first, output) }
    }
}

/// Magnitudes below this count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-35;

/// The scale of a block of activations with this largest magnitude.
#[inline]
pub(super) fn scale_of(largest: f32) -> f32 {
    match largest {
        largest if !largest.is_finite() => f32::NAN,
        largest if largest < SMALLEST => 0.0,
        largest => largest / 127.0,
    }
}

/// Writes blocks of rounded activations to the layout of the module.
pub(super) struct BlockWriter {
    rows: usize,
    minima: bool,
    /// Whether each half of a block has a sum of its own.
    pub halves: bool,
    offset: i32,
}

impl BlockWriter {
    pub fn new(weight_type: WeightType, rows: usize) -> Self {
        let offset = i32::from(offset(weight_type));
        Self { rows, minima: has_minima(weight_type), halves: weight_type == WeightType::Q6_K, offset }
    }

    /// Writes a block of row `row` to `words`, that of all rows. `sums` are those of the codes: of each half, or of all and 0.
    #[inline]
    pub fn write(&self, words: &mut [u32], row: usize, quads: &[u32; BLOCK / 4], scale: f32, sums: [i32; 2]) {
        let rows = self.rows;
        for (quad, &code) in quads.iter().enumerate() {
            words[quad * rows + row] = code;
        }
        words[8 * rows + row] = scale.to_bits();
        words[9 * rows + row] =
            if self.minima { (scale * sums[0] as f32).to_bits() } else { (-self.offset * sums[0]) as u32 };
        words[10 * rows + row] = (-self.offset * sums[1]) as u32;
    }
}

/// Rounds rows `[rows][in_features]` to the layout of the module: for each row and block of 32, scale = largest
/// magnitude / 127, codes to nearest even. A block with a NaN or an infinity gets the scale NaN, so that the output
/// row becomes NaN. Blocks past `in_features` are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,f16c")]
pub(super) fn quantise(weight_type: WeightType, input: &[f32], in_features: usize, output: &mut [u32]) {
    let rows = input.len() / in_features;
    let writer = BlockWriter::new(weight_type, rows);
    output[in_features / BLOCK * BLOCK_WORDS * rows..].fill(0);
    for (row, values) in input.chunks_exact(in_features).enumerate() {
        for (values, words) in values.chunks_exact(BLOCK).zip(output.chunks_exact_mut(BLOCK_WORDS * rows)) {
            // SAFETY: `values` holds 32 floats.
            let (first, second) =
                unsafe { (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))) };
            // As integers the bits of magnitudes are ordered like the numbers, infinity and NaN above all others.
            let magnitudes =
                _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(first)), _mm512_castps_si512(_mm512_abs_ps(second)));
            let largest = f32::from_bits(_mm512_reduce_max_epu32(magnitudes));
            let scale = scale_of(largest);
            let inverse = _mm512_set1_ps(127.0 / largest);
            let usable = if scale > 0.0 { 0xffff } else { 0 };
            let first = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(first, inverse));
            let second = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(second, inverse));
            let mut codes = [0_u32; 8];
            // SAFETY: `codes` has 32 bytes.
            unsafe {
                _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(first));
                _mm_storeu_si128(codes.as_mut_ptr().add(4).cast(), _mm512_cvtsepi32_epi8(second));
            }
            let sums = match writer.halves {
                true => [_mm512_reduce_add_epi32(first), _mm512_reduce_add_epi32(second)],
                false => [_mm512_reduce_add_epi32(_mm512_add_epi32(first, second)), 0],
            };
            writer.write(words, row, &codes, scale, sums);
        }
    }
}
