//! Statistics of timed rounds.

/// The middle value, or the mean of the two middle ones.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        _ if sorted.is_empty() => None,
        0 => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

/// Median over the rounds of each round's ratio, which slow drift of the machine does not reach.
/// `None` unless both have the same rounds.
pub fn median_ratio(values: &[f64], base: &[f64]) -> Option<f64> {
    if values.len() != base.len() {
        return None;
    }
    let ratios: Vec<f64> = values.iter().zip(base).map(|(a, b)| a / b).collect();
    median(&ratios)
}

/// The geometric mean: that of ratios does not depend on which side is the base.
pub fn geometric_mean(ratios: &[f64]) -> Option<f64> {
    let logarithms: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    (!ratios.is_empty()).then(|| (logarithms / ratios.len() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // The machine slows down tenfold; each round's ratio stays.
        let (values, base) = ([1.0, 10.0, 20.0], [2.0, 20.0, 40.0]);
        assert_eq!(median_ratio(&values, &base), Some(0.5));
        assert_eq!(
            median_ratio(&[1.0, 30.0, 4.0], &[1.0, 10.0, 2.0]),
            Some(2.0)
        );
        assert_eq!(median_ratio(&values, &base[..2]), None);
        assert_eq!(median_ratio(&[], &[]), None);
    }

    #[test]
    fn geometric_means_do_not_depend_on_the_base() {
        let mean = geometric_mean(&[2.0, 8.0]).unwrap();
        assert!((mean - 4.0).abs() < 1e-12);
        let inverse = geometric_mean(&[0.5, 0.125]).unwrap();
        assert!((mean * inverse - 1.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[]), None);
    }
}
