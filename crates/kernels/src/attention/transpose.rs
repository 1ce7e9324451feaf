//! Sixteen keys, row by row, turned into the columns of a page, and back.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::PAGE_KEYS;
use crate::InstructionSet;

/// Writes `rows`, sixteen of one length, to `page`, `[words][16]`: the keys of a page whatever their type, four bytes of a
/// key at a time. Where the page has more words than the rows, the rest of it becomes zero.
///
/// # Panics
/// When the rows are of several lengths, or `page` is no whole number of words for sixteen keys, or of fewer than the rows.
pub fn transpose_keys(rows: [&[u32]; PAGE_KEYS], page: &mut [u32]) {
    transpose_at(InstructionSet::current(), rows, page);
}

fn transpose_at(level: InstructionSet, rows: [&[u32]; PAGE_KEYS], page: &mut [u32]) {
    let words = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == words), "rows of several lengths");
    assert!(page.len().is_multiple_of(PAGE_KEYS), "a page of {} words", page.len());
    let (page, padding) = page.split_at_mut(words * PAGE_KEYS);
    padding.fill(0);
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        // SAFETY: a level is only in use when this machine has it; rows have `words` words, the page sixteen times as many.
        unsafe { transpose_avx512(rows.map(<[u32]>::as_ptr), page.as_mut_ptr(), words) };
        return;
    }
    let _ = level;
    for (word, lanes) in page.chunks_exact_mut(PAGE_KEYS).enumerate() {
        lanes.iter_mut().zip(rows).for_each(|(lane, row)| *lane = row[word]);
    }
}

/// Writes up to sixteen words of each key of `page`, `[words][16]`, to `rows`, `[16][words]`: the way back.
///
/// # Panics
/// When the page has more words, or there is no room for them.
pub(super) fn rows_of_page(level: InstructionSet, page: &[u32], rows: &mut [u32]) {
    let words = page.len() / PAGE_KEYS;
    assert!((1..=PAGE_KEYS).contains(&words), "{words} words of a key at a time");
    let rows = &mut rows[..PAGE_KEYS * words];
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        // SAFETY: a level is only in use when this machine has it; page and rows have `16 · words` words.
        unsafe { rows_avx512(page.as_ptr(), words, rows.as_mut_ptr()) };
        return;
    }
    let _ = level;
    for (key, row) in rows.chunks_exact_mut(words).enumerate() {
        row.iter_mut().zip(page.iter().skip(key).step_by(PAGE_KEYS)).for_each(|(word, source)| *word = *source);
    }
}

/// Writes rows to a page, 16 × 16 words at a time.
///
/// # Safety
/// The machine has AVX-512 F; each of `rows` is readable for `words`, `page` writable for `16 · words`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_avx512(rows: [*const u32; PAGE_KEYS], page: *mut u32, words: usize) {
    for first in (0..words).step_by(PAGE_KEYS) {
        let count = (words - first).min(PAGE_KEYS);
        let mask = (u32::MAX >> (32 - count)) as __mmask16;
        // A loop, as the `map` of an array is compiled without the instructions.
        let mut square = [_mm512_setzero_si512(); PAGE_KEYS];
        for (lanes, row) in square.iter_mut().zip(rows) {
            // SAFETY: the mask holds the load within the row.
            *lanes = unsafe { _mm512_maskz_loadu_epi32(mask, row.add(first).cast()) };
        }
        for (column, lanes) in transposed(square).into_iter().enumerate().take(count) {
            // SAFETY: word `first + column` of the page is below `words`.
            unsafe { _mm512_storeu_si512(page.add((first + column) * PAGE_KEYS).cast(), lanes) };
        }
    }
}

