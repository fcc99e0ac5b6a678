//! Names and numbers of parameters of torchvision's networks, without drawing any, and the two
//! forms of a single block.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::DropoutConfig;
use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor};
use burn_conv_bn::{Activation, ConvBn2dConfig, ConvBnModule, NormVariant};
use burn_store::KeyRemapper;

use crate::cspdarknet::pixel_blocks;
use crate::{
    CspDarknet, CspDarknetConfig, DenseNet, DenseNetConfig, EfficientNetBlock, EfficientNetConfig,
    Form, MobileNetV2Config, Net, NetConfig, ResNetConfig, VggConfig,
};

/// Sizes of all parameters and buffers, by name.
#[derive(Default)]
struct Sizes {
    path: Vec<String>,
    sizes: BTreeMap<String, usize>,
}

impl ModuleVisitor for Sizes {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let size = param.lazy_shape().num_elements();
        self.sizes.insert(self.path.join("."), size);
    }
}

/// Checks a network's names, given those of its blocks and linear layers, and its number of
/// parameters, which torchvision's documentation gives.
fn check<M: Module>(network: &M, blocks: &[String], bias: bool, linear: &[&str], count: usize) {
    let mut visitor = Sizes::default();
    network.visit(&mut visitor);
    let of_block = [
        "norm.gamma",
        "norm.beta",
        "norm.running_mean",
        "norm.running_var",
    ];
    let mut names: Vec<String> = Vec::new();
    for block in blocks {
        names.push(format!("{block}.conv.weight"));
        if bias {
            names.push(format!("{block}.conv.bias"));
        }
        names.extend(of_block.map(|name| format!("{block}.{name}")));
    }
    for layer in linear {
        names.extend(["weight", "bias"].map(|name| format!("{layer}.{name}")));
    }
    names.sort();
    assert!(visitor.sizes.keys().eq(&names), "{:#?}", visitor.sizes);

    let buffers = ["running_mean", "running_var"];
    let parameters = visitor
        .sizes
        .iter()
        .filter(|(name, _)| !buffers.iter().any(|buffer| name.ends_with(buffer)));
    assert_eq!(parameters.map(|(_, size)| size).sum::<usize>(), count);
}

#[test]
fn resnets_are_those_of_torchvision() {
    let networks = [
        (ResNetConfig::resnet18(Form::Fused), 2, 11_689_512),
        (
            ResNetConfig::resnet18(Form::Fused)
                .with_small_images(true)
                .with_classes(10),
            2,
            11_173_962,
        ),
        (ResNetConfig::resnet34(Form::Fused), 2, 21_797_672),
        (ResNetConfig::resnet50(Form::Fused), 3, 25_557_032),
        (ResNetConfig::resnet101(Form::Fused), 3, 44_549_160),
    ];
    for (config, convs, count) in networks {
        let mut blocks = vec!["conv1".to_owned()];
        for (layer, length) in (1..).zip(config.blocks) {
            for index in 0..length {
                let block = format!("layer{layer}.{index}");
                blocks.extend((1..=convs).map(|conv| format!("{block}.conv{conv}")));
                if index == 0 && (layer > 1 || convs == 3) {
                    blocks.push(format!("{block}.downsample"));
                }
            }
        }
        let network = config.init_lazy(&Device::flex());
        check(&network, &blocks, false, &["fc"], count);
    }
}

/// A line for each block; Burn's own layers take 84.
#[test]
fn resnet18_prints_a_line_for_each_block() {
    let text = ResNetConfig::resnet18(Form::Fused)
        .init_lazy(&Device::flex())
        .to_string();
    assert_eq!(text.matches("ConvBn2d").count(), 20, "{text}");
    let lines: Vec<&str> = text.lines().collect();
    let of_blocks = lines
        .iter()
        .filter(|line| line.contains("ConvBn2d {channels: "));
    assert_eq!(of_blocks.count(), 20, "{text}");
    assert!(lines.len() < 84, "{} lines: {text}", lines.len());
}

#[test]
fn vgg_is_that_of_torchvision() {
    let blocks: Vec<_> = (0..13).map(|index| format!("features.{index}")).collect();
    let linear = ["classifier.0", "classifier.1", "classifier.2"];
    let network = VggConfig::vgg16_bn(Form::Fused).init_lazy(&Device::flex());
    check(&network, &blocks, true, &linear, 138_365_992);
}

