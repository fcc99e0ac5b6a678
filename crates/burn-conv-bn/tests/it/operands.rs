//! Each operand plain, on autodiff but untracked, or tracked, in every combination: statistics, outputs
//! and gradients are those of Burn's own pair of layers, and to the bit the same over borrowed modules.

use burn::module::{Param, ParamId, RunningState};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, Conv3d, Conv3dConfig};
use burn::nn::pool::MaxPool2dConfig as BurnMaxPool2dConfig;
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{
    Activation, ConvBn1d, ConvBn2d, ConvBn3d, ConvBnOptions, ConvSpec, MaxPool2dConfig, fuse,
};

use crate::common::{assert_close, random, values};

/// How an operand is known to autodiff.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// On the device without autodiff, as from a data loader without a device.
    Plain,
    /// On the autodiff device, without a gradient.
    Untracked,
    Tracked,
}

use State::{Plain, Tracked, Untracked};

const STATES: [State; 3] = [Plain, Untracked, Tracked];

impl State {
    fn tensor<const D: usize>(self, data: TensorData) -> Tensor<D> {
        let plain = Tensor::from_data(data, (&Device::flex(), DType::F32));
        match self {
            Plain => plain,
            Untracked => plain.autodiff(),
            Tracked => plain.autodiff().require_grad(),
        }
    }
}

/// The state of each operand. Statistics are tracked nowhere: Burn's modules keep them as buffers.
#[derive(Clone, Copy, Debug)]
struct Operands {
    input: State,
    weight: State,
    bias: State,
    gamma: State,
    beta: State,
    residual: State,
    statistics: State,
}

impl Operands {
    fn all() -> impl Iterator<Item = Self> {
        (0..3usize.pow(6) * 2).map(|index| {
            let state = |operand: u32| STATES[index / 3usize.pow(operand) % 3];
            Self {
                input: state(0),
                weight: state(1),
                bias: state(2),
                gamma: state(3),
                beta: state(4),
                residual: state(5),
                statistics: STATES[index / 3usize.pow(6)],
            }
        })
    }

    /// Those that decide together where statistics come from, with the rest tracked.
    fn few() -> impl Iterator<Item = Self> {
        Self::all().filter(|operands| {
            operands.beta == Tracked && operands.gamma == Tracked && operands.statistics != Plain
        })
    }

    /// Whether Burn's pair takes the batch's statistics: by the device of its convolution's output.
    fn trains(&self) -> bool {
        [self.input, self.weight, self.bias]
            .iter()
            .any(|state| *state != Plain)
    }
}

const CHANNELS: [usize; 2] = [2, 3];

/// Parameters of one side of a comparison.
struct Parameters<const D: usize> {
    input: Tensor<D>,
    weight: Tensor<D>,
    bias: Tensor<1>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    residual: Tensor<D>,
    mean: Tensor<1>,
    variance: Tensor<1>,
}

impl<const D: usize> Parameters<D> {
    fn new(operands: Operands, input: [usize; D], output: [usize; D]) -> Self {
        let mut kernel = [3; D];
        (kernel[0], kernel[1]) = (CHANNELS[1], CHANNELS[0]);
        let row = |seed| random(&[CHANNELS[1]], seed);
        Self {
            input: operands.input.tensor(random(&input, 1)),
            weight: operands.weight.tensor(random(&kernel, 2)),
            bias: operands.bias.tensor(row(3)),
            gamma: operands.gamma.tensor(row(4)),
            beta: operands.beta.tensor(row(5)),
            residual: operands.residual.tensor(random(&output, 6)),
            mean: operands.statistics.tensor(row(7)),
            variance: operands.statistics.tensor::<1>(row(8)) + 2.0,
        }
    }

    fn norm(&self) -> BatchNorm {
        let mut norm = BatchNormConfig::new(CHANNELS[1]).init(&Device::flex());
        norm.gamma = parameter(&self.gamma);
        norm.beta = parameter(&self.beta);
        norm.running_mean = RunningState::new(self.mean.clone());
        norm.running_var = RunningState::new(self.variance.clone());
        norm
    }

