//! Operations whose cost is a matter of how tensors lie in memory, which Burn's `Backend` does not show.

use core::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Shape, Slice};

/// What a backend does better that knows its tensors' strides. The default bodies are Burn's operations.
pub(crate) trait Layouts<B: Backend> {
    /// Whether convolution gradients are tuned, and tried with im2col columns: these are bounded then even without
    /// `max_workspace`.
    const TUNES_PRODUCTS: bool = false;

    /// `[a, b, length]` viewed as `[a, b, 1, length]`.
    fn lift(tensor: FloatTensor<B>) -> FloatTensor<B> {
        let shape = lift_shape(&tensor.shape());
        B::float_reshape(tensor, shape)
    }

    /// `[a, b, 1, length]` viewed as `[a, b, length]`.
    fn lower(tensor: FloatTensor<B>) -> FloatTensor<B> {
        let mut shape = tensor.shape().to_vec();
        shape.remove(2);
        B::float_reshape(tensor, Shape::from(shape))
    }

    /// The tensor, with strides of axes of length 1 by which convolutions see channels to be innermost in memory
    /// where they are. No copy.
    fn innermost_channels(tensor: FloatTensor<B>) -> FloatTensor<B> {
        tensor
    }

    /// Whether a weight of several taps has its channels innermost.
    fn is_channels_last(weight: &FloatTensor<B>) -> bool {
        let _ = weight;
        false
    }

    /// A weight, or its gradient, in the memory order of the device's convolutions, which copy any other.
    fn convolution_order(weight: FloatTensor<B>) -> FloatTensor<B> {
        weight
    }

    /// A part of the tensor, in the same layout if it is a copy.
    fn slice(tensor: FloatTensor<B>, slices: &[Slice]) -> FloatTensor<B> {
        B::float_slice(tensor, slices)
    }

    /// Images `chunk` of a tensor whose first axis is the batch; the tensor itself if that is all.
    fn images(tensor: FloatTensor<B>, chunk: &Range<usize>) -> FloatTensor<B> {
        let shape = tensor.shape();
        if chunk.len() == shape[0] {
            tensor
        } else {
            Self::slice(tensor, &image_slices(&shape, chunk))
        }
    }

    /// `batch`, which earlier chunks were written to, with `value` as its images `chunk`. The first chunk
    /// allocates it, of that shape.
    fn write_images(
        batch: Option<FloatTensor<B>>,
        shape: &Shape,
        chunk: &Range<usize>,
        value: FloatTensor<B>,
    ) -> FloatTensor<B> {
        // Not `float_empty`, for which Flex holds two buffers for a moment.
        let batch = batch.unwrap_or_else(|| {
            let (device, dtype) = (value.device(), value.dtype());
            B::float_full(shape.clone(), 0f64.into(), &device, dtype.into())
        });
        B::float_slice_assign(batch, &image_slices(shape, chunk), value)
    }

    /// The number of images whose multiples [`images`](Self::images) cuts off without a copy, if any.
    fn images_of_a_view(tensor: &FloatTensor<B>) -> Option<usize> {
        let _ = tensor;
        None
    }

    /// The largest alignment of rows in the device's allocations, in bytes, if it pads them.
    fn row_alignment(tensor: &FloatTensor<B>) -> Option<usize> {
        let _ = tensor;
        None
    }

    /// [`ModuleOps::conv2d_x_backward`](burn::backend::ops::ModuleOps::conv2d_x_backward).
    fn conv2d_x_backward(
        input: FloatTensor<B>,
        weight: FloatTensor<B>,
        output_grad: FloatTensor<B>,
        options: ConvOptions<2>,
    ) -> FloatTensor<B> {
        B::conv2d_x_backward(input, weight, output_grad, options)
    }

    /// [`ModuleOps::conv3d_x_backward`](burn::backend::ops::ModuleOps::conv3d_x_backward).
    fn conv3d_x_backward(
        input: FloatTensor<B>,
        weight: FloatTensor<B>,
        output_grad: FloatTensor<B>,
        options: ConvOptions<3>,
    ) -> FloatTensor<B> {
        B::conv3d_x_backward(input, weight, output_grad, options)
    }
}

/// The shape after [`Layouts::lift`].
pub(crate) fn lift_shape(shape: &Shape) -> Shape {
    let mut shape = shape.to_vec();
    shape.insert(2, 1);
    Shape::from(shape)
}

/// Slices of the images `chunk` of a batch.
pub(crate) fn image_slices(shape: &Shape, chunk: &Range<usize>) -> Vec<Slice> {
    core::iter::once(chunk.clone())
        .chain(shape.iter().skip(1).map(|&size| 0..size))
        .map(Slice::from)
        .collect()
}
