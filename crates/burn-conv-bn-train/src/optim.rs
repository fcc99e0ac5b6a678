//! The optimizers to choose from, and Adadelta, which Burn 0.22 does not have.

use burn::config::Config;
use burn::grad_clipping::GradientClippingConfig;
use burn::optim::decay::{WeightDecay, WeightDecayConfig};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdamConfig, AdamWConfig, LearningRate, ModuleOptimizer, Optimizer, RecordState, SgdConfig,
    StateSink, StateSource,
};
use burn::tensor::{Device, FloatDType, Tensor};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// An optimizer with its settings but for the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerChoice {
    /// Adadelta, the tutorial's, with PyTorch's settings.
    Adadelta,
    /// Adam, with Burn's settings.
    Adam,
    /// Adam with a weight decay apart from the gradient, with Burn's settings.
    Adamw,
    /// Stochastic gradient descent with a momentum of 0.9, as PyTorch does it.
    Sgd,
}

impl OptimizerChoice {
    /// The learning rate to start with where none is given.
    pub(crate) fn default_learning_rate(self) -> LearningRate {
        match self {
            Self::Adadelta => 1.0,
            Self::Adam | Self::Adamw => 1e-3,
            Self::Sgd => 0.05,
        }
    }

    /// Whether a record restores its state exactly, for parameters of this type.
    ///
    /// Burn restores the state of its own optimizers in the default type of the default device,
    /// which is single precision.
    pub(crate) fn restores(self, dtype: FloatDType) -> bool {
        self == Self::Adadelta || dtype != FloatDType::F64
    }

    /// The optimizer, in its initial state.
    pub(crate) fn init(self) -> ModuleOptimizer {
        match self {
            Self::Adadelta => AdadeltaConfig::new().init(),
            Self::Adam => AdamConfig::new().init(),
            Self::Adamw => AdamWConfig::new().init(),
            Self::Sgd => {
                // Burn dampens the gradient by a tenth where PyTorch does not.
                let momentum = MomentumConfig::new().with_momentum(0.9).with_dampening(0.0);
                SgdConfig::new().with_momentum(Some(momentum)).init()
            }
        }
    }
}

/// Configuration of [`Adadelta`].
///
/// The defaults are PyTorch's.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn_train::optim::AdadeltaConfig;
///
/// let device = Device::flex().autodiff();
/// let layer = LinearConfig::new(2, 1).init(&device);
/// let mut optimizer = AdadeltaConfig::new().with_rho(0.95).init();
///
/// let loss = |layer: &burn::nn::Linear| layer.forward(Tensor::<2>::ones([4, 2], &device)).mean();
/// let before = loss(&layer);
/// let grads = GradientsParams::from_grads(before.clone().backward(), &layer);
/// let layer = optimizer.step(1.0, layer, grads);
/// assert!(loss(&layer).into_scalar::<f32>() < before.into_scalar::<f32>());
/// # }
/// ```
#[derive(Config, Debug)]
pub struct AdadeltaConfig {
    /// Decay of the two running averages.
    #[config(default = 0.9)]
    rho: f64,
    /// Added under both square roots: keeps the first steps from being zero and the
    /// quotient finite.
    #[config(default = 1e-6)]
    epsilon: f64,
    /// [Weight decay](WeightDecayConfig) config.
    weight_decay: Option<WeightDecayConfig>,
    /// [Gradient Clipping](GradientClippingConfig) config.
    grad_clipping: Option<GradientClippingConfig>,
}

/// Adadelta optimizer.
///
/// Scales every gradient element by the ratio of two running averages, that of the squared
/// updates over that of the squared gradients, so that a learning rate of 1 is the method as
/// published.
///
/// See:
/// - [ADADELTA: An Adaptive Learning Rate Method](https://arxiv.org/abs/1212.5701).
/// - [`torch.optim.Adadelta`](https://docs.pytorch.org/docs/stable/generated/torch.optim.Adadelta.html),
///   whose formulae these are.
///
/// Made by [`AdadeltaConfig`].
#[derive(Clone)]
pub struct Adadelta {
    rho: f64,
    epsilon: f64,
    weight_decay: Option<WeightDecay>,
}

