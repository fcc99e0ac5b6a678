//! Every kernel against sums in f64 on the host, over layouts, dtypes and shapes.
//!
//! On the device of `CubeDevice::default()`. Each dtype that it lacks is skipped with a line; with
//! `BURN_CONV_BN_STRICT=1` a skip fails.

use std::f64::consts::PI;

use burn_backend::ops::FloatTensorOps;
use burn_backend::{DType, TensorData, bf16, f16};
use burn_conv_bn_cubecl::{
    Activation, Affine, ChannelTable, GradSums, Moments, Norm, Parameter, PoolArgmax, PoolWindow,
    PreActivation, Running, channel_table, max_pool, max_pool_backward, moments,
    moments_and_running, norm_input_grad, normalize, running_moments, with_last_cube,
};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::zspace::metadata::Metadata;
use cubecl::zspace::{Shape, Strides};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BATCH_NORM: Norm = Norm {
    inner_epsilon: 1e-5,
    outer_epsilon: 0.0,
    degrees_of_freedom: 0,
};
const TUTORIAL: Norm = Norm {
    inner_epsilon: 0.0,
    outer_epsilon: 1e-3,
    degrees_of_freedom: 1,
};

/// Slope of LeakyRelu, and alpha of HardSigmoid and Elu.
const SLOPE: f64 = 0.1;

/// Beta of Softplus.
const SHARPNESS: f64 = 1.5;

/// Layout of a `[batch, channels, spatial..]` tensor in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    ChannelsFirst,
    ChannelsLast,
    /// Channels first, with that many unused elements after each row.
    Pitched(usize),
    /// Channels last, with that many unused elements after each pixel, as CUDA's allocations have.
    PitchedLast(usize),
}

impl Layout {
    fn strides(self, shape: &[usize]) -> Vec<usize> {
        let rank = shape.len();
        let order: Vec<usize> = match self {
            Self::ChannelsFirst | Self::Pitched(_) => (0..rank).collect(),
            Self::ChannelsLast | Self::PitchedLast(_) => {
                [0].into_iter().chain(2..rank).chain([1]).collect()
            }
        };
        let mut strides = vec![0; rank];
        let mut step = 1;
        for (position, &axis) in order.iter().enumerate().rev() {
            strides[axis] = step;
            step *= shape[axis];
            if let Self::Pitched(gap) | Self::PitchedLast(gap) = self
                && position + 1 == rank
            {
                step += gap;
            }
        }
        strides
    }
}

/// A tensor in logical order on the host.
#[derive(Clone, Debug)]
struct Host {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Host {
    fn random(shape: &[usize], rng: &mut ChaCha8Rng, mean: f64, spread: f64) -> Self {
        let values = (0..shape.iter().product())
            .map(|_| mean + spread * rng.random_range(-1.0..1.0))
            .collect();
        Self {
            shape: shape.to_vec(),
            values,
        }
    }

    fn channel_of(&self, index: usize) -> usize {
        let inner: usize = self.shape[2..].iter().product();
        index / inner % self.shape[1]
    }

    fn channels(&self) -> usize {
        self.shape[1]
    }

    fn per_channel(&self) -> f64 {
        (self.values.len() / self.channels()) as f64
    }

    fn map(&self, function: impl Fn(usize, f64) -> f64) -> Self {
        let values = self.values.iter().enumerate();
        Self {
            shape: self.shape.clone(),
            values: values
                .map(|(index, &value)| function(index, value))
                .collect(),
        }
    }

    fn channel_sums(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.channels()];
        for (index, value) in self.values.iter().enumerate() {
            sums[self.channel_of(index)] += value;
        }
        sums
    }

    /// Puts the values into a buffer of that layout, NaN wherever the layout leaves a gap.
    fn upload(&self, layout: Layout, dtype: DType, device: &CubeDevice) -> CubeTensor {
        let strides = layout.strides(&self.shape);
        let end = |index: &mut Vec<usize>| -> usize {
            index
                .iter()
                .zip(&strides)
                .map(|(i, stride)| i * stride)
                .sum()
        };
        let mut last: Vec<usize> = self
            .shape
            .iter()
            .map(|size| size.saturating_sub(1))
            .collect();
        let mut buffer = vec![f64::NAN; end(&mut last) + 1];
        for (linear, value) in self.values.iter().enumerate() {
            let mut rest = linear;
            let mut offset = 0;
            for (size, stride) in self.shape.iter().zip(&strides).rev() {
                offset += rest % size * stride;
                rest /= size;
            }
            buffer[offset] = *value;
        }
        let data = TensorData::new(buffer, [end(&mut last) + 1]).convert_dtype(dtype);
        let mut tensor = CubeBackend::float_from_data(data, device);
        let shape = Shape::from(self.shape.clone());
        *tensor.meta = Metadata::new(shape, Strides::from(strides));
        tensor
    }
}

/// `[channels]` on the device.
fn upload_channels(values: &[f64], dtype: DType, device: &CubeDevice) -> CubeTensor {
    let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
    CubeBackend::float_from_data(data, device)
}

fn download(tensor: &CubeTensor) -> Vec<f64> {
    let data = burn_cubecl::ops::into_data_sync(tensor.clone());
    data.iter::<f64>().collect()
}

/// The value rounded to that dtype.
fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        DType::F32 => f64::from(value as f32),
        _ => value,
    }
}

fn largest(values: &[f64]) -> f64 {
    values
        .iter()
        .fold(1e-30, |max: f64, value| max.max(value.abs()))
}

/// Largest difference over `scale`.
fn error(got: &[f64], expected: &[f64], scale: f64) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference = got.iter().zip(expected).map(|(got, expected)| {
        assert!(got.is_finite(), "expected {expected}, got {got}");
        (got - expected).abs()
    });
    difference.fold(0.0, f64::max) / scale
}

#[track_caller]
fn assert_close(what: &str, got: &CubeTensor, expected: &[f64], tolerance: f64) {
    assert_close_to(what, got, expected, largest(expected), tolerance);
}

#[track_caller]
fn assert_close_to(what: &str, got: &CubeTensor, expected: &[f64], scale: f64, tolerance: f64) {
    let error = error(&download(got), expected, scale);
    assert!(
        error <= tolerance,
        "{what}: error {error:.1e} above {tolerance:.1e}"
    );
}

/// The kernels' dtypes that this device has.
fn dtypes(device: &CubeDevice) -> Vec<DType> {
    let client = device.client();
    let strict = std::env::var_os("BURN_CONV_BN_STRICT").is_some_and(|value| value != "0");
    [DType::F32, DType::F16, DType::BF16, DType::F64]
        .into_iter()
        .filter(|&dtype| {
            let element = burn_backend::cubecl::dtype_to_storage_type(dtype);
            let has = client.properties().supports_type(element);
            if !has {
                println!("SKIPPED: {dtype:?} on {device:?}, which does not have it");
                assert!(
                    !strict,
                    "{dtype:?} is skipped, and BURN_CONV_BN_STRICT is set"
                );
            }
            has
        })
        .collect()
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 2e-2,
        // Error of the reference's finite differences.
        DType::F64 => 1e-10,
        _ => 3e-6,
    }
}

