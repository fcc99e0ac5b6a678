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
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn_train::optim::OptimizerChoice;
///
/// let device = Device::flex().autodiff();
/// let layer = LinearConfig::new(2, 1).init(&device);
/// let choice = OptimizerChoice::Sgd;
/// assert_eq!(choice.default_learning_rate(), 0.05);
///
/// let before = layer.weight.val();
/// let loss = layer.forward(Tensor::<2>::ones([4, 2], &device)).mean();
/// let grads = GradientsParams::from_grads(loss.backward(), &layer);
/// let layer = choice.init().step(choice.default_learning_rate(), layer, grads);
/// // The gradient is 1: the mean of four rows of ones.
/// let step = (before - layer.weight.val()).mean().into_scalar::<f32>();
/// assert!((step - 0.05).abs() < 1e-6, "{step}");
/// # }
/// ```
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
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adadelta => "adadelta",
            Self::Adam => "adam",
            Self::Adamw => "adamw",
            Self::Sgd => "sgd",
        }
    }

    /// The learning rate to start with where none is given.
    pub fn default_learning_rate(self) -> LearningRate {
        match self {
            Self::Adadelta => 1.0,
            Self::Adam | Self::Adamw => 1e-3,
            Self::Sgd => 0.05,
        }
    }

    /// Whether its recorded state, restored, is what it was, for parameters of this type.
    ///
    /// Burn restores the state of its own optimizers in the default type of the default device,
    /// which is single precision.
    pub fn restores(self, dtype: FloatDType) -> bool {
        self == Self::Adadelta || dtype != FloatDType::F64
    }

    /// The optimizer, in its initial state.
    pub fn init(self) -> ModuleOptimizer {
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
/// Made by [`AdadeltaConfig`], which has an example.
#[derive(Clone)]
pub struct Adadelta {
    rho: f64,
    epsilon: f64,
    weight_decay: Option<WeightDecay>,
}

/// Adadelta state.
///
/// [`Adadelta`] keeps one for each parameter; [`AdadeltaConfig`] has an example.
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
mod tests {
    use super::*;

    use burn::module::Param;
    use burn::nn::Linear;
    use burn::optim::GradientsParams;
    use burn::tensor::{DType, TensorData, Tolerance};

    /// One element, straight from Zeiler's Algorithm 1 with PyTorch's learning rate.
    #[derive(Default)]
    struct Scalar {
        square_avg: f64,
        acc_delta: f64,
    }

    impl Scalar {
        fn step(&mut self, parameter: f64, grad: f64, lr: f64, rho: f64, epsilon: f64) -> f64 {
            self.square_avg = rho * self.square_avg + (1.0 - rho) * grad * grad;
            let delta =
                (self.acc_delta + epsilon).sqrt() / (self.square_avg + epsilon).sqrt() * grad;
            self.acc_delta = rho * self.acc_delta + (1.0 - rho) * delta * delta;
            parameter - lr * delta
        }
    }

    /// A bias-free 2 -> 1 layer, so that the gradient of the sum of its outputs for one input
    /// row is that row.
    fn layer(weight: [f64; 2], dtype: FloatDType, device: &Device) -> Linear {
        let weight = Tensor::<2>::from_data(
            TensorData::new(weight.to_vec(), [2, 1]),
            (device, DType::from(dtype)),
        );
        Linear {
            weight: Param::from_tensor(weight),
            bias: None,
        }
    }

    fn step(optimizer: &mut ModuleOptimizer, layer: Linear, lr: f64, grad: [f64; 2]) -> Linear {
        let weight = layer.weight.val();
        let input = Tensor::<2>::from_data(
            TensorData::new(grad.to_vec(), [1, 2]),
            (&weight.device(), weight.dtype()),
        );
        let grads = layer.forward(input).sum().backward();
        let grads = GradientsParams::from_grads(grads, &layer);
        optimizer.step(lr, layer, grads)
    }

    const GRADS: [[f64; 2]; 4] = [[0.5, -3.0], [-0.25, 1e-4], [2.0, 0.0], [0.125, 40.0]];

    #[test]
    fn follows_the_published_formulae() {
        let device = Device::flex().autodiff();
        for (dtype, tolerance) in [(FloatDType::F32, 1e-6), (FloatDType::F64, 1e-12)] {
            let (rho, epsilon, decay, lr) = (0.8, 1e-5, 0.125, 0.7);
            let mut optimizer = AdadeltaConfig::new()
                .with_rho(rho)
                .with_epsilon(epsilon)
                .with_weight_decay(Some(WeightDecayConfig::new(decay as f32)))
                .init();

            let mut expected = [0.75, -1.5];
            let mut scalars = [Scalar::default(), Scalar::default()];
            let mut layer = layer(expected, dtype, &device);
            for grad in GRADS {
                layer = step(&mut optimizer, layer, lr, grad);
                for ((value, scalar), grad) in expected.iter_mut().zip(&mut scalars).zip(grad) {
                    let grad = grad + decay * *value;
                    *value = scalar.step(*value, grad, lr, rho, epsilon);
                }
            }

            layer.weight.val().into_data().assert_approx_eq::<f64>(
                &TensorData::new(expected.to_vec(), [2, 1]),
                Tolerance::absolute(tolerance),
            );
        }
    }

    #[test]
    fn resumes_from_its_record() {
        let device = Device::flex().autodiff();
        for dtype in [FloatDType::F32, FloatDType::F64] {
            let mut original = AdadeltaConfig::new().init();
            let mut layer = layer([0.75, -1.5], dtype, &device);
            for grad in GRADS {
                layer = step(&mut original, layer, 1.0, grad);
            }
            let bytes = original.into_bytes().expect("the state is serializable");
            let mut restored = AdadeltaConfig::new()
                .init()
                .from_bytes(bytes)
                .expect("the record was just written");

            let expected = step(&mut original, layer.clone(), 1.0, [-0.5, 0.5]);
            let actual = step(&mut restored, layer, 1.0, [-0.5, 0.5]);

            actual
                .weight
                .val()
                .into_data()
                .assert_eq(&expected.weight.val().into_data(), true);
        }
    }

    /// Whether a record of the state after one step, restored, gives the same record again.
    fn comes_back(choice: OptimizerChoice, dtype: FloatDType) -> bool {
        let device = Device::flex().autodiff();
        let mut original = choice.init();
        let layer = layer([0.75, -1.5], dtype, &device);
        step(&mut original, layer, 0.125, [1.0 / 3.0, -3.0]);
        let record = || original.into_bytes().expect("the state is serializable");
        let restored = choice.init().from_bytes(record());
        let restored = restored.expect("the record was just written");
        restored.into_bytes().expect("the state is serializable") == record()
    }

    #[test]
    fn what_restores_comes_back() {
        for &choice in OptimizerChoice::value_variants() {
            for dtype in [FloatDType::F32, FloatDType::F64] {
                assert_eq!(
                    comes_back(choice, dtype),
                    choice.restores(dtype),
                    "{choice:?}, {dtype:?}"
                );
            }
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for choice in OptimizerChoice::value_variants() {
            let value = choice.to_possible_value().expect("no choice is hidden");
            assert_eq!(value.get_name(), choice.name());
            let json = serde_json::to_string(choice).expect("a name is JSON");
            assert_eq!(json, format!("{:?}", choice.name()));
        }
    }

    /// Each takes the loss of a linear layer down, at the rate that it has by default.
    #[test]
    fn every_choice_descends() {
        let device = Device::flex().autodiff();
        for choice in OptimizerChoice::value_variants() {
            let mut optimizer = choice.init();
            let mut layer = layer([0.75, -1.5], FloatDType::F32, &device);
            for _ in 0..3 {
                layer = step(
                    &mut optimizer,
                    layer,
                    choice.default_learning_rate(),
                    [2.0, -1.0],
                );
            }
            let weight = layer.weight.val().into_data();
            let weight: Vec<f64> = weight.iter::<f64>().collect();
            assert!(
                weight[0] < 0.75 && weight[1] > -1.5,
                "{choice:?}: {weight:?}"
            );
        }
    }

    /// PyTorch's: the velocity is 0.9 of the last one and all of the gradient.
    #[test]
    fn sgd_has_an_undampened_momentum() {
        let device = Device::flex().autodiff();
        let mut optimizer = OptimizerChoice::Sgd.init();
        let mut layer = layer([0.0, 0.0], FloatDType::F64, &device);
        for _ in 0..2 {
            layer = step(&mut optimizer, layer, 0.5, [1.0, -2.0]);
        }
        let wanted = TensorData::new(vec![-0.5 * (1.0 + 1.9), 0.5 * (2.0 + 3.8)], [2, 1]);
        let weight = layer.weight.val().into_data();
        weight.assert_approx_eq::<f64>(&wanted, Tolerance::absolute(1e-6));
    }

    #[test]
    fn config_survives_json() {
        let config = AdadeltaConfig::new()
            .with_rho(0.95)
            .with_grad_clipping(Some(GradientClippingConfig::Norm(2.0)));
        let copy = AdadeltaConfig::load_binary(config.to_string().as_bytes())
            .expect("a printed config is its JSON");

        assert_eq!(copy.to_string(), config.to_string());
        assert!(copy.init().has_gradient_clipping());
    }
}
