use burn::backend::DispatchDevice;
use burn::module::Param;
use burn::tensor::Tensor;

/// The weight, drawn or loaded, with its channels innermost in the memory of CubeCL's devices: Burn's convolutions copy
/// any other in each pass. Burn's element-wise ops keep the order of their operands, and so do optimizers.
pub(super) fn in_convolution_order<const D: usize>(weight: Param<Tensor<D>>) -> Param<Tensor<D>> {
    weight
        .load_mapper(innermost_channels)
        .init_mapper(innermost_channels)
}

fn innermost_channels<const D: usize>(weight: Tensor<D>) -> Tensor<D> {
    let device = weight.device().without_autodiff();
    if !matches!(device.as_dispatch(), DispatchDevice::Cube(_)) {
        return weight;
    }
    let last = D as i32 - 1;
    let ordered = weight.movedim(1, last);
    let (shape, elements) = (ordered.shape(), ordered.shape().num_elements());
    // Through one axis, which cannot be a view: the copy is in the order of the axes.
    ordered.reshape([elements]).reshape(shape).movedim(last, 1)
}
