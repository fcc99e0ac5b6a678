//! Analytic against numerical gradients, as PyTorch's `gradcheck` does it.
//!
//! The numerical gradient is the central difference `(f(x + h) - f(x - h)) / 2h` in f64, one
//! element of one input at a time. The function's output `y` is compared through `sum(u * y)` for
//! an upstream gradient `u`: every unit vector, which is the whole Jacobian, or one random vector,
//! which is as many times cheaper as the output has elements and still sees every path.
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::{Device, TensorData};
//! use burn_conv_bn::gradcheck::{GradCheck, Upstream};
//!
//! let x = TensorData::from([[0.5, -1.0], [2.0, 0.1]]);
//! let report = GradCheck::new(&Device::flex())
//!     .input("x", x)
//!     .upstream(Upstream::Jacobian)
//!     .check(|inputs| inputs.get::<2>("x").tanh())
//!     .unwrap();
//! assert_eq!(report.compared, 4 * 4);
//! # }
//! ```

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What multiplies the output on its way back.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, TensorData};
/// use burn_conv_bn::gradcheck::{GradCheck, Upstream};
///
/// let compared = |upstream: Upstream| {
///     let check = GradCheck::new(&Device::flex())
///         .input("x", TensorData::from([0.5, 1.0, 2.0]))
///         .upstream(upstream);
///     let report = check.check(|inputs| inputs.get::<1>("x").exp()).unwrap();
///     report.compared
/// };
/// assert_eq!(compared(Upstream::Jacobian), 3 * 3);
/// assert_eq!(compared(Upstream::Random(1)), 3);
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Upstream {
    /// Each unit vector in turn: the whole Jacobian is compared.
    Jacobian,
    /// One vector, uniform in `[-1, 1)`, from this seed.
    Random(u64),
}

/// A gradient check: inputs, step, tolerances.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, TensorData};
/// use burn_conv_bn::ConvSpec;
/// use burn_conv_bn::functional::conv;
/// use burn_conv_bn::gradcheck::{GradCheck, Upstream};
///
/// let values = |count: usize| (0..count).map(|i| (i as f64).sin()).collect::<Vec<_>>();
/// let report = GradCheck::new(&Device::flex())
///     .input("x", TensorData::new(values(100), [2, 2, 5, 5]))
///     .input("weight", TensorData::new(values(54), [3, 2, 3, 3]))
///     .upstream(Upstream::Random(1))
///     .check(|inputs| {
///         let (x, weight) = (inputs.get::<4>("x"), inputs.get("weight"));
///         conv(x, weight, None, ConvSpec::unit(2)).unwrap()
///     })
///     .unwrap();
/// assert_eq!(report.compared, 100 + 54);
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GradCheck {
    device: Device,
    inputs: Vec<Input>,
    step: f64,
    absolute: f64,
    relative: f64,
    upstream: Upstream,
}

#[derive(Clone, Debug)]
struct Input {
    name: &'static str,
    shape: Vec<usize>,
    values: Vec<f64>,
    differentiated: bool,
}

/// A check that passed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradCheckReport {
    /// Number of derivatives compared.
    pub compared: usize,
    /// Largest absolute difference among them.
    pub max_difference: f64,
}

/// A check that failed.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, TensorData};
/// use burn_conv_bn::gradcheck::{GradCheck, GradCheckError};
///
/// // The gradient of x * x with one factor missing.
/// let error = GradCheck::new(&Device::flex())
///     .input("x", TensorData::from([1.0, 2.0]))
///     .check(|inputs| {
///         let x = inputs.get::<1>("x");
///         x.clone() * x.detach()
///     })
///     .unwrap_err();
/// assert!(matches!(error, GradCheckError::Mismatch { mismatched: 2, .. }));
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GradCheckError {
    /// The gradients differ.
    #[error(
        "{mismatched} of {compared} derivatives differ by more than {absolute:e} + {relative:e} \
         of the numerical one; worst: d output[{output:?}] / d {input}[{index}], analytic \
         {analytic:e}, numerical {numerical:e}"
    )]
    Mismatch {
        /// How many differ.
        mismatched: usize,
        /// How many were compared.
        compared: usize,
        /// Absolute tolerance.
        absolute: f64,
        /// Relative tolerance.
        relative: f64,
        /// Input with the largest excess over the tolerance.
        input: &'static str,
        /// Row-major index of the element in that input.
        index: usize,
        /// Row-major index of the output's element, or `None` with a random upstream gradient.
        output: Option<usize>,
        /// Derivative from the backward pass.
        analytic: f64,
        /// Derivative from central differences.
        numerical: f64,
    },
    /// An input has no gradient.
    #[error("{input}: the backward pass returned no gradient")]
    NoGradient {
        /// The input.
        input: &'static str,
    },
    /// The output is not f64, so that differences would be lost in rounding.
    #[error("expected an output of F64, got {got:?}")]
    OutputDType {
        /// The output's dtype.
        got: DType,
    },
}

