//! The networks: the two forms against each other in f64, and what they keep.

mod close;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_conv_bn::{ConvBnModule, Recompute, SavedTensor};
use burn_conv_bn_models::{
    CspDarknet, CspDarknetConfig, DenseNet, DenseNetConfig, EfficientNet, EfficientNetConfig, Form,
    MobileNetV2, MobileNetV2Config, ResNet, ResNetConfig, Vgg, VggConfig,
};

use close::{Named, assert_close, collect, is_statistic, largest, values};

const BATCH: usize = 4;
const CLASSES: usize = 10;

/// Flex has one generator for the whole process: no other test may draw between a seed and the last
/// draw after it. Held to a test's end, so that one network at a time is in memory.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A network with scores of images.
trait Network: Module {
    /// Scores of an image.
    const SCORES: usize = CLASSES;

    fn forward(&self, images: Tensor<4>) -> Tensor<2>;
    fn with_form(self, form: Form) -> Self;
}

macro_rules! networks {
    ($($network:ident)*) => {
        $(
            impl Network for $network {
                fn forward(&self, images: Tensor<4>) -> Tensor<2> {
                    $network::forward(self, images)
                }

                fn with_form(self, form: Form) -> Self {
                    $network::with_form(self, form)
                }
            }
        )*
    };
}

networks!(DenseNet EfficientNet MobileNetV2 ResNet Vgg);

impl Network for CspDarknet {
    /// Of YOLOX-nano's three outputs: a score for each channel.
    const SCORES: usize = 64 + 128 + 256;

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let maps = CspDarknet::forward(self, images);
        let sums = maps.map(|map| map.sum_dim(3).sum_dim(2).flatten::<2>(1, 3));
        Tensor::cat(sums.to_vec(), 1)
    }

    fn with_form(self, form: Form) -> Self {
        CspDarknet::with_form(self, form)
    }
}

/// Turns a network to f64, with biases, scales, shifts and statistics off their initial values.
struct Prepare;

impl ModuleMapper for Prepare {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tracked = param.val().is_require_grad();
        let device = param.val().device();
        let mut tensor = param.val().detach().cast(DType::F64);
        if D == 1 {
            let noise = tensor.random_like(Distribution::Uniform(0.0, 0.2));
            tensor = tensor + noise;
        }
        // A leaf: what was computed on an autodiff device cannot be tracked anew.
        let tensor = Tensor::from_data(tensor.into_data(), (&device, DType::F64));
        Param::initialized(param.id, tensor.set_require_grad(tracked))
    }
}

/// All that a training step and an evaluation after it yield.
struct Step {
    output: Vec<f64>,
    /// Of the images and of all parameters.
    gradients: Named,
    statistics: Named,
    evaluation: Vec<f64>,
}

impl Step {
    fn run<N: Network>(network: N, images: Tensor<4>, upstream: Tensor<2>) -> Self {
        let tracked = images.clone().autodiff().require_grad();
        let output = network.forward(tracked.clone());
        assert_eq!(output.dims(), upstream.dims());
        let grads = (output.clone() * upstream.autodiff()).sum().backward();
        let mut gradients = collect(&network, Some(&grads));
        gradients.insert("images".to_owned(), values(tracked.grad(&grads).unwrap()));
        let valid = network.valid();
        let mut statistics = collect(&valid, None);
        statistics.retain(|name, _| is_statistic(name));
        Self {
            output: values(output),
            gradients,
            statistics,
            evaluation: values(valid.forward(images)),
        }
    }
}

/// Largest difference of the two forms, relative to the largest of the values that are compared.
const TOLERANCE: f64 = 1e-6;

fn assert_named_close(got: &Named, wanted: &Named, absolute: f64) {
    assert_eq!(got.len(), wanted.len());
    for ((name, got), (wanted_name, wanted)) in got.iter().zip(wanted) {
        assert_eq!(name, wanted_name);
        assert_close(name, got, wanted, TOLERANCE, absolute);
    }
}