/// Adadelta state.
#[derive(Clone)]
pub struct AdadeltaState<const D: usize> {
    /// Running average of the squared gradients.
    pub square_avg: Tensor<D>,
    /// Running average of the squared updates.
    pub acc_delta: Tensor<D>,
}

impl Optimizer for Adadelta {
    type State<const D: usize> = AdadeltaState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        mut grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        if let Some(weight_decay) = &self.weight_decay {
            grad = weight_decay.transform(grad, tensor.clone());
        }

        let AdadeltaState {
            square_avg,
            acc_delta,
        } = match state {
            // A record may be of another type.
            Some(state) => state.cast_like(&grad),
            None => AdadeltaState {
                square_avg: grad.zeros_like(),
                acc_delta: grad.zeros_like(),
            },
        };

        // Every operand is moved into its last use, so that backends can work in place.
        let square_avg = square_avg
            .mul_scalar(self.rho)
            .add(grad.clone().square().mul_scalar(1.0 - self.rho));
        let std = square_avg.clone().add_scalar(self.epsilon).sqrt();
        let delta = acc_delta
            .clone()
            .add_scalar(self.epsilon)
            .sqrt()
            .div(std)
            .mul(grad);
        let acc_delta = acc_delta
            .mul_scalar(self.rho)
            .add(delta.clone().square().mul_scalar(1.0 - self.rho));

        let state = AdadeltaState {
            square_avg,
            acc_delta,
        };

        (tensor - delta.mul_scalar(lr), Some(state))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        state.to_device(device)
    }
}

/// As derived, but for the type: the derived state comes back in the default type of the device,
/// and loses half of its digits if it was in double precision.
impl<const D: usize> RecordState for AdadeltaState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, SQUARE_AVG, self.square_avg.clone().into_data());
        out.push_tensor(prefix, ACC_DELTA, self.acc_delta.clone().into_data());
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let mut take = |leaf| {
            let data = src.take_tensor(prefix, leaf)?;
            let dtype = data.dtype();
            Some(Tensor::from_data(data, (device, dtype)))
        };
        Some(Self {
            square_avg: take(SQUARE_AVG)?,
            acc_delta: take(ACC_DELTA)?,
        })
    }
}

/// Names of the state's tensors in a record.
const SQUARE_AVG: &str = "square_avg";
const ACC_DELTA: &str = "acc_delta";

impl AdadeltaConfig {
    /// Build an [`Adadelta`] from the config.
    ///
    /// The bare optimizer, which [`ModuleOptimizer::with_group`] takes to optimize one
    /// parameter group. [`init`](Self::init) is the whole-module counterpart, and the only one
    /// that applies the configured gradient clipping.
    pub fn build(&self) -> Adadelta {
        Adadelta {
            rho: self.rho,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay.as_ref().map(WeightDecay::new),
        }
    }

    /// Initialize Adadelta optimizer.
    ///
    /// # Returns
    ///
    /// Returns an optimizer that can be used to optimize a module.
    pub fn init(&self) -> ModuleOptimizer {
        let mut optim = ModuleOptimizer::from(self.build());
        if let Some(config) = &self.grad_clipping {
            optim = optim.with_grad_clipping(config.init());
        }
        optim
    }
}

impl<const D: usize> AdadeltaState<D> {
    /// Move state to device.
    ///
    /// # Arguments
    ///
    /// * `device` - Device to move state to.
    ///
    /// # Returns
    ///
    /// Returns state moved to device.
    pub fn to_device(self, device: &Device) -> Self {
        Self {
            square_avg: self.square_avg.to_device(device),
            acc_delta: self.acc_delta.to_device(device),
        }
    }

    fn cast_like(self, grad: &Tensor<D>) -> Self {
        Self {
            square_avg: self.square_avg.cast(grad.dtype()),
            acc_delta: self.acc_delta.cast(grad.dtype()),
        }
    }
}

#[cfg(test)]
mod tests;
