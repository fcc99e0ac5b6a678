//! Burn's own max pool, which keeps its input for the backward pass.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::ops::MaxPoolOptions;

/// The padding of a dimension's two sides is the same.
pub(crate) fn forward<B: Backend>(
    input: FloatTensor<B>,
    options: &MaxPoolOptions<2>,
) -> FloatTensor<B> {
    B::max_pool2d(
        input,
        options.kernel_size,
        options.stride,
        options.padding.map(|(before, _)| before),
        options.dilation,
        options.ceil_mode,
    )
}