/// Compares the forms of a network over images of that size.
fn check<N: Network>(init: impl Fn(&Device) -> N, size: usize) {
    let _alone = alone();
    let plain = Device::flex();
    let normal = Distribution::Normal(0.0, 1.0);
    let images = Tensor::<4>::random([BATCH, 3, size, size], normal, &plain).cast(DType::F64);
    let upstream = Tensor::<2>::random([BATCH, N::SCORES], normal, &plain).cast(DType::F64);
    // Clones share running statistics, so each form starts from the seed.
    let [fused, unfused] = [Form::Fused, Form::Unfused].map(|form| {
        let device = Device::flex().autodiff();
        device.seed(5);
        let network = init(&device).map(&mut Prepare).with_form(form);
        Step::run(network, images.clone(), upstream.clone())
    });

    assert_close("output", &fused.output, &unfused.output, TOLERANCE, 0.0);
    assert_close(
        "evaluation",
        &fused.evaluation,
        &unfused.evaluation,
        TOLERANCE,
        0.0,
    );
    assert_named_close(&fused.statistics, &unfused.statistics, 0.0);
    // A bias before a norm has no gradient; unfused, it has the rounding errors of a sum.
    let gradients = unfused.gradients.iter();
    let scale = gradients.fold(0.0, |max: f64, (_, values)| max.max(largest(values)));
    assert!(scale > 0.0);
    assert_named_close(&fused.gradients, &unfused.gradients, 1e-10 * scale);
}

#[test]
fn both_forms_of_resnet18_agree() {
    for (recompute, max_workspace) in [
        (Recompute::Conv, None),
        (Recompute::Conv, Some(1 << 16)),
        (Recompute::Norm, None),
        (Recompute::Never, None),
    ] {
        let config = ResNetConfig::resnet18(Form::Fused).with_classes(CLASSES);
        let init = |device: &Device| {
            let network = config.init(device).with_recompute(recompute);
            network.with_max_workspace(max_workspace)
        };
        check(init, 32);
    }
}

#[test]
fn both_forms_of_a_resnet_for_small_images_agree() {
    let config = ResNetConfig::resnet18(Form::Fused)
        .with_small_images(true)
        .with_classes(CLASSES);
    check(|device| config.init(device), 16);
    check(
        |device| config.init(device).with_rebuilt_chains(Recompute::Never),
        16,
    );
}

#[test]
fn both_forms_of_resnet50_agree() {
    let config = ResNetConfig::resnet50(Form::Fused).with_classes(CLASSES);
    check(|device| config.init(device), 32);
    check(
        |device| config.init(device).with_rebuilt_chains(Recompute::Conv),
        32,
    );
}

#[test]
fn both_forms_of_vgg16_agree() {
    let config = VggConfig::vgg16_bn(Form::Fused)
        .with_classes(CLASSES)
        .with_hidden(32)
        .with_dropout(0.0);
    check(|device| config.init(device), 32);
}

#[test]
fn both_forms_of_mobilenet_v2_agree() {
    let config = MobileNetV2Config::new(Form::Fused)
        .with_classes(CLASSES)
        .with_dropout(0.0);
    check(|device| config.init(device), 32);
}

#[test]
fn both_forms_of_efficientnet_agree() {
    for recompute in [Recompute::Conv, Recompute::Never] {
        let config = EfficientNetConfig::new(Form::Fused)
            .with_width(0.5)
            .with_classes(CLASSES)
            .with_dropout(0.0)
            .with_stochastic_depth(0.0);
        check(|device| config.init(device).with_recompute(recompute), 32);
    }
}

#[test]
fn both_forms_of_cspdarknet_agree() {
    let config = CspDarknetConfig::yolox_nano(Form::Fused);
    for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
        check(|device| config.init(device).with_recompute(recompute), 46);
    }
    check(
        |device| config.init(device).with_rebuilt_chains(Recompute::Conv),
        64,
    );
}

