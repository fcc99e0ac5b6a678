//! The layer over borrowed modules, in a struct that was written for Burn's own layers: what it computes
//! is in [`operands`](crate::operands) and [`states`](crate::states).

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d, pool};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::relu;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, BatchNormActivation, ConvBn2d, ConvBnModule, ConvBnSettings, Convolution,
    MaxPool2dConfig, NormVariant, Recompute, RunningVariance, fuse,
};

use crate::common::{assert_close, device, panic_message, random, tensor, values};

const CHANNELS: usize = 6;

/// A user's model, whose fields stay.
#[derive(Module, Debug)]
struct Network {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    head: Linear,
}

/// One of the two blocks as a call: convolution, norm, input, and whether the input is added.
type Block = fn(&Conv2d, &BatchNorm, Tensor<4>, bool) -> Tensor<4>;

fn before(conv: &Conv2d, norm: &BatchNorm, x: Tensor<4>, residual: bool) -> Tensor<4> {
    let y = norm.forward(conv.forward(x.clone()));
    relu(if residual { y + x } else { y })
}

fn after(conv: &Conv2d, norm: &BatchNorm, x: Tensor<4>, residual: bool) -> Tensor<4> {
    let block = fuse(conv, norm).with_activation(Activation::Relu);
    if residual {
        block.forward_residual(x.clone(), x)
    } else {
        block.forward(x)
    }
}

impl Network {
    fn new(device: &Device) -> Self {
        let conv = |channels| {
            Conv2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Same)
                .with_bias(false)
                .init(device)
        };
        Self {
            conv1: conv([3, CHANNELS]),
            bn1: BatchNormConfig::new(CHANNELS).init(device),
            conv2: conv([CHANNELS, CHANNELS]),
            bn2: BatchNormConfig::new(CHANNELS).init(device),
            head: LinearConfig::new(CHANNELS, 4).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>, block: Block) -> Tensor<2> {
        let x = block(&self.conv1, &self.bn1, images, false);
        let x = block(&self.conv2, &self.bn2, x, true);
        self.head
            .forward(x.mean_dims(&[2, 3]).squeeze_dims(&[2, 3]))
    }

    /// One step of training.
    fn step(self, seed: u64, optimizer: &mut ModuleOptimizer, block: Block) -> Self {
        let dtype = self.conv1.weight.val().dtype();
        let scores = self.forward(tensor(random(&[4, 3, 8, 8], seed), dtype), block);
        let wanted = tensor(random(&[4, 4], seed + 100), dtype);
        let error = scores - wanted;
        let loss = (error.clone() * error).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &self);
        optimizer.step(1e-2, self, grads)
    }

    /// Every parameter and statistic.
    fn values(&self) -> Vec<f64> {
        let [conv1, conv2] = [&self.conv1, &self.conv2].map(|conv| values(conv.weight.val()));
        let norms = [&self.bn1, &self.bn2].into_iter().flat_map(|norm| {
            let parameters = [norm.gamma.val(), norm.beta.val()];
            let statistics = [&norm.running_mean, &norm.running_var].map(|r| r.value_sync());
            parameters.into_iter().chain(statistics).flat_map(values)
        });
        let head = values(self.head.weight.val());
        conv1
            .into_iter()
            .chain(conv2)
            .chain(norms)
            .chain(head)
            .collect()
    }
}

#[test]
fn a_record_from_before_the_edit_loads_after_it() {
    let mut optimizer = AdamConfig::new().init();
    let mut trained = Network::new(&device());
    for seed in 0..5 {
        trained = trained.step(seed, &mut optimizer, before);
    }
    let images: Tensor<4> = tensor::<4>(random(&[4, 3, 8, 8], 50), DType::F32).inner();
    let wanted = values(trained.valid().forward(images.clone(), before));
    let folder = std::env::temp_dir().join(format!("conv-bn-borrowed-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("network");
    trained.valid().save_file(&path).unwrap();

    let loaded = Network::new(&Device::flex()).load_file(&path);
    let got = values(loaded.forward(images, after));
    assert_close("scores", &got, &wanted, 1e-5, 1e-6);
    // Loaded tensors are read from the file when they are first used.
    std::fs::remove_dir_all(&folder).unwrap();
}

/// In f64, where the two forms stay together.
struct Double;

impl ModuleMapper for Double {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let tracked = tensor.is_require_grad();
            tensor.cast(DType::F64).detach().set_require_grad(tracked)
        })
    }
}

/// The edit falls between two steps: the optimizer knows the parameters and goes on with its moments.
#[test]
fn an_optimizer_steps_on_after_the_edit() {
    let start = Network::new(&device()).map(&mut Double);
    // With statistics of its own, which clones would share.
    let train = |edited_at: u64| {
        let mut network = start.valid().train();
        let mut optimizer = AdamConfig::new().init();
        for seed in 0..6 {
            let block = if seed < edited_at { before } else { after };
            network = network.step(seed, &mut optimizer, block);
        }
        network.values()
    };
    let wanted = train(6);
    assert_close("from the start", &train(0), &wanted, 1e-9, 1e-9);
    assert_close("after three steps", &train(3), &wanted, 1e-9, 1e-9);

    // The moments count: an optimizer that starts anew goes elsewhere.
    let mut network = start.valid().train();
    for seed in 0..6 {
        network = network.step(seed, &mut AdamConfig::new().init(), after);
    }
    assert!(crate::common::distance(&network.values(), &wanted) > 1e-3);
}

