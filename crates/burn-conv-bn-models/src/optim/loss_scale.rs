use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, FloatDType, Gradients, Tensor};

/// [`LossScale::of`] f16.
const F16: f64 = 1024.0;

/// Bounds of a [`LossScaler`]'s scale: it is halved above the first, and doubled below the second.
const BOUNDS: [f64; 2] = [1.0 / (1 << 24) as f64, (1 << 24) as f64];

/// Factor on the loss for the backward pass, by which the gradients are divided after it.
///
/// A loss is a mean over a batch, so that the gradients of single values are as small as the batch is
/// large, and f16 has nothing below 6e-8. What is summed over the batch again, as gradients of weights
/// are, must stay below f16's 65504. A power of two rounds nothing. bf16 reaches as far as f32 does, and
/// needs no factor.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, FloatDType, Tensor};
/// use burn_conv_bn_models::optim::LossScale;
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
    /// A fixed factor.
    ///
    /// # Errors
    ///
    /// [`LossScaleError::Factor`], unless it is finite and above 0.
    pub fn new(factor: f64) -> Result<Self, LossScaleError> {
        if factor.is_finite() && factor > 0.0 {
            Ok(Self(factor))
        } else {
            Err(LossScaleError::Factor(factor))
        }
    }

    /// For activations of a type: 1024 for f16, which leaves room for sums over a batch, 1 for others.
    pub fn of(activations: FloatDType) -> Self {
        Self(match activations {
            FloatDType::F16 => F16,
            _ => 1.0,
        })
    }

    /// The factor.
    pub fn factor(self) -> f64 {
        self.0
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
        let scaled = GradientsParams::from_grads(gradients, module);
        if self.is_one() {
            return scaled;
        }
        let mut unscale = Unscale {
            scale: self,
            scaled,
            unscaled: GradientsParams::new(),
        };
        module.visit(&mut unscale);
        unscale.unscaled
    }

    fn is_one(self) -> bool {
        self.0 == 1.0
    }
}

/// A [`LossScale`] that follows the gradients, as PyTorch's `GradScaler` does: halved where one of them is
/// not finite, in which case the step is to be skipped, and doubled after so many finite steps.
///
/// Clip gradients after [`gradients`](Self::gradients), as the clipping of Burn's optimizers does. A training
/// that is resumed takes up the scale from [`scale`](Self::scale) of its last step.
///
/// A fused block that trains in f16, with its parameters and their gradients in f32:
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::optim::SgdConfig;
/// use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
/// use burn_conv_bn::{ConvBn2dConfig, ConvBnModule};
/// use burn_conv_bn_models::optim::{LossScale, LossScaler};
///
/// let device = Device::flex().autodiff();
/// let mut block = ConvBn2dConfig::new([3, 8], [3, 3]).init(&device);
/// let mut optimizer = SgdConfig::new().init();
///
/// // Too large for f16, to show what happens then; without it, `LossScaler::default()`.
/// let first = LossScale::new(f64::from(1 << 24))?;
/// let mut scaler = LossScaler::new(first).with_growth_interval(1000);
/// let (mut stepped, mut skipped) = (0, 0);
/// for _ in 0..16 {
///     let images = Tensor::<4>::random([2, 3, 8, 8], Distribution::Default, &device);
///     let output = block.autocast(FloatDType::F16).forward(images.cast(DType::F16));
///     let loss = output.cast(DType::F32).square().mean();
///     let gradients = scaler.backward(&loss);
///     match scaler.gradients(gradients, &block) {
///         Ok(gradients) => {
///             block = optimizer.step(0.01, block, gradients);
///             stepped += 1;
///         }
///         Err(error) => {
///             println!("{error}");
///             skipped += 1;
///         }
///     }
/// }
/// assert!(stepped > 0 && skipped > 0);
/// assert_eq!(scaler.scale().factor(), first.factor() / f64::from(1 << skipped));
/// # }
/// # Ok::<(), burn_conv_bn_models::optim::LossScaleError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    scale: LossScale,
    growth_interval: usize,
    /// Finite ones since the scale has changed.
    steps: usize,
}

impl Default for LossScaler {
    /// Of 65536, doubled after 2000 steps: PyTorch's.
    fn default() -> Self {
        Self::new(LossScale(65536.0))
    }
}

impl LossScaler {
    /// Starts from a scale.
    pub fn new(scale: LossScale) -> Self {
        Self {
            scale,
            growth_interval: 2000,
            steps: 0,
        }
    }

    /// Sets the number of finite steps in a row after which the scale is doubled. 0: never. Default: 2000.
    #[must_use]
    pub fn with_growth_interval(mut self, steps: usize) -> Self {
        self.growth_interval = steps;
        self
    }

    /// The scale of the next step.
    pub fn scale(&self) -> LossScale {
        self.scale
    }

    /// The gradients of a loss, still multiplied.
    pub fn backward(&self, loss: &Tensor<1>) -> Gradients {
        self.scale.backward(loss)
    }

    /// Those of [`backward`](Self::backward) that are a module's parameters', divided. Updates the scale.
    ///
    /// Reads one value a parameter from the device, which must be the same for all of them.
    ///
    /// # Errors
    ///
    /// [`LossScaleError::NotFinite`], if an element of one is infinite or NaN.
    pub fn gradients<M: Module>(
        &mut self,
        gradients: Gradients,
        module: &M,
    ) -> Result<GradientsParams, LossScaleError> {
        let gradients = self.scale.gradients(gradients, module);
        let mut finite = Finite {
            gradients: &gradients,
            parameters: Vec::new(),
            flags: Vec::new(),
        };
        module.visit(&mut finite);
        let scale = self.scale.0;
        if let Some(parameter) = finite.exception() {
            self.steps = 0;
            if scale > BOUNDS[0] {
                self.scale.0 = scale / 2.0;
            }
            return Err(LossScaleError::NotFinite {
                parameter,
                scale,
                next: self.scale.0,
            });
        }
        self.steps += 1;
        if self.steps == self.growth_interval {
            self.steps = 0;
            if scale < BOUNDS[1] {
                self.scale.0 = scale * 2.0;
            }
        }
        Ok(gradients)
    }
}

