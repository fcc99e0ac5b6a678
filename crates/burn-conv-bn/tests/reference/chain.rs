//! Chains of blocks under any recompute policies as plain data, run on Flex in f64 and compared with the
//! reference.

use std::env;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_conv_bn::functional::{ConvBnParams, conv_bn};
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, NormSpec, NormVariant, Recompute};
use proptest::arbitrary::any;
use proptest::array::uniform3;
use proptest::bool::weighted;
use proptest::collection::vec;
use proptest::sample::select;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::reference::{Forward, Op, Tensors};
use crate::strategy::activations;

const CASES: u32 = 400;

/// A block of a chain.
#[derive(Clone, Debug)]
struct Link {
    recompute: Recompute,
    activation: Activation,
    variant: NormVariant,
    /// 1, or 3 with padding.
    kernel: usize,
    channels_out: usize,
    bias: bool,
    /// Whether the block adds its input, where that is of its output's shape.
    wants_residual: bool,
    /// Of weight and bias, gamma, and beta.
    tracked: [bool; 3],
}

/// Blocks one behind the other.
#[derive(Clone, Debug)]
pub struct Chain {
    batch: usize,
    size: [usize; 2],
    channels_in: usize,
    links: Vec<Link>,
    input_tracked: bool,
    /// Whether the loss is of the output's squares, and so asks for the output.
    squares: bool,
    checkpoints: bool,
    seed: u64,
}

/// Chains of two and three blocks.
pub fn chains() -> impl Strategy<Value = Chain> {
    let policies = [Recompute::Conv, Recompute::Norm, Recompute::Never];
    let link = (
        select(policies.to_vec()),
        select(activations()),
        select(vec![NormVariant::BatchNorm, NormVariant::Tutorial]),
        select(vec![1usize, 3]),
        1..=3usize,
        (weighted(0.5), weighted(0.5)),
        uniform3(weighted(0.8)),
    )
        .prop_map(
            |(recompute, activation, variant, kernel, channels_out, flags, tracked)| Link {
                recompute,
                activation,
                variant,
                kernel,
                channels_out,
                bias: flags.0,
                wants_residual: flags.1,
                tracked,
            },
        );
    (
        2..=3usize,
        (1..=5usize, 1..=5usize),
        1..=3usize,
        vec(link, 2..=3),
        (weighted(0.7), weighted(0.5), weighted(0.5)),
        any::<u64>().no_shrink(),
    )
        .prop_map(|(batch, size, channels_in, links, flags, seed)| Chain {
            batch,
            size: size.into(),
            channels_in,
            links,
            input_tracked: flags.0,
            squares: flags.1,
            checkpoints: flags.2,
            seed,
        })
}

/// Draws chains and checks each.
///
/// # Panics
///
/// Panics with the smallest chain found that fails.
pub fn hold_chains() {
    let mut config = Config::default();
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = CASES;
    }
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => 0,
    };
    config.rng_seed = RngSeed::Fixed(seed.wrapping_add(23));
    config.failure_persistence = None;
    let result = TestRunner::new(config).run(&chains(), |chain| {
        chain.check().map_err(TestCaseError::fail)
    });
    if let Err(error) = result {
        panic!("{error}\n\tPROPTEST_RNG_SEED={seed} draws these chains again");
    }
}

/// A name and what there is of it, if anything.
type Results = Vec<(String, Option<Vec<f64>>)>;

/// A link with its shapes and tensors.
struct Drawn {
    op: Op,
    options: ConvBnOptions,
    input: Vec<usize>,
    weight: Vec<usize>,
    residual: bool,
    tensors: Tensors<f64>,
}