/// Each setting, on its own and with all others, is the owned layer's.
#[test]
fn settings_are_the_owned_layers() {
    let network = Network::new(&device());
    let (conv, norm) = (&network.conv1, &network.bn1);
    assert_eq!(
        fuse(conv, norm).settings,
        ConvBnSettings::new(Activation::Identity)
    );
    let mut settings = ConvBnSettings::new(Activation::Silu);
    settings.norm_variant = NormVariant::Tutorial;
    settings.affine = false;
    settings.track_running_stats = false;
    settings.running_variance = RunningVariance::Unbiased;
    settings.recompute = Recompute::Never;
    settings.max_workspace = Some(1 << 10);
    let one_by_one = fuse(conv, norm)
        .with_activation(settings.activation)
        .with_norm_variant(settings.norm_variant)
        .with_affine(settings.affine)
        .with_track_running_stats(settings.track_running_stats)
        .with_running_variance(settings.running_variance)
        .with_recompute(settings.recompute)
        .with_max_workspace(settings.max_workspace);
    assert_eq!(one_by_one.settings, settings);

    let owned = ConvBn2d::with_settings(conv.clone(), norm.clone(), settings.clone());
    let borrowed = fuse(conv, norm).with_settings(settings);
    let shape = [4, 3, 8, 8];
    let x = || tensor::<4>(random(&shape, 1), DType::F32);
    assert_eq!(values(borrowed.forward(x())), values(owned.forward(x())));
    let saved = borrowed.saved_for_backward(shape);
    assert!(saved.iter().any(|tensor| tensor.name == "conv_output"));
    assert_eq!(saved, owned.saved_for_backward(shape));
    assert_eq!(borrowed.fold().unwrap_err(), owned.fold().unwrap_err());
}

/// A user's function over every rank.
#[test]
fn code_can_be_generic_in_the_convolution() {
    fn block<C: Convolution<D>, const D: usize>(
        conv: &C,
        norm: &BatchNorm,
        x: Tensor<D>,
    ) -> [usize; D] {
        let block = fuse(conv, norm);
        let shape = block.output_shape(x.dims());
        assert_eq!(block.forward(x).dims(), shape);
        shape
    }
    let network = Network::new(&device());
    let x = tensor::<4>(random(&[4, 3, 8, 8], 1), DType::F32);
    assert_eq!(block(&network.conv1, &network.bn1, x), [4, CHANNELS, 8, 8]);
}

#[test]
fn what_reaches_no_fuse_says_so() {
    let network = Network::new(&device());
    let calls: [&dyn Fn() -> Network; 3] = [
        &|| network.clone().with_recompute(Recompute::Never),
        &|| network.clone().with_max_workspace(Some(1)),
        &|| network.autocast(FloatDType::BF16),
    ];
    for call in calls {
        let message = panic_message(call);
        for part in ["none of this crate's layers", "`fuse`", "`with_precision`"] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    }
    // It casts whatever there is.
    let half = network.with_precision(FloatDType::BF16);
    assert_eq!(half.conv1.weight.val().dtype(), DType::BF16);
}

#[test]
fn burns_own_max_pool_is_joined() {
    let network = Network::new(&device());
    let burns = pool::MaxPool2dConfig::new([3, 3])
        .with_strides([2, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init();
    let ours = MaxPool2dConfig::new([3, 3])
        .with_strides([2, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init();
    let block = fuse(&network.conv1, &network.bn1).with_activation(Activation::Relu);
    let x = tensor::<4>(random(&[2, 3, 9, 9], 1), DType::F32);
    let pooled = values(block.forward_max_pool(x.clone(), &burns));
    assert_eq!(pooled, values(block.forward_max_pool(x.clone(), &ours)));
    let apart = values(burns.forward(block.forward(x)));
    assert_close("pooled", &pooled, &apart, 1e-6, 0.0);
    assert_eq!(
        block.saved_for_backward_max_pool([2, 3, 9, 9], &burns),
        block.saved_for_backward_max_pool([2, 3, 9, 9], &ours)
    );
}

/// Running statistics of another width than the convolution's output are an error, though no gamma tells.
#[test]
fn a_norm_of_another_width_is_an_error_without_its_affine() {
    let device = device();
    let network = Network::new(&device);
    let biased = Conv2dConfig::new([3, CHANNELS], [3, 3]).init(&device);
    let x = tensor::<4>(random(&[2, 3, 5, 5], 1), DType::F32);
    for channels in [1, CHANNELS - 2, CHANNELS + 2] {
        let norm = BatchNormConfig::new(channels).init(&device);
        for conv in [&network.conv1, &biased] {
            let block = fuse(conv, &norm).with_affine(false);
            let message = panic_message(|| block.forward(x.clone()));
            assert!(message.contains("running mean"), "{message}");
        }
        let mut alone = BatchNormActivation::from_parts(norm, Activation::Relu);
        alone.settings.affine = false;
        let message = panic_message(|| alone.forward(x.clone()));
        assert!(message.contains("running mean"), "{message}");
    }
}
