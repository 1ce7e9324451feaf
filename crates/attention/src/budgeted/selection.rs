//! Which clusters are computed exactly: the fewest whose absence from the estimate keeps the error within a limit.

use iceformer_kernels::attention::{largest, sums_up_to};
use iceformer_kernels::selection::push_reaching;

/// Borders that are tried at a time.
const BORDERS: i32 = 8;

/// Leaves in `selected` the clusters with the largest squared errors, in ascending order, as few as leave a sum of at
/// most `limit` to the others, to within half an octave at the border. What is no number is always selected.
pub(super) fn select(errors: &[f32], limit: f32, selected: &mut Vec<u32>) {
    selected.clear();
    // The largest border, in half octaves below the largest error, under which the errors sum up to no more than the
    // limit: first in steps of eight, then of one.
    let largest = largest(errors).max(0.0);
    let border_at = |steps: i32| largest * (-0.5 * steps as f32).exp2();
    let mut steps = 0;
    for stride in [BORDERS, 1] {
        let borders: [f32; BORDERS as usize] = std::array::from_fn(|step| border_at(steps + stride * step as i32));
        let sums = sums_up_to(errors, borders);
        let within = sums.iter().position(|sum| *sum <= limit).map_or(BORDERS, |place| place as i32);
        if within == 0 {
            break;
        }
        // Between the last border that is too large and the first that is not, or that was not tried.
        steps += stride * if stride == 1 { within } else { within - 1 };
    }
    // Behind the last border nothing may be left out. What lies on a border is left to the estimate.
    let border = if steps >= BORDERS * BORDERS { -1.0 } else { border_at(steps) };
    push_reaching(border.next_up(), errors, selected);
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    fn selected(errors: &[f32], limit: f32) -> Vec<u32> {
        let mut selected = vec![7];
        select(errors, limit, &mut selected);
        selected
    }

    #[test]
    fn what_is_left_out_keeps_the_limit() {
        let mut random = Random::new(3);
        for count in [0, 1, 2, 32, 100, 1000] {
            let errors: Vec<f32> = random.normals(count, 4.0).iter().map(|value| value.exp()).collect();
            let total: f32 = errors.iter().sum();
            for share in [0.0, 1e-6, 1e-3, 0.1, 0.5, 2.0] {
                let limit = share * total;
                let chosen = selected(&errors, limit);
                assert!(chosen.is_sorted_by(|a, b| a < b));
                let is_chosen = |index: usize| chosen.binary_search(&(index as u32)).is_ok();
                let (kept, left): (Vec<_>, Vec<_>) = (0..count).partition(|&index| is_chosen(index));
                let sum = left.iter().map(|&index| errors[index]).sum::<f32>();
                assert!(sum <= limit * 1.001, "{sum} of at most {limit}");
                let least = kept.iter().map(|&index| errors[index]).fold(f32::INFINITY, f32::min);
                assert!(least >= left.iter().map(|&index| errors[index]).fold(0.0, f32::max));
                if share > 1.0 {
                    assert!(chosen.is_empty());
                }
                // One more half octave would not have fitted.
                if !chosen.is_empty() && share > 0.0 {
                    let octave: f32 = errors.iter().filter(|&&error| error >= least && error <= 2.0 * least).sum();
                    assert!(sum + octave > limit);
                }
            }
        }
    }

    #[test]
    fn broken_errors_are_selected() {
        assert!(selected(&[1.0, f32::NAN, 0.5], 100.0).contains(&1));
        assert!(selected(&[f32::INFINITY, 1.0], 100.0).contains(&0));
        assert!(selected(&[0.0; 3], 0.0).is_empty());
    }
}
