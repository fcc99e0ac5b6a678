//! Every public method of the networks in every state that a model can be in, on Flex with and without
//! autodiff: nothing panics, and both forms agree.

mod close;

use burn::module::Module;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{ConvBnModule, Recompute};
use burn_conv_bn_models::{
    CspDarknet, CspDarknetConfig, DenseNet, DenseNetConfig, EfficientNet, EfficientNetConfig, Form,
    MobileNetV2, MobileNetV2Config, Net, NetConfig, ResNet, ResNetConfig, Vgg, VggConfig,
};

use close::values;

/// What has happened to a network.
#[derive(Clone, Copy, Debug)]
enum State {
    New,
    AfterForward,
    AfterStep,
    Frozen,
    NoGrad,
    Valid,
    ValidThenTrain,
    Forked,
    Loaded,
}

const STATES: [State; 9] = [
    State::New,
    State::AfterForward,
    State::AfterStep,
    State::Frozen,
    State::NoGrad,
    State::Valid,
    State::ValidThenTrain,
    State::Forked,
    State::Loaded,
];

macro_rules! network {
    ($name:ident, $network:ident, $images:expr, $new:expr, $saved:expr) => {
        network!($name, $network, $images, $new, $saved, $network::forward);
    };
    ($name:ident, $network:ident, $images:expr, $new:expr, $saved:expr, $scores:expr) => {
        mod $name {
            use super::*;

            fn scores(network: &$network, images: &Tensor<4>) -> Tensor<2> {
                let scores = $scores;
                scores(network, images.clone())
            }

            fn in_state(state: State, device: &Device, images: &Tensor<4>) -> $network {
                let new = || -> $network { $new(device) };
                let network = new();
                let trained = |network: $network| {
                    scores(&network, images);
                    network
                };
                match state {
                    State::New => network,
                    State::AfterForward => trained(network),
                    State::AfterStep if device.is_autodiff() => {
                        let scores = scores(&network, images);
                        let loss = (scores.clone() * scores).mean();
                        let grads = GradientsParams::from_grads(loss.backward(), &network);
                        SgdConfig::new().init().step(1e-3, network, grads)
                    }
                    State::AfterStep => trained(network),
                    State::Frozen => trained(network).freeze(),
                    State::NoGrad => network.no_grad(),
                    State::Valid => trained(network).valid(),
                    State::ValidThenTrain => trained(network).valid().train(),
                    State::Forked => trained(network).fork(device),
                    State::Loaded => trained(new()).load_record(trained(network).into_record()),
                }
            }

            #[test]
            fn every_method() {
                let plain = Device::flex();
                let images = Tensor::<4>::random($images, Distribution::Normal(0.3, 1.0), &plain);
                for device in [plain.clone(), plain.clone().autodiff()] {
                    for state in STATES {
                        let what = format!("{state:?} on {device:?}");
                        let network = in_state(state, &device, &images);
                        assert_eq!(network.form(), Form::Fused);
                        let evaluate =
                            |network: &$network| values(scores(&network.valid(), &images));
                        let wanted = evaluate(&network);
                        let scale = wanted
                            .iter()
                            .fold(0.0f64, |max, value| max.max(value.abs()));
                        let same = |how: &str, got: Vec<f64>| {
                            for (got, wanted) in got.iter().zip(&wanted) {
                                let difference = (got - wanted).abs();
                                assert!(
                                    difference <= 2e-3 * scale,
                                    "{what}, {how}: {got} for {wanted}"
                                );
                            }
                        };
                        let unfused = network.clone().with_form(Form::Unfused);
                        same("unfused", evaluate(&unfused));
                        let never = network.clone().with_recompute(Recompute::Never);
                        same(
                            "another policy",
                            evaluate(&never.with_max_workspace(Some(1))),
                        );
                        let saved = |network: &$network| -> usize { $saved(network) };
                        assert!(saved(&network) > 0, "{what}");
                        assert!(saved(&unfused) > 0, "{what}");
                        assert!(!format!("{network}").is_empty());
                        // A batch that knows nothing of autodiff, as of a data loader without a device.
                        let on_autodiff = scores(&unfused, &images).is_autodiff();
                        assert_eq!(
                            scores(&network, &images).is_autodiff(),
                            on_autodiff,
                            "{what}"
                        );
                    }
                }
            }
        }
    };
}

fn bytes<N>(saved: Vec<(N, burn_conv_bn::SavedTensor)>) -> usize {
    saved.iter().map(|(_, tensor)| tensor.bytes()).sum()
}

network!(
    tutorial,
    Net,
    [4, 1, 12, 12],
    |device| NetConfig::new(Form::Fused)
        .with_channels([4, 6])
        .with_image_size(12)
        .with_hidden(8)
        .with_dropout(0.0)
        .init(device),
    |network: &Net| bytes(network.saved_for_backward([4, 1, 12, 12]))
);
network!(
    resnet,
    ResNet,
    [2, 3, 64, 64],
    |device| ResNetConfig::resnet18(Form::Fused)
        .with_classes(5)
        .init(device),
    |network: &ResNet| bytes(network.saved_for_backward([2, 3, 64, 64]))
);
network!(
    vgg,
    Vgg,
    [2, 3, 32, 32],
    |device| VggConfig::vgg16_bn(Form::Fused)
        .with_hidden(8)
        .with_classes(5)
        .with_dropout(0.0)
        .init(device),
    |network: &Vgg| bytes(network.saved_for_backward([2, 3, 32, 32]))
);
network!(
    mobilenet,
    MobileNetV2,
    [2, 3, 64, 64],
    |device| MobileNetV2Config::new(Form::Fused)
        .with_width(0.25)
        .with_classes(5)
        .with_dropout(0.0)
        .init(device),
    |network: &MobileNetV2| bytes(network.saved_for_backward([2, 3, 64, 64]))
);
network!(
    efficientnet,
    EfficientNet,
    [2, 3, 64, 64],
    |device| EfficientNetConfig::new(Form::Fused)
        .with_width(0.25)
        .with_depth(0.5)
        .with_classes(5)
        .with_dropout(0.0)
        .with_stochastic_depth(0.0)
        .init(device),
    |network: &EfficientNet| bytes(network.saved_for_backward([2, 3, 64, 64]))
);
network!(
    densenet,
    DenseNet,
    [2, 3, 64, 64],
    |device| DenseNetConfig::new(Form::Fused, [1, 2, 2, 1])
        .with_growth(8)
        .with_classes(5)
        .init(device),
    |network: &DenseNet| bytes(network.saved_for_backward([2, 3, 64, 64]))
);
network!(
    cspdarknet,
    CspDarknet,
    [2, 3, 64, 64],
    |device| CspDarknetConfig::yolox_nano(Form::Fused).init(device),
    |network: &CspDarknet| bytes(network.saved_for_backward([2, 3, 64, 64])),
    |network: &CspDarknet, images| {
        let means = network
            .forward(images)
            .map(|map| map.mean_dim(3).mean_dim(2).flatten::<2>(1, 3));
        Tensor::cat(means.to_vec(), 1)
    }
);
