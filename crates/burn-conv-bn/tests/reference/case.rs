//! One application of the op as plain data, run on a device and compared with the reference.

use std::fmt;
use std::ops::Add;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn::backend::Parents;
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, NormSpec, Recompute};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::ball::{self, Ball};
use super::{Number, Op, Tensors, kinks, largest, rounded};

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// Row by row.
    Contiguous,
    /// Axis 1 innermost, as of an image whose channels are neighbours.
    ChannelsLast,
    /// Cut out of a larger tensor, which holds NaN everywhere else.
    Slice,
    /// One slice of axis 0, seen as all of them. The values are the same in each.
    Expanded,
}

/// What values are drawn from: uniform within `spread` of `offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Values {
    /// The middle.
    pub offset: f64,
    /// From the middle to either end.
    pub spread: f64,
}

/// Uniform in `[-1, 1)`.
pub const UNIT: Values = Values {
    offset: 0.0,
    spread: 1.0,
};

/// The norm's scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gamma {
    /// There is none, and no shift either.
    Absent,
    /// Of either sign, within 3 of 0.
    Random,
    /// The same, but 0 in every third channel, from the first on.
    SomeZero,
    /// 0 everywhere.
    Zero,
}

/// One application of the op.
#[derive(Clone, Debug)]
pub struct Case {
    /// `[batch, channels_in, spatial..]`.
    pub input: Vec<usize>,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: Vec<usize>,
    /// Geometry of the convolution.
    pub spec: ConvSpec,
    /// The norm.
    pub norm: NormSpec,
    /// The activation.
    pub activation: Activation,
    /// Whether the convolution's output is kept.
    pub recompute: Recompute,
    /// Bound on the backward pass's workspace.
    pub max_workspace: Option<usize>,
    /// Whether the convolution has a bias.
    pub bias: bool,
    /// Whether the norm has a scale and shift, and which.
    pub gamma: Gamma,
    /// Whether something is added before the activation.
    pub residual: bool,
    /// Whether mean and variance are given.
    pub given_statistics: bool,
    /// Which inputs are tracked, of those that are there.
    pub tracked: Parents,
    /// Layout of the input.
    pub input_layout: Layout,
    /// Layout of the weight.
    pub weight_layout: Layout,
    /// Layout of the residual.
    pub residual_layout: Layout,
    /// Layout of the output's gradient. `Expanded`: it is 1 everywhere, where no derivative is in
    /// doubt; `Slice` is as `Contiguous`.
    pub grad_layout: Layout,
    /// Whether tensors of a channel's values are cut out of larger ones.
    pub vector_slices: bool,
    /// Whether the norm's parameters and statistics are of the data's type where that is f16 or
    /// bf16, rather than f32.
    pub half_norm: bool,
    /// Values of the input.
    pub input_values: Values,
    /// Values of the weight.
    pub weight_values: Values,
    /// Values of the residual.
    pub residual_values: Values,
    /// Values of the output's gradient.
    pub grad_values: Values,
    /// Seed of all values.
    pub seed: u64,
}

impl Case {
    /// A case with batch statistics, everything tracked, and nothing unusual about it.
    pub fn new(spec: ConvSpec, input: &[usize], weight: &[usize]) -> Self {
        Self {
            input: input.to_vec(),
            weight: weight.to_vec(),
            spec,
            norm: NormSpec::default(),
            activation: Activation::Identity,
            recompute: Recompute::Conv,
            max_workspace: None,
            bias: false,
            gamma: Gamma::Random,
            residual: false,
            given_statistics: false,
            tracked: Parents {
                input: true,
                weight: true,
                bias: true,
                gamma: true,
                beta: true,
                residual: true,
            },
            input_layout: Layout::Contiguous,
            weight_layout: Layout::Contiguous,
            residual_layout: Layout::Contiguous,
            grad_layout: Layout::Contiguous,
            vector_slices: false,
            half_norm: false,
            input_values: UNIT,
            weight_values: UNIT,
            residual_values: UNIT,
            grad_values: UNIT,
            seed: 1,
        }
    }