    /// Each gradient, zeros for none, and the running statistics.
    fn results(
        &self,
        norm: Option<&BatchNorm>,
        output: Tensor<D>,
    ) -> Vec<(&'static str, Vec<f64>)> {
        let upstream: Tensor<D> = Plain.tensor(random(&output.dims(), 9));
        let mut results = vec![
            ("output", values(output.clone())),
            (
                "output is on autodiff",
                vec![f64::from(output.is_autodiff())],
            ),
            ("output is tracked", vec![f64::from(output.is_tracked())]),
        ];
        if output.is_tracked() {
            let grads = (output * upstream).sum().backward();
            results.extend([
                ("gradient of the input", gradient(&self.input, &grads)),
                ("gradient of the weight", gradient(&self.weight, &grads)),
                ("gradient of the bias", gradient(&self.bias, &grads)),
                ("gradient of gamma", gradient(&self.gamma, &grads)),
                ("gradient of beta", gradient(&self.beta, &grads)),
                ("gradient of the residual", gradient(&self.residual, &grads)),
            ]);
        }
        if let Some(norm) = norm {
            results.push(("running mean", values(norm.running_mean.value_sync())));
            results.push(("running variance", values(norm.running_var.value_sync())));
        }
        results
    }
}

fn parameter<const D: usize>(tensor: &Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor.clone())
}

/// With a first value that says whether there is one.
fn gradient<const D: usize>(tensor: &Tensor<D>, grads: &Gradients) -> Vec<f64> {
    let grad = tensor.grad(grads);
    let mut all = vec![f64::from(grad.is_some())];
    all.extend(grad.into_iter().flat_map(values));
    all
}