/// The inputs as tensors, by name, as the checked function sees them.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    inputs: &'a [Input],
    leaves: Vec<Tensor<1>>,
}

impl Inputs<'_> {
    /// The input of that name.
    ///
    /// # Panics
    ///
    /// Panics if there is none of that name, or if it has another rank.
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let position = self.inputs.iter().position(|input| input.name == name);
        let position = position.unwrap_or_else(|| panic!("no input is named {name:?}"));
        let shape = &self.inputs[position].shape;
        let shape: [usize; D] = shape
            .as_slice()
            .try_into()
            .unwrap_or_else(|_| panic!("{name}: expected rank {D}, got shape {shape:?}"));
        self.leaves[position].clone().reshape(shape)
    }
}

impl GradCheck {
    /// A check on that device with PyTorch's step, 1e-6, and tolerances, 1e-5 absolute and 1e-3
    /// relative, over the whole Jacobian.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone().autodiff(),
            inputs: Vec::new(),
            step: 1e-6,
            absolute: 1e-5,
            relative: 1e-3,
            upstream: Upstream::Jacobian,
        }
    }

    /// Adds an input whose gradient is checked. Its values are converted to f64.
    #[must_use]
    pub fn input(self, name: &'static str, data: TensorData) -> Self {
        self.add(name, data, true)
    }

    /// Adds an input that is not tracked.
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{Device, TensorData};
    /// use burn_conv_bn::gradcheck::GradCheck;
    ///
    /// let report = GradCheck::new(&Device::flex())
    ///     .input("x", TensorData::from([0.5, 2.0]))
    ///     .constant("scale", TensorData::from([3.0, -1.0]))
    ///     .check(|inputs| inputs.get::<1>("x") * inputs.get::<1>("scale"))
    ///     .unwrap();
    /// // Two outputs by two values of x.
    /// assert_eq!(report.compared, 2 * 2);
    /// # }
    /// ```
    #[must_use]
    pub fn constant(self, name: &'static str, data: TensorData) -> Self {
        self.add(name, data, false)
    }

    fn add(mut self, name: &'static str, data: TensorData, differentiated: bool) -> Self {
        self.inputs.push(Input {
            name,
            shape: data.shape().to_vec(),
            values: data.iter::<f64>().collect(),
            differentiated,
        });
        self
    }

    /// Sets the step of the central differences.
    #[must_use]
    pub fn step(mut self, step: f64) -> Self {
        self.step = step;
        self
    }

    /// Sets the tolerances: a difference may be `absolute + relative * |numerical|`.
    #[must_use]
    pub fn tolerance(mut self, absolute: f64, relative: f64) -> Self {
        self.absolute = absolute;
        self.relative = relative;
        self
    }

    /// Sets the upstream gradient.
    #[must_use]
    pub fn upstream(mut self, upstream: Upstream) -> Self {
        self.upstream = upstream;
        self
    }

    /// Compares the gradients of `function`.
    ///
    /// # Errors
    ///
    /// [`GradCheckError::Mismatch`] with the worst derivative, or the reason why there was nothing
    /// to compare.
    pub fn check<const D: usize>(
        &self,
        function: impl Fn(&Inputs) -> Tensor<D>,
    ) -> Result<GradCheckReport, GradCheckError> {
        let values: Vec<Vec<f64>> = self.inputs.iter().map(|i| i.values.clone()).collect();
        let inputs = self.leaves(&values);
        let output = function(&inputs);
        if output.dtype() != DType::F64 {
            return Err(GradCheckError::OutputDType {
                got: output.dtype(),
            });
        }
        if !output.is_tracked() {
            let first = self.inputs.iter().find(|input| input.differentiated);
            return Err(GradCheckError::NoGradient {
                input: first.map_or("(no input is differentiated)", |input| input.name),
            });
        }
        let shape = output.dims();
        let upstreams = self.upstreams(output.shape().num_elements());

        let mut analytic = Vec::with_capacity(upstreams.len());
        for upstream in &upstreams {
            // A graph is gone after its backward pass, so each upstream gradient has its own.
            let inputs = self.leaves(&values);
            let weights = self.tensor(upstream).reshape(shape);
            let grads = (function(&inputs) * weights).sum().backward();
            let mut per_input = Vec::new();
            for (input, leaf) in self.inputs.iter().zip(&inputs.leaves) {
                per_input.push(if input.differentiated {
                    match leaf.grad(&grads) {
                        Some(grad) => floats(grad),
                        None => return Err(GradCheckError::NoGradient { input: input.name }),
                    }
                } else {
                    Vec::new()
                });
            }
            analytic.push(per_input);
        }

        let evaluate = |values: &[Vec<f64>]| floats(function(&self.leaves(values)).inner());
        let mut worst = Worst::default();
        let mut moved = values.clone();
        for (position, input) in self.inputs.iter().enumerate() {
            let elements = if input.differentiated {
                input.values.len()
            } else {
                0
            };
            for index in 0..elements {
                let value = values[position][index];
                moved[position][index] = value + self.step;
                let above = evaluate(&moved);
                moved[position][index] = value - self.step;
                let below = evaluate(&moved);
                moved[position][index] = value;
                for (row, upstream) in upstreams.iter().enumerate() {
                    let difference: f64 = above
                        .iter()
                        .zip(&below)
                        .zip(upstream)
                        .map(|((above, below), upstream)| (above - below) * upstream)
                        .sum();
                    let numerical = difference / (2.0 * self.step);
                    let output = (self.upstream == Upstream::Jacobian).then_some(row);
                    let derivative = Derivative {
                        input: input.name,
                        index,
                        output,
                        analytic: analytic[row][position][index],
                        numerical,
                    };
                    worst.add(derivative, self.absolute + self.relative * numerical.abs());
                }
            }
        }
        worst.into_result(self.absolute, self.relative)
    }

    fn leaves(&self, values: &[Vec<f64>]) -> Inputs<'_> {
        let leaves = self
            .inputs
            .iter()
            .zip(values)
            .map(|(input, values)| {
                let leaf = self.tensor(values);
                if input.differentiated {
                    leaf.require_grad()
                } else {
                    leaf
                }
            })
            .collect();
        Inputs {
            inputs: &self.inputs,
            leaves,
        }
    }

    fn tensor(&self, values: &[f64]) -> Tensor<1> {
        let data = TensorData::new(values.to_vec(), [values.len()]);
        Tensor::from_data(data, (&self.device, DType::F64))
    }

    fn upstreams(&self, elements: usize) -> Vec<Vec<f64>> {
        match self.upstream {
            Upstream::Jacobian => (0..elements)
                .map(|hot| {
                    (0..elements)
                        .map(|i| f64::from(u8::from(i == hot)))
                        .collect()
                })
                .collect(),
            Upstream::Random(seed) => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                vec![(0..elements).map(|_| rng.random_range(-1.0..1.0)).collect()]
            }
        }
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