    fn options(&self) -> ConvBnOptions {
        ConvBnOptions::new(self.spec.clone())
            .with_norm(self.norm)
            .with_activation(self.activation)
            .with_recompute(self.recompute)
            .with_max_workspace(self.max_workspace)
    }

    /// The op on tensors of that type, as the reference takes it.
    pub fn op(&self, dtype: DType) -> Op {
        let rebuilds = self.recompute == Recompute::Norm;
        Op {
            stores_conv_grad: rebuilds && !self.residual && !self.given_statistics,
            ..Op::new(&self.input, &self.weight, &self.options(), dtype)
        }
    }

    /// `[batch, channels_out, spatial_out..]`.
    fn output(&self) -> Vec<usize> {
        let spatial = self.input.len() - 2;
        let size = self.op(DType::F64).output();
        let mut output = vec![self.input[0], self.weight[0]];
        output.extend_from_slice(&size[3 - spatial..]);
        output
    }

    /// Type of the norm's parameters and statistics.
    fn norm_dtype(&self, dtype: DType) -> DType {
        match dtype {
            DType::F16 | DType::BF16 if !self.half_norm => DType::F32,
            dtype => dtype,
        }
    }

    /// The tracked ones of the case's parents.
    fn parents(&self) -> Parents {
        let affine = self.gamma != Gamma::Absent;
        Parents {
            input: self.tracked.input,
            weight: self.tracked.weight,
            bias: self.tracked.bias && self.bias,
            gamma: self.tracked.gamma && affine,
            beta: self.tracked.beta && affine,
            residual: self.tracked.residual && self.residual,
        }
    }

    /// Draws the tensors in f64, each value one of its type.
    pub fn draw(&self, dtype: DType) -> Data {
        let op = self.op(dtype);
        let norm_dtype = self.norm_dtype(dtype);
        let channels = op.channels[1];
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut draw = |len: usize, values: Values, dtype: DType| -> Vec<f64> {
            (0..len)
                .map(|_| {
                    let unit: f64 = rng.random_range(-1.0..1.0);
                    rounded(values.offset + values.spread * unit, dtype)
                })
                .collect()
        };
        let wide = Values {
            spread: 3.0,
            ..UNIT
        };
        // Positive, after rounding too.
        let positive = Values {
            offset: 1.05,
            spread: 0.95,
        };
        let mut data = Data {
            input: draw(op.input_len(), self.input_values, dtype),
            weight: draw(op.weight_len(), self.weight_values, dtype),
            bias: draw(channels, UNIT, dtype),
            gamma: draw(channels, wide, norm_dtype),
            beta: draw(channels, UNIT, norm_dtype),
            residual: draw(op.output_len(), self.residual_values, dtype),
            mean: draw(channels, UNIT, norm_dtype),
            variance: draw(channels, positive, norm_dtype),
            output_grad: draw(op.output_len(), self.grad_values, dtype),
            is_grad_one: false,
        };
        for (channel, gamma) in data.gamma.iter_mut().enumerate() {
            match self.gamma {
                Gamma::Absent => *gamma = 1.0,
                Gamma::SomeZero if channel.is_multiple_of(3) => *gamma = 0.0,
                Gamma::Zero => *gamma = 0.0,
                _ => {}
            }
        }
        if self.gamma == Gamma::Absent {
            data.beta.fill(0.0);
        }
        if !self.bias {
            data.bias.fill(0.0);
        }
        if !self.residual {
            data.residual.fill(0.0);
        }
        for (values, layout, slices) in [
            (&mut data.input, self.input_layout, self.input[0]),
            (&mut data.weight, self.weight_layout, self.weight[0]),
            (&mut data.residual, self.residual_layout, self.input[0]),
        ] {
            if layout == Layout::Expanded {
                let len = values.len() / slices;
                for slice in 1..slices {
                    values.copy_within(..len, slice * len);
                }
            }
        }
        data
    }

