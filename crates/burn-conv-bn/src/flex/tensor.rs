//! Flex's tensors as slices, and the op's options as those of the kernels.

use std::borrow::Cow;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{Element, Shape, TensorData};
use burn_conv_bn_cpu::{Activation as KernelActivation, Element as KernelElement, Geometry, Real};
use bytemuck::Pod;

use crate::portable::cast;
use crate::spec::{Activation, ConvSpec};

/// Element types of the kernels' activations.
pub(super) trait Kernel: KernelElement<Real: Number> + Element + Pod {}
impl<E: KernelElement<Real: Number> + Element + Pod> Kernel for E {}

/// Types that the kernels compute in.
pub(super) trait Number: Real + Element + Pod {}
impl<T: Real + Element + Pod> Number for T {}

pub(super) fn kernel_activation(activation: Activation) -> KernelActivation {
    match activation {
        Activation::Identity => KernelActivation::Identity,
        Activation::Relu => KernelActivation::Relu,
        Activation::Relu6 => KernelActivation::Relu6,
        Activation::LeakyRelu { negative_slope } => KernelActivation::LeakyRelu { negative_slope },
        Activation::Silu => KernelActivation::Silu,
        Activation::Gelu => KernelActivation::Gelu,
        Activation::GeluApproximate => KernelActivation::GeluApproximate,
        Activation::HardSwish => KernelActivation::HardSwish,
        Activation::Sigmoid => KernelActivation::Sigmoid,
        Activation::HardSigmoid { alpha, beta } => KernelActivation::HardSigmoid { alpha, beta },
        Activation::Tanh => KernelActivation::Tanh,
        Activation::Elu { alpha } => KernelActivation::Elu { alpha },
        Activation::Mish => KernelActivation::Mish,
        Activation::Softplus { beta } => KernelActivation::Softplus { beta },
    }
}

/// Least bound on the kernels' scratch: each of them takes as much.
const LEAST_SCRATCH: usize = 2 << 20;

/// The kernels' geometry, with missing leading dimensions of size 1 and scratch bounded by the workspace. The
/// shapes were checked by [`ConvBnProblem`](crate::backend::ConvBnProblem).
pub(super) fn geometry(
    [input, weight]: [&Shape; 2],
    spec: &ConvSpec,
    max_workspace: Option<usize>,
) -> Geometry {
    fn lifted<T: Copy>(values: &[T], missing: T) -> [T; 3] {
        let mut all = [missing; 3];
        all[3 - values.len()..].copy_from_slice(values);
        all
    }
    Geometry::new(
        input[0],
        [input[1], weight[0]],
        spec.groups,
        lifted(&input[2..], 1),
        lifted(&weight[2..], 1),
        lifted(&spec.stride, 1),
        lifted(&spec.padding, (0, 0)),
        lifted(&spec.dilation, 1),
    )
    .unwrap_or_else(|error| panic!("{error}"))
    .with_max_scratch(max_workspace.map_or(usize::MAX, |most| most.max(LEAST_SCRATCH)))
}

pub(super) fn output_shape(input: &Shape, geometry: &Geometry) -> Shape {
    let spatial = input.num_dims() - 2;
    let mut shape = vec![geometry.batch(), geometry.channels_out()];
    shape.extend_from_slice(&geometry.output()[3 - spatial..]);
    Shape::from(shape)
}

/// The tensor itself unless it is a view that the kernels cannot read.
pub(super) fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    match tensor.layout().contiguous_offsets() {
        Some(_) => tensor.clone(),
        None => tensor.to_contiguous(),
    }
}

/// The tensor with its values changed: in place where nothing else holds them.
pub(super) fn updated<E: Element + Pod>(
    tensor: FlexTensor,
    change: impl FnOnce(&mut [E]),
) -> FlexTensor {
    let mut tensor = match tensor.layout().contiguous_offsets() {
        Some(_) => tensor,
        None => tensor.to_contiguous(),
    };
    let offsets = tensor.layout().contiguous_offsets();
    let (start, end) = offsets.expect("a contiguous tensor has offsets");
    change(&mut tensor.storage_mut()[start..end]);
    tensor
}

pub(super) fn slice<E: Element + Pod>(tensor: &FlexTensor) -> &[E] {
    tensor
        .as_slice::<E>()
        .expect("the op's tensors were checked to be of one dtype")
}

/// The values of a contiguous tensor of parameters, in the kernels' type.
pub(super) fn numbers<T: Number>(tensor: &FlexTensor) -> Cow<'_, [T]> {
    if tensor.dtype() == T::dtype() {
        Cow::Borrowed(slice(tensor))
    } else {
        Cow::Owned(slice(&cast::<Flex>(tensor.clone(), T::dtype())).to_vec())
    }
}

/// Values of a `[channels]` tensor.
pub(super) fn host<T: Number>(tensor: &FlexTensor) -> Vec<T> {
    numbers(&contiguous(tensor)).into_owned()
}

pub(super) fn tensor<T: Element + Pod>(values: Vec<T>, shape: &Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.clone()))
}