fn formula(activation: Activation, v: f64) -> f64 {
    match activation {
        Activation::Identity => v,
        Activation::Relu => v.max(0.0),
        Activation::Relu6 => v.clamp(0.0, 6.0),
        Activation::LeakyRelu(_) => v.max(SLOPE * v),
        Activation::Silu => v / (1.0 + (-v).exp()),
        Activation::Gelu => v * 0.5 * (1.0 + libm::erf(v / 2f64.sqrt())),
        Activation::GeluApproximate => {
            let cubic = v + 0.044715 * v.powi(3);
            v * 0.5 * (1.0 + ((2.0 / PI).sqrt() * cubic).tanh())
        }
        Activation::HardSwish => v * ((v + 3.0) / 6.0).clamp(0.0, 1.0),
        Activation::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        Activation::HardSigmoid(..) => (SLOPE * v + 0.5).clamp(0.0, 1.0),
        Activation::Tanh => v.tanh(),
        Activation::Elu(_) if v > 0.0 => v,
        Activation::Elu(_) => SLOPE * v.exp_m1(),
        Activation::Mish => v * softplus(v).tanh(),
        Activation::Softplus(_) => softplus(SHARPNESS * v) / SHARPNESS,
    }
}

fn softplus(v: f64) -> f64 {
    v.max(0.0) + (-v.abs()).exp().ln_1p()
}

/// All but the identity and ReLU.
fn activations() -> Vec<Activation> {
    let slope = Parameter::new(SLOPE);
    vec![
        Activation::Relu6,
        Activation::LeakyRelu(slope),
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluApproximate,
        Activation::HardSwish,
        Activation::Sigmoid,
        Activation::HardSigmoid(slope, Parameter::new(0.5)),
        Activation::Tanh,
        Activation::Elu(slope),
        Activation::Mish,
        Activation::Softplus(Parameter::new(SHARPNESS)),
    ]
}

/// By finite differences.
fn slope(activation: Activation, v: f64) -> f64 {
    let step = 1e-5;
    (formula(activation, v + step) - formula(activation, v - step)) / (2.0 * step)
}

fn has_derivative_of_output(activation: Activation) -> bool {
    matches!(
        activation,
        Activation::Identity | Activation::Relu | Activation::Relu6 | Activation::LeakyRelu(_)
    )
}

/// One application of the whole op but its convolution.
struct Case {
    shape: Vec<usize>,
    /// Layout of the norm's input.
    layout: Layout,
    /// Layout of all other activations.
    other_layout: Layout,
    dtype: DType,
    norm: Norm,
    activation: Activation,
    affine: bool,
    residual: bool,
    mean: f64,
}

impl Case {
    fn new(shape: &[usize], layout: Layout) -> Self {
        Self {
            shape: shape.to_vec(),
            layout,
            other_layout: layout,
            dtype: DType::F32,
            norm: BATCH_NORM,
            activation: Activation::Relu,
            affine: true,
            residual: false,
            mean: 0.5,
        }
    }

    fn describe(&self) -> String {
        format!(
            "{:?} {:?} {:?}/{:?} {:?} residual {} affine {} ddof {}",
            self.shape,
            self.dtype,
            self.layout,
            self.other_layout,
            self.activation,
            self.residual,
            self.affine,
            self.norm.degrees_of_freedom
        )
    }

    fn check(&self, device: &CubeDevice) {
        let name = self.describe();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let tolerance = match self.activation {
            // CubeCL's erf is within 1.5e-7 in any dtype.
            Activation::Gelu => tolerance(self.dtype).max(3e-6),
            _ => tolerance(self.dtype),
        };
        let mut draw = |mean: f64, spread: f64| {
            Host::random(&self.shape, &mut rng, mean, spread)
                .map(|_, value| rounded(value, self.dtype))
        };
        let (input, residual, output_grad) = (draw(self.mean, 1.0), draw(0.0, 1.0), draw(0.1, 1.0));
        let channels = input.channels();
        let m = input.per_channel();
        // A gamma of 0 and a negative one among them.
        let gamma: Vec<f64> = (0..channels)
            .map(|c| {
                if self.affine {
                    (c % 5) as f64 * 0.5 - 0.5
                } else {
                    1.0
                }
            })
            .collect();
        let beta: Vec<f64> = (0..channels)
            .map(|c| {
                if self.affine {
                    (c % 3) as f64 * 0.25 - 0.25
                } else {
                    0.0
                }
            })
            .collect();

        let mean: Vec<f64> = input.channel_sums().iter().map(|sum| sum / m).collect();
        let deviation = input.map(|i, value| value - mean[input.channel_of(i)]);
        let variance: Vec<f64> = deviation
            .map(|_, value| value * value)
            .channel_sums()
            .iter()
            .map(|sum| sum / m)
            .collect();
        let freedom = m - self.norm.degrees_of_freedom as f64;
        let root: Vec<f64> = variance
            .iter()
            .map(|variance| (variance * m / freedom + self.norm.inner_epsilon).sqrt())
            .collect();
        let s: Vec<f64> = root
            .iter()
            .map(|root| 1.0 / (root + self.norm.outer_epsilon))
            .collect();
        let value = deviation.map(|i, d| {
            let c = input.channel_of(i);
            let residual = if self.residual {
                residual.values[i]
            } else {
                0.0
            };
            gamma[c] * s[c] * d + beta[c] + residual
        });
        let output = value.map(|_, v| formula(self.activation, v));
        // No gradient where rounding decides between two slopes.
        let output_grad = output_grad.map(|i, g| {
            let near = |kink: &f64| (value.values[i] - kink).abs() < 64.0 * tolerance;
            if [-3.0, 0.0, 3.0, 6.0].iter().any(near) {
                0.0
            } else {
                g
            }
        });
        let g = output_grad.map(|i, g| g * slope(self.activation, value.values[i]));
        let sum_g = g.channel_sums();
        let sum_gd = g.map(|i, g| g * deviation.values[i]).channel_sums();
        let input_grad = g.map(|i, g| {
            let c = input.channel_of(i);
            let slope = if root[c] == 0.0 {
                0.0
            } else {
                -s[c] * s[c] / (root[c] * freedom) * sum_gd[c]
            };
            gamma[c] * (s[c] * (g - sum_g[c] / m) + slope * deviation.values[i])
        });

        let up = |host: &Host, layout| host.upload(layout, self.dtype, device);
        let norm_dtype = burn_conv_bn_cubecl::accumulator_dtype(self.dtype);
        let terms = g.map(|i, g| {
            let c = input.channel_of(i);
            gamma[c] * s[c] * g
        });
        let (gamma, beta) = (
            upload_channels(&gamma, norm_dtype, device),
            upload_channels(&beta, norm_dtype, device),
        );
        let affine = Affine {
            gamma: self.affine.then_some(&gamma),
            beta: self.affine.then_some(&beta),
        };
        let device_residual = up(&residual, self.other_layout);
        let given_residual = self.residual.then_some(&device_residual);
        let device_input = up(&input, self.layout);
        let (stats, table) = moments(&device_input, affine, self.norm);
        let statistics = tolerance.min(3e-6);
        assert_close(&format!("{name}: mean"), &stats.mean, &mean, statistics);
        assert_close(
            &format!("{name}: variance"),
            &stats.variance,
            &variance,
            4.0 * statistics,
        );

        let kept = device_input.clone();
        let fresh = normalize(device_input, Some(&table), given_residual, self.activation);
        assert_close(
            &format!("{name}: output"),
            &fresh,
            &output.values,
            tolerance,
        );
        assert_eq!(
            download(&kept),
            input.values,
            "{name}: a shared input was written"
        );
        let fresh_values = download(&fresh);
        let in_place = normalize(
            up(&input, self.layout),
            Some(&table),
            given_residual,
            self.activation,
        );
        assert_eq!(download(&in_place), fresh_values, "{name}: in place");

        let values = input.values.len() / channels;
        let table = channel_table(&stats, affine, self.norm, values);
        let pre_activation = |input: CubeTensor| PreActivation {
            output_grad: up(&output_grad, self.other_layout),
            pool: None,
            norm_input: Some(input),
            residual: given_residual
                .filter(|_| !has_derivative_of_output(self.activation))
                .cloned(),
            output: given_residual
                .filter(|_| has_derivative_of_output(self.activation))
                .map(|_| fresh.clone()),
            activation: self.activation,
        };
        let shared = pre_activation(kept.clone());
        let grads = GradSums::new(&shared, Some(&table)).finish(&table);
        let gamma_grad: Vec<f64> = sum_gd.iter().zip(&s).map(|(sum, s)| sum * s).collect();
        assert_close(
            &format!("{name}: gamma's gradient"),
            &grads.gamma,
            &gamma_grad,
            1e-5,
        );
        assert_close(
            &format!("{name}: beta's gradient"),
            &grads.beta,
            &sum_g,
            1e-5,
        );

        let result = norm_input_grad(shared, Some(&table), true);
        // With few values per channel the terms nearly cancel.
        assert_close_to(
            &format!("{name}: input's gradient"),
            &result.grad,
            &input_grad.values,
            largest(&terms.values),
            3.0 * tolerance,
        );
        let residual_grad = result.residual_grad.expect("it was asked for");
        assert_close(
            &format!("{name}: residual's gradient"),
            &residual_grad,
            &g.values,
            tolerance,
        );
        assert_eq!(
            download(&kept),
            input.values,
            "{name}: a shared input was written"
        );
        let in_place =
            norm_input_grad(pre_activation(up(&input, self.layout)), Some(&table), false);
        assert!(in_place.residual_grad.is_none());
        assert_eq!(
            download(&in_place.grad),
            download(&result.grad),
            "{name}: in place"
        );
    }
}

