use burn::config::Config;
use burn::grad_clipping::GradientClippingConfig;
use burn::optim::decay::{WeightDecay, WeightDecayConfig};
use burn::optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};

/// Configuration of [`Adadelta`].
///
/// The defaults are PyTorch's.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::optim::GradientsParams;
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn_models::optim::AdadeltaConfig;
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
/// Multiplies every gradient element by the root of two running averages' ratio, the squared updates' over
/// the squared gradients'. A learning rate of 1 is [the method as published](https://arxiv.org/abs/1212.5701).
/// The formulae are those of
/// [`torch.optim.Adadelta`](https://docs.pytorch.org/docs/stable/generated/torch.optim.Adadelta.html).
///
/// Made by [`AdadeltaConfig`]. A record of its state keeps the state's type.
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

/// As derived, with the state's type: the derived state comes back in the device's default type, in which one
/// in double precision loses half of its digits.
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
    /// Build the bare optimizer, which [`ModuleOptimizer::with_group`] takes for one parameter group.
    ///
    /// It clips no gradients; [`init`](Self::init) does.
    pub fn build(&self) -> Adadelta {
        Adadelta {
            rho: self.rho,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay.as_ref().map(WeightDecay::new),
        }
    }

    /// Build an optimizer of a whole module, with the configured gradient clipping.
    pub fn init(&self) -> ModuleOptimizer {
        let mut optim = ModuleOptimizer::from(self.build());
        if let Some(config) = &self.grad_clipping {
            optim = optim.with_grad_clipping(config.init());
        }
        optim
    }
}

impl<const D: usize> AdadeltaState<D> {
    /// Move the state to a device.
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