#[test]
fn mobilenet_v2_is_that_of_torchvision() {
    let blocks: Vec<_> = (0..19)
        .flat_map(|index| {
            let convs = match index {
                0 | 18 => 1,
                1 => 2,
                _ => 3,
            };
            (0..convs).map(move |conv| format!("features.{index}.conv.{conv}"))
        })
        .collect();
    let network = MobileNetV2Config::new(Form::Fused).init_lazy(&Device::flex());
    check(&network, &blocks, false, &["classifier"], 3_504_872);
}

/// Torchvision's names, in both spellings, with the patterns for them.
#[test]
fn densenet_is_that_of_torchvision() {
    let config = DenseNetConfig::densenet121(Form::Fused);
    let mut visitor = Sizes::default();
    config.init_lazy(&Device::flex()).visit(&mut visitor);
    let buffers = ["running_mean", "running_var"];
    let mut sizes = visitor.sizes.clone();
    sizes.retain(|name, _| !buffers.iter().any(|buffer| name.ends_with(buffer)));
    assert_eq!(sizes.values().sum::<usize>(), 7_978_856);

    for dot in ["", "."] {
        let (mut convs, mut norms) = (vec!["features.conv0".to_owned()], Vec::new());
        norms.extend(["features.norm0", "features.norm5"].map(str::to_owned));
        for (block, layers) in (1..).zip(config.blocks) {
            for layer in 1..=layers {
                let name = format!("features.denseblock{block}.denselayer{layer}");
                convs.extend([1, 2].map(|conv| format!("{name}.conv{dot}{conv}")));
                norms.extend([1, 2].map(|norm| format!("{name}.norm{dot}{norm}")));
            }
            if block < 4 {
                convs.push(format!("features.transition{block}.conv"));
                norms.push(format!("features.transition{block}.norm"));
            }
        }
        let mut names: Vec<_> = ["classifier.weight", "classifier.bias"]
            .map(str::to_owned)
            .into();
        names.extend(convs.iter().map(|conv| format!("{conv}.weight")));
        for norm in norms {
            let of_norm = ["weight", "bias", "running_mean", "running_var"];
            names.extend(of_norm.map(|name| format!("{norm}.{name}")));
        }
        let names = renamed(names, DenseNet::PYTORCH_KEYS);
        assert!(visitor.sizes.keys().eq(&names), "{names:#?}");
    }
}

/// Names of PyTorch's after a table's patterns, sorted.
fn renamed(mut names: Vec<String>, keys: &[(&'static str, &'static str)]) -> Vec<String> {
    let patterns = KeyRemapper::from_patterns(keys.to_vec()).unwrap();
    for (pattern, replacement) in patterns.to_regex_pairs() {
        for name in &mut names {
            *name = pattern.replace_all(name, replacement.as_str()).into_owned();
        }
    }
    names.sort();
    names
}

/// Names of the backbone in a file of the whole detector, and the number of parameters of YOLOX's code.
#[test]
fn cspdarknet_is_that_of_yolox() {
    let network = CspDarknetConfig::yolox_nano(Form::Fused).init_lazy(&Device::flex());
    let mut visitor = Sizes::default();
    network.visit(&mut visitor);
    let mut convs = vec!["stem.conv".to_owned()];
    let separable = |name: String| ["dconv", "pconv"].map(|conv| format!("{name}.{conv}"));
    for (stage, count) in [(2, 1), (3, 3), (4, 3), (5, 1)] {
        convs.extend(separable(format!("dark{stage}.0")));
        let mut csp = format!("dark{stage}.1");
        if stage == 5 {
            convs.extend([1, 2].map(|conv| format!("{csp}.conv{conv}")));
            csp = "dark5.2".to_owned();
        }
        convs.extend([1, 2, 3].map(|conv| format!("{csp}.conv{conv}")));
        for index in 0..count {
            convs.push(format!("{csp}.m.{index}.conv1"));
            convs.extend(separable(format!("{csp}.m.{index}.conv2")));
        }
    }
    let mut names = Vec::new();
    for conv in convs {
        let conv = format!("backbone.backbone.{conv}");
        names.push(format!("{conv}.conv.weight"));
        let of_norm = ["weight", "bias", "running_mean", "running_var"];
        names.extend(of_norm.map(|name| format!("{conv}.bn.{name}")));
    }
    let names = renamed(names, CspDarknet::PYTORCH_KEYS);
    assert!(visitor.sizes.keys().eq(&names), "{names:#?}");

    let buffers = ["running_mean", "running_var"];
    let parameters = visitor
        .sizes
        .iter()
        .filter(|(name, _)| !buffers.iter().any(|buffer| name.ends_with(buffer)));
    assert_eq!(parameters.map(|(_, size)| size).sum::<usize>(), 459_968);
}

