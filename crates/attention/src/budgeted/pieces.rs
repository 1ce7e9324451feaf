//! Calls of few tiles, such as decode steps: what each tile computes is chosen first; then the keys of all tiles are cut into
//! pieces of much the same size, so that threads share the work evenly however differently heads choose.
//!
//! Pieces depend on shapes and choices alone, never on the number of threads, so the result does not either.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use iceformer_kernels::attention::{AttentionTile, MICRO_ROWS};

use super::chosen::Chosen;
use super::measurement::Answer;
use super::region::{CLUSTER_KEYS, FIRST_KEYS, SEGMENT_CLUSTERS};
use super::tile::{Budgeted, TileScratch, Work};
use crate::output::Output;
use crate::strided::FromF32;
use crate::tiles::{self, HeadKeys, Part, Plan, Task};
use crate::{HeadReport, Report, ThreadTeam};

/// Selected clusters are cut into so many pieces, …
const WANTED_PIECES: usize = 32;
/// … each with no fewer than this, but for the last of a tile.
const LEAST_CLUSTERS: usize = 16;
/// Clusters between two places where they may be cut: where a block of them ends.
const CUT_CLUSTERS: usize = SEGMENT_CLUSTERS;
/// Tiles of many rows from which each computes what it has selected itself: a piece begins with all rows of its tile and
/// ends with a part to be merged, which is a fifteenth of a prompt's time where each of eighteen tiles is cut in two.
const ENOUGH_TILES: usize = WANTED_PIECES / 2;

/// Buffers reused from call to call.
#[derive(Default)]
pub(super) struct PieceScratch {
    /// One per tile.
    choices: Vec<Choice>,
    /// One per piece.
    parts: Vec<Part>,
}

/// What a tile has computed and what is left to pieces.
#[derive(Default)]
struct Choice {
    chosen: Chosen,
    reports: Vec<HeadReport>,
    /// Near keys and what was left to the estimate; all keys where tiles are not cut.
    part: Part,
}

/// A tile: its rows, the regions that they see from afar, and whether all keys of these are computed.
struct Tile<'a> {
    task: Task,
    regions: Vec<usize>,
    is_exact: bool,
    /// Whether that is as clusters do not pay.
    fell_back: bool,
    /// The exact rows, where they are known.
    answer: Option<&'a Part>,
}

/// Some keys of a tile.
struct Piece {
    tile: usize,
    keys: PieceKeys,
}

enum PieceKeys {
    /// Those at these positions.
    All(Range<usize>),
    /// Those at these positions, for the micro-tiles that compute everything.
    Exact(Range<usize>),
    /// Those of the clusters among these that micro-tiles have selected.
    Selected(Range<u32>),
}

/// What threads do before any cluster is computed.
enum First<'a> {
    Choose(&'a Tile<'a>, &'a mut Choice),
    Compute(&'a Piece, &'a mut Part),
}

/// Runs the call of `budgeted`, cut as `plan` says, but for heads whose `answers` are known.
pub(super) fn run<T: FromF32>(
    budgeted: &Budgeted<'_>,
    plan: &Plan,
    output: Output<'_, T>,
    team: &ThreadTeam,
    (scratch, own): (&[Mutex<AttentionTile>], &[Mutex<TileScratch>]),
    answers: &[Answer],
    PieceScratch { choices, parts }: &mut PieceScratch,
) -> Report {
    let call = &budgeted.call;
    let tiles: Vec<Tile> =
        (0..plan.tiles()).map(|tile| Tile::new(budgeted, plan.tile(tile, call.cache.len()), answers)).collect();
    let compute = |piece: &Piece, chosen: &Chosen, part: &mut Part, worker: usize| {
        let mut tile = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        tiles[piece.tile].compute(budgeted, &piece.keys, chosen, &mut tile);
        part.fill(&tile, tiles[piece.tile].work(budgeted).rows(), call.cache.shape().value_dim);
    };

    let is_cut = tiles.len() < ENOUGH_TILES || call.tokens() < MICRO_ROWS;
    // The tiles that choose nothing need not wait for the others.
    let mut pieces = Vec::new();
    for (index, tile) in tiles.iter().enumerate().filter(|(_, tile)| tile.is_exact && tile.answer.is_none()) {
        push_ranges(index, tile.seen(budgeted), plan.range_keys(), PieceKeys::All, &mut pieces);
    }
    choices.resize_with(choices.len().max(tiles.len()), Choice::default);
    let choices = &mut choices[..tiles.len()];
    parts.resize_with(parts.len().max(pieces.len()), Part::default);
    let choose = tiles.iter().zip(choices.iter_mut()).map(|(tile, choice)| First::Choose(tile, choice));
    let compute_all = pieces.iter().zip(parts.iter_mut()).map(|(piece, part)| First::Compute(piece, part));
    let mut first: Vec<First<'_>> = choose.chain(compute_all).collect();
    team.run_chunks(&mut first, 1, |_, first, worker| match &mut first[0] {
        First::Choose(tile, choice) => {
            let mut own = own[worker].lock().unwrap_or_else(PoisonError::into_inner);
            tile.choose(
                budgeted,
                is_cut,
                &mut scratch[worker].lock().unwrap_or_else(PoisonError::into_inner),
                &mut own,
                choice,
            );
        }
        First::Compute(piece, part) => compute(piece, &Chosen::default(), part, worker),
    });

    let computed = pieces.len();
    let selected: usize = choices.iter().map(|choice| choice.chosen.selected()).sum();
    let piece_clusters = selected.div_ceil(WANTED_PIECES).max(LEAST_CLUSTERS);
    for (index, (tile, choice)) in
        tiles.iter().zip(&*choices).enumerate().filter(|(_, (tile, _))| is_cut && !tile.is_exact)
    {
        push_selected(index, &choice.chosen, piece_clusters, &mut pieces);
        if choice.chosen.any_is_exact() {
            push_ranges(index, tile.work(budgeted).far_keys(), plan.range_keys(), PieceKeys::Exact, &mut pieces);
        }
    }
    parts.resize_with(parts.len().max(pieces.len()), Part::default);
    let mut second: Vec<_> = pieces.iter().zip(parts.iter_mut()).skip(computed).collect();
    team.run_chunks(&mut second, 1, |_, second, worker| {
        let (piece, part) = &mut second[0];
        compute(piece, &choices[piece.tile].chosen, part, worker);
    });

    let parts = &parts[..pieces.len()];
    audit(budgeted, &tiles, choices, (&pieces, parts), own, team);
    // What is known of a tile, or what it has computed itself, comes first.
    let own: Vec<Option<&Part>> = tiles
        .iter()
        .zip(&*choices)
        .map(|(tile, choice)| tile.answer.or_else(|| (!tile.is_exact).then_some(&choice.part)))
        .collect();
    plan.write_merged(call, output, team, |tile| own[tile].into_iter().chain(parts_of(tile, &pieces, parts)));
    super::sum_up(call, plan, choices.iter().map(|choice| choice.reports.as_slice()))
}