/// Writes the first `words` words of a page to sixteen rows, one behind the other in `rows`.
///
/// # Safety
/// The machine has AVX-512 F; `page` is readable and `rows` writable for `16 · words` words, of which there are up to 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn rows_avx512(page: *const u32, words: usize, rows: *mut u32) {
    let mut square = [_mm512_setzero_si512(); PAGE_KEYS];
    for (word, lanes) in square.iter_mut().enumerate().take(words) {
        // SAFETY: word `word` of the page is below `words`.
        *lanes = unsafe { _mm512_loadu_si512(page.add(word * PAGE_KEYS).cast()) };
    }
    let mask = ((1_u32 << words) - 1) as __mmask16;
    for (row, lanes) in transposed(square).into_iter().enumerate() {
        // SAFETY: the mask holds the store within the row.
        unsafe { _mm512_mask_storeu_epi32(rows.add(row * words).cast(), mask, lanes) };
    }
}

/// The columns of a square of 16 × 16 words, by way of squares of 2 × 2, 4 × 4 and 8 × 8.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(row: [__m512i; PAGE_KEYS]) -> [__m512i; PAGE_KEYS] {
    let (mut twos, mut fours) = ([_mm512_setzero_si512(); PAGE_KEYS], [_mm512_setzero_si512(); PAGE_KEYS]);
    for pair in (0..PAGE_KEYS).step_by(2) {
        twos[pair] = _mm512_unpacklo_epi32(row[pair], row[pair + 1]);
        twos[pair + 1] = _mm512_unpackhi_epi32(row[pair], row[pair + 1]);
    }
    for four in (0..PAGE_KEYS).step_by(4) {
        fours[four] = _mm512_unpacklo_epi64(twos[four], twos[four + 2]);
        fours[four + 1] = _mm512_unpackhi_epi64(twos[four], twos[four + 2]);
        fours[four + 2] = _mm512_unpacklo_epi64(twos[four + 1], twos[four + 3]);
        fours[four + 3] = _mm512_unpackhi_epi64(twos[four + 1], twos[four + 3]);
    }
    // Lane `l` of `fours[4i + j]` now holds column `4l + j` of rows 4i to 4i + 3.
    let mut columns = [_mm512_setzero_si512(); PAGE_KEYS];
    for column in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(
            #[inline(always)]
            |four| fours[four + column],
        );
        let (low_even, high_even) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (low_odd, high_odd) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        columns[column] = _mm512_shuffle_i32x4::<0x88>(low_even, high_even);
        columns[column + 4] = _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd);
        columns[column + 8] = _mm512_shuffle_i32x4::<0xdd>(low_even, high_even);
        columns[column + 12] = _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_to_their_lanes() {
        for level in InstructionSet::ALL.into_iter().filter(|level| *level <= InstructionSet::detected()) {
            for (words, padding) in
                [(0, 2), (1, 0), (2, 0), (7, 1), (15, 1), (16, 0), (17, 3), (32, 0), (40, 16), (64, 0)]
            {
                let rows: [Vec<u32>; PAGE_KEYS] =
                    std::array::from_fn(|row| (0..words).map(|word| (word * PAGE_KEYS + row) as u32 + 1).collect());
                let mut page = vec![u32::MAX; PAGE_KEYS * (words + padding)];
                transpose_at(level, rows.each_ref().map(Vec::as_slice), &mut page);
                let expected = (1..=PAGE_KEYS * words).map(|word| word as u32);
                let expected: Vec<u32> = expected.chain(vec![0; PAGE_KEYS * padding]).collect();
                assert_eq!(page, expected, "{words} words, {}", level.name());
                if (1..=PAGE_KEYS).contains(&words) {
                    let mut back = vec![u32::MAX; PAGE_KEYS * words + 3];
                    rows_of_page(level, &page[..PAGE_KEYS * words], &mut back);
                    assert_eq!(back[..PAGE_KEYS * words], rows.concat(), "{words} words, {}", level.name());
                    assert_eq!(back[PAGE_KEYS * words..], [u32::MAX; 3], "{words} words, {}", level.name());
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "several lengths")]
    fn rows_are_of_one_length() {
        let mut rows = [&[1, 2][..]; PAGE_KEYS];
        rows[3] = &[1];
        transpose_keys(rows, &mut [0; 2 * PAGE_KEYS]);
    }
}