impl Chain {
    fn draw(&self) -> (Vec<f64>, Vec<Drawn>, Vec<f64>) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut draw =
            |len: usize| -> Vec<f64> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let positions = self.size[0] * self.size[1];
        let x = draw(self.batch * self.channels_in * positions);
        let mut channels_in = self.channels_in;
        let mut drawn = Vec::new();
        for link in &self.links {
            let channels = link.channels_out;
            let padding = link.kernel / 2;
            let spec = ConvSpec {
                padding: vec![(padding, padding); 2],
                ..ConvSpec::unit(2)
            };
            let options = ConvBnOptions::new(spec)
                .with_norm(NormSpec::new(link.variant, 1e-2))
                .with_activation(link.activation)
                .with_recompute(link.recompute);
            let input = vec![self.batch, channels_in, self.size[0], self.size[1]];
            let weight = vec![channels, channels_in, link.kernel, link.kernel];
            let op = Op::new(&input, &weight, &options, DType::F64);
            drawn.push(Drawn {
                residual: link.wants_residual && channels == channels_in,
                tensors: Tensors {
                    input: Vec::new(),
                    weight: draw(op.weight_len()),
                    bias: if link.bias {
                        draw(channels)
                    } else {
                        vec![0.0; channels]
                    },
                    gamma: draw(channels),
                    beta: draw(channels),
                    residual: vec![0.0; op.output_len()],
                    statistics: None,
                },
                op,
                options,
                input,
                weight,
            });
            channels_in = channels;
        }
        let upstream = draw(self.batch * channels_in * positions);
        (x, drawn, upstream)
    }

    /// What the reference makes of it; gradients of what is tracked.
    fn expected(&self) -> Results {
        let (x, mut drawn, upstream) = self.draw();
        let mut value = x;
        let mut forwards: Vec<Forward<f64>> = Vec::new();
        for block in &mut drawn {
            if block.residual {
                block.tensors.residual = value.clone();
            }
            block.tensors.input = value;
            let forward = block.op.forward(&block.tensors);
            value = forward.output.clone();
            forwards.push(forward);
        }
        let mut grad: Vec<f64> = value
            .iter()
            .zip(&upstream)
            .map(|(y, u)| if self.squares { 2.0 * y * u } else { *u })
            .collect();
        let mut results = vec![("output".to_string(), Some(value))];
        let blocks = self.links.iter().zip(&drawn).zip(&forwards).enumerate();
        for (index, ((link, block), forward)) in blocks.rev() {
            let grads = block.op.backward(&block.tensors, forward, &grad);
            let [weight, gamma, beta] = link.tracked;
            let bias = vec![0.0; link.channels_out];
            for (name, tracked, grad) in [
                ("weight", weight, grads.weight),
                ("bias", weight && link.bias, bias),
                ("gamma", gamma, grads.gamma),
                ("beta", beta, grads.beta),
            ] {
                results.push((format!("{name} {index}"), tracked.then_some(grad)));
            }
            grad = grads.input;
            if block.residual {
                for (grad, residual) in grad.iter_mut().zip(&grads.residual) {
                    *grad += residual;
                }
            }
        }
        results.push(("input".to_string(), self.input_tracked.then_some(grad)));
        results
    }

    /// The same on Flex.
    fn run(&self) -> Results {
        let mut device = Device::flex().autodiff();
        if self.checkpoints {
            device = device.gradient_checkpointing();
        }
        fn leaf<const D: usize>(
            values: &[f64],
            shape: &[usize],
            tracked: bool,
            device: &Device,
        ) -> Tensor<D> {
            let data = TensorData::new(values.to_vec(), shape.to_vec());
            Tensor::from_data(data, (device, DType::F64)).set_require_grad(tracked)
        }
        let (x, drawn, upstream) = self.draw();
        let input = leaf::<4>(&x, &drawn[0].input, self.input_tracked, &device);
        let mut y = input.clone();
        let mut leaves = Vec::new();
        for (link, block) in self.links.iter().zip(&drawn) {
            let channels = [link.channels_out];
            let [weight, gamma, beta] = link.tracked;
            let vector =
                |values: &[f64], tracked: bool| leaf::<1>(values, &channels, tracked, &device);
            let weight_leaf = leaf::<4>(&block.tensors.weight, &block.weight, weight, &device);
            let bias = link.bias.then(|| vector(&block.tensors.bias, weight));
            let gamma = vector(&block.tensors.gamma, gamma);
            let beta = vector(&block.tensors.beta, beta);
            let params = ConvBnParams {
                weight: weight_leaf.clone(),
                bias: bias.clone(),
                affine: Some((gamma.clone(), beta.clone())),
                residual: block.residual.then(|| y.clone()),
                statistics: None,
            };
            y = conv_bn(y, params, block.options.clone())
                .expect("the chain is valid")
                .output;
            leaves.push((weight_leaf, bias, gamma, beta));
        }
        let values = |tensor: Tensor<1>| tensor.into_data().iter::<f64>().collect::<Vec<_>>();
        let mut results = vec![("output".to_string(), Some(values(y.clone().flatten(0, 3))))];
        if !y.is_tracked() {
            return results;
        }
        let upstream = leaf::<4>(&upstream, &y.dims(), false, &device);
        let loss = if self.squares {
            y.clone() * y * upstream
        } else {
            y * upstream
        };
        let grads = loss.sum().backward();
        for (index, (weight, bias, gamma, beta)) in leaves.into_iter().enumerate().rev() {
            let weight = weight.grad(&grads).map(|grad| values(grad.flatten(0, 3)));
            let bias = bias.and_then(|bias| bias.grad(&grads)).map(values);
            for (name, grad) in [
                ("weight", weight),
                ("bias", bias),
                ("gamma", gamma.grad(&grads).map(values)),
                ("beta", beta.grad(&grads).map(values)),
            ] {
                results.push((format!("{name} {index}"), grad));
            }
        }
        let input = input.grad(&grads).map(|grad| values(grad.flatten(0, 3)));
        results.push(("input".to_string(), input));
        results
    }

    fn check(&self) -> Result<(), String> {
        let (got, wanted) = (self.run(), self.expected());
        for ((name, got), (wanted_name, wanted)) in got.iter().zip(&wanted) {
            assert_eq!(name, wanted_name);
            let (got, wanted) = match (got, wanted) {
                (Some(got), Some(wanted)) => (got, wanted),
                (None, None) => continue,
                _ => return Err(format!("{name}: there is {got:?}, wanted {wanted:?}")),
            };
            let scale = wanted
                .iter()
                .fold(1.0f64, |most, value| most.max(value.abs()));
            for (got, wanted) in got.iter().zip(wanted) {
                let difference = (got - wanted).abs();
                if difference.is_nan() || difference > 1e-8 * scale {
                    return Err(format!("{name}: got {got:e}, wanted {wanted:e}"));
                }
            }
        }
        Ok(())
    }
}