/// The outputs of YOLOX-nano at its 416 pixels.
#[test]
fn cspdarknet_has_three_outputs() {
    let _alone = alone();
    let device = Device::flex();
    let network = CspDarknetConfig::yolox_nano(Form::Fused).init(&device);
    let images = Tensor::<4>::ones([1, 3, 416, 416], &device);
    let shapes = network.forward(images).map(|map| map.dims());
    assert_eq!(
        shapes,
        [[1, 64, 52, 52], [1, 128, 26, 26], [1, 256, 13, 13]]
    );
}

#[test]
fn both_forms_of_densenet121_agree() {
    let config = DenseNetConfig::densenet121(Form::Fused).with_classes(CLASSES);
    check(
        |device| config.init(device).with_rebuilt_chains(Recompute::Conv),
        32,
    );
}

/// With every policy, and with images that its pools do not divide.
#[test]
fn both_forms_of_a_small_densenet_agree() {
    for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
        let config = DenseNetConfig::new(Form::Fused, [1, 2, 3, 2])
            .with_growth(6)
            .with_classes(CLASSES);
        check(|device| config.init(device).with_recompute(recompute), 59);
    }
}

#[test]
fn a_resnet_may_start_as_its_shortcuts() {
    let _alone = alone();
    for config in [
        ResNetConfig::resnet18(Form::Fused),
        ResNetConfig::resnet50(Form::Fused),
    ] {
        let network = config.with_zero_init_residual(true).init(&Device::flex());
        for block in &network.layer2 {
            let last = block.conv3.as_ref().unwrap_or(&block.conv2);
            assert_eq!(largest(&values(last.norm.gamma.val())), 0.0);
            assert_eq!(largest(&values(block.conv1.norm.gamma.val())), 1.0);
        }
    }
}

/// Names and shapes of the activations among what a block keeps.
fn activations(saved: &[(String, SavedTensor)], block: &str) -> Vec<(&'static str, Vec<usize>)> {
    let small = ["weight", "bias", "gamma", "beta", "mean", "variance"];
    saved
        .iter()
        .filter(|(name, tensor)| name == block && !small.contains(&tensor.name))
        .map(|(_, tensor)| (tensor.name, tensor.shape.to_vec()))
        .collect()
}

#[test]
fn what_the_blocks_of_a_resnet_keep() {
    let _alone = alone();
    let network = ResNetConfig::resnet18(Form::Fused).init(&Device::flex().autodiff());
    let shape = [2, 3, 64, 64];
    let fused = network.saved_for_backward(shape);
    let unfused = network.with_form(Form::Unfused).saved_for_backward(shape);

    let images = vec![2, 3, 64, 64];
    let (stem, wide, narrow) = (vec![2, 64, 32, 32], vec![2, 64, 16, 16], vec![2, 128, 8, 8]);
    let input = |shape: &Vec<usize>| ("input", shape.clone());
    for (block, fused_wanted, unfused_wanted) in [
        (
            "conv1",
            vec![
                input(&images),
                ("pooled", wide.clone()),
                ("argmax", wide.clone()),
            ],
            vec![
                input(&images),
                ("conv_output", stem.clone()),
                ("norm_output", stem.clone()),
                ("output", stem.clone()),
                ("indices", wide.clone()),
            ],
        ),
        (
            "layer2.0.downsample",
            vec![input(&wide)],
            vec![input(&wide), ("conv_output", narrow.clone())],
        ),
        (
            "layer2.0.conv2",
            vec![input(&narrow), ("output", narrow.clone())],
            vec![
                input(&narrow),
                ("conv_output", narrow.clone()),
                ("sum", narrow.clone()),
            ],
        ),
    ] {
        assert_eq!(activations(&fused, block), fused_wanted, "{block}");
        assert_eq!(activations(&unfused, block), unfused_wanted, "{block}");
    }
    let last = activations(&unfused, "layer4.1.conv2");
    assert_eq!(last[2], ("sum", vec![2, 512, 2, 2]));
}