/// Top left, bottom left, top right and bottom right pixels.
#[test]
fn blocks_of_pixels_are_in_the_order_of_yolox() {
    let images = Tensor::<1, Int>::arange(0..16, &Device::flex()).float();
    let blocks = pixel_blocks(images.reshape([1, 2, 2, 4]));
    assert_eq!(blocks.dims(), [1, 8, 1, 2]);
    let values: Vec<f32> = blocks.into_data().iter::<f32>().collect();
    let of_first = [[0, 2], [4, 6], [1, 3], [5, 7]];
    let wanted = of_first.map(|[left, right]| [left, right, left + 8, right + 8]);
    let wanted: Vec<f32> = wanted
        .concat()
        .into_iter()
        .map(|pixel| pixel as f32)
        .collect();
    assert_eq!(values, wanted);
}

#[test]
fn efficientnet_b0_is_that_of_torchvision() {
    let (mut blocks, mut linear) = (vec!["stem".to_owned()], vec!["classifier".to_owned()]);
    for (stage, length) in (1..).zip([1, 2, 2, 3, 3, 4, 1]) {
        for index in 0..length {
            let block = format!("stage{stage}.{index}");
            let convs = ["expand", "depthwise", "project"];
            // The first stage does not expand.
            let convs = if stage == 1 { &convs[1..] } else { &convs[..] };
            blocks.extend(convs.iter().map(|conv| format!("{block}.{conv}")));
            linear.extend(["fc1", "fc2"].map(|fc| format!("{block}.squeeze.{fc}")));
        }
    }
    blocks.push("head".to_owned());
    let linear: Vec<&str> = linear.iter().map(String::as_str).collect();
    let network = EfficientNetConfig::new(Form::Fused).init_lazy(&Device::flex());
    check(&network, &blocks, false, &linear, 5_288_548);
}

/// In training an image's branch is left out, or doubled where half of them are; in evaluation it is whole.
#[test]
fn stochastic_depth_leaves_out_branches_of_images() {
    let device = Device::flex().autodiff();
    let config = EfficientNetConfig::new(Form::Fused).with_width(0.25);
    let network = config.init(&device);
    let mut block = network.stage3[1].clone();
    let normal = Distribution::Normal(0.0, 1.0);
    let input = Tensor::<4>::random([40, 16, 4, 4], normal, &device);
    let branch = |block: &EfficientNetBlock, input: Tensor<4>| {
        (block.forward(input.clone(), Form::Fused) - input).without_autodiff()
    };
    block.stochastic_depth = DropoutConfig::new(0.0).init();
    let whole = branch(&block, input.clone());
    block.stochastic_depth = DropoutConfig::new(0.5).init();
    let drawn = branch(&block, input.clone());
    let mut counts = [0; 2];
    for image in 0..40 {
        let [drawn, whole] = [&drawn, &whole].map(|all| all.clone().narrow(0, image, 1));
        let left_out = drawn.clone().abs().max().into_scalar::<f32>() == 0.0;
        let factor = if left_out { 0.0 } else { 2.0 };
        let difference = (drawn - whole * factor).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-4, "{image}: {difference}");
        counts[usize::from(left_out)] += 1;
    }
    assert!(counts.iter().all(|count| *count > 5), "{counts:?}");

    let evaluated = |prob: f64| {
        block.stochastic_depth = DropoutConfig::new(prob).init();
        let data = branch(&block.valid(), input.clone().without_autodiff()).into_data();
        data.iter::<f32>().collect::<Vec<_>>()
    };
    let [with, without] = [0.5, 0.0].map(evaluated);
    assert_eq!(with, without);
}

