/// Mean and sum of squared deviations of each channel, merged by the rule of Chan, Golub and LeVeque
/// (1979), which never subtracts large sums.
///
/// ```
/// use burn_conv_bn_cpu::{Geometry, conv_moments};
///
/// // One channel of four pixels, with a weight of 1.
/// let one = [1; 3];
/// let geometry = Geometry::new(1, [1, 1], 1, [1, 2, 2], one, one, [(0, 0); 3], one)?;
/// let mut output = Vec::new();
/// let moments = conv_moments(&geometry, &[1.0, 2.0, 3.0, 6.0f64], &[1.0], &mut output);
/// assert_eq!(moments.mean, [3.0]);
/// assert_eq!(moments.variance().collect::<Vec<_>>(), [3.5]);
/// # Ok::<(), burn_conv_bn_cpu::GeometryError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Values so far, `[channels]`.
    pub count: Vec<usize>,
    /// `[channels]`.
    pub mean: Vec<f64>,
    /// Sum of squared deviations from the mean, `[channels]`.
    pub squares: Vec<f64>,
}

impl Moments {
    pub(crate) fn new(channels: usize) -> Self {
        Self {
            count: vec![0; channels],
            mean: vec![0.0; channels],
            squares: vec![0.0; channels],
        }
    }

    /// Adds `count` values of one channel.
    pub(crate) fn add(&mut self, channel: usize, count: usize, mean: f64, squares: f64) {
        let (old, new) = (self.count[channel] as f64, count as f64);
        let delta = mean - self.mean[channel];
        let total = old + new;
        self.count[channel] += count;
        self.mean[channel] += delta * (new / total);
        self.squares[channel] += squares + delta * delta * (old * new / total);
    }

    pub(crate) fn merge(mut self, other: &Self) -> Self {
        for channel in 0..other.count.len() {
            self.add(
                channel,
                other.count[channel],
                other.mean[channel],
                other.squares[channel],
            );
        }
        self
    }

    /// Sum of squared deviations over the number of values, `[channels]`.
    pub fn variance(&self) -> impl Iterator<Item = f64> + '_ {
        self.squares
            .iter()
            .zip(&self.count)
            .map(|(squares, count)| squares / *count as f64)
    }
}
