//! Which clusters are computed exactly: the fewest whose absence from the estimate keeps the error within a limit.

/// Bins of half an octave of squared error below the largest.
const BINS: usize = 64;

/// Marks in `selected` the clusters with the largest squared errors, as few as leave a sum of at most `limit` to the
/// others, to within half an octave at the border. Returns their number. What is no number is always selected.
pub(super) fn select(errors: &[f32], limit: f32, selected: &mut [bool]) -> usize {
    let largest = errors.iter().copied().fold(0.0, f32::max);
    // The bits of a positive float grow with its logarithm: 22 below the exponent's last are half an octave.
    let bin_of = |error: f32| match error.is_nan() {
        true => 0,
        false => ((largest.to_bits().saturating_sub(error.max(0.0).to_bits())) >> 22).min(BINS as u32 - 1) as usize,
    };
    let mut sums = [0.0_f32; BINS];
    for &error in errors {
        sums[bin_of(error)] += error;
    }
    let (mut first_left_out, mut sum) = (BINS, 0.0);
    while first_left_out > 0 {
        sum += sums[first_left_out - 1];
        if sum > limit || sum.is_nan() {
            break;
        }
        first_left_out -= 1;
    }
    let mut count = 0;
    for (selected, &error) in selected.iter_mut().zip(errors) {
        *selected = bin_of(error) < first_left_out;
        count += usize::from(*selected);
    }
    count
}

#[cfg(test)]
mod tests {
    use iceformer_testing::random::Random;

    use super::*;

    #[test]
    fn what_is_left_out_keeps_the_limit() {
        let mut random = Random::new(3);
        for count in [0, 1, 2, 32, 100, 1000] {
            let errors: Vec<f32> = random.normals(count, 4.0).iter().map(|value| value.exp()).collect();
            let total: f32 = errors.iter().sum();
            for share in [0.0, 1e-6, 1e-3, 0.1, 0.5, 2.0] {
                let limit = share * total;
                let mut selected = vec![false; count];
                let number = select(&errors, limit, &mut selected);
                assert_eq!(number, selected.iter().filter(|&&selected| selected).count());
                let left: f32 =
                    errors.iter().zip(&selected).filter(|(_, selected)| !**selected).map(|(error, _)| error).sum();
                assert!(left <= limit * 1.001, "{left} of at most {limit}");
                let least_selected =
                    errors.iter().zip(&selected).filter(|(_, selected)| **selected).map(|(error, _)| *error);
                let largest_left =
                    errors.iter().zip(&selected).filter(|(_, selected)| !**selected).map(|(error, _)| *error);
                assert!(least_selected.fold(f32::INFINITY, f32::min) >= largest_left.fold(0.0, f32::max));
                if share > 1.0 {
                    assert_eq!(number, 0);
                }
                // One more half octave would not have fitted.
                if number > 0 && share > 0.0 {
                    let least = errors
                        .iter()
                        .zip(&selected)
                        .filter(|(_, selected)| **selected)
                        .map(|(error, _)| *error)
                        .fold(f32::INFINITY, f32::min);
                    let octave: f32 = errors.iter().filter(|&&error| error >= least && error <= 2.0 * least).sum();
                    assert!(left + octave > limit);
                }
            }
        }
    }

    #[test]
    fn broken_errors_are_selected() {
        let mut selected = [false; 3];
        assert!(select(&[1.0, f32::NAN, 0.5], 100.0, &mut selected) >= 1);
        assert!(selected[1]);
        let mut selected = [false; 2];
        select(&[f32::INFINITY, 1.0], 100.0, &mut selected);
        assert!(selected[0]);
        let mut selected = [true; 3];
        assert_eq!(select(&[0.0; 3], 0.0, &mut selected), 0);
    }
}