    /// Runs the op on the device and compares all that comes out with the reference. `unit` is the
    /// largest relative error of one operation there, with the slack that the bounds are to have.
    ///
    /// # Errors
    ///
    /// What differs by more than rounding explains.
    pub fn check(&self, dtype: DType, device: &Device, unit: f64) -> Result<Tally, String> {
        let mut data = self.draw(dtype);
        let (expected, kinks) = self.expected(&mut data, dtype, unit);
        let got = self.run(&data, dtype, device);
        let tally = expected.compare(&got)?;
        Ok(Tally { kinks, ..tally })
    }

    /// What the reference makes of the data, and at how many positions the output's gradient was
    /// set to 0: there rounding may carry the pre-activation over a kink, so that either derivative
    /// is right.
    pub fn expected(&self, data: &mut Data, dtype: DType, unit: f64) -> (Expected, u64) {
        let op = self.op(dtype);
        let balls = |values: &[f64]| -> Vec<Ball> {
            values.iter().map(|value| Ball::new(*value, unit)).collect()
        };
        let tensors = Tensors {
            input: balls(&data.input),
            weight: balls(&data.weight),
            bias: balls(&data.bias),
            gamma: balls(&data.gamma),
            beta: balls(&data.beta),
            residual: balls(&data.residual),
            statistics: self
                .given_statistics
                .then(|| (balls(&data.mean), balls(&data.variance))),
        };
        let forward = op.forward(&tensors);

        let mut near = 0;
        for (value, grad) in forward.pre_activation.iter().zip(&mut data.output_grad) {
            if kinks(self.activation)
                .iter()
                .any(|kink| value.is_near(*kink, dtype))
            {
                *grad = 0.0;
                near += 1;
            }
        }
        data.is_grad_one = self.grad_layout == Layout::Expanded && near == 0;
        if data.is_grad_one {
            data.output_grad.fill(1.0);
        }
        let mut grads = op.backward(&tensors, &forward, &balls(&data.output_grad));
        if !self.given_statistics {
            // The statistics take the bias away again: no rounding is left of it.
            grads.bias.fill(Ball::exact(0.0));
        }

        let norm_dtype = self.norm_dtype(dtype);
        let statistics_dtype = match dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let parents = self.parents();
        let some = |wanted: bool, values: Vec<Ball>, dtype: DType| -> Option<(Vec<Ball>, DType)> {
            wanted.then_some((values, dtype))
        };
        let expected = Expected([
            some(true, forward.output, dtype),
            some(true, forward.mean, statistics_dtype),
            some(true, forward.variance, statistics_dtype),
            some(parents.input, grads.input, dtype),
            some(parents.weight, grads.weight, dtype),
            some(parents.bias, grads.bias, dtype),
            some(parents.gamma, grads.gamma, norm_dtype),
            some(parents.beta, grads.beta, norm_dtype),
            some(parents.residual, grads.residual, dtype),
        ]);
        (expected, near)
    }

    /// The op on the device.
    pub fn run(&self, data: &Data, dtype: DType, device: &Device) -> Results {
        match self.input.len() {
            3 => self.run_ranked::<3>(data, dtype, device),
            4 => self.run_ranked::<4>(data, dtype, device),
            5 => self.run_ranked::<5>(data, dtype, device),
            rank => panic!("the op has no rank {rank}"),
        }
    }

