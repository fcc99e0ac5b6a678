//! Lengths, slices and chunks of CubeCL's tensors by their strides, and Burn's convolution gradients.

use core::ops::Range;

use burn::backend::ops::FloatTensorOps;
use burn::backend::ops::conv::calculate_padding_out;
use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{Shape, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::zspace::Strides;
use burn_cubecl::cubecl::zspace::metadata::Metadata;
use burn_cubecl::kernel::conv::{
    ConvStrategy, ConvTranspose2dStrategy, conv_data_backward, conv_transpose2d,
};
use burn_cubecl::kernel::{into_contiguous_aligned, untile};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::ops::{permute, permute_nchw_to_nhwc, permute_nhwc_to_nchw};
use burn_cubecl::tensor::CubeTensor;

use super::sweeps::Kernels;
use crate::cubek::reads_padding;
use crate::portable::layout::{Layouts, image_slices};
use crate::portable::workspace::{self, is_depthwise};

impl Layouts<CubeBackend> for Kernels {
    const TUNES_PRODUCTS: bool = true;

    // Burn's reshape copies a channels-last tensor. The new axis is one row of the axis behind it.
    fn lift(tensor: CubeTensor) -> CubeTensor {
        with_axes(tensor, |axes| {
            let (size, stride) = axes[2];
            axes.insert(2, (1, size * stride));
        })
    }

    fn lower(tensor: CubeTensor) -> CubeTensor {
        with_axes(tensor, |axes| {
            axes.remove(2);
        })
    }

    // Burn's convolutions copy what they cannot see to be channels-last: `[n, 1, h, w]`, and `[n, c, 1, 1]`.
    fn innermost_channels(tensor: CubeTensor) -> CubeTensor {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        if tensor.qparams.is_some() || (shape[1] != 1 && strides[1] != 1) {
            return tensor;
        }
        with_axes(tensor, |axes| {
            let inwards = (2..axes.len()).rev().chain([0]);
            axes[1].1 = 1;
            let mut row = axes[1].0;
            for axis in inwards {
                let (size, stride) = &mut axes[axis];
                if *size == 1 {
                    *stride = row;
                }
                row = *size * *stride;
            }
        })
    }

    fn is_channels_last(weight: &CubeTensor) -> bool {
        let (shape, strides) = (weight.meta.shape(), weight.meta.strides());
        shape[1] > 1 && strides[1] == 1 && shape[2..].iter().any(|&size| size > 1)
    }

    fn convolution_order(weight: CubeTensor) -> CubeTensor {
        let weight = Self::innermost_channels(weight);
        if weight.meta.strides()[1] == 1 {
            return weight;
        }
        permute_nhwc_to_nchw(into_contiguous_aligned(permute_nchw_to_nhwc(weight)))
    }

    fn slice(tensor: CubeTensor, slices: &[Slice]) -> CubeTensor {
        let order = Order::of(&tensor);
        let slices = order.slices(slices);
        order.restore(CubeBackend::float_slice(order.apply(tensor), &slices))
    }

    fn write_images(
        batch: Option<CubeTensor>,
        shape: &Shape,
        chunk: &Range<usize>,
        value: CubeTensor,
    ) -> CubeTensor {
        let order = Order::of(batch.as_ref().unwrap_or(&value));
        let batch = match batch {
            Some(batch) => order.apply(batch),
            None => empty_device_contiguous_dtype(
                value.client.clone(),
                value.device.clone(),
                Shape::from(order.sizes(shape)),
                value.dtype,
            ),
        };
        let slices = order.slices(&image_slices(shape, chunk));
        order.restore(CubeBackend::float_slice_assign(
            batch,
            &slices,
            order.apply(value),
        ))
    }

    fn images_of_a_view(tensor: &CubeTensor) -> Option<usize> {
        let alignment = tensor.client.properties().memory.alignment as usize;
        let stride = tensor.meta.strides()[0] * tensor.dtype.size();
        workspace::images_of_a_view(tensor.meta.shape()[0], stride, alignment)
    }

    fn row_alignment(tensor: &CubeTensor) -> Option<usize> {
        let is_pitched = matches!(tensor.client.name(), "cuda" | "hip");
        is_pitched.then(|| tensor.client.properties().memory.alignment as usize)
    }

    fn conv2d_x_backward(
        input: CubeTensor,
        weight: CubeTensor,
        output_grad: CubeTensor,
        options: ConvOptions<2>,
    ) -> CubeTensor {
        if is_depthwise(options.groups, weight.meta.shape()) {
            depthwise_x_backward(input.meta.shape(), weight, output_grad, &options)
        } else {
            x_backward(input, weight, output_grad, options)
        }
    }

    fn conv3d_x_backward(
        input: CubeTensor,
        weight: CubeTensor,
        output_grad: CubeTensor,
        options: ConvOptions<3>,
    ) -> CubeTensor {
        x_backward(input, weight, output_grad, options)
    }
}

/// The tensor with other axes over the same buffer, each a size and a stride.
fn with_axes(tensor: CubeTensor, change: impl FnOnce(&mut Vec<(usize, usize)>)) -> CubeTensor {
    let mut tensor = untile(tensor);
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let mut axes: Vec<_> = shape.iter().copied().zip(strides.iter().copied()).collect();
    change(&mut axes);
    let (shape, strides): (Vec<usize>, Vec<usize>) = axes.into_iter().unzip();
    *tensor.meta = Metadata::new(Shape::from(shape), Strides::from(strides));
    tensor
}

/// A tensor's axes in the order of its memory, outermost first.
struct Order(Vec<usize>);

impl Order {
    fn of(tensor: &CubeTensor) -> Self {
        let strides = tensor.meta.strides();
        let mut axes: Vec<usize> = (0..strides.len()).collect();
        axes.sort_by_key(|&axis| core::cmp::Reverse(strides[axis]));
        Self(axes)
    }

    fn apply(&self, tensor: CubeTensor) -> CubeTensor {
        permute(tensor, &self.0)
    }

    /// Undoes [`apply`](Self::apply).
    fn restore(&self, tensor: CubeTensor) -> CubeTensor {
        let mut inverse = vec![0; self.0.len()];
        for (position, &axis) in self.0.iter().enumerate() {
            inverse[axis] = position;
        }
        permute(tensor, &inverse)
    }

    fn sizes(&self, shape: &[usize]) -> Vec<usize> {
        self.0.iter().map(|&axis| shape[axis]).collect()
    }

    fn slices(&self, slices: &[Slice]) -> Vec<Slice> {
        self.0.iter().map(|&axis| slices[axis]).collect()
    }
}

/// Burn's gradient of a convolution's input. `input` is for its shape.
fn x_backward<const N: usize>(
    input: CubeTensor,
    weight: CubeTensor,
    output_grad: CubeTensor,
    options: ConvOptions<N>,
) -> CubeTensor {
    let shape = input.meta.shape().clone();
    let width = output_grad.client.properties().io_width() as usize / 8;
    let channels = [shape[1], output_grad.meta.shape()[1]];
    let strategy = if reads_padding(channels, width, output_grad.dtype, &options) {
        ConvStrategy::Direct
    } else {
        ConvStrategy::default()
    };
    conv_data_backward(output_grad, weight, shape, options, strategy)
        .expect("Burn has a kernel for any convolution")
}

/// Gradient of a depthwise convolution's input, of padding that is symmetric, by Burn's direct algorithm. Burn tunes
/// it against one by im2col columns, as many as those of a dense convolution.
fn depthwise_x_backward(
    input_shape: &Shape,
    weight: CubeTensor,
    output_grad: CubeTensor,
    options: &ConvOptions<2>,
) -> CubeTensor {
    let (stride, padding, dilation) = (options.stride, options.padding_begin(), options.dilation);
    let padding_out = core::array::from_fn(|dim| {
        calculate_padding_out(
            weight.meta.shape()[dim + 2],
            stride[dim],
            padding[dim],
            dilation[dim],
            input_shape[dim + 2],
            output_grad.meta.shape()[dim + 2],
        )
    });
    let options = ConvTransposeOptions::new(stride, padding, padding_out, dilation, options.groups);
    let direct = ConvTranspose2dStrategy::Direct;
    conv_transpose2d(output_grad, weight, None, options, direct)
        .expect("the direct algorithm takes any convolution")
}
