//! Training of whole networks, fused and in Burn's own layers, and how far two runs are apart.

use std::env;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::activation::{log_softmax, relu};
use burn::tensor::module::{adaptive_avg_pool2d, batch_norm_train, max_pool2d};
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, bf16};
use burn_conv_bn::{Activation, ConvBn2d};
use burn_conv_bn_models::{Form, Net, ResNet, ResNetBlock};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const CLASSES: usize = 10;

/// The seed of weights and data. `BURN_CONV_BN_SEED` chooses another.
pub fn seed() -> u64 {
    let chosen = env::var("BURN_CONV_BN_SEED").unwrap_or_else(|_| "1".to_string());
    chosen.parse().expect("BURN_CONV_BN_SEED is a number")
}

/// Batches of images that look like their classes, with as much noise again.
pub struct Task {
    /// `[batch, channels, height, width]`.
    shape: [usize; 4],
    /// Images and targets; each step takes the next batch.
    batches: Vec<(Vec<f32>, Vec<i64>)>,
    steps: usize,
    learning_rate: f64,
}

/// How the images of a batch follow each other: the order of the sums over a batch, and with it how
/// they are rounded. Nothing else changes.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    AsIs,
    Reversed,
}

impl Task {
    /// Four batches, each again every fourth step.
    pub fn new(shape: [usize; 4], steps: usize, learning_rate: f64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let [batch, channels, height, width] = shape;
        let pixels = channels * height * width;
        let mut image =
            || -> Vec<f32> { (0..pixels).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let classes: Vec<Vec<f32>> = (0..CLASSES).map(|_| image()).collect();
        let mut batch_of = |first: usize| {
            // Whichever classes come first, all come equally often.
            let targets = (first..first + batch).map(|index| index * 7 % CLASSES);
            let targets: Vec<usize> = targets.collect();
            let images = targets.iter().flat_map(|target| {
                let noise = image().into_iter();
                let values = classes[*target].iter().zip(noise);
                values
                    .map(|(class, noise)| rounded(class + noise))
                    .collect::<Vec<_>>()
            });
            let images: Vec<f32> = images.collect();
            let targets = targets.into_iter().map(|target| target as i64);
            let targets: Vec<i64> = targets.collect();
            (images, targets)
        };
        Self {
            shape,
            batches: (0..4).map(|index| batch_of(index * batch)).collect(),
            steps,
            learning_rate,
        }
    }

    fn batch(
        &self,
        step: usize,
        order: Order,
        dtype: FloatDType,
        device: &Device,
    ) -> (Tensor<4>, Tensor<2, Int>) {
        let (images, targets) = &self.batches[step % self.batches.len()];
        let pixels = images.len() / targets.len();
        let mut pairs: Vec<_> = images.chunks(pixels).zip(targets.iter().copied()).collect();
        if let Order::Reversed = order {
            pairs.reverse();
        }
        let (images, targets): (Vec<&[f32]>, Vec<i64>) = pairs.into_iter().unzip();
        let count = targets.len();
        (
            Tensor::from_data(
                TensorData::new(images.concat(), self.shape),
                (device, DType::from(dtype)),
            ),
            Tensor::from_data(TensorData::new(targets, [count, 1]), device),
        )
    }
}

/// What bf16 holds, and so every other type: all runs start from the same weights and see the same
/// images.
fn rounded(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Rounds all parameters and buffers as [`rounded`] and turns them to a type.
pub struct Start(pub FloatDType);

impl ModuleMapper for Start {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let dtype = DType::from(self.0);
        param.map(|tensor| {
            let (tracked, shape, device) =
                (tensor.is_require_grad(), tensor.shape(), tensor.device());
            let data = tensor.into_data();
            let values: Vec<f32> = data.iter::<f32>().map(rounded).collect();
            // A leaf: what was computed on an autodiff device cannot be tracked anew.
            let data = TensorData::new(values, shape);
            let tensor = Tensor::<D>::from_data(data, (&device, dtype));
            tensor.set_require_grad(tracked)
        })
    }
}

/// A network in two forms, of the same modules.
pub trait Network: Module {
    /// Scores of the classes, by the fused layer.
    fn fused(&self, images: Tensor<4>) -> Tensor<2>;