/// Audits the tiles whose turn it is, of whose `pieces` these are the `parts`.
fn audit(
    budgeted: &Budgeted<'_>,
    tiles: &[Tile<'_>],
    choices: &mut [Choice],
    (pieces, parts): (&[Piece], &[Part]),
    own: &[Mutex<TileScratch>],
    team: &ThreadTeam,
) {
    let is_audited = |tile: &Tile<'_>| !tile.is_exact && budgeted.audits(&tile.task);
    let mut audited: Vec<_> = tiles.iter().zip(choices).enumerate().filter(|(_, (tile, _))| is_audited(tile)).collect();
    team.run_chunks(&mut audited, 1, |_, audited, worker| {
        let (index, (tile, Choice { chosen, reports, part })) = &mut audited[0];
        let mut own = own[worker].lock().unwrap_or_else(PoisonError::into_inner);
        tile.work(budgeted).audit(chosen, &mut own, reports, |row, output| {
            tiles::merge(std::iter::once(&*part).chain(parts_of(*index, pieces, parts)), row, output);
        });
    });
}

/// The parts of the pieces of `tile`.
fn parts_of<'p>(tile: usize, pieces: &'p [Piece], parts: &'p [Part]) -> impl Iterator<Item = &'p Part> + Clone {
    pieces.iter().zip(parts).filter(move |(piece, _)| piece.tile == tile).map(|(_, part)| part)
}

/// Cuts `keys` of `tile` where a multiple of `range_keys` is.
fn push_ranges(
    tile: usize,
    keys: Range<usize>,
    range_keys: usize,
    piece_keys: impl Fn(Range<usize>) -> PieceKeys,
    pieces: &mut Vec<Piece>,
) {
    let mut first = keys.start;
    while first < keys.end {
        let end = keys.end.min((first / range_keys + 1) * range_keys);
        pieces.push(Piece { tile, keys: piece_keys(first..end) });
        first = end;
    }
}

/// Cuts the clusters that micro-tiles of `tile` have selected, at places where `piece_clusters` of them or a few more have
/// come together.
fn push_selected(tile: usize, chosen: &Chosen, piece_clusters: usize, pieces: &mut Vec<Piece>) {
    let mut counts = Vec::new();
    for &cluster in chosen.selections().flatten() {
        // The first segment of a region begins with keys that are in none.
        let place = (cluster as usize + FIRST_KEYS / CLUSTER_KEYS) / CUT_CLUSTERS;
        counts.resize(counts.len().max(place + 1), 0);
        counts[place] += 1;
    }
    let (mut first, mut together) = (0, 0);
    for (place, count) in counts.iter().enumerate() {
        together += count;
        if together >= piece_clusters || place + 1 == counts.len() {
            let end = (CUT_CLUSTERS * (place + 1) - FIRST_KEYS / CLUSTER_KEYS) as u32;
            pieces.push(Piece { tile, keys: PieceKeys::Selected(first..end) });
            (first, together) = (end, 0);
        }
    }
}

impl<'a> Tile<'a> {
    fn new(budgeted: &Budgeted<'_>, task: Task, answers: &'a [Answer]) -> Self {
        let regions = budgeted.far_regions(&task);
        // An answer holds all tokens of the call, which are those of one tile.
        let answer = answers.get(task.kv_head).filter(|answer| answer.is_known).map(|answer| &answer.part);
        let fell_back = !regions.is_empty() && !budgeted.pays(&task);
        let is_exact = answer.is_some() || regions.is_empty() || fell_back;
        Self { task, regions, is_exact, fell_back, answer }
    }

    fn work<'b>(&'b self, budgeted: &'b Budgeted<'b>) -> Work<'b> {
        Work { budgeted, task: &self.task, regions: &self.regions }
    }

    /// Keys from the first that some row sees to the last.
    fn seen(&self, budgeted: &Budgeted<'_>) -> Range<usize> {
        let seen = self.task.tokens.clone().map(|token| budgeted.call.seen(token)).filter(|seen| !seen.is_empty());
        seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or_default()
    }

    /// Computes the near keys and estimates the others. What was selected of them is left to pieces if the tile `is_cut`.
    fn choose(
        &self,
        budgeted: &Budgeted<'_>,
        is_cut: bool,
        tile: &mut AttentionTile,
        scratch: &mut TileScratch,
        choice: &mut Choice,
    ) {
        let Choice { chosen, reports, part } = choice;
        if self.is_exact {
            // What was chosen in an earlier call is nothing to cut.
            chosen.begin(0);
            self.work(budgeted).report_exact(self.fell_back, reports);
            return;
        }
        self.work(budgeted).choose(tile, scratch, chosen, reports);
        if !is_cut {
            self.work(budgeted).compute_chosen(chosen, tile);
        }
        part.fill(tile, self.work(budgeted).rows(), budgeted.call.cache.shape().value_dim);
    }

    /// Computes `keys` alone; the result stays in `tile`. `chosen` tells what micro-tiles have selected.
    fn compute(&self, budgeted: &Budgeted<'_>, keys: &PieceKeys, chosen: &Chosen, tile: &mut AttentionTile) {
        let call = &budgeted.call;
        let of = |keys: &Range<usize>| Task { keys: keys.clone(), tokens: self.task.tokens.clone(), ..self.task };
        match keys {
            PieceKeys::All(range) => tiles::attend_to_all(tile, call, &of(range)),
            PieceKeys::Exact(range) => {
                tiles::begin(tile, call, &of(range));
                let wanted = |micro_tile| chosen.is_exact(micro_tile);
                HeadKeys::of(call, &self.task).accumulate(tile, range.clone(), wanted);
            }
            PieceKeys::Selected(clusters) => {
                tiles::begin(tile, call, &self.task);
                self.work(budgeted).compute_selections(clusters.clone(), chosen, tile);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_multiples_and_leave_nothing_out() {
        for (keys, count) in [(0..0, 0), (5..100, 1), (1000..4096, 4), (1024..2048, 1)] {
            let mut pieces = Vec::new();
            push_ranges(3, keys.clone(), 1024, PieceKeys::All, &mut pieces);
            assert_eq!(pieces.len(), count);
            let mut next = keys.start;
            for piece in &pieces {
                let PieceKeys::All(range) = &piece.keys else { panic!("other keys") };
                assert!(range.start == next && (range.end.is_multiple_of(1024) || range.end == keys.end));
                next = range.end;
            }
            assert!(pieces.iter().all(|piece| piece.tile == 3) && next == keys.end);
        }
    }

    #[test]
    fn every_selected_cluster_is_in_one_piece() {
        // Two micro-tiles that select much and little, one that computes everything.
        let selections: [&[u32]; 3] = [&[0, 1, 2, 3, 9, 40, 41, 42, 43, 44, 45, 46, 47, 48, 200, 511], &[], &[7, 300]];
        for piece_clusters in [1, 3, 8, 100] {
            let chosen = Chosen::of_selections(&selections);
            let mut pieces = Vec::new();
            push_selected(0, &chosen, piece_clusters, &mut pieces);
            let ranges: Vec<_> = pieces
                .iter()
                .map(|piece| match &piece.keys {
                    PieceKeys::Selected(range) => range.clone(),
                    _ => panic!("other keys"),
                })
                .collect();
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start) && ranges[0].start == 0);
            let count =
                |range: &Range<u32>| selections.concat().iter().filter(|cluster| range.contains(cluster)).count();
            assert_eq!(ranges.iter().map(count).sum::<usize>(), 18);
            let (last, others) = ranges.split_last().unwrap();
            assert!(others.iter().all(|range| count(range) >= piece_clusters) && count(last) > 0);
        }
        let mut pieces = Vec::new();
        push_selected(0, &Chosen::of_selections(&[&[], &[]]), 1, &mut pieces);
        assert!(pieces.is_empty());
    }
}
