//! What blocks and whole networks keep, counted by the allocator, against their lists.
//!
//! One test, so that no other allocates at the same time.

use std::cell::Cell;
use std::ops::Range;

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBn2dConfig, ConvBnModule, MaxPool2dConfig, Recompute, SavedTensor,
};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::{
    BudgetError, CspDarknet, CspDarknetConfig, DenseNet, DenseNetConfig, EfficientNet,
    EfficientNetConfig, Form, MemoryPlan, MobileNetV2, MobileNetV2Config, Net, NetConfig, ResNet,
    ResNetConfig, Vgg, VggConfig,
};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Bytes of graph nodes for each listed tensor. A node has some hundreds of bytes, and up to four of them lie
/// between two that keep a tensor. A norm in training adds ten vectors of its channels: temporaries of its
/// running statistics, which Burn's autodiff holds until the backward pass, in either form.
const NODES: usize = 4 << 10;

/// What the tables of a graph may grow by at once, however few its nodes are. An activation of a block here
/// has 90 KiB and more.
const TABLES: usize = 32 << 10;

/// Bytes that are left of a forward pass while its loss is held.
///
/// `prepare` makes the module anew for each step, since a graph that leads to its parameters is gone after a
/// backward pass.
fn kept<M, const D: usize>(prepare: impl Fn() -> M, forward: impl Fn(&M) -> Tensor<D>) -> usize {
    let module = prepare();
    let start = ALLOCATOR.current();
    let loss = forward(&module).sum();
    let kept = ALLOCATOR.current().saturating_sub(start);
    loss.backward();
    kept
}

/// Asserts that what a step keeps is what is listed as nobody else's.
#[track_caller]
fn assert_listed<'a>(
    what: &str,
    saved: impl IntoIterator<Item = &'a SavedTensor>,
    kept: impl Fn() -> usize,
) {
    let (mut listed, mut entries) = (0, 0);
    for tensor in saved {
        entries += 1;
        if !tensor.shared {
            listed += tensor.bytes();
        }
    }
    let allowed: Range<usize> = listed..listed + TABLES + NODES * entries;
    // The first run pays for running statistics, and any may for what a thread keeps from then on.
    kept();
    let mut least = kept();
    if !allowed.contains(&least) {
        least = least.min(kept());
    }
    println!("{what}: got {least} bytes, {listed} listed, {entries} entries");
    assert!(
        allowed.contains(&least),
        "{what}: got {least} bytes, {listed} are listed in {entries} entries"
    );
}

/// A network that lists what it keeps.
trait Lists: Module + ConvBnModule {
    fn in_form(self, form: Form) -> Self;
    fn forward(&self, images: Tensor<4>) -> Tensor<2>;
    fn saved(&self, images: [usize; 4]) -> Vec<(String, SavedTensor)>;
    fn within(self, images: [usize; 4], bytes: usize) -> Result<(Self, MemoryPlan), BudgetError>;
}

macro_rules! lists {
    ($($network:ty, |$this:ident, $images:ident| $saved:expr, $forward:expr;)*) => {
        $(
            impl Lists for $network {
                fn in_form(self, form: Form) -> Self {
                    self.with_form(form)
                }

                fn forward(&self, images: Tensor<4>) -> Tensor<2> {
                    $forward(self, images)
                }

                fn saved(&self, $images: [usize; 4]) -> Vec<(String, SavedTensor)> {
                    let $this = self;
                    $saved
                }

                fn within(
                    self,
                    images: [usize; 4],
                    bytes: usize,
                ) -> Result<(Self, MemoryPlan), BudgetError> {
                    self.with_memory_budget(images, bytes)
                }
            }
        )*
    };
}

lists! {
    Net, |net, images| net.saved_for_backward(images), Net::forward;
    ResNet, |net, images| net.saved_for_backward(images), ResNet::forward;
    Vgg, |net, images| net.saved_for_backward(images), Vgg::forward;
    MobileNetV2, |net, images| net.saved_for_backward(images), MobileNetV2::forward;
    EfficientNet, |net, images| net.saved_for_backward(images), EfficientNet::forward;
    DenseNet, |net, images| net.saved_for_backward(images), DenseNet::forward;
    CspDarknet, |net, images| net.saved_for_backward(images), sums;
}

/// Sums of the three outputs' channels, which keep nothing.
fn sums(network: &CspDarknet, images: Tensor<4>) -> Tensor<2> {
    let maps = network.forward(images);
    let sums = maps.map(|map| map.sum_dim(3).sum_dim(2).flatten::<2>(1, 3));
    Tensor::cat(sums.to_vec(), 1)
}

/// Turns norms to their running statistics; gamma and beta go on being trained.
struct FixStatistics;

impl ModuleMapper for FixStatistics {
    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        flag.with_value(false)
    }
}