#[test]
fn every_layout_and_shape() {
    let device = CubeDevice::default();
    println!("device: {device:?}");
    let shapes: &[&[usize]] = &[
        &[2, 3, 5],
        &[1, 1, 2],
        &[4, 7, 1, 1],
        &[3, 8, 6, 10],
        &[2, 65, 3, 5],
        &[2, 64, 9, 9],
        &[5, 1, 4, 4],
        &[2, 200, 2, 3],
        &[2, 6, 2, 3, 4],
    ];
    for shape in shapes {
        for layout in [
            Layout::ChannelsFirst,
            Layout::ChannelsLast,
            Layout::Pitched(3),
        ] {
            Case::new(shape, layout).check(&device);
        }
    }
}

#[test]
fn every_option() {
    let device = CubeDevice::default();
    let shape = [3, 12, 5, 8];
    for activation in [Activation::Identity, Activation::Relu] {
        for residual in [false, true] {
            for (affine, norm) in [(true, BATCH_NORM), (false, BATCH_NORM), (true, TUTORIAL)] {
                Case {
                    activation,
                    residual,
                    affine,
                    norm,
                    ..Case::new(&shape, Layout::ChannelsLast)
                }
                .check(&device);
            }
        }
    }
}

#[test]
fn every_activation() {
    let device = CubeDevice::default();
    for activation in activations() {
        for residual in [false, true] {
            for dtype in dtypes(&device) {
                // WGSL and SPIR-V have no exponential of f64.
                let exponential = !has_derivative_of_output(activation)
                    && !matches!(
                        activation,
                        Activation::HardSwish | Activation::HardSigmoid(..)
                    );
                if exponential
                    && dtype == DType::F64
                    && cfg!(any(
                        feature = "vulkan",
                        feature = "webgpu",
                        feature = "wgpu"
                    ))
                {
                    continue;
                }
                Case {
                    activation,
                    residual,
                    dtype,
                    other_layout: Layout::ChannelsFirst,
                    ..Case::new(&[3, 12, 5, 8], Layout::ChannelsLast)
                }
                .check(&device);
            }
        }
    }
}

/// Smooth activations of large values are straight lines, not NaN.
#[test]
fn activations_far_out() {
    let device = CubeDevice::default();
    let values = [-3e4, -200.0, -90.0, 90.0, 200.0, 3e4];
    let host = Host {
        shape: vec![1, 1, values.len()],
        values: values.to_vec(),
    };
    let ones = host.map(|_, _| 1.0);
    let up = |host: &Host| host.upload(Layout::ChannelsFirst, DType::F32, &device);
    for activation in activations() {
        let output = download(&normalize(up(&host), None, None, activation));
        let pre_activation = PreActivation {
            output_grad: up(&ones),
            pool: None,
            norm_input: None,
            residual: None,
            output: Some(up(&host)),
            activation,
        };
        let grad = download(&norm_input_grad(pre_activation, None, false).grad);
        for (index, v) in values.into_iter().enumerate() {
            let (got, wanted) = (output[index], formula(activation, v));
            let error = (got - wanted).abs();
            assert!(error <= 1e-5 * v.abs(), "{activation:?}: {v} gives {got}");
            let (got, wanted) = (grad[index], slope(activation, v));
            let error = (got - wanted).abs();
            assert!(error <= 1e-5, "{activation:?}: {v} has {got}, not {wanted}");
        }
    }
}

#[test]
fn mixed_layouts() {
    let device = CubeDevice::default();
    let layouts = [
        Layout::ChannelsFirst,
        Layout::ChannelsLast,
        Layout::PitchedLast(4),
    ];
    for layout in layouts {
        for other_layout in layouts {
            Case {
                other_layout,
                residual: true,
                ..Case::new(&[2, 8, 4, 12], layout)
            }
            .check(&device);
        }
    }
}

#[test]
fn every_dtype() {
    let device = CubeDevice::default();
    for dtype in dtypes(&device) {
        for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
            Case {
                dtype,
                residual: true,
                ..Case::new(&[4, 16, 6, 6], layout)
            }
            .check(&device);
        }
    }
}

/// More chunks than one, more channels than one block, and more cubes than fit one dimension.
#[test]
fn large_launches() {
    let device = CubeDevice::default();
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        Case::new(&[8, 4, 64, 65], layout).check(&device);
        Case::new(&[2, 1030, 3, 3], layout).check(&device);
    }
    Case::new(&[1, 70_000, 3, 3], Layout::ChannelsFirst).check(&device);
}

/// A mean of a thousand spreads, at which sums of squares have no digit left.
#[test]
fn a_mean_far_from_zero() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        let input = Host::random(&[8, 6, 40, 40], &mut rng, 1e3, 1e-2)
            .map(|_, value| rounded(value, DType::F32));
        let m = input.per_channel();
        let mean: Vec<f64> = input.channel_sums().iter().map(|sum| sum / m).collect();
        let variance: Vec<f64> = input
            .map(|i, value| (value - mean[input.channel_of(i)]).powi(2))
            .channel_sums()
            .iter()
            .map(|sum| sum / m)
            .collect();
        let device_input = input.upload(layout, DType::F32, &device);
        let (stats, _) = moments(&device_input, Affine::default(), BATCH_NORM);
        assert_close("mean", &stats.mean, &mean, 1e-7);
        assert_close("variance", &stats.variance, &variance, 2e-3);
    }
}