    /// The same, by Burn's own layers alone.
    fn unfused(&self, images: Tensor<4>) -> Tensor<2>;
}

/// A block in Burn's own layers. Their tensors are of one type: around a norm that is kept in f32 its
/// input and output are cast.
fn unfused_block(block: &ConvBn2d, input: Tensor<4>, residual: Option<Tensor<4>>) -> Tensor<4> {
    let dtype = input.dtype();
    let norm = &block.norm;
    let (mut gamma, mut beta) = (norm.gamma.val(), norm.beta.val());
    if !block.settings.affine {
        // Constants: a layer that is not affine trains neither.
        (gamma, beta) = (gamma.detach(), beta.detach());
    }
    let input = block.conv.forward(input).cast(gamma.dtype());
    let normalized = if block.settings.track_running_stats {
        norm.forward(input)
    } else {
        batch_norm_train(input, gamma, beta, norm.epsilon).output
    };
    let normalized = normalized.cast(dtype);
    let sum = match residual {
        Some(residual) => normalized + residual,
        None => normalized,
    };
    match block.settings.activation {
        Activation::Identity => sum,
        Activation::Relu => relu(sum),
        other => panic!("no network here has {other:?}"),
    }
}

impl Network for Net {
    fn fused(&self, images: Tensor<4>) -> Tensor<2> {
        assert_eq!(self.form(), Form::Fused);
        self.forward(images)
    }

    fn unfused(&self, images: Tensor<4>) -> Tensor<2> {
        let x = unfused_block(&self.conv1, images, None);
        let x = unfused_block(&self.conv2, x, None);
        let x = max_pool2d(x, MaxPoolOptions::new([2, 2]));
        let x = relu(self.fc1.forward(x.flatten(1, 3)));
        log_softmax(self.fc2.forward(x), 1)
    }
}

impl Network for ResNet {
    fn fused(&self, images: Tensor<4>) -> Tensor<2> {
        assert_eq!(self.form(), Form::Fused);
        self.forward(images)
    }

    fn unfused(&self, images: Tensor<4>) -> Tensor<2> {
        let pool = MaxPoolOptions::new([3, 3])
            .with_stride([2, 2])
            .with_padding([1, 1]);
        let mut x = max_pool2d(unfused_block(&self.conv1, images, None), pool);
        let layers = [&self.layer1, &self.layer2, &self.layer3, &self.layer4];
        for block in layers.into_iter().flatten() {
            x = unfused_residual(block, x);
        }
        let x = adaptive_avg_pool2d(x, [1, 1]);
        self.fc.forward(x.flatten(1, 3))
    }
}

fn unfused_residual(block: &ResNetBlock, input: Tensor<4>) -> Tensor<4> {
    assert!(block.conv3.is_none(), "a basic block has two convolutions");
    let shortcut = match &block.downsample {
        Some(downsample) => unfused_block(downsample, input.clone(), None),
        None => input.clone(),
    };
    let x = unfused_block(&block.conv1, input, None);
    unfused_block(&block.conv2, x, Some(shortcut))
}

/// What training yields.
#[derive(Default)]
pub struct Run {
    /// Before each step.
    pub losses: Vec<f64>,
    /// Of all parameters, at the end.
    pub weights: Vec<f64>,
    /// Running means, at the end.
    pub means: Vec<f64>,
    /// Running variances, at the end.
    pub variances: Vec<f64>,
}

/// Collects a network's values.
#[derive(Default)]
struct Collect {
    path: Vec<String>,
    run: Run,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = match self.path.last().map(String::as_str) {
            Some("running_mean") => &mut self.run.means,
            Some("running_var") => &mut self.run.variances,
            _ => &mut self.run.weights,
        };
        values.extend(param.val().into_data().iter::<f64>());
    }
}

/// A network's values as they are, without losses.
pub fn values<N: Network>(network: &N) -> Run {
    let mut collect = Collect::default();
    // Without autodiff, running statistics are read as they are after the last step.
    network.valid().visit(&mut collect);
    collect.run
}

/// Trains a network whose weights are of `dtype`, its norms' parameters aside.
pub fn train<N: Network>(
    mut network: N,
    task: &Task,
    form: Form,
    order: Order,
    dtype: FloatDType,
    device: &Device,
) -> Run {
    // The loss itself is computed in what the norms are.
    let loss_dtype = match dtype {
        FloatDType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    };
    let mut optimizer = SgdConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..task.steps {
        let (images, targets) = task.batch(step, order, dtype, device);
        let scores = match form {
            Form::Fused => network.fused(images),
            Form::Unfused => network.unfused(images),
        };
        let probabilities = log_softmax(scores.cast(loss_dtype), 1);
        let loss = probabilities.gather(1, targets).mean().neg();
        losses.push(loss.clone().into_scalar::<f64>());
        let grads = GradientsParams::from_grads(loss.backward(), &network);
        network = optimizer.step(task.learning_rate, network, grads);
    }
    Run {
        losses,
        ..values(&network)
    }
}

