use burn::module::Param;
use burn::tensor::Tensor;

#[cfg(feature = "cubecl")]
use burn::{backend::DispatchDevice, tensor::Device};

/// The weight, drawn or loaded, with its channels innermost in the memory of CubeCL's devices: Burn's convolutions copy
/// any other in each pass. Burn's element-wise ops keep the order of their operands, and so do optimizers.
pub(super) fn in_convolution_order<const D: usize>(weight: Param<Tensor<D>>) -> Param<Tensor<D>> {
    weight
        .load_mapper(innermost_channels)
        .init_mapper(innermost_channels)
}

#[cfg(not(feature = "cubecl"))]
fn innermost_channels<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    weight
}

#[cfg(feature = "cubecl")]
fn innermost_channels<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    if !is_cube(weight.device()) {
        return weight;
    }
    let last = D as i32 - 1;
    let ordered = weight.movedim(1, last);
    let (shape, elements) = (ordered.shape(), ordered.shape().num_elements());
    // Through one axis, which cannot be a view: the copy is in the order of the axes.
    ordered.reshape([elements]).reshape(shape).movedim(last, 1)
}

#[cfg(feature = "cubecl")]
fn is_cube(device: Device) -> bool {
    matches!(
        device.without_autodiff().as_dispatch(),
        DispatchDevice::Cube(_)
    )
}