/// A constant channel: the variance is 0, and the tutorial's variant has an infinite slope there.
#[test]
fn a_constant_channel() {
    let device = CubeDevice::default();
    for norm in [BATCH_NORM, TUTORIAL] {
        let input = Host {
            shape: vec![2, 3, 2, 4],
            values: vec![0.25; 48],
        };
        let input = input.upload(Layout::ChannelsFirst, DType::F32, &device);
        let (stats, table) = moments(&input, Affine::default(), norm);
        assert_eq!(download(&stats.variance), [0.0; 3]);
        let output = normalize(input.clone(), Some(&table), None, Activation::Identity);
        assert_eq!(download(&output), [0.0; 48]);
        let table = channel_table(&stats, Affine::default(), norm, 16);
        let pre_activation = PreActivation {
            output_grad: output.clone(),
            pool: None,
            norm_input: Some(input),
            residual: None,
            output: None,
            activation: Activation::Identity,
        };
        let sums = GradSums::new(&pre_activation, Some(&table));
        sums.finish(&table);
        let grad = norm_input_grad(pre_activation, Some(&table), false);
        assert_eq!(download(&grad.grad), [0.0; 48]);
    }
}

/// NaN stays NaN through the activation, forward and backward.
#[test]
fn nan_propagates() {
    let device = CubeDevice::default();
    let mut input = Host {
        shape: vec![1, 2, 1, 4],
        values: vec![1.0, 2.0, 3.0, 4.0, 1.0, f64::NAN, 3.0, 4.0],
    };
    let uploaded = input.upload(Layout::ChannelsFirst, DType::F32, &device);
    let (stats, table) = moments(&uploaded, Affine::default(), BATCH_NORM);
    assert!(download(&stats.mean)[0].is_finite());
    assert!(download(&stats.mean)[1].is_nan());
    let output = download(&normalize(uploaded, Some(&table), None, Activation::Relu));
    assert!(
        output[..4].iter().all(|value| value.is_finite()),
        "{output:?}"
    );
    assert!(output[4..].iter().all(|value| value.is_nan()), "{output:?}");

    input.values[5] = 0.0;
    let uploaded = input.upload(Layout::ChannelsFirst, DType::F32, &device);
    let sum = normalize(uploaded.clone(), None, Some(&uploaded), Activation::Relu);
    assert_eq!(download(&sum), [2.0, 4.0, 6.0, 8.0, 2.0, 0.0, 6.0, 8.0]);
}

/// A batch in chunks sums to the same as the whole.
#[test]
fn chunks_of_a_batch() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let shape = [5, 6, 4, 4];
    let (input, grad) = (
        Host::random(&shape, &mut rng, 0.0, 1.0),
        Host::random(&shape, &mut rng, 0.3, 1.0),
    );
    let rows = |host: &Host, range: std::ops::Range<usize>| {
        let image = host.values.len() / shape[0];
        let values = host.values[range.start * image..range.end * image].to_vec();
        Host {
            shape: vec![range.len(), shape[1], shape[2], shape[3]],
            values,
        }
        .upload(Layout::ChannelsLast, DType::F32, &device)
    };
    let affine = Affine::default();
    let (stats, _): (Moments, ChannelTable) = moments(&rows(&input, 0..5), affine, BATCH_NORM);
    let grads = |sizes: &[usize]| {
        let table = channel_table(&stats, affine, BATCH_NORM, 80);
        let mut start = 0;
        let sums = sizes.iter().map(|size| {
            let chunk = start..start + size;
            start = chunk.end;
            let pre_activation = PreActivation {
                output_grad: rows(&grad, chunk.clone()),
                pool: None,
                norm_input: Some(rows(&input, chunk)),
                residual: None,
                output: None,
                activation: Activation::Relu,
            };
            GradSums::new(&pre_activation, Some(&table))
        });
        let sums = sums.reduce(GradSums::merge).expect("there are chunks");
        sums.finish(&table)
    };
    let compare = || {
        let (whole, parts) = (grads(&[5]), grads(&[2, 2, 1]));
        assert_close("gamma", &parts.gamma, &download(&whole.gamma), 1e-6);
        assert_close("beta", &parts.beta, &download(&whole.beta), 1e-6);
    };
    for finishes in [false, true] {
        with_last_cube(finishes, compare);
    }
}

/// Reductions that the last cube finishes where a second launch does by default, or the other way round. Where the
/// device promises nothing the last cube is right all the same on a CPU, whose cores see each other's writes in order.
#[test]
fn reductions_in_one_launch_or_in_two() {
    let device = CubeDevice::default();
    let promises = device.client().properties().features.device_memory_scope;
    println!("the last cube finishes reductions: {promises}");
    let layouts = [
        Layout::ChannelsFirst,
        Layout::ChannelsLast,
        Layout::Pitched(3),
    ];
    with_last_cube(!promises, || {
        for layout in layouts {
            // One chunk; many; several blocks of channels.
            for shape in [[2, 3, 5, 1], [4, 8, 32, 33], [6, 200, 5, 5]] {
                Case {
                    residual: true,
                    ..Case::new(&shape, layout)
                }
                .check(&device);
            }
        }
        for dtype in dtypes(&device) {
            let case = Case::new(&[4, 16, 16, 16], Layout::ChannelsLast);
            Case { dtype, ..case }.check(&device);
        }
        Case {
            norm: TUTORIAL,
            affine: false,
            mean: 3.0,
            ..Case::new(&[8, 16, 20, 20], Layout::ChannelsLast)
        }
        .check(&device);
    });
}

/// A launch that fails, for a tensor larger than any memory, leaves those after it as they are.
#[test]
fn a_failed_launch_fails_alone() {
    let device = CubeDevice::default();
    let tensor = |width| {
        let shape = burn_backend::Shape::new([1, 1, 1, width]);
        CubeBackend::float_empty(shape, &device, DType::F32.into())
    };
    let runs = |input: &CubeTensor| {
        let (statistics, _) = moments(input, Affine::default(), BATCH_NORM);
        input.client.check([&statistics.variance.handle]).is_ok()
    };
    with_last_cube(true, || {
        assert!(!runs(&tensor(1 << 44)));
        assert!(runs(&tensor(16)));
    });
}

/// Given statistics: no norm's input, the gradient alone, and its sum.
#[test]
fn without_a_norm() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let shape = [3, 5, 4, 7];
    let output =
        Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, v| rounded(v.max(0.0), DType::F32));
    let grad = Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, v| rounded(v, DType::F32));
    let expected = grad.map(|i, g| if output.values[i] > 0.0 { g } else { 0.0 });
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        let pre_activation = PreActivation {
            output_grad: grad.upload(layout, DType::F32, &device),
            pool: None,
            norm_input: None,
            residual: None,
            output: Some(output.upload(layout, DType::F32, &device)),
            activation: Activation::Relu,
        };
        let sum = GradSums::new(&pre_activation, None).grad();
        assert_close("sum", &sum, &expected.channel_sums(), 1e-6);
        let result = norm_input_grad(pre_activation, None, true);
        assert_eq!(download(&result.grad), expected.values);
        let residual_grad = result.residual_grad.expect("it was asked for");
        assert_eq!(download(&residual_grad), expected.values);
    }
}