#[test]
fn blocks_and_networks_keep_what_they_list() {
    let device = Device::flex().autodiff();
    for form in [Form::Fused, Form::Unfused] {
        blocks(form, &device);
        norms_of_no_leaves(form, &device);
    }
    let classes = 10;
    rebuilt_chains(&device);
    a_dense_network_keeps_each_output_once(&device);
    budgets(&device);
    // Burn's own layers have no policy.
    for (form, recompute) in [
        (Form::Unfused, Recompute::Conv),
        (Form::Fused, Recompute::Conv),
        (Form::Fused, Recompute::Norm),
        (Form::Fused, Recompute::Never),
    ] {
        let name = |network: &str| format!("{network}, {form:?}, {recompute:?}");
        let net = NetConfig::new(form);
        network(
            &name("tutorial"),
            net.init(&device).with_recompute(recompute),
            [16, 1, 28, 28],
        );

        let images = [2, 3, 64, 64];
        let resnet = |config: ResNetConfig| {
            let network = config.with_classes(classes).init(&device);
            network.with_recompute(recompute)
        };
        let resnet18 = resnet(ResNetConfig::resnet18(form));
        network(&name("ResNet-18"), resnet18, images);
        let small = resnet(ResNetConfig::resnet18(form).with_small_images(true));
        network(&name("ResNet-18, small images"), small, [2, 3, 32, 32]);
        let resnet50 = resnet(ResNetConfig::resnet50(form));
        network(&name("ResNet-50"), resnet50, images);
        let vgg = VggConfig::vgg16_bn(form)
            .with_classes(classes)
            .with_hidden(64);
        network(
            &name("VGG-16"),
            vgg.init(&device).with_recompute(recompute),
            images,
        );
        let mobilenet = MobileNetV2Config::new(form).with_classes(classes);
        network(
            &name("MobileNetV2"),
            mobilenet.init(&device).with_recompute(recompute),
            images,
        );
        let efficientnet = EfficientNetConfig::new(form).with_classes(classes);
        network(
            &name("EfficientNet"),
            efficientnet.init(&device).with_recompute(recompute),
            images,
        );
        let densenet = DenseNetConfig::densenet121(form).with_classes(classes);
        network(
            &name("DenseNet-121"),
            densenet.init(&device).with_recompute(recompute),
            images,
        );
        let cspdarknet = CspDarknetConfig::yolox_nano(form);
        network(
            &name("CSPDarknet"),
            cspdarknet.init(&device).with_recompute(recompute),
            [2, 3, 128, 128],
        );
    }
}

fn own_bytes(saved: &[(String, SavedTensor)]) -> usize {
    let own = saved.iter().filter(|(_, tensor)| !tensor.shared);
    own.map(|(_, tensor)| tensor.bytes()).sum()
}

/// The allocator counts at most a fifth of the bytes that DenseNet-121 keeps in Burn's layers.
fn a_dense_network_keeps_each_output_once(device: &Device) {
    let config = DenseNetConfig::densenet121(Form::Fused).with_classes(10);
    let images = Tensor::<4>::random([4, 3, 96, 96], Distribution::Default, device);
    for recompute in [Recompute::Conv, Recompute::Norm] {
        let [fused, unfused] = [Form::Fused, Form::Unfused].map(|form| {
            let chains = config.init(device).with_rebuilt_chains(Recompute::Conv);
            let network = match recompute {
                Recompute::Norm => chains,
                _ => chains.with_recompute(recompute),
            };
            let network = network.with_form(form);
            let kept = || {
                kept(
                    || network.clone(),
                    |network| network.forward(images.clone()),
                )
            };
            kept();
            kept()
        });
        let ratio = fused as f64 / unfused as f64;
        println!("DenseNet-121, {recompute:?}: {fused} of {unfused} bytes, {ratio:.3}");
        assert!(ratio < 0.2, "{fused} of {unfused} bytes");
    }
}

/// Between the least and the most that a network can keep, and below.
fn budgets(device: &Device) {
    let images = [2, 3, 64, 64];
    let resnet = ResNetConfig::resnet18(Form::Fused).with_classes(10);
    budget("ResNet-18", resnet.init(device), images);
    let mobilenet = MobileNetV2Config::new(Form::Fused).with_classes(10);
    budget("MobileNetV2", mobilenet.init(device), images);
    let efficientnet = EfficientNetConfig::new(Form::Fused).with_classes(10);
    budget("EfficientNet", efficientnet.init(device), images);
    let densenet = DenseNetConfig::new(Form::Fused, [3, 4, 5, 2]).with_classes(10);
    budget("DenseNet", densenet.init(device), images);
    let vgg = VggConfig::vgg16_bn(Form::Fused)
        .with_classes(10)
        .with_hidden(64);
    budget("VGG-16", vgg.init(device), images);
    let cspdarknet = CspDarknetConfig::yolox_nano(Form::Fused);
    budget("CSPDarknet", cspdarknet.init(device), [2, 3, 128, 128]);
    let net = NetConfig::new(Form::Fused);
    budget("tutorial", net.init(device), [16, 1, 28, 28]);
}