    fn run_ranked<const D: usize>(&self, data: &Data, dtype: DType, device: &Device) -> Results {
        let device = device.clone().autodiff();
        let norm_dtype = self.norm_dtype(dtype);
        let output_shape = self.output();
        let parents = self.parents();
        let leaf = |values: &[f64], shape: &[usize], layout, tracked| {
            let place = Place {
                dtype,
                device: &device,
            };
            let tensor: Tensor<D> = place.tensor(values, shape, layout);
            tensor.detach().set_require_grad(tracked)
        };
        let vector = |values: &[f64], dtype, tracked| {
            let place = Place {
                dtype,
                device: &device,
            };
            let layout = if self.vector_slices {
                Layout::Slice
            } else {
                Layout::Contiguous
            };
            let tensor: Tensor<1> = place.tensor(values, &[values.len()], layout);
            tensor.detach().set_require_grad(tracked)
        };

        let input = leaf(&data.input, &self.input, self.input_layout, parents.input);
        let weight = leaf(
            &data.weight,
            &self.weight,
            self.weight_layout,
            parents.weight,
        );
        let bias = self.bias.then(|| vector(&data.bias, dtype, parents.bias));
        let affine = (self.gamma != Gamma::Absent).then(|| {
            (
                vector(&data.gamma, norm_dtype, parents.gamma),
                vector(&data.beta, norm_dtype, parents.beta),
            )
        });
        let residual = self.residual.then(|| {
            let layout = self.residual_layout;
            leaf(&data.residual, &output_shape, layout, parents.residual)
        });
        let statistics = self.given_statistics.then(|| {
            (
                vector(&data.mean, norm_dtype, false),
                vector(&data.variance, norm_dtype, false),
            )
        });
        let params = ConvBnParams {
            weight: weight.clone(),
            bias: bias.clone(),
            affine: affine.clone(),
            residual: residual.clone(),
            statistics,
        };
        let result = conv_bn(input.clone(), params, self.options()).expect("the case is valid");
        let mut results = Results([
            Some(host_as(result.output.clone(), &output_shape, dtype)),
            Some(host(result.mean)),
            Some(host(result.variance)),
            None,
            None,
            None,
            None,
            None,
            None,
        ]);
        let tracked = parents != Parents::default();
        assert_eq!(result.output.is_tracked(), tracked, "the output");
        if !tracked {
            return results;
        }

        let place = Place {
            dtype,
            device: &device,
        };
        let loss = match self.grad_layout {
            _ if data.is_grad_one => result.output.sum(),
            Layout::ChannelsLast => {
                let (values, shape) = channels_last(&data.output_grad, &output_shape);
                let upstream: Tensor<D> = place.tensor(&values, &shape, Layout::Contiguous);
                (result.output.movedim(1, D - 1) * upstream).sum()
            }
            _ => {
                let values = &data.output_grad;
                let upstream: Tensor<D> = place.tensor(values, &output_shape, Layout::Contiguous);
                (result.output * upstream).sum()
            }
        };
        let grads = loss.backward();
        let (gamma, beta) = affine.unzip();
        let channels = &self.weight[..1];
        results.0[3] = input
            .grad(&grads)
            .map(|grad| host_as(grad, &self.input, dtype));
        results.0[4] = weight
            .grad(&grads)
            .map(|grad| host_as(grad, &self.weight, dtype));
        results.0[5] = bias
            .and_then(|bias| bias.grad(&grads))
            .map(|grad| host_as(grad, channels, dtype));
        results.0[6] = gamma
            .and_then(|gamma| gamma.grad(&grads))
            .map(|grad| host_as(grad, channels, norm_dtype));
        results.0[7] = beta
            .and_then(|beta| beta.grad(&grads))
            .map(|grad| host_as(grad, channels, norm_dtype));
        results.0[8] = residual
            .and_then(|residual| residual.grad(&grads))
            .map(|grad| host_as(grad, &output_shape, dtype));
        results
    }
}

