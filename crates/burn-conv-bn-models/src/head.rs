//! From a network's blocks to its linear layers.

use burn::nn::Linear;
use burn::tensor::Tensor;

/// A row for each image, in the type of the linear layer that takes it.
///
/// In mixed precision that is f32, and the blocks' type is f16 or bf16: linear layers have few values
/// beside the convolutions, and the loss depends on the last digits of theirs. All that comes before
/// is left as it is, so that the rows are the first thing that is kept in f32.
pub(crate) fn rows(images: Tensor<4>, layer: &Linear) -> Tensor<2> {
    images.flatten::<2>(1, 3).cast(layer.weight.val().dtype())
}
