//! A tensor that is written in chunks of a batch.

use core::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::layout::Layouts;

/// A tensor that is written chunk by chunk over the batch: allocated once, never concatenated.
pub(super) struct Batch<B: Backend> {
    shape: Shape,
    tensor: Option<FloatTensor<B>>,
}

impl<B: Backend> Batch<B> {
    pub(super) fn new(shape: &Shape) -> Self {
        Self {
            shape: shape.clone(),
            tensor: None,
        }
    }

    pub(super) fn write<L: Layouts<B>>(&mut self, chunk: &Range<usize>, value: FloatTensor<B>) {
        self.tensor = Some(if chunk.len() == self.shape[0] {
            value
        } else {
            L::write_images(self.tensor.take(), &self.shape, chunk, value)
        });
    }

    pub(super) fn finish(self) -> FloatTensor<B> {
        self.tensor.expect("the second pass wrote every chunk")
    }
}