#[derive(Clone, Copy, Debug)]
struct Derivative {
    input: &'static str,
    index: usize,
    output: Option<usize>,
    analytic: f64,
    numerical: f64,
}

#[derive(Debug, Default)]
struct Worst {
    compared: usize,
    mismatched: usize,
    max_difference: f64,
    excess: f64,
    derivative: Option<Derivative>,
}

impl Worst {
    fn add(&mut self, derivative: Derivative, tolerance: f64) {
        let difference = (derivative.analytic - derivative.numerical).abs();
        self.compared += 1;
        self.max_difference = self.max_difference.max(difference);
        let excess = difference - tolerance;
        if excess > 0.0 || excess.is_nan() {
            self.mismatched += 1;
            if self.derivative.is_none() || excess.is_nan() || excess > self.excess {
                self.excess = excess;
                self.derivative = Some(derivative);
            }
        }
    }

    fn into_result(self, absolute: f64, relative: f64) -> Result<GradCheckReport, GradCheckError> {
        match self.derivative {
            None => Ok(GradCheckReport {
                compared: self.compared,
                max_difference: self.max_difference,
            }),
            Some(worst) => Err(GradCheckError::Mismatch {
                mismatched: self.mismatched,
                compared: self.compared,
                absolute,
                relative,
                input: worst.input,
                index: worst.index,
                output: worst.output,
                analytic: worst.analytic,
                numerical: worst.numerical,
            }),
        }
    }
}