/// A closed activation passes no infinite or NaN gradient on: with a norm of the batch's statistics, of constant
/// ones, and without a norm.
#[test]
fn closed_activations_pass_nothing() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let shape = [2, 2, 3, 8];
    for dtype in dtypes(&device) {
        let input = Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, v| rounded(v, dtype));
        let grad = Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, v| rounded(v, dtype));
        let up = |host: &Host| host.upload(Layout::ChannelsFirst, dtype, &device);
        let norm_dtype = burn_conv_bn_cubecl::accumulator_dtype(dtype);
        // Values on each side of all kinks.
        let gamma = upload_channels(&[8.0, -8.0], norm_dtype, &device);
        let affine = Affine {
            gamma: Some(&gamma),
            beta: None,
        };
        for activation in [
            Activation::Relu,
            Activation::Relu6,
            Activation::LeakyRelu(Parameter::new(0.0)),
            Activation::HardSwish,
            Activation::HardSigmoid(Parameter::new(0.25), Parameter::new(0.5)),
            Activation::Elu(Parameter::new(0.0)),
        ] {
            let (stats, table) = moments(&up(&input), affine, BATCH_NORM);
            let value = normalize(up(&input), Some(&table), None, Activation::Identity);
            let of_batch = channel_table(&stats, affine, BATCH_NORM, 48);
            let constant = of_batch.clone().with_constant_statistics();
            // All results, `g` last.
            let run = |grad: &Host, table: Option<&ChannelTable>| -> Vec<Vec<f64>> {
                let pre_activation = PreActivation {
                    output_grad: up(grad),
                    pool: None,
                    norm_input: table.map(|_| up(&input)),
                    residual: None,
                    output: table.is_none().then(|| value.clone()),
                    activation,
                };
                let sums = GradSums::new(&pre_activation, table);
                let sums = match table {
                    Some(table) => {
                        let grads = sums.finish(table);
                        vec![grads.gamma, grads.beta]
                    }
                    None => vec![sums.grad()],
                };
                let result = norm_input_grad(pre_activation, table, true);
                let g = result.residual_grad.expect("it was asked for");
                let results = sums.iter().chain([&result.grad, &g]);
                results.map(download).collect()
            };
            for table in [Some(&of_batch), Some(&constant), None] {
                let slopes = run(&grad.map(|_, _| 1.0), table).pop().expect("there is g");
                let closed = slopes.iter().filter(|slope| **slope == 0.0).count();
                assert!(0 < closed && closed < slopes.len(), "{activation:?}");
                let at_closed = |value: f64| {
                    let grad = grad.map(|i, g| if slopes[i] == 0.0 { value } else { g });
                    run(&grad, table)
                };
                let wanted = at_closed(0.0);
                for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                    let what = format!("{value} to {activation:?} of {dtype:?}");
                    assert_eq!(at_closed(value), wanted, "{what}");
                }
            }
        }
    }
}

/// An input with more than a tenth of gaps is not overwritten: the output is dense.
#[test]
fn sparse_inputs_are_written_dense() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    let shape = [2, 3, 4, 20];
    let input = Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, v| rounded(v, DType::F32));
    let expected = input.map(|_, v| v.max(0.0));
    for (gap, dense) in [(1, false), (4, true), (12, true)] {
        let padded = input.upload(Layout::Pitched(gap), DType::F32, &device);
        let output = normalize(padded, None, None, Activation::Relu);
        assert_eq!(download(&output), expected.values, "gap {gap}");
        let row = if dense { 20 } else { 20 + gap };
        assert_eq!(output.meta.strides()[2], row, "gap {gap}");
        assert_eq!(output.meta.strides()[0], 12 * row, "gap {gap}");
    }
}

/// The same for the output of CUDA's convolutions in f32, whose pixels start at multiples of up to 512 bytes.
#[test]
fn pitched_pixels_are_written_dense() {
    let device = CubeDevice::default();
    for (channels, pitch, dense) in [
        (24, 32, true),
        (64, 64, false),
        (96, 128, true),
        (120, 128, false),
        (144, 256, true),
    ] {
        let host = Host {
            shape: vec![2, channels, 3, 5],
            values: vec![0.5; 30 * channels],
        };
        let pitched = host.upload(Layout::PitchedLast(pitch - channels), DType::F32, &device);
        let output = normalize(pitched, None, None, Activation::Relu);
        assert_eq!(download(&output), host.values, "{channels} channels");
        let pixel = if dense { channels } else { pitch };
        let strides = [15 * pixel, 1, 5 * pixel, pixel];
        assert_eq!(output.meta.strides()[..], strides, "{channels} channels");
    }
}

