//! Chunks of a batch, read and written.

use core::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{Shape, Slice};

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

    pub(super) fn write(&mut self, chunk: &Range<usize>, value: FloatTensor<B>) {
        if chunk.len() == self.shape[0] {
            self.tensor = Some(value);
            return;
        }
        // Not `float_empty`, for which Flex holds two buffers for a moment.
        let tensor = self.tensor.take().unwrap_or_else(|| {
            let (device, dtype) = (value.device(), value.dtype());
            B::float_full(self.shape.clone(), 0f64.into(), &device, dtype.into())
        });
        let rows = row_slices(&self.shape, chunk);
        self.tensor = Some(B::float_slice_assign(tensor, &rows, value));
    }

    pub(super) fn finish(self) -> FloatTensor<B> {
        self.tensor.expect("the second pass wrote every chunk")
    }
}

/// Images `chunk` of a tensor whose first axis is the batch; the tensor itself if that is all.
pub(super) fn rows<B: Backend>(tensor: FloatTensor<B>, chunk: &Range<usize>) -> FloatTensor<B> {
    let shape = tensor.shape();
    if chunk.len() == shape[0] {
        tensor
    } else {
        B::float_slice(tensor, &row_slices(&shape, chunk))
    }
}

fn row_slices(shape: &Shape, chunk: &Range<usize>) -> Vec<Slice> {
    core::iter::once(chunk.clone())
        .chain(shape.iter().skip(1).map(|&size| 0..size))
        .map(Slice::from)
        .collect()
}