fn budget<M: Lists>(what: &str, network: M, shape: [usize; 4]) {
    let init = || network.clone();
    let images = Tensor::<4>::random(shape, Distribution::Default, &init().devices()[0]);
    let [least, most] = [Recompute::Conv, Recompute::Never]
        .map(|recompute| own_bytes(&init().with_recompute(recompute).saved(shape)));
    let mut recomputed = u64::MAX;
    for share in [0, 4, 10] {
        let bytes = least + (most - least) * share / 10;
        let (network, plan) = init().within(shape, bytes).unwrap();
        let saved = network.saved(shape);
        assert!(plan.bytes <= bytes, "{what}: {plan}");
        assert_eq!(plan.bytes, own_bytes(&saved), "{what}: {plan}");
        let what = format!("{what}, {plan}");
        assert_listed(&what, saved.iter().map(|(_, tensor)| tensor), || {
            kept(
                || network.clone(),
                |network| network.forward(images.clone()),
            )
        });
        assert!(plan.recomputed() <= recomputed, "{what}");
        recomputed = plan.recomputed();
    }
    assert_eq!(recomputed, 0, "{what}: there is room for everything");

    let error = init().within(shape, least - 1).unwrap_err();
    assert_eq!((error.budget, error.least), (least - 1, least));
    assert!(!error.layer.is_empty());
    assert!(init().within(shape, error.least).is_ok());
    // No other mix keeps less.
    for seed in 0..5 {
        let state = Cell::new(seed);
        let mixed = init().map_settings(move |settings| {
            let next = u64::wrapping_mul(state.get() + 1, 0x9e37_79b9_7f4a_7c15);
            state.set(next >> 8);
            let policies = [Recompute::Conv, Recompute::Norm, Recompute::Never];
            settings.recompute = policies[(next >> 40) as usize % 3];
        });
        assert!(own_bytes(&mixed.saved(shape)) >= least, "{what}");
    }
}

/// Networks whose chains are rebuilt, with either kind of ends, between those that are of one policy.
fn rebuilt_chains(device: &Device) {
    let images = [2, 3, 64, 64];
    macro_rules! chains {
        ($name:literal, $images:expr, $network:expr) => {
            let drawn = $network.init(device);
            let init = || drawn.clone();
            let [conv, never] = [Recompute::Conv, Recompute::Never].map(|ends| {
                let chains = init().with_rebuilt_chains(ends);
                let whole = own_bytes(&init().with_recompute(ends).saved($images));
                let listed = own_bytes(&chains.saved($images));
                network(
                    &format!("{}, chains before {ends:?}", $name),
                    chains,
                    $images,
                );
                listed as f64 / whole as f64
            });
            println!("{}: {conv:.3} of Conv, {never:.3} of Never", $name);
            assert!(conv < 1.06, "{}: {conv} of Conv's bytes", $name);
            assert!(never < 0.95, "{}: {never} of Never's bytes", $name);
        };
    }
    chains!(
        "ResNet-18",
        images,
        ResNetConfig::resnet18(Form::Fused).with_classes(10)
    );
    chains!(
        "ResNet-50",
        images,
        ResNetConfig::resnet50(Form::Fused).with_classes(10)
    );
    let vgg = VggConfig::vgg16_bn(Form::Fused)
        .with_classes(10)
        .with_hidden(64);
    chains!("VGG-16", images, vgg);
    let mobilenet = MobileNetV2Config::new(Form::Fused).with_classes(10);
    chains!("MobileNetV2", images, mobilenet);
    // Its chains keep what Conv's do.
    let densenet = DenseNetConfig::densenet121(Form::Fused).with_classes(10);
    chains!("DenseNet-121", images, densenet);
    let cspdarknet = CspDarknetConfig::yolox_nano(Form::Fused);
    chains!("CSPDarknet", [2, 3, 128, 128], cspdarknet);
    let net = NetConfig::new(Form::Fused);
    let chains = net.init(device).with_rebuilt_chains(Recompute::Conv);
    network("tutorial, chains", chains, [16, 1, 28, 28]);
}

