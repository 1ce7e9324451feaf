//! How element-wise work is shared among the threads.

use crate::ThreadTeam;

/// Elements that one task takes: some 10 µs of work, so that waking a thread pays.
const TASK_ELEMENTS: usize = 16 * 1024;

/// Calls `body(first_row, rows)` on groups of whole rows of `output`, in parallel when there is enough to do. What a
/// row becomes does not depend on the grouping.
pub(crate) fn row_groups(
    output: &mut [f32],
    row_length: usize,
    team: &ThreadTeam,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(row_length > 0 && output.len().is_multiple_of(row_length), "whole rows of {row_length} elements");
    let rows = (TASK_ELEMENTS / row_length).max(1);
    if output.len() <= rows * row_length {
        body(0, output);
    } else {
        team.run_chunks(output, rows * row_length, |group, part, _| body(group * rows, part));
    }
}

#[cfg(test)]
mod tests;

/// The levels that the tests of this crate run: every one the machine has.
#[cfg(test)]
pub(crate) fn levels() -> Vec<crate::InstructionSet> {
    let detected = crate::InstructionSet::detected();
    crate::InstructionSet::ALL.into_iter().filter(|&level| level <= detected).collect()
}