/// The tensors of a case, by their values; what is absent is 0, a gamma 1.
#[derive(Clone, Debug)]
pub struct Data {
    /// `[batch, channels_in, spatial..]`.
    pub input: Vec<f64>,
    /// `[channels_out, channels_in / groups, kernel..]`.
    pub weight: Vec<f64>,
    /// `[channels_out]`.
    pub bias: Vec<f64>,
    /// `[channels_out]`.
    pub gamma: Vec<f64>,
    /// `[channels_out]`.
    pub beta: Vec<f64>,
    /// Of the output's shape.
    pub residual: Vec<f64>,
    /// `[channels_out]`, if the statistics are given.
    pub mean: Vec<f64>,
    /// `[channels_out]`, if the statistics are given.
    pub variance: Vec<f64>,
    /// Of the output's shape.
    pub output_grad: Vec<f64>,
    /// Whether the output's gradient is 1 everywhere, and comes as one value expanded.
    pub is_grad_one: bool,
}

/// What comes out of the op, in the order of [`Results`] and [`Expected`].
pub const NAMES: [&str; 9] = [
    "output",
    "mean",
    "variance",
    "input's gradient",
    "weight's gradient",
    "bias's gradient",
    "gamma's gradient",
    "beta's gradient",
    "residual's gradient",
];

/// What came out of the op: output, mean, variance, and the gradients that there are.
#[derive(Clone, Debug, PartialEq)]
pub struct Results(pub [Option<Vec<f64>>; 9]);

/// What should have, with the type that each is stored as.
#[derive(Clone, Debug)]
pub struct Expected(pub [Option<(Vec<Ball>, DType)>; 9]);

impl Expected {
    /// Compares each value within its own bound.
    ///
    /// # Errors
    ///
    /// The first tensor that is missing, superfluous or wrong, and where it is worst.
    pub fn compare(&self, got: &Results) -> Result<Tally, String> {
        let mut tally = Tally::default();
        for ((name, expected), got) in NAMES.iter().zip(&self.0).zip(&got.0) {
            match (expected, got) {
                (None, None) => {}
                (None, Some(_)) => return Err(format!("{name}: there is one that is not wanted")),
                (Some(_), None) => return Err(format!("{name}: there is none")),
                (Some((expected, dtype)), Some(got)) => {
                    tally = tally + compare(name, expected, got, *dtype)?;
                }
            }
        }
        tally.cases = 1;
        Ok(tally)
    }
}

fn compare(name: &str, expected: &[Ball], got: &[f64], dtype: DType) -> Result<Tally, String> {
    if expected.len() != got.len() {
        let (wanted, got) = (expected.len(), got.len());
        return Err(format!("{name}: {got} values, not {wanted}"));
    }
    let size = largest(expected);
    let mut tally = Tally::default();
    let mut failed = 0;
    let mut worst: (f64, usize) = (0.0, 0);
    for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
        let wanted = expected.value();
        let allowed = expected.allowance(dtype);
        tally.compared += 1;
        tally.sharp += u64::from(allowed <= SHARP * size.max(ball::unit(dtype)));
        let error = (got - wanted).abs();
        // In ill-conditioned cases anything may come out.
        let passes = error <= allowed
            || !allowed.is_finite()
            || (got.is_infinite() && wanted.abs() + allowed >= limit(dtype));
        if !passes {
            failed += 1;
            // An error that is not a number is the worst of all.
            let excess = if error.is_nan() {
                f64::INFINITY
            } else {
                error / allowed
            };
            if failed == 1 || excess > worst.0 {
                worst = (excess, index);
            }
        }
    }
    if failed == 0 {
        return Ok(tally);
    }
    let (excess, index) = worst;
    Err(format!(
        "{name}: {failed} of {} values of {dtype:?} are off by more than rounding explains; worst \
         at {index}: got {:e}, wanted {:e} within {:e} ({excess:.1} times that; the largest wanted \
         is {size:e})",
        got.len(),
        got[index],
        expected[index].value(),
        expected[index].allowance(dtype),
    ))
}

/// Where a type's numbers end.
fn limit(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65504.0,
        DType::F32 | DType::BF16 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}

/// A comparison is sharp if it allows no more than this part of the tensor's largest value, or of the
/// rounding of 1 where all values are 0.
const SHARP: f64 = 0.05;