/// Constant statistics: the gradient is `scale * g`, with or without the norm's input, in any buffer.
#[test]
fn constant_statistics() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let shape = [3, 3, 4, 5];
    let (mean, variance) = ([0.5, -1.0, 0.0], [4.0, 0.25, 1.0]);
    let (gamma, beta) = ([1.5, 0.0, -0.5], [0.25, 1.0, -0.25]);
    let norm = Norm {
        inner_epsilon: 0.0,
        ..BATCH_NORM
    };
    let scale: Vec<f64> = (0..3).map(|c| gamma[c] / f64::sqrt(variance[c])).collect();
    for dtype in dtypes(&device) {
        let mut draw =
            || Host::random(&shape, &mut rng, 0.0, 1.0).map(|_, value| rounded(value, dtype));
        let (input, grad, residual) = (draw(), draw(), draw());
        let norm_dtype = burn_conv_bn_cubecl::accumulator_dtype(dtype);
        let [mean, variance, gamma, beta] =
            [&mean, &variance, &gamma, &beta].map(|v| upload_channels(v, norm_dtype, &device));
        let statistics = Moments { mean, variance };
        let affine = Affine {
            gamma: Some(&gamma),
            beta: Some(&beta),
        };
        let table = channel_table(&statistics, affine, norm, 1).with_constant_statistics();
        let (mean, beta) = (download(&statistics.mean), download(&beta));
        let deviation = input.map(|i, z| z - mean[input.channel_of(i)]);
        let value = deviation.map(|i, d| {
            let c = input.channel_of(i);
            scale[c] * d + beta[c] + residual.values[i]
        });
        let output = value.map(|_, v| v.max(0.0));
        let up = |host: &Host| host.upload(Layout::ChannelsLast, dtype, &device);
        let got = normalize(
            up(&input),
            Some(&table),
            Some(&up(&residual)),
            Activation::Relu,
        );
        assert_close("output", &got, &output.values, tolerance(dtype));

        for activation in [Activation::Identity, Activation::Relu] {
            let is_open = |i: usize| activation == Activation::Identity || output.values[i] > 0.0;
            let g = grad.map(|i, g| if is_open(i) { g } else { 0.0 });
            let wanted = g.map(|i, g| scale[input.channel_of(i)] * g);
            for has_input in [false, true] {
                for wants_residual in [false, true] {
                    let pre_activation = PreActivation {
                        output_grad: up(&grad),
                        pool: None,
                        norm_input: has_input.then(|| up(&input)),
                        residual: None,
                        output: Some(got.clone()),
                        activation,
                    };
                    let what = format!("{dtype:?}, {activation:?}, input {has_input}");
                    let sums = GradSums::new(&pre_activation, Some(&table));
                    if has_input {
                        let grads = sums.finish(&table);
                        let products = g.map(|i, g| g * deviation.values[i]).channel_sums();
                        let inverse = [0.5, 2.0, 1.0];
                        let gamma: Vec<f64> = products
                            .iter()
                            .zip(inverse)
                            .map(|(sum, s)| sum * s)
                            .collect();
                        assert_close(&format!("{what}: gamma"), &grads.gamma, &gamma, 1e-5);
                        let beta = g.channel_sums();
                        assert_close(&format!("{what}: beta"), &grads.beta, &beta, 1e-5);
                    }
                    let result = norm_input_grad(pre_activation, Some(&table), wants_residual);
                    assert_close(&what, &result.grad, &wanted.values, tolerance(dtype));
                    assert_eq!(result.residual_grad.is_some(), wants_residual);
                    if let Some(residual_grad) = result.residual_grad {
                        assert_eq!(download(&residual_grad), g.values, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_empty_batch() {
    let device = CubeDevice::default();
    let empty = CubeBackend::float_empty(
        burn_backend::Shape::new([0, 3, 4, 4]),
        &device,
        DType::F32.into(),
    );
    let (stats, table) = moments(&empty, Affine::default(), BATCH_NORM);
    assert!(
        download(&stats.variance)
            .iter()
            .all(|variance| variance.is_nan())
    );
    let output = normalize(empty.clone(), Some(&table), None, Activation::Relu);
    assert_eq!(download(&output), Vec::<f64>::new());
    let pre_activation = PreActivation {
        output_grad: empty.clone(),
        pool: None,
        norm_input: Some(empty),
        residual: None,
        output: None,
        activation: Activation::Relu,
    };
    let sums = GradSums::new(&pre_activation, Some(&table));
    assert_eq!(download(&sums.grad()), [0.0; 3]);
    let grad = norm_input_grad(pre_activation, Some(&table), false);
    assert_eq!(download(&grad.grad), Vec::<f64>::new());
}

/// Parameters and statistics that are views without a value for each channel in memory.
#[test]
fn expanded_parameters() {
    let device = CubeDevice::default();
    let shape = [2, 8, 3, 5];
    let mut rng = ChaCha8Rng::seed_from_u64(37);
    let input = Host::random(&shape, &mut rng, 0.5, 1.0);
    let input = || input.upload(Layout::ChannelsLast, DType::F32, &device);
    let dense = |value| upload_channels(&[value; 8], DType::F32, &device);
    let expanded = |value| {
        let mut tensor = upload_channels(&[value], DType::F32, &device);
        *tensor.meta = Metadata::new(Shape::from(vec![8]), Strides::from(vec![0]));
        tensor
    };
    let results = |channels: &dyn Fn(f64) -> CubeTensor| {
        let (gamma, beta) = (channels(1.5), channels(-0.25));
        let affine = Affine {
            gamma: Some(&gamma),
            beta: Some(&beta),
        };
        let running = Running {
            moments: Moments {
                mean: channels(0.5),
                variance: channels(2.0),
            },
            momentum: 0.1,
            factor: 1.0,
        };
        let got = moments_and_running(&input(), affine, BATCH_NORM, Some(&running));
        let after = got.running.expect("running statistics were given");
        let output = normalize(input(), Some(&got.table), None, Activation::Relu);
        let given = Moments {
            mean: channels(0.25),
            variance: channels(4.0),
        };
        let updated = running_moments(&running, &given);
        let table = channel_table(&given, affine, BATCH_NORM, 30);
        let pre_activation = PreActivation {
            output_grad: input(),
            pool: None,
            norm_input: Some(input()),
            residual: None,
            output: None,
            activation: Activation::Relu,
        };
        let grads = GradSums::new(&pre_activation, Some(&table)).finish(&table);
        let grad = norm_input_grad(pre_activation, Some(&table), false).grad;
        let results = [
            after.mean,
            after.variance,
            output,
            updated.mean,
            updated.variance,
        ];
        let results = results.into_iter().chain([grads.gamma, grads.beta, grad]);
        results.map(|tensor| download(&tensor)).collect::<Vec<_>>()
    };
    assert_eq!(results(&expanded), results(&dense));
}

/// Running statistics in a dtype of their own, by biased and unbiased variance: values that no dtype rounds.
#[test]
fn running_statistics() {
    let device = CubeDevice::default();
    for dtype in dtypes(&device) {
        let accumulator = burn_conv_bn_cubecl::accumulator_dtype(dtype);
        let moments = |[mean, variance]: [[f64; 3]; 2], dtype| Moments {
            mean: upload_channels(&mean, dtype, &device),
            variance: upload_channels(&variance, dtype, &device),
        };
        let batch = moments([[1.5, 0.5, -4.0], [2.0, 1.0, 0.5]], accumulator);
        for (factor, variance) in [(1.0, [3.5, 0.4375, 0.875]), (1.5, [3.75, 0.5625, 0.9375])] {
            let running = Running {
                moments: moments([[0.5, -1.0, 2.0], [4.0, 0.25, 1.0]], dtype),
                momentum: 0.25,
                factor,
            };
            let got = running_moments(&running, &batch);
            assert_eq!(got.mean.dtype, dtype);
            assert_eq!(download(&got.mean), [0.75, -0.625, 0.5], "{dtype:?}");
            assert_eq!(download(&got.variance), variance, "{dtype:?}");
        }
    }
}

/// Running statistics by the launches of the batch's have the bits of those by a launch of their own.
#[test]
fn running_statistics_along_with_the_batch() {
    let device = CubeDevice::default();
    for (layout, channels) in [(Layout::ChannelsFirst, 3), (Layout::ChannelsLast, 40)] {
        let shape = [4, channels, 33, 32];
        let input = Host::random(&shape, &mut ChaCha8Rng::seed_from_u64(7), 2.0, 3.0);
        let input = input.upload(layout, DType::F32, &device);
        let running = Running {
            moments: Moments {
                mean: upload_channels(&vec![0.5; channels], DType::F32, &device),
                variance: upload_channels(&vec![1.5; channels], DType::F32, &device),
            },
            momentum: 0.1,
            factor: 1.25,
        };
        for finishes in [false, true] {
            let got = with_last_cube(finishes, || {
                moments_and_running(&input, Affine::default(), BATCH_NORM, Some(&running))
            });
            let alone = running_moments(&running, &got.moments);
            let got = got.running.expect("running statistics were given");
            assert_eq!(download(&got.mean), download(&alone.mean), "{layout:?}");
            assert_eq!(
                download(&got.variance),
                download(&alone.variance),
                "{layout:?}"
            );
            assert_ne!(download(&got.mean), vec![0.5; channels]);
        }
    }
}

/// Output of a max pool, and each maximum's index in the input, the first of equals.
fn pooled(input: &Host, window: PoolWindow) -> (Host, Vec<usize>) {
    let [images, channels, height, width] = input.shape[..] else {
        panic!("expected four axes, got {:?}", input.shape);
    };
    let [rows, columns] = window.output([height, width]);
    let taps = |dim: usize, at: usize, size: usize| {
        let start = at * window.stride[dim];
        let padding = window.padding[dim];
        (start..start + window.kernel_size[dim])
            .filter_map(move |tap| tap.checked_sub(padding))
            .filter(move |&pixel| pixel < size)
    };
    let mut argmax = Vec::new();
    for plane in 0..images * channels {
        for row in 0..rows {
            for column in 0..columns {
                let mut best: Option<usize> = None;
                for y in taps(0, row, height) {
                    for x in taps(1, column, width) {
                        let index = (plane * height + y) * width + x;
                        if best.is_none_or(|best| input.values[index] > input.values[best]) {
                            best = Some(index);
                        }
                    }
                }
                argmax.push(best.expect("a window has a pixel"));
            }
        }
    }
    let output = Host {
        shape: vec![images, channels, rows, columns],
        values: argmax.iter().map(|&index| input.values[index]).collect(),
    };
    (output, argmax)
}

const WINDOWS: [PoolWindow; 4] = [
    PoolWindow {
        kernel_size: [2, 2],
        stride: [2, 2],
        padding: [0, 0],
    },
    PoolWindow {
        kernel_size: [3, 3],
        stride: [2, 2],
        padding: [1, 1],
    },
    PoolWindow {
        kernel_size: [3, 2],
        stride: [1, 3],
        padding: [1, 0],
    },
    // As many pixels as a byte has values.
    PoolWindow {
        kernel_size: [32, 8],
        stride: [5, 3],
        padding: [16, 4],
    },
];

/// Outputs and gradients to the bit, for values with many ties: eighths, whose sums no dtype rounds.
#[test]
fn max_pools() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(29);
    let eighths = |host: Host| host.map(|_, value| (8.0 * value).round() / 8.0);
    let dtypes = dtypes(&device);
    let layouts = [
        Layout::ChannelsFirst,
        Layout::ChannelsLast,
        Layout::Pitched(3),
    ];
    for shape in [[2, 3, 7, 9], [2, 8, 6, 10], [3, 6, 5, 4], [1, 1, 4, 5]] {
        for window in WINDOWS {
            let input = eighths(Host::random(&shape, &mut rng, -0.5, 1.0));
            let (output, argmax) = pooled(&input, window);
            let grad = eighths(Host::random(&output.shape, &mut rng, 0.0, 1.0));
            let mut wanted = vec![0.0; input.values.len()];
            for (index, grad) in argmax.iter().zip(&grad.values) {
                wanted[*index] += grad;
            }
            let cases = dtypes
                .iter()
                .map(|&dtype| (dtype, Layout::ChannelsLast))
                .chain(layouts.map(|layout| (DType::F32, layout)));
            for (dtype, layout) in cases {
                let what = format!("{shape:?} {dtype:?} {layout:?} {window:?}");
                let uploaded = input.upload(layout, dtype, &device);
                let got = max_pool(&uploaded, None, Activation::Identity, window);
                assert_eq!(download(&got.output), output.values, "output of {what}");
                // A byte per output.
                let bytes = got.argmax.meta.num_elements() * got.argmax.dtype.size();
                assert_eq!(bytes, output.values.len().next_multiple_of(4), "{what}");
                let pool = PoolArgmax {
                    window,
                    argmax: got.argmax,
                    first_image: 0,
                };
                let grad = grad.upload(layout, dtype, &device);
                let got = max_pool_backward(&grad, &pool, [shape[2], shape[3]]);
                assert_eq!(download(&got), wanted, "gradient of {what}");
            }
        }
    }
}

/// NaN is the maximum, wherever it is in the window.
#[test]
fn max_pools_propagate_nan() {
    let device = CubeDevice::default();
    let nan = f64::NAN;
    let input = Host {
        shape: vec![1, 1, 2, 6],
        values: vec![nan, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0, nan, 1.0, 3.0, 4.0],
    };
    let input = input.upload(Layout::ChannelsFirst, DType::F32, &device);
    let got = max_pool(&input, None, Activation::Identity, WINDOWS[0]);
    let output = download(&got.output);
    assert!(output[0].is_nan() && output[1].is_nan(), "{output:?}");
    assert_eq!(output[2], 4.0);
    // Places 0, 2 and 3 of four.
    let words = burn_cubecl::ops::into_data_sync(got.argmax);
    assert_eq!(words.iter::<u32>().collect::<Vec<_>>(), [0x0003_0200]);
}

/// A pool behind norm and ReLU against the two one after the other: output, sums and the gradient of the norm's
/// input, over the whole batch and in chunks.
#[test]
fn max_pools_behind_a_norm() {
    let device = CubeDevice::default();
    let mut rng = ChaCha8Rng::seed_from_u64(31);
    let dtypes = dtypes(&device);
    for shape in [[3, 8, 7, 6], [3, 3, 6, 5]] {
        for (window, dtype, layout) in [
            (WINDOWS[0], DType::F32, Layout::ChannelsLast),
            (WINDOWS[1], DType::F32, Layout::ChannelsLast),
            (WINDOWS[1], DType::F32, Layout::ChannelsFirst),
            (WINDOWS[1], DType::F16, Layout::ChannelsLast),
        ] {
            if !dtypes.contains(&dtype) {
                continue;
            }
            let what = format!("{shape:?} {dtype:?} {layout:?} {window:?}");
            let mut draw = |shape: &[usize]| {
                Host::random(shape, &mut rng, 0.25, 1.0).map(|_, v| rounded(v, dtype))
            };
            let input = draw(&shape);
            let [rows, columns] = window.output([shape[2], shape[3]]);
            let grad = draw(&[shape[0], shape[1], rows, columns]);
            let image = |host: &Host, images: std::ops::Range<usize>| {
                let size = host.values.len() / shape[0];
                let mut part = host.shape.clone();
                part[0] = images.len();
                Host {
                    shape: part,
                    values: host.values[size * images.start..size * images.end].to_vec(),
                }
                .upload(layout, dtype, &device)
            };
            let all = 0..shape[0];
            let affine = Affine::default();
            let uploaded = image(&input, all.clone());
            let (stats, table) = moments(&uploaded, affine, BATCH_NORM);
            let got = max_pool(&uploaded, Some(&table), Activation::Relu, window);
            let between = normalize(uploaded, Some(&table), None, Activation::Relu);
            let wanted = max_pool(&between, None, Activation::Identity, window);
            let output = download(&wanted.output);
            assert_close(&what, &got.output, &output, tolerance(dtype));

            // Sums and the input's gradient, over a batch in these parts.
            let run = |joined: bool, parts: &[std::ops::Range<usize>]| {
                let values = input.values.len() / shape[1];
                let table = channel_table(&stats, affine, BATCH_NORM, values);
                let parts: Vec<PreActivation> = parts
                    .iter()
                    .map(|images| {
                        let pool = PoolArgmax {
                            window,
                            argmax: got.argmax.clone(),
                            first_image: images.start,
                        };
                        let grad = image(&grad, images.clone());
                        let (output_grad, pool) = if joined {
                            (grad, Some(pool))
                        } else {
                            (max_pool_backward(&grad, &pool, [shape[2], shape[3]]), None)
                        };
                        PreActivation {
                            output_grad,
                            pool,
                            norm_input: Some(image(&input, images.clone())),
                            residual: None,
                            output: None,
                            activation: Activation::Relu,
                        }
                    })
                    .collect();
                let sums = parts.iter().map(|part| GradSums::new(part, Some(&table)));
                let sums = sums.reduce(GradSums::merge).expect("there are parts");
                let grads = sums.finish(&table);
                let mut input_grad = Vec::new();
                for part in parts {
                    let result = norm_input_grad(part, Some(&table), false);
                    input_grad.extend(download(&result.grad));
                }
                [download(&grads.gamma), download(&grads.beta), input_grad]
            };
            let wanted = run(false, std::slice::from_ref(&all));
            for parts in [vec![all.clone()], vec![0..1, 1..3]] {
                let got = run(true, &parts);
                for (got, wanted) in got.iter().zip(&wanted) {
                    let error = error(got, wanted, largest(wanted));
                    assert!(error <= 3.0 * tolerance(dtype), "{what}: error {error:.1e}");
                }
            }
        }
    }
}

/// Arguments that do not fit, as kernels check no bounds: each is refused before a launch.
#[test]
fn arguments_that_do_not_fit() {
    let device = CubeDevice::default();
    let tensor_of = |shape: &[usize], dtype: DType| {
        let shape = burn_backend::Shape::from(shape.to_vec());
        CubeBackend::float_empty(shape, &device, dtype.into())
    };
    let tensor = |shape: &[usize]| tensor_of(shape, DType::F32);
    let (three, four) = (tensor(&[3]), tensor(&[4]));
    let three_f64 = tensor_of(&[3], DType::F64);
    let input = tensor(&[2, 3, 4, 4]);
    let affine = Affine::default();
    let statistics = |mean: &CubeTensor, variance: &CubeTensor| Moments {
        mean: mean.clone(),
        variance: variance.clone(),
    };
    let table = |channels| channel_table(&statistics(channels, channels), affine, BATCH_NORM, 32);
    let normed = PreActivation {
        output_grad: input.clone(),
        pool: None,
        norm_input: Some(input.clone()),
        residual: None,
        output: None,
        activation: Activation::Silu,
    };
    let window = WINDOWS[0];
    let pooled = max_pool(&input, None, Activation::Identity, window);
    let pool = PoolArgmax {
        window,
        argmax: pooled.argmax,
        first_image: 0,
    };
    let second = PoolArgmax {
        first_image: 1,
        ..pool.clone()
    };
    let joined = |pool: &PoolArgmax, output_grad: &CubeTensor| PreActivation {
        output_grad: output_grad.clone(),
        pool: Some(pool.clone()),
        ..normed.clone()
    };
    let running = |mean, variance| Running {
        moments: statistics(mean, variance),
        momentum: 0.1,
        factor: 1.0,
    };
    let update = |running: &Running| {
        moments_and_running(&input, affine, BATCH_NORM, Some(running));
    };
    let of = |gamma, beta| Affine {
        gamma: Some(gamma),
        beta: Some(beta),
    };
    let sums = |value: &PreActivation, channels| {
        GradSums::new(value, Some(&table(channels)));
    };
    let pool_input = |window: PoolWindow| {
        max_pool(&input, None, Activation::Identity, window);
    };
    let relu = |residual: &CubeTensor| {
        normalize(input.clone(), None, Some(residual), Activation::Relu);
    };
    let cases: &[(&str, &dyn Fn())] = &[
        ("gamma: expected 3 values, got 4", &|| {
            moments(&input, of(&four, &three), BATCH_NORM);
        }),
        ("beta: expected F32, got F64", &|| {
            moments(&input, of(&three, &three_f64), BATCH_NORM);
        }),
        ("running mean: expected 3 values, got 4", &|| {
            update(&running(&four, &three))
        }),
        ("running variance: expected F32, got F64", &|| {
            update(&running(&three, &three_f64))
        }),
        ("batch variance: expected 3 values, got 4", &|| {
            running_moments(&running(&three, &three), &statistics(&three, &four));
        }),
        ("variance: expected 3 values, got 4", &|| {
            channel_table(&statistics(&three, &four), affine, BATCH_NORM, 32);
        }),
        ("beta: expected 3 values, got 4", &|| {
            channel_table(
                &statistics(&three, &three),
                of(&three, &four),
                BATCH_NORM,
                32,
            );
        }),
        ("mean: expected 3 values, got 4", &|| {
            normalize(input.clone(), Some(&table(&four)), None, Activation::Relu);
        }),
        ("residual: expected shape [2, 3, 4, 4]", &|| {
            relu(&tensor(&[2, 3, 4, 5]))
        }),
        ("residual: expected F32, got F64", &|| {
            relu(&tensor_of(&[2, 3, 4, 4], DType::F64))
        }),
        ("mean: expected F32, got F64", &|| sums(&normed, &three_f64)),
        ("output gradient: expected shape [2, 3, 4, 4]", &|| {
            let output_grad = tensor(&[2, 3, 4, 2]);
            sums(
                &PreActivation {
                    output_grad,
                    ..normed.clone()
                },
                &three,
            );
        }),
        ("norm input: expected F32, got F64", &|| {
            let norm_input = Some(tensor_of(&[2, 3, 4, 4], DType::F64));
            sums(
                &PreActivation {
                    norm_input,
                    ..normed.clone()
                },
                &three,
            );
        }),
        ("residual: expected shape [2, 3, 4, 4]", &|| {
            let residual = Some(tensor(&[1, 3, 4, 4]));
            sums(
                &PreActivation {
                    residual,
                    ..normed.clone()
                },
                &three,
            );
        }),
        ("output: expected shape [2, 3, 4, 4]", &|| {
            let output = Some(tensor(&[1, 3, 4, 4]));
            norm_input_grad(
                PreActivation {
                    output,
                    ..normed.clone()
                },
                None,
                false,
            );
        }),
        ("mean: expected 3 values, got 4", &|| {
            GradSums::new(&normed, Some(&table(&three))).finish(&table(&four));
        }),
        ("complete it with `GradSums::finish`", &|| {
            norm_input_grad(normed.clone(), Some(&table(&three)), false);
        }),
        ("output gradient: expected shape [2, 3, 2, 2]", &|| {
            sums(&joined(&pool, &input), &three);
        }),
        ("argmax: expected at least 9 values, got 6", &|| {
            sums(&joined(&second, &pooled.output), &three);
        }),
        ("argmax: expected at least 9 values, got 6", &|| {
            max_pool_backward(&pooled.output, &second, [4, 4]);
        }),
        ("output gradient: expected shape [2, 3, 3, 2]", &|| {
            max_pool_backward(&pooled.output, &pool, [6, 4]);
        }),
        ("input: expected [batch, channels, height, width]", &|| {
            max_pool(&tensor(&[2, 3, 4]), None, Activation::Identity, window);
        }),
        ("mean: expected 3 values, got 4", &|| {
            max_pool(&input, Some(&table(&four)), Activation::Identity, window);
        }),
        (
            "window: expected at most the padded input's 4 pixels, got 5",
            &|| {
                pool_input(PoolWindow {
                    kernel_size: [5, 2],
                    ..window
                });
            },
        ),
        ("window: expected at most 256 pixels, got 257", &|| {
            pool_input(PoolWindow {
                kernel_size: [257, 1],
                ..window
            });
        }),
        (
            "padding: expected at most half the window's 2 pixels, got 2",
            &|| {
                pool_input(PoolWindow {
                    padding: [2, 0],
                    ..window
                });
            },
        ),
    ];
    let is_refused = |(message, call): &&(&str, &dyn Fn())| {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        let panic = result
            .err()
            .and_then(|panic| panic.downcast::<String>().ok());
        panic.is_some_and(|got| got.contains(message))
    };
    let missed = cases.iter().filter(|case| !is_refused(case));
    let missed: Vec<_> = missed.map(|(message, _)| message).collect();
    assert!(missed.is_empty(), "not refused: {missed:?}");
}