#[test]
fn what_the_blocks_of_a_mobilenet_keep() {
    let _alone = alone();
    let network = MobileNetV2Config::new(Form::Fused).init(&Device::flex().autodiff());
    let saved = network.saved_for_backward([2, 3, 64, 64]);
    // The second block of the second stage adds its input and applies no activation: no more.
    for (block, shape) in [
        ("features.0.conv.0", vec![2, 3, 64, 64]),
        ("features.3.conv.0", vec![2, 24, 16, 16]),
        ("features.3.conv.2", vec![2, 144, 16, 16]),
        ("features.18.conv.0", vec![2, 320, 2, 2]),
    ] {
        assert_eq!(activations(&saved, block), [("input", shape)], "{block}");
    }
}

/// Of what is before it, a dense layer keeps the newest output alone; of its own, that of one convolution.
#[test]
fn what_the_layers_of_a_densenet_keep() {
    let _alone = alone();
    let network = DenseNetConfig::densenet121(Form::Fused).init(&Device::flex().autodiff());
    let network = network.with_rebuilt_chains(Recompute::Conv);
    let saved = network.saved_for_backward([2, 3, 64, 64]);
    let (newest, all, inner) = (
        vec![2, 32, 16, 16],
        vec![2, 128, 16, 16],
        vec![2, 128, 16, 16],
    );
    let own: Vec<_> = saved
        .iter()
        .filter(|(_, tensor)| !tensor.shared)
        .cloned()
        .collect();
    let own = |layer| activations(&own, layer);
    assert_eq!(activations(&saved, "denseblock1.2"), [("input", newest)]);
    assert_eq!(activations(&saved, "denseblock1.2.norm1"), [("input", all)]);
    assert!(own("denseblock1.2.norm1").is_empty());
    assert_eq!(own("denseblock1.2.conv1"), [("conv_output", inner)]);
    assert!(own("denseblock1.2.conv2").is_empty());
    // A quarter of what the unfused form's keeps, which pools last.
    assert_eq!(own("transition1.conv"), [("input", vec![2, 256, 8, 8])]);
}

#[test]
fn what_the_blocks_of_an_efficientnet_keep() {
    let _alone = alone();
    let network = EfficientNetConfig::new(Form::Fused).init(&Device::flex().autodiff());
    let saved = network.saved_for_backward([2, 3, 64, 64]);
    let (narrow, wide) = (vec![2, 24, 16, 16], vec![2, 144, 16, 16]);
    for (block, wanted) in [
        ("stem", vec![("input", vec![2, 3, 64, 64])]),
        ("stage2.1.expand", vec![("input", narrow)]),
        ("stage2.1.depthwise", vec![("input", wide.clone())]),
        (
            "stage2.1.squeeze",
            vec![("input", wide.clone()), ("gate", vec![2, 144, 1, 1])],
        ),
        ("stage2.1.project", vec![("input", wide)]),
        ("stage2.1", vec![("mask", vec![2, 1, 1, 1])]),
    ] {
        assert_eq!(activations(&saved, block), wanted, "{block}");
    }
}

#[test]
fn what_the_blocks_of_vgg_keep() {
    let _alone = alone();
    let config = VggConfig::vgg16_bn(Form::Fused).with_hidden(8);
    let network = config.init(&Device::flex().autodiff());
    let saved = network.saved_for_backward([2, 3, 64, 64]);
    let last = activations(&saved, "features.12");
    let pooled = vec![2, 512, 2, 2];
    assert_eq!(
        last,
        [
            ("input", vec![2, 512, 4, 4]),
            ("pooled", pooled.clone()),
            ("argmax", pooled),
        ]
    );
}
