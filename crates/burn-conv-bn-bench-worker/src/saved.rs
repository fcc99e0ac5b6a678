//! What a workload lists as kept for the backward pass, as one number.

use burn_conv_bn::SavedTensor;

/// Bytes of what is kept for it alone: each buffer once, without parameters and images.
pub fn bytes<'a>(listed: impl IntoIterator<Item = &'a SavedTensor>) -> u64 {
    let own = listed.into_iter().filter(|tensor| !tensor.shared);
    own.map(|tensor| tensor.bytes() as u64).sum()
}
