//! Precisions in Burn's terms.

use std::borrow::Cow;

use burn::optim::GradientsParams;
use burn::tensor::{Gradients, Tensor};
use burn_conv_bn::ConvBnModule;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_models::optim::LossScale;
use burn_conv_bn_train::job;

/// The types of a precision. Burn chooses whether f32 is multiplied as TF32.
pub fn types(precision: Precision) -> job::Precision {
    match precision {
        Precision::F32 | Precision::Tf32 => job::Precision::F32,
        Precision::F16 => job::Precision::F16,
        Precision::Bf16 => job::Precision::BF16,
    }
}

/// Computation in a precision, with parameters in f32 in all of them.
#[derive(Clone, Copy, Debug)]
pub struct Computing(job::Precision);

impl Computing {
    pub fn new(precision: Precision) -> Self {
        Self(types(precision))
    }

    /// Whether activations are of another type than parameters.
    pub fn is_mixed(self) -> bool {
        self.0.is_mixed()
    }

    /// Activations in the blocks' type.
    pub fn activations<const D: usize>(self, tensor: Tensor<D>) -> Tensor<D> {
        tensor.cast(self.0.activations())
    }

    /// A module for one forward pass, in mixed precision with its blocks' weights cast.
    pub fn module<M: ConvBnModule>(self, module: &M) -> Cow<'_, M> {
        if self.is_mixed() {
            Cow::Owned(module.autocast(self.0.activations()))
        } else {
            Cow::Borrowed(module)
        }
    }

    /// The backward pass of a loss, which may be scaled for it.
    pub fn backward(self, loss: &Tensor<1>) -> Gradients {
        self.scale().backward(loss)
    }

    /// A gradient of [`backward`](Self::backward), unscaled.
    pub fn gradient<const D: usize>(
        self,
        parameter: &Tensor<D>,
        gradients: &Gradients,
    ) -> Option<Tensor<D>> {
        let gradient = parameter.grad(gradients)?;
        Some(self.scale().unscale(gradient))
    }

    /// All of a module's gradients, unscaled.
    pub fn gradients<M: ConvBnModule>(self, gradients: Gradients, module: &M) -> GradientsParams {
        self.scale().gradients(gradients, module)
    }

    fn scale(self) -> LossScale {
        LossScale::of(self.0.activations())
    }
}
