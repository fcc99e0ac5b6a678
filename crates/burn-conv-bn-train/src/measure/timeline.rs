//! Bytes alive over one training step: the curve that `mnist compare --plot` draws.

use serde::{Deserialize, Serialize};

/// Bytes alive over one training step, and when its phases end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// In order of time.
    pub points: Vec<Point>,
    /// Seconds from the start of the forward pass to its end.
    pub forward_end: f64,
    /// The same to the end of the backward pass.
    pub backward_end: f64,
    /// The same to the end of the optimizer's step.
    pub optimizer_end: f64,
}

/// The most bytes alive since the point before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Seconds from the start of the forward pass.
    pub seconds: f64,
    /// Bytes above the level just before the forward pass, at which point parameters, optimizer
    /// state and data are there already.
    pub bytes: usize,
}

impl Timeline {
    /// Most bytes at any time.
    pub fn peak(&self) -> usize {
        self.points
            .iter()
            .map(|p| p.bytes)
            .max()
            .unwrap_or_default()
    }

    /// The curve in at most `count` points, each the highest of its neighbours.
    pub(crate) fn thinned(self, count: usize) -> Self {
        let each = self.points.len().div_ceil(count.max(1)).max(1);
        let highest = |points: &[Point]| points.iter().copied().max_by_key(|point| point.bytes);
        Self {
            points: self.points.chunks(each).filter_map(highest).collect(),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_peaks() {
        let points = [1, 9, 2, 3, 4, 8, 5].into_iter().enumerate();
        let timeline = Timeline {
            points: points
                .map(|(index, bytes)| Point {
                    seconds: index as f64,
                    bytes,
                })
                .collect(),
            ..Timeline::default()
        };
        let bytes = |count| -> Vec<usize> {
            let points = timeline.clone().thinned(count).points;
            points.iter().map(|point| point.bytes).collect()
        };
        assert_eq!(bytes(100), [1, 9, 2, 3, 4, 8, 5]);
        assert_eq!(bytes(3), [9, 8, 5]);
        assert_eq!(bytes(1), [9]);
        assert_eq!(timeline.peak(), 9);
        assert_eq!(Timeline::default().thinned(0), Timeline::default());
    }
}
