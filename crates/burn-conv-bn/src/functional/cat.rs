use burn::backend::Dispatch;
use burn::tensor::Tensor;

use super::check::Check;
use crate::backend::{ConvBnBackend, Tensors};
use crate::spec::ConvBnError;

/// Concatenation along channels: what [`Tensor::cat`] computes, gradients included, with less kept for the
/// backward pass.
///
/// It keeps the tensors, and its output is kept by nobody: a layer behind, Burn's own included, that needs it in
/// its backward pass gets it concatenated again, once, and it then lives until the last one that asked. In a
/// dense network, where every layer takes all outputs before it, each is kept once; with [`Tensor::cat`] each
/// is kept once for every layer behind.
///
/// A single tensor is returned as it is, and one without channels adds nothing.
///
/// # Shapes
///
/// - `tensors`: `[batch, channels, ..]` of rank 2 or more, the same in all but the channels
/// - output: `[batch, sum of the channels, ..]`
///
/// # Errors
///
/// No tensor, or one whose shape, dtype or device does not fit the first one's.
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn::functional::cat_channels;
///
/// let device = Device::flex().autodiff();
/// let x = Tensor::<4>::ones([2, 3, 8, 8], &device).require_grad();
/// let y = Tensor::<4>::zeros([2, 5, 8, 8], &device);
/// let both = cat_channels(vec![x.clone(), y])?;
/// assert_eq!(both.dims(), [2, 8, 8, 8]);
/// let grads = both.sum().backward();
/// assert_eq!(x.grad(&grads).unwrap().dims(), [2, 3, 8, 8]);
/// # }
/// # Ok::<(), burn_conv_bn::ConvBnError>(())
/// ```
pub fn cat_channels<const D: usize>(tensors: Vec<Tensor<D>>) -> Result<Tensor<D>, ConvBnError> {
    let tensors: Vec<_> = tensors.into_iter().map(Tensor::dequantize).collect();
    let Some(first) = tensors.first() else {
        return Err(ConvBnError::Zero {
            what: "number of tensors to concatenate",
            got: vec![0],
        });
    };
    let check = Check::new(first);
    let mut shape = first.shape();
    if D < 2 {
        return Err(ConvBnError::Rank {
            what: "concatenation along channels",
            input: shape,
            expected: 2,
            got: D,
        });
    }
    let mut channels = 0;
    for tensor in &tensors {
        shape[1] = tensor.shape()[1];
        channels += shape[1];
        check.shape("concatenated tensor", tensor, shape.clone())?;
        check.data("concatenated tensor", tensor)?;
    }
    shape[1] = channels;
    if shape.num_elements() == 0 {
        return Ok(check.empty(shape));
    }
    let mut tensors: Vec<_> = tensors
        .into_iter()
        .filter(|tensor| tensor.shape()[1] > 0)
        .collect();
    if tensors.len() == 1 {
        return Ok(tensors.remove(0));
    }
    let tensors = tensors.into_iter().map(Tensor::into_dispatch).collect();
    Ok(Tensor::from_dispatch(Dispatch::concatenate(Tensors(
        tensors,
    ))))
}
