use crate::Real;
use crate::simd::sweeps::ChannelAffine;

/// Per-channel affine map with the mean kept apart: `scale * (z - mean) + shift`.
///
/// ```
/// use burn_conv_bn_cpu::Affine;
///
/// let identity = Affine { mean: &[0.0, 0.0], scale: &[1.0, 1.0], shift: &[0.0, 0.0] };
/// assert_eq!(identity.scale.len(), 2);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a, T> {
    /// `[channels_out]`.
    pub mean: &'a [T],
    /// `[channels_out]`.
    pub scale: &'a [T],
    /// `[channels_out]`.
    pub shift: &'a [T],
}

impl<T: Real> Affine<'_, T> {
    pub(crate) fn channel(&self, channel: usize) -> ChannelAffine<T> {
        ChannelAffine {
            mean: self.mean[channel],
            scale: self.scale[channel],
            shift: self.shift[channel],
        }
    }
}