/// As it is, in half with parameters that are no leaves, and with running statistics.
fn network<M: Lists>(what: &str, network: M, shape: [usize; 4]) {
    let unfused = |network: M| network.in_form(Form::Unfused).saved(shape);
    let never = network.clone().with_recompute(Recompute::Never);
    assert_eq!(unfused(network.clone()), unfused(never), "{what}");

    let device = network.devices()[0].clone();
    let images = Tensor::<4>::random(shape, Distribution::Default, &device);
    let half = images.clone().cast(FloatDType::BF16);
    let frozen = network.clone().map(&mut FixStatistics);
    let cast = || network.autocast(FloatDType::BF16);
    let same = |network: &M| network.clone();
    let prepare: [(&str, &dyn Fn() -> M, &Tensor<4>); 3] = [
        ("", &|| same(&network), &images),
        (", bf16", &cast, &half),
        (", frozen", &|| same(&frozen), &images),
    ];
    for (how, prepare, images) in prepare {
        let saved = prepare().saved(shape);
        let what = format!("{what}{how}");
        assert_listed(&what, saved.iter().map(|(_, tensor)| tensor), || {
            kept(prepare, |network| network.forward(images.clone()))
        });
    }
}

const INPUT: [usize; 4] = [8, 8, 32, 31];

/// Lists of a block alone, whose neighbours' tensors exist anyway, with every activation, pool and type.
fn blocks(form: Form, device: &Device) {
    let input = Tensor::<4>::random(INPUT, Distribution::Default, device).require_grad();
    let config = ConvBn2dConfig::new([8, 12], [3, 3]);
    let dilated = config
        .clone()
        .with_dilation([2, 2])
        .with_padding(PaddingConfig2d::Same);
    let window = |size| MaxPool2dConfig::new([size; 2]).with_strides([2, 2]);
    let uneven = window(2).with_padding(PaddingConfig2d::Explicit(0, 0, 1, 1));
    for activation in Activation::SAMPLES {
        for config in [&config, &dilated] {
            for fixed in [false, true] {
                let block = config.clone().with_activation(activation).init(device);
                let block = if fixed {
                    block.map(&mut FixStatistics)
                } else {
                    block
                };
                for dtype in [FloatDType::F32, FloatDType::F16] {
                    let cast = || block.autocast(dtype);
                    let input = input.clone().cast(dtype).detach().require_grad();
                    let what = format!("{form:?}, {dtype:?}, fixed {fixed}, {block}");
                    alone(&what, form, cast, &input);
                    for pool in [window(2), window(17), uneven.clone()] {
                        let pool = pool.init();
                        let saved = form.saved_for_backward_max_pool(&cast(), INPUT, &pool);
                        assert_listed(&format!("{what}, {pool}"), &saved, || {
                            kept_beside_output(cast, |block| {
                                form.forward_max_pool(block, input.clone(), &pool)
                            })
                        });
                    }
                }
            }
        }
    }
}

/// A scale and a shift that lead back to the parameters, through an op that keeps nothing.
fn norms_of_no_leaves(form: Form, device: &Device) {
    let input = Tensor::<4>::random(INPUT, Distribution::Default, device).require_grad();
    for fixed in [false, true] {
        let config = ConvBn2dConfig::new([8, 12], [3, 3]).with_activation(Activation::Relu);
        let mut block = config.init(device);
        if fixed {
            block = block.map(&mut FixStatistics);
        }
        // Where the norm alone is trained, what is kept depends on it.
        block.conv = block.conv.freeze();
        // Anew for each step: a graph is gone after its backward pass.
        let derived = || {
            let mut block = block.clone();
            block.norm.gamma = block.norm.gamma.map(|gamma| gamma.mul_scalar(2.0));
            block.norm.beta = block.norm.beta.map(|beta| beta.mul_scalar(2.0));
            block
        };
        let what = format!("{form:?}, no leaves, fixed {fixed}");
        alone(&what, form, derived, &input);
    }
}

fn alone(what: &str, form: Form, block: impl Fn() -> ConvBn2d + Copy, input: &Tensor<4>) {
    let saved = form.saved_for_backward(&block(), INPUT);
    assert_listed(what, &saved, || {
        kept_beside_output(block, |block| form.forward(block, input.clone()))
    });

    let output = block().output_shape(INPUT);
    let residual = Tensor::<4>::random(output, Distribution::Default, &input.device());
    let residual = residual.cast(input.dtype()).detach().require_grad();
    let saved = form.saved_for_backward_residual(&block(), INPUT);
    assert_listed(&format!("{what}, residual"), &saved, || {
        kept_beside_output(block, |block| {
            form.forward_residual(block, input.clone(), residual.clone())
        })
    });
}

/// As [`kept`], while the output is held as well, without its bytes.
fn kept_beside_output(
    prepare: impl Fn() -> ConvBn2d,
    forward: impl Fn(&ConvBn2d) -> Tensor<4>,
) -> usize {
    let block = prepare();
    let start = ALLOCATOR.current();
    let output = forward(&block);
    let kept = ALLOCATOR.current().saturating_sub(start);
    let own = output.shape().num_elements() * output.dtype().size();
    output.sum().backward();
    kept.saturating_sub(own)
}
