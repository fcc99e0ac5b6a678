//! Statistics of timed rounds.

use serde::{Deserialize, Serialize};

/// A median, and how far the rounds lie from it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle value, or the mean of the two middle ones.
    pub median: f64,
    /// The lower and the upper quartile, in between where they fall between two values.
    pub quartiles: [f64; 2],
    /// The smallest and the largest value.
    pub range: [f64; 2],
}

impl Spread {
    /// Of values in any order. `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            median: median(values)?,
            quartiles: [0.25, 0.75].map(|share| quantile(&sorted, share)),
            range: [first, last],
        })
    }
}

/// The value that a share of the others lies below. There must be one.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (below, above) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    below + place.fract() * (above - below)
}

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

/// Each round's ratio, which slow drift of the machine does not reach. Empty unless both have the
/// same rounds.
pub fn ratios(values: &[f64], base: &[f64]) -> Vec<f64> {
    match values.len() == base.len() {
        true => values.iter().zip(base).map(|(a, b)| a / b).collect(),
        false => Vec::new(),
    }
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
        assert_eq!(ratios(&values, &base), [0.5; 3]);
        assert!(ratios(&values, &base[..2]).is_empty());
        assert!(ratios(&[], &[]).is_empty());
    }

    #[test]
    fn spreads_reach_from_the_smallest_to_the_largest() {
        let spread = Spread::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        let wanted = Spread {
            median: 3.0,
            quartiles: [2.0, 4.0],
            range: [1.0, 5.0],
        };
        assert_eq!(spread, wanted);
        // Of two values a quartile is a quarter of the way from one to the other.
        let spread = Spread::of(&[8.0, 4.0]).unwrap();
        assert_eq!((spread.median, spread.quartiles), (6.0, [5.0, 7.0]));
        let one = Spread::of(&[7.0]).unwrap();
        assert_eq!((one.quartiles, one.range), ([7.0; 2], [7.0; 2]));
        assert_eq!(Spread::of(&[]), None);
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