fn compare(
    what: &str,
    operands: Operands,
    got: &[(&'static str, Vec<f64>)],
    wanted: &[(&'static str, Vec<f64>)],
) {
    assert_eq!(
        got.len(),
        wanted.len(),
        "{what}, {operands:?}: tracked or not"
    );
    for ((name, got), (_, wanted)) in got.iter().zip(wanted) {
        // Burn's gradient of a bias under batch statistics is rounding noise around our zero.
        assert_close(
            &format!("{what}, {operands:?}: {name}"),
            got,
            wanted,
            2e-5,
            2e-5,
        );
    }
}

/// A block's output, whatever kind of block it is.
macro_rules! output {
    ($block:expr, $of:expr, $residual:expr) => {{
        let (block, x) = ($block, $of.input.clone());
        if $residual {
            block.forward_residual(x, $of.residual.clone())
        } else {
            block.forward(x)
        }
    }};
}

macro_rules! rank {
    ($name:ident, $rank:literal, $conv:ident, $config:expr, $layer:ident, $operands:expr) => {
        #[test]
        fn $name() {
            let (mut input, mut output) = ([5; $rank], [3; $rank]);
            (input[0], input[1]) = (2, CHANNELS[0]);
            (output[0], output[1]) = (2, CHANNELS[1]);
            let (mut training, mut evaluating) = (0, 0);
            for operands in $operands {
                let conv = |of: &Parameters<$rank>| -> $conv {
                    let mut conv = $config.init(&Device::flex());
                    conv.weight = parameter(&of.weight);
                    conv.bias = Some(parameter(&of.bias));
                    conv
                };
                let burn = |residual: bool| {
                    let of = Parameters::new(operands, input, output);
                    let norm = of.norm();
                    let z = norm.forward(conv(&of).forward(of.input.clone()));
                    let y = relu(if residual { z + of.residual.clone() } else { z });
                    of.results(Some(&norm), y)
                };
                let owned = |residual: bool| {
                    let of = Parameters::new(operands, input, output);
                    let block = $layer::from_parts(conv(&of), of.norm(), Activation::Relu);
                    of.results(Some(&block.norm), output!(&block, of, residual))
                };
                let borrowed = |residual: bool| {
                    let of = Parameters::new(operands, input, output);
                    let (conv, norm) = (conv(&of), of.norm());
                    let block = fuse(&conv, &norm).with_activation(Activation::Relu);
                    of.results(Some(&norm), output!(&block, of, residual))
                };
                for residual in [false, true] {
                    let wanted = burn(residual);
                    let got = owned(residual);
                    compare("layer", operands, &got, &wanted);
                    assert_eq!(borrowed(residual), got, "borrowed, {operands:?}");
                    if residual {
                        compare("op", operands, &op(operands, input, output), &wanted);
                    }
                }
                if operands.trains() {
                    training += 1;
                } else {
                    evaluating += 1;
                }
            }
            assert!(training > 0 && evaluating > 0);
        }
    };
}

/// The function on tensors, given the statistics that the pair takes.
fn op<const D: usize>(
    operands: Operands,
    input: [usize; D],
    output: [usize; D],
) -> Vec<(&'static str, Vec<f64>)> {
    let of = Parameters::new(operands, input, output);
    let mut params = ConvBnParams::new(of.weight.clone())
        .with_bias(of.bias.clone())
        .with_affine(of.gamma.clone(), of.beta.clone())
        .with_residual(of.residual.clone());
    if !operands.trains() {
        params = params.with_statistics(of.mean.clone(), of.variance.clone());
    }
    let options = ConvBnOptions::new(ConvSpec::unit(D - 2)).with_activation(Activation::Relu);
    let result = conv_bn(of.input.clone(), params, options).unwrap();
    let mut results = of.results(None, result.output);
    let updated = |old: Tensor<1>, new: Tensor<1>| values(old.inner() * 0.9 + new.inner() * 0.1);
    if operands.trains() {
        results.push(("running mean", updated(of.mean, result.mean)));
        results.push(("running variance", updated(of.variance, result.variance)));
    } else {
        results.push(("running mean", values(of.mean)));
        results.push(("running variance", values(of.variance)));
    }
    results
}

rank!(
    one_dimension,
    3,
    Conv1d,
    Conv1dConfig::new(2, 3, 3),
    ConvBn1d,
    Operands::few()
);
rank!(
    two_dimensions,
    4,
    Conv2d,
    Conv2dConfig::new(CHANNELS, [3, 3]),
    ConvBn2d,
    Operands::all()
);
rank!(
    three_dimensions,
    5,
    Conv3d,
    Conv3dConfig::new(CHANNELS, [3, 3, 3]),
    ConvBn3d,
    Operands::few()
);

#[test]
fn a_max_pool_behind() {
    let (input, output) = ([2, CHANNELS[0], 6, 6], [2, CHANNELS[1], 4, 4]);
    for operands in Operands::all().filter(|operands| operands.residual == Plain) {
        let conv = |of: &Parameters<4>| {
            let mut conv = Conv2dConfig::new(CHANNELS, [3, 3]).init(&Device::flex());
            conv.weight = parameter(&of.weight);
            conv.bias = Some(parameter(&of.bias));
            conv
        };
        let wanted = {
            let of = Parameters::new(operands, input, output);
            let norm = of.norm();
            let y = relu(norm.forward(conv(&of).forward(of.input.clone())));
            let pool = BurnMaxPool2dConfig::new([2, 2]).init();
            of.results(Some(&norm), pool.forward(y))
        };
        let pool = MaxPool2dConfig::new([2, 2]).init();
        let of = Parameters::new(operands, input, output);
        let block = ConvBn2d::from_parts(conv(&of), of.norm(), Activation::Relu);
        let y = block.forward_max_pool(of.input.clone(), &pool);
        let got = of.results(Some(&block.norm), y);
        compare("max pool", operands, &got, &wanted);

        let of = Parameters::new(operands, input, output);
        let (conv, norm) = (conv(&of), of.norm());
        let block = fuse(&conv, &norm).with_activation(Activation::Relu);
        let y = block.forward_max_pool(of.input.clone(), &pool);
        assert_eq!(of.results(Some(&norm), y), got, "borrowed, {operands:?}");
    }
}

/// The report's own case: a layer in training, a batch that knows nothing of autodiff.
#[test]
fn a_plain_batch_trains_a_layer_on_autodiff() {
    let device = Device::flex().autodiff();
    let block = burn_conv_bn::ConvBn2dConfig::new(CHANNELS, [3, 3]).init(&device);
    let x: Tensor<4> = Plain.tensor(random(&[2, CHANNELS[0], 6, 6], 1));
    let y = block.forward(x);
    assert!(y.is_tracked());
    // Batch statistics: every channel of the output has mean 0.
    let means = values(y.inner().mean_dims(&[0, 2, 3]));
    assert_close("means", &means, &[0.0; 3], 0.0, 1e-5);
    let running = values(block.norm.running_mean.value());
    assert!(running.iter().all(|mean| *mean != 0.0), "{running:?}");
}
