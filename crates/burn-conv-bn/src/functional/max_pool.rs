use burn::backend::Dispatch;
use burn::tensor::Tensor;
use burn::tensor::ops::MaxPoolOptions;

use super::check::Check;
use crate::backend::ConvBnBackend;
use crate::spec::{ConvBnError, MaxPoolProblem};

/// Max pool over height and width, with the results and gradients of [`burn::tensor::module::max_pool2d`]
/// and less kept for the backward pass.
///
/// Burn 0.22.1 keeps the input and, for each output, its pixel's index in the device's integers. On Flex and
/// CubeCL's devices this keeps the argmax, one byte for each output: the maximum's position in its window. The
/// input, such as the output of a fused block, is then free once nothing else holds it. An untracked input keeps
/// nothing, and no argmax is computed.
///
/// Of equal values the first wins, and NaN wins over all, as in Burn. Results are equal to Burn's to the bit,
/// except gradients in f16 where windows overlap: Burn rounds after each sum, and this sums in f32.
///
/// Burn's own op runs where there is no kernel: on other backends, for windows of more than 256 pixels, and
/// for padding that differs between the two sides of a dimension, which Burn copies the input for. On CubeCL's
/// devices also with dilation, in ceil mode, for padding above half the window's size, and for an untracked input.
///
/// # Shapes
///
/// - `input`: `[batch, channels, height, width]`, of any float dtype
/// - output: `[batch, channels, height_out, width_out]`, where `height_out` is
///   `(height + padding - dilation * (kernel_size - 1) - 1) / stride + 1` with the padding of both sides,
///   rounded down, or up in ceil mode unless that window would begin in the padding behind
///
/// # Errors
///
/// A kernel size, a stride or a dilation of zero, or a window that does not fit into the padded input.
/// In ceil mode it need not fit.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::ops::MaxPoolOptions;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::functional::max_pool2d;
///
/// let image = [[[[0.5, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0]]]];
/// let x = Tensor::<4>::from_data(image, &Device::flex().autodiff()).require_grad();
/// let y = max_pool2d(x.clone(), MaxPoolOptions::new([2, 2]))?;
/// assert_eq!(y.dims(), [1, 1, 1, 2]);
///
/// // The gradient of each output goes to the pixel that it was.
/// let grads = y.sum().backward();
/// let grad = x.grad(&grads).unwrap().into_data();
/// assert_eq!(grad.iter::<f32>().collect::<Vec<_>>(), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn max_pool2d(input: Tensor<4>, options: MaxPoolOptions<2>) -> Result<Tensor<4>, ConvBnError> {
    let input = input.dequantize();
    let output = MaxPoolProblem::new(input.shape(), options.clone())?.output();
    let check = Check::new(&input);
    check.backend()?;
    if output.num_elements() == 0 {
        return Ok(check.empty(output));
    }
    if options.is_asymmetric() {
        return Ok(burn::tensor::module::max_pool2d(input, options));
    }
    let sizes = input.dims();
    let output = Dispatch::max_pool(input.into_dispatch(), options.clone());
    let mut output = Tensor::<4>::from_dispatch(output);
    // As Burn's function does: where padding is as wide as the window, its op leaves such windows.
    for dim in 0..2 {
        let count = output.dims()[dim + 2];
        let input_end = sizes[dim + 2] + options.padding[dim].0;
        if options.ceil_mode && count > 1 && (count - 1) * options.stride[dim] >= input_end {
            output = output.narrow(dim + 2, 0, count - 1);
        }
    }
    Ok(output)
}