/// What was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Cases.
    pub cases: u64,
    /// Values.
    pub compared: u64,
    /// Values whose error may be no more than a twentieth of their tensor's largest value.
    pub sharp: u64,
    /// Values whose gradient was set to 0 because of a kink.
    pub kinks: u64,
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            cases: self.cases + other.cases,
            compared: self.compared + other.compared,
            sharp: self.sharp + other.sharp,
            kinks: self.kinks + other.kinks,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |count: u64| 100.0 * count as f64 / self.compared.max(1) as f64;
        write!(
            f,
            "{} cases, {} values compared, {:.1} % of them to better than a twentieth of their \
             tensor's largest; {} at a kink left out of the gradients",
            self.cases,
            self.compared,
            part(self.sharp),
            self.kinks,
        )
    }
}

/// Largest relative error of one operation on Flex, which computes in f64 for f64 and in f32
/// otherwise, with the slack of the bounds.
pub fn flex_unit(dtype: DType) -> f64 {
    let computed = match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    ball::SLACK * ball::unit(computed)
}

/// Where tensors are made.
struct Place<'a> {
    dtype: DType,
    device: &'a Device,
}

impl Place<'_> {
    fn upload<const D: usize>(&self, values: Vec<f64>, shape: Vec<usize>) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), (self.device, self.dtype))
    }

    /// A tensor of those values in that layout.
    fn tensor<const D: usize>(&self, values: &[f64], shape: &[usize], layout: Layout) -> Tensor<D> {
        match layout {
            Layout::Contiguous => self.upload(values.to_vec(), shape.to_vec()),
            Layout::ChannelsLast => {
                let (values, shape) = channels_last(values, shape);
                self.upload::<D>(values, shape).movedim(D - 1, 1)
            }
            Layout::Slice => {
                let larger: Vec<usize> = shape.iter().map(|size| size + 2).collect();
                let mut all = vec![f64::NAN; larger.iter().product()];
                for (index, value) in values.iter().enumerate() {
                    let (mut rest, mut at, mut step) = (index, 0, 1);
                    for (size, larger) in shape.iter().zip(&larger).rev() {
                        at += (rest % size + 1) * step;
                        rest /= size;
                        step *= larger;
                    }
                    all[at] = *value;
                }
                let tensor = self.upload::<D>(all, larger);
                (0..D).fold(tensor, |tensor, dim| tensor.narrow(dim, 1, shape[dim]))
            }
            Layout::Expanded => {
                let mut one = shape.to_vec();
                one[0] = 1;
                let first = values[..values.len() / shape[0]].to_vec();
                let all: [usize; D] = std::array::from_fn(|dim| shape[dim]);
                self.upload::<D>(first, one).expand(all)
            }
        }
    }
}

/// The values in the order that has axis 1 innermost, and their shape in that order.
fn channels_last(values: &[f64], shape: &[usize]) -> (Vec<f64>, Vec<usize>) {
    let (outer, channels) = (shape[0], shape[1]);
    let inner: usize = shape[2..].iter().product();
    let mut reordered = Vec::with_capacity(values.len());
    for outer in 0..outer {
        for inner_index in 0..inner {
            for channel in 0..channels {
                reordered.push(values[(outer * channels + channel) * inner + inner_index]);
            }
        }
    }
    let mut reordered_shape = vec![outer];
    reordered_shape.extend_from_slice(&shape[2..]);
    reordered_shape.push(channels);
    (reordered, reordered_shape)
}

/// The values of a tensor, which has to be of that shape and type.
fn host_as<const D: usize>(tensor: Tensor<D>, shape: &[usize], dtype: DType) -> Vec<f64> {
    assert_eq!(tensor.dims()[..], *shape);
    assert_eq!(tensor.dtype(), dtype);
    host(tensor)
}

/// The values of a tensor.
pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}
