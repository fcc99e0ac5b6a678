/// Why a layer cannot be folded into one convolution.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn::{ConvBn2dConfig, FoldError};
///
/// let block = ConvBn2dConfig::new([3, 8], [3, 3])
///     .with_track_running_stats(false)
///     .init(&Device::flex());
/// assert_eq!(block.fold().unwrap_err(), FoldError::NoRunningStatistics);
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// The layer normalizes with each batch's own statistics.
    #[error(
        "a layer with track_running_stats = false normalizes with each batch's own statistics; \
         only a layer with running statistics can be folded"
    )]
    NoRunningStatistics,
    /// The norm's parameters are not those of the convolution's channels.
    #[error("{what}: expected {expected} values for the weight's output channels, got {got}")]
    Channels {
        /// Which tensor.
        what: &'static str,
        /// The convolution's output channels.
        expected: usize,
        /// Values seen.
        got: usize,
    },
    /// A channel's scale or shift is infinite or not a number.
    #[error(
        "channel {channel} folds into a scale or shift that is not finite: running mean {mean}, \
         running variance {variance}, gamma {gamma}, beta {beta}"
    )]
    NotFinite {
        /// Index of the output channel.
        channel: usize,
        /// Its running mean.
        mean: f64,
        /// Its running variance.
        variance: f64,
        /// Its scale.
        gamma: f64,
        /// Its shift.
        beta: f64,
    },
}