/// How far a run is from the one that it is held against.
#[derive(Clone, Debug)]
pub struct Errors {
    /// At each step, absolute: losses begin at ln 10, which is 2.3.
    pub losses: Vec<f64>,
    /// As a part of how far training has moved the weights.
    pub weights: f64,
    /// As a part of the running means.
    pub means: f64,
    /// As a part of the running variances.
    pub variances: f64,
}

impl Errors {
    /// Of a run that began, as `exact` did, from `start`.
    pub fn of(run: &Run, exact: &Run, start: &Run) -> Self {
        let losses = run.losses.iter().zip(&exact.losses);
        let nothing = |like: &[f64]| vec![0.0; like.len()];
        let relative = |run: &[f64], exact: &[f64], origin: &[f64]| {
            let (error, scale) = (distance(run, exact), distance(exact, origin));
            // Nothing of nothing: the tutorial's network has no running statistics.
            if error == 0.0 {
                0.0
            } else {
                finite(error / scale)
            }
        };
        Self {
            losses: losses
                .map(|(run, exact)| finite((run - exact).abs()))
                .collect(),
            weights: relative(&run.weights, &exact.weights, &start.weights),
            means: relative(&run.means, &exact.means, &nothing(&exact.means)),
            variances: relative(&run.variances, &exact.variances, &nothing(&exact.variances)),
        }
    }
}

/// The root of the sum of the squares of the differences.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

/// The largest error there is, where it is not a number.
fn finite(error: f64) -> f64 {
    if error.is_nan() { f64::INFINITY } else { error }
}

/// What the errors may be where rounding is not amplified.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub loss: f64,
    pub weights: f64,
    pub statistics: f64,
}

/// Asserts, by the two-times rule of flash-attention's tests, that a fused run is at most twice as far
/// from what is exact as the farthest of the unfused runs, and a bound more. Training amplifies
/// rounding, at steps that chance decides: each loss is compared with the farthest of all unfused ones.
pub fn judge(name: &str, fused: &Errors, unfused: &[Errors], bounds: Bounds) {
    let most = |errors: &Errors| errors.losses.iter().copied().fold(0.0, f64::max);
    let farthest_loss = unfused.iter().map(most).fold(0.0, f64::max);
    println!(
        "{name}: losses {:.1e} apart, weights {:.1e}, means {:.1e}, variances {:.1e}; unfused \
         {:.1e}, {:.1e}, {:.1e}, {:.1e}",
        most(fused),
        fused.weights,
        fused.means,
        fused.variances,
        farthest_loss,
        farthest(unfused, |errors| errors.weights),
        farthest(unfused, |errors| errors.means),
        farthest(unfused, |errors| errors.variances),
    );
    for (step, error) in fused.losses.iter().enumerate() {
        let what = format!("{name}, loss {step}");
        check(&what, *error, farthest_loss, bounds.loss);
    }
    type Of = fn(&Errors) -> f64;
    let all: [(&str, Of, f64); 3] = [
        ("weights", |errors| errors.weights, bounds.weights),
        ("means", |errors| errors.means, bounds.statistics),
        ("variances", |errors| errors.variances, bounds.statistics),
    ];
    for (what, of, bound) in all {
        check(
            &format!("{name}, {what}"),
            of(fused),
            farthest(unfused, of),
            bound,
        );
    }
}

fn farthest(runs: &[Errors], of: fn(&Errors) -> f64) -> f64 {
    runs.iter().map(of).fold(0.0, f64::max)
}

#[track_caller]
fn check(what: &str, error: f64, unfused: f64, bound: f64) {
    assert!(
        unfused.is_finite(),
        "{what}: the unfused runs say nothing, they are not finite"
    );
    let allowed = 2.0 * unfused + bound;
    assert!(
        error <= allowed,
        "{what}: {error:.2e} off, {allowed:.2e} allowed; Burn's own layers are off by \
         {unfused:.2e}"
    );
}
