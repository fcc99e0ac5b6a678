//! What networks have besides blocks, in both forms: norms before convolutions, convolutions and max pools alone, and
//! concatenations.

use burn::nn::conv::Conv2d;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Shape, Tensor};
use burn_conv_bn::functional::{cat_channels, conv};
use burn_conv_bn::{BatchNormActivation, ConvBnError, MaxPool2d, SavedTensor};

use crate::Form;
use crate::form::{burn_pool, kept_by_activation, unfused_activation, unfused_norm};

impl Form {
    /// Norm and activation. Fused, the output is rebuilt in the backward pass.
    pub(crate) fn normalize(self, layer: &BatchNormActivation, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Fused => layer.forward(input),
            Self::Unfused => {
                let normalized = unfused_norm(&layer.norm, &layer.settings, input);
                unfused_activation(layer.settings.activation, normalized)
            }
        }
    }

    /// A convolution of stride 1 without bias that keeps height and width, in the input's type.
    pub(crate) fn convolve(self, layer: &Conv2d, input: Tensor<4>) -> Tensor<4> {
        let weight = layer.weight.val().cast(input.dtype());
        let padding = layer.kernel_size.map(|size| size / 2);
        let same = ConvOptions::new([1, 1], padding, [1, 1], 1);
        match self {
            Self::Fused => or_panic(conv(input, weight, None, same)),
            Self::Unfused => conv2d(input, weight, None, same),
        }
    }

    /// Concatenation along channels. Fused, the output is rebuilt in the backward pass.
    pub(crate) fn concatenate(self, tensors: Vec<Tensor<4>>) -> Tensor<4> {
        match self {
            Self::Fused => or_panic(cat_channels(tensors)),
            Self::Unfused => Tensor::cat(tensors, 1),
        }
    }

    /// A max pool.
    pub(crate) fn max_pool(self, pool: &MaxPool2d, input: Tensor<4>) -> Tensor<4> {
        match self {
            Self::Fused => pool.forward(input),
            Self::Unfused => burn_pool(pool).forward(input),
        }
    }

    /// What [`max_pool`](Self::max_pool) keeps of a tracked input of that shape and type.
    pub(crate) fn saved_by_max_pool(
        self,
        pool: &MaxPool2d,
        input_shape: [usize; 4],
        dtype: DType,
    ) -> Vec<SavedTensor> {
        let mut saved = match self {
            Self::Fused => pool.saved_for_backward(input_shape),
            Self::Unfused => pool.saved_by_burn(input_shape),
        };
        for tensor in &mut saved {
            if tensor.name == "input" {
                tensor.dtype = dtype;
            }
        }
        saved
    }

    /// What [`normalize`](Self::normalize) keeps of a tracked input of that shape and type.
    pub(crate) fn saved_by_norm(
        self,
        layer: &BatchNormActivation,
        shape: &Shape,
        dtype: DType,
    ) -> Vec<SavedTensor> {
        match self {
            Self::Fused => {
                let mut saved = layer.saved_for_backward(shape.dims::<4>());
                for tensor in &mut saved {
                    if tensor.name == "input" {
                        tensor.dtype = dtype;
                    }
                }
                saved
            }
            Self::Unfused => unfused_saved(layer, shape, dtype),
        }
    }
}

/// What Burn's norm and activation keep; see [`Form::saved_for_backward`].
fn unfused_saved(layer: &BatchNormActivation, shape: &Shape, dtype: DType) -> Vec<SavedTensor> {
    let (norm, settings) = (&layer.norm, &layer.settings);
    let gamma = norm.gamma.val();
    let norm_dtype = gamma.dtype();
    let is_frozen = settings.track_running_stats && !norm.training.is_enabled();
    let normalized = is_frozen && settings.affine && gamma.is_tracked();
    let channels = Shape::new([shape[1]]);
    let variance = if is_frozen { "std" } else { "variance" };
    // In mixed precision the norm's input is a cast of its own.
    let of_norm = [
        (!is_frozen, "input", shape, dtype == norm_dtype),
        (normalized, "normalized", shape, false),
        (true, "gamma", &channels, true),
        (!is_frozen, "mean", &channels, false),
        (true, variance, &channels, false),
    ];
    let of_norm = of_norm.into_iter().filter(|(kept, ..)| *kept);
    let of_norm = of_norm.map(|(_, name, shape, shared)| SavedTensor {
        name,
        shape: shape.clone(),
        dtype: norm_dtype,
        shared,
    });
    let of_activation = kept_by_activation(settings.activation, "norm_output", dtype);
    let of_activation = of_activation.into_iter().map(|(name, dtype)| SavedTensor {
        name,
        shape: shape.clone(),
        dtype,
        shared: false,
    });
    of_norm.chain(of_activation).collect()
}

fn or_panic<T>(result: Result<T, ConvBnError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}
