use burn::tensor::DType;

use crate::spec::ConvBnError;

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
    /// Epsilon is not a finite number, or it is negative.
    #[error("epsilon must be finite and positive, or 0, got {got}")]
    Epsilon {
        /// The value seen.
        got: f64,
    },
    /// `Same` padding that Burn's convolution refuses for some sizes of the input.
    #[error(
        "spatial dimension {dim}: `Same` padding of kernel {kernel} with stride {stride} is wider behind than \
         before for some sizes of the input, which Burn's Conv3d refuses; set the padding of the layer's \
         convolution to `PaddingConfig3d::Explicit` if it is even for your inputs, or to `Valid` and pad them \
         before the convolution"
    )]
    SamePadding {
        /// Index of the spatial dimension, from 0.
        dim: usize,
        /// The kernel's size in it.
        kernel: usize,
        /// The stride in it.
        stride: usize,
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
    /// A folded value is too large for the weight's dtype, or a channel's weights are so small in it that they
    /// lose more than 1/256 of what they add to the channel.
    #[error(
        "channel {channel}: its folded {what}, {value:e}, is out of {dtype:?}'s range; cast the layer to \
         a wider dtype before it is folded, as with `with_precision(FloatDType::F32)`"
    )]
    OutOfRange {
        /// Weight or bias.
        what: &'static str,
        /// The weight's dtype, which the folded convolution would have.
        dtype: DType,
        /// Index of the output channel.
        channel: usize,
        /// The value; of weights that are too small, the largest.
        value: f64,
    },
}

/// The value, or a panic with the error's message at the line of the caller.
#[track_caller]
pub(super) fn or_panic<T>(result: Result<T, ConvBnError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}