#[test]
fn both_forms_of_a_block_agree_for_every_activation() {
    let device = Device::flex().autodiff();
    let random = |channels: usize| {
        let distribution = Distribution::Normal(0.0, 3.0);
        Tensor::<4>::random([2, channels, 5, 5], distribution, &device)
    };
    for activation in Activation::SAMPLES {
        let block = ConvBn2dConfig::new([2, 3], [1, 1])
            .with_activation(activation)
            .init(&device);
        let (input, residual) = (random(2), random(3));
        let [fused, unfused] = [Form::Fused, Form::Unfused].map(|form| {
            let plain = form.forward(&block, input.clone());
            let sum = form.forward_residual(&block, input.clone(), residual.clone());
            Tensor::cat(vec![plain, sum], 0).into_data()
        });
        let pairs = fused.iter::<f64>().zip(unfused.iter::<f64>());
        for (fused, unfused) in pairs {
            let difference = (fused - unfused).abs();
            assert!(difference <= 1e-4, "{activation:?}: {fused} and {unfused}");
        }
    }
}

/// Norms in f32 between weights in half: the fused op takes both, Burn's own norm stands between casts.
#[test]
fn both_forms_of_a_block_agree_in_mixed_precision() {
    let device = Device::flex().autodiff();
    // Values of up to 8, which are rounded some four times, by up to 2^-12 and 2^-9 of that.
    for (dtype, tolerance) in [(DType::F16, 1.5e-2), (DType::BF16, 1e-1)] {
        let random = |channels: usize, size: usize| {
            let distribution = Distribution::Normal(0.0, 1.0);
            Tensor::<4>::random([4, channels, size, size], distribution, &device).cast(dtype)
        };
        for (variant, tracks) in [
            (NormVariant::BatchNorm, true),
            (NormVariant::BatchNorm, false),
            (NormVariant::Tutorial, false),
        ] {
            let block = ConvBn2dConfig::new([2, 3], [3, 3])
                .with_norm_variant(variant)
                .with_track_running_stats(tracks)
                .with_activation(Activation::Relu)
                .init(&device)
                .with_precision(dtype.into());
            let (input, residual) = (random(2, 7), random(3, 5));
            let [fused, unfused] = [Form::Fused, Form::Unfused].map(|form| {
                let output = form.forward_residual(&block, input.clone(), residual.clone());
                assert_eq!(output.dtype(), dtype, "{form:?}");
                output.into_data()
            });
            let pairs = fused.iter::<f64>().zip(unfused.iter::<f64>());
            for (fused, unfused) in pairs {
                let difference = (fused - unfused).abs();
                assert!(difference <= tolerance, "{dtype:?}: {fused} and {unfused}");
            }
            let mean = block.norm.running_mean.value_sync();
            assert_eq!(mean.dtype(), DType::F32);
        }
    }
}

#[test]
fn an_unfused_norm_keeps_its_input_in_its_own_type() {
    let block = ConvBn2dConfig::new([2, 3], [3, 3])
        .with_activation(Activation::Relu)
        .init(&Device::flex().autodiff())
        .with_precision(FloatDType::BF16);
    let saved = Form::Unfused.saved_for_backward(&block, [4, 2, 7, 7]);
    for (name, dtype) in [
        ("input", DType::BF16),
        ("conv_output", DType::F32),
        ("norm_output", DType::BF16),
        ("mean", DType::F32),
    ] {
        let tensor = saved.iter().find(|tensor| tensor.name == name);
        assert_eq!(tensor.map(|tensor| tensor.dtype), Some(dtype), "{name}");
    }
}

/// Linear layers run in the type of their weights, whatever the blocks run in.
#[test]
fn a_network_runs_in_mixed_precision() {
    let device = Device::flex().autodiff();
    let network = NetConfig::new(Form::Fused).with_hidden(8).init(&device);
    let images = Tensor::<4>::random([4, 1, 28, 28], Distribution::Default, &device);
    let half = FloatDType::BF16;
    for form in [Form::Fused, Form::Unfused] {
        let network = network.clone().with_form(form);
        let scores = |network: &Net| network.forward(images.clone().cast(half)).dtype();
        assert_eq!(scores(&network.autocast(half)), DType::F32);
        assert_eq!(scores(&network.with_precision(half)), DType::BF16);
    }
}
