//! Gradients that are too small for f16.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Gradients, Tensor};

/// In f16, see [`LossScale`].
const F16: f64 = 1024.0;

/// Factor on the loss for the backward pass, by which the gradients are divided after it:
/// 1024 where activations are f16, and 1 elsewhere.
///
/// A loss is a mean over a batch, so that the gradients of single values are as small as the batch is
/// large, and f16 has nothing below 6e-8. What is summed over the batch again, as gradients of weights
/// are, has room for this factor below f16's 65504; a gradient beyond that is infinite all the same.
/// It is a power of two: nothing is rounded for it. bf16 reaches as far as f32 does.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, FloatDType, Tensor};
/// use burn_conv_bn_train::loss_scale::LossScale;
///
/// let device = Device::flex().autodiff();
/// let linear = LinearConfig::new(2, 1).init(&device);
/// let loss = |scale: f32| linear.forward(Tensor::<2>::full([1, 2], scale, &device)).mean();
///
/// let scale = LossScale::of(FloatDType::F16);
/// let scaled = scale.backward(&loss(0.5));
/// let weight = linear.weight.val();
/// let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
/// assert_eq!(values(weight.grad(&scaled).unwrap()), [512.0; 2]);
///
/// let gradients = scale.gradients(scaled, &linear);
/// let gradient = gradients.get::<2>(linear.weight.id).unwrap();
/// assert_eq!(values(gradient), [0.5; 2]);
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale(f64);

impl LossScale {
    /// That of activations of a type.
    pub fn of(activations: FloatDType) -> Self {
        Self(match activations {
            FloatDType::F16 => F16,
            _ => 1.0,
        })
    }

    /// The gradients of a loss, still multiplied.
    pub fn backward(self, loss: &Tensor<1>) -> Gradients {
        if self.is_one() {
            loss.backward()
        } else {
            (loss.clone() * self.0).backward()
        }
    }

    /// A gradient of [`backward`](Self::backward), divided.
    #[must_use]
    pub fn unscale<const D: usize>(self, gradient: Tensor<D>) -> Tensor<D> {
        if self.is_one() {
            gradient
        } else {
            gradient / self.0
        }
    }

    /// Those of [`backward`](Self::backward) that are a module's parameters', divided.
    pub fn gradients<M: Module>(self, gradients: Gradients, module: &M) -> GradientsParams {
        let mut gradients = GradientsParams::from_grads(gradients, module);
        if !self.is_one() {
            module.visit(&mut Unscale {
                scale: self,
                gradients: &mut gradients,
            });
        }
        gradients
    }

    fn is_one(self) -> bool {
        self.0 == 1.0
    }
}

struct Unscale<'a> {
    scale: LossScale,
    gradients: &'a mut GradientsParams,
}

impl ModuleVisitor for Unscale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients
                .register(param.id, self.scale.unscale(gradient));
        }
    }
}