/// What is wrong with a loss scale, or with gradients at one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossScaleError {
    /// No factor.
    #[error("a loss scale must be finite and above 0, got {0}")]
    Factor(f64),
    /// Infinities or NaN in a gradient.
    #[error(
        "the gradient of parameter {parameter} is not finite at a loss scale of {scale}; skip this step: the \
         next one's scale is {next}"
    )]
    NotFinite {
        /// The first such parameter of the module.
        parameter: ParamId,
        /// Factor of this step.
        scale: f64,
        /// Factor of the next step: half of it, down to 6e-8.
        next: f64,
    },
}

/// Moves gradients, each once where a parameter is in a module twice.
struct Unscale {
    scale: LossScale,
    scaled: GradientsParams,
    unscaled: GradientsParams,
}

impl ModuleVisitor for Unscale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.scaled.remove::<D>(param.id) {
            self.unscaled
                .register(param.id, self.scale.unscale(gradient));
        }
    }
}

/// Whether each parameter's gradient is finite, still on the device.
struct Finite<'a> {
    gradients: &'a GradientsParams,
    parameters: Vec<ParamId>,
    flags: Vec<Tensor<1, Bool>>,
}

impl Finite<'_> {
    /// The first parameter whose gradient is not.
    fn exception(self) -> Option<ParamId> {
        if self.flags.is_empty() {
            return None;
        }
        let flags = Tensor::cat(self.flags, 0).into_data();
        let index = flags.iter::<bool>().position(|finite| !finite)?;
        Some(self.parameters[index])
    }
}

impl ModuleVisitor for Finite<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.parameters.push(param.id);
            self.flags.push(gradient.is_finite().all());
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    use super::*;

    /// Gradients of the sum of a bias-free layer's outputs: its input.
    fn step(
        scaler: &mut LossScaler,
        layer: &Linear,
        input: f32,
    ) -> Result<GradientsParams, LossScaleError> {
        let input = Tensor::<2>::full([1, 2], input, &layer.weight.device());
        let gradients = scaler.backward(&layer.forward(input).sum());
        scaler.gradients(gradients, layer)
    }

    fn layer() -> Linear {
        let device = Device::flex().autodiff();
        LinearConfig::new(2, 1).with_bias(false).init(&device)
    }

    #[test]
    fn a_step_that_is_not_finite_halves_the_scale() {
        let layer = layer();
        let mut scaler = LossScaler::new(LossScale(8.0));
        for input in [f32::INFINITY, f32::NAN] {
            let scale = scaler.scale().factor();
            let error = step(&mut scaler, &layer, input).unwrap_err();
            let wanted = LossScaleError::NotFinite {
                parameter: layer.weight.id,
                scale,
                next: scale / 2.0,
            };
            assert_eq!(error, wanted);
        }
        assert_eq!(scaler.scale(), LossScale(2.0));
        // Finite without the factor, infinite with it.
        assert!(step(&mut scaler, &layer, f32::MAX).is_err());
        let gradients = step(&mut scaler, &layer, f32::MAX).unwrap();
        let gradient = gradients.get::<2>(layer.weight.id).unwrap().into_data();
        assert_eq!(gradient.iter::<f32>().collect::<Vec<_>>(), [f32::MAX; 2]);
    }

    #[test]
    fn finite_steps_in_a_row_double_the_scale() {
        let layer = layer();
        let mut scaler = LossScaler::new(LossScale(4.0)).with_growth_interval(2);
        let scales = [1.0, 1.0, 1.0, f32::NAN, 1.0, 1.0].map(|input| {
            let _ = step(&mut scaler, &layer, input);
            scaler.scale().factor()
        });
        assert_eq!(scales, [4.0, 8.0, 8.0, 4.0, 4.0, 8.0]);
    }

    #[test]
    fn a_scale_stays_within_its_bounds() {
        let layer = layer();
        for (bound, input) in BOUNDS.into_iter().zip([f32::NAN, 1.0]) {
            let mut scaler = LossScaler::new(LossScale(bound)).with_growth_interval(1);
            let _ = step(&mut scaler, &layer, input);
            assert_eq!(scaler.scale(), LossScale(bound));
        }
    }

    #[test]
    fn a_parameter_that_is_twice_in_a_module_is_divided_once() {
        let layer = layer();
        let input = Tensor::<2>::ones([1, 2], &layer.weight.device());
        let scale = LossScale(4.0);
        let gradients = scale.backward(&layer.forward(input).sum());
        let gradients = scale.gradients(gradients, &vec![layer.clone(), layer.clone()]);
        let gradient = gradients.get::<2>(layer.weight.id).unwrap().into_data();
        assert_eq!(gradient.iter::<f32>().collect::<Vec<_>>(), [1.0; 2]);
    }

    #[test]
    fn a_factor_is_finite_and_above_zero() {
        for factor in [0.0, -1.0, f64::INFINITY] {
            let error = LossScale::new(factor).unwrap_err();
            assert_eq!(error, LossScaleError::Factor(factor));
        }
        assert!(LossScale::new(f64::NAN).is_err());
        assert_eq!(LossScale::new(3.0), Ok(LossScale(3.0)));
    }
}
