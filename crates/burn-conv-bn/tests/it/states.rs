//! Every public method of the layers in every state that a model can be in, on Flex with and without
//! autodiff: nothing panics, and all agree on what the layer computes, over modules of its own and borrowed.

use std::thread;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_conv_bn::{
    Activation, ConvBn1d, ConvBn1dConfig, ConvBn2d, ConvBn2dConfig, ConvBn3d, ConvBn3dConfig,
    ConvBnModule, MaxPool2d, MaxPool2dConfig, Recompute, RunningVariance, fuse,
};

use crate::common::{assert_close, random, values};

/// What has happened to a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    New,
    AfterForward,
    AfterBackward,
    AfterStep,
    Frozen,
    NoGrad,
    Valid,
    ValidThenTrain,
    Forked,
    Moved,
    Loaded,
    LoadedAfterForward,
    TrainedInThread,
}

const STATES: [State; 13] = [
    State::New,
    State::AfterForward,
    State::AfterBackward,
    State::AfterStep,
    State::Frozen,
    State::NoGrad,
    State::Valid,
    State::ValidThenTrain,
    State::Forked,
    State::Moved,
    State::Loaded,
    State::LoadedAfterForward,
    State::TrainedInThread,
];

fn input<const D: usize>(device: &Device) -> Tensor<D> {
    let mut shape = [7; D];
    (shape[0], shape[1]) = (2, 3);
    Tensor::from_data(random(&shape, 1), (device, DType::F32)) + 0.5
}

macro_rules! states {
    ($name:ident, $rank:literal, $conv:ident, $layer:ident, $config:expr) => {
        mod $name {
            use super::*;

            fn new(device: &Device) -> $layer {
                $config
                    .with_bias(true)
                    .with_activation(Activation::Relu)
                    .init(device)
            }

            /// A layer in that state; none where the device has no such state.
            fn in_state(state: State, device: &Device) -> Option<$layer> {
                let layer = new(device);
                let forward = |layer: &$layer| layer.forward(input::<$rank>(device));
                if !device.is_autodiff() && matches!(state, State::AfterBackward | State::AfterStep)
                {
                    return None;
                }
                Some(match state {
                    State::New => layer,
                    State::AfterForward => {
                        forward(&layer);
                        layer
                    }
                    State::AfterBackward => {
                        forward(&layer).sum().backward();
                        layer
                    }
                    State::AfterStep => {
                        let mut optimizer: ModuleOptimizer = SgdConfig::new().init();
                        let y = forward(&layer);
                        let grads = (y.clone() * y).sum().backward();
                        let grads = GradientsParams::from_grads(grads, &layer);
                        optimizer.step(0.01, layer, grads)
                    }
                    State::Frozen => {
                        forward(&layer);
                        layer.freeze()
                    }
                    State::NoGrad => layer.no_grad(),
                    State::Valid => {
                        forward(&layer);
                        layer.valid()
                    }
                    State::ValidThenTrain => {
                        forward(&layer);
                        layer.valid().train()
                    }
                    State::Forked => {
                        forward(&layer);
                        layer.fork(device)
                    }
                    State::Moved => {
                        forward(&layer);
                        layer.to_device(device)
                    }
                    State::Loaded => {
                        forward(&layer);
                        new(device).load_record(layer.into_record())
                    }
                    State::LoadedAfterForward => {
                        let trained = new(device);
                        forward(&trained);
                        let record = trained.into_record();
                        forward(&layer);
                        layer.load_record(record)
                    }
                    State::TrainedInThread => {
                        let (clone, device) = (layer.clone(), device.clone());
                        let trained = thread::spawn(move || {
                            clone.forward(input::<$rank>(&device));
                        });
                        trained.join().unwrap();
                        layer
                    }
                })
            }

            #[test]
            fn every_method() {
                for device in [Device::flex(), Device::flex().autodiff()] {
                    for state in STATES {
                        if let Some(layer) = in_state(state, &device) {
                            methods(&format!("{state:?} on {device:?}"), layer, &device);
                        }
                    }
                }
            }

            fn methods(what: &str, layer: $layer, device: &Device) {
                let plain = input::<$rank>(&Device::flex());
                let evaluated = values(layer.valid().forward(plain.clone()));
                let same = |how: &str, got: Tensor<$rank>| {
                    assert_close(
                        &format!("{what}: {how}"),
                        &values(got),
                        &evaluated,
                        1e-5,
                        1e-6,
                    );
                };

                // Folding is evaluation, whatever has happened, and trains like a layer of Burn's.
                let folded = layer
                    .fold()
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(
                    folded.weight.val().device(),
                    layer.conv.weight.val().device()
                );
                let borrowed = fuse(&layer.conv, &layer.norm).with_settings(layer.settings.clone());
                let parameters = |conv: burn::nn::conv::$conv| {
                    (values(conv.weight.val()), values(conv.bias.unwrap().val()))
                };
                assert_eq!(
                    parameters(borrowed.fold().unwrap()),
                    parameters(folded.clone()),
                    "{what}"
                );
                let activation = layer.settings.activation;
                let y = activation.forward(folded.forward(input(device)));
                same("folded", y.clone());
                if layer.conv.weight.val().is_autodiff() {
                    let grads = y.sum().backward();
                    assert!(folded.weight.val().grad(&grads).is_some(), "{what}: folded");
                }
                same(
                    "folded, evaluated",
                    activation.forward(folded.valid().forward(plain.clone())),
                );

                // Parts, and every change to a whole model's settings.
                let (conv, norm) = layer.clone().into_parts();
                let again = $layer::from_parts(conv, norm, activation);
                same("from parts", again.valid().forward(plain.clone()));
                let changed = layer
                    .clone()
                    .with_recompute(Recompute::Never)
                    .with_max_workspace(Some(1))
                    .with_running_variance(RunningVariance::Unbiased)
                    .map_settings(|settings| settings.activation = Activation::Relu);
                same("other settings", changed.valid().forward(plain.clone()));
                let half = layer.clone().with_precision(FloatDType::BF16);
                let cast = layer.autocast(FloatDType::BF16);
                for (how, half) in [("half", half), ("autocast", cast)] {
                    let y = half.valid().forward(plain.clone().cast(DType::BF16));
                    let y = values(y.cast(DType::F32));
                    assert_close(&format!("{what}: {how}"), &y, &evaluated, 5e-2, 5e-2);
                    assert!(!half.saved_for_backward(plain.dims()).is_empty());
                }
                assert!(
                    format!("{layer}").contains("channels") && !format!("{layer:?}").is_empty()
                );

                // Lists, from shapes alone.
                let shape = plain.dims();
                let saved = layer.saved_for_backward(shape);
                assert!(!saved.is_empty(), "{what}");
                assert_eq!(borrowed.saved_for_backward(shape), saved, "{what}");
                let saved = layer.saved_for_backward_residual(shape);
                assert!(!saved.is_empty(), "{what}");
                assert_eq!(borrowed.saved_for_backward_residual(shape), saved, "{what}");
                assert_eq!(borrowed.output_shape(shape), layer.output_shape(shape));

                // Forward from both kinds of input, which moves the statistics where it trains.
                let inputs = [plain.clone(), input(device)];
                for (x, owned) in inputs
                    .iter()
                    .flat_map(|x| [(x.clone(), true), (x.clone(), false)])
                {
                    let before = layer.valid().norm;
                    let y = if owned {
                        layer.forward(x.clone())
                    } else {
                        borrowed.forward(x.clone())
                    };
                    let on_autodiff = layer.conv.weight.val().is_autodiff() || x.is_autodiff();
                    assert_eq!(y.is_autodiff(), on_autodiff, "{what}");
                    // Read before turning to evaluation, which takes in what is pending.
                    let here = values(layer.norm.running_mean.value());
                    let after = layer.valid().norm;
                    let mean = |norm: &burn::nn::BatchNorm| values(norm.running_mean.value());
                    let moved = mean(&before) != mean(&after);
                    let trains = on_autodiff && layer.norm.training.is_enabled();
                    assert_eq!(moved, trains, "{what}: statistics moved");
                    assert_eq!(here, mean(&after), "{what}: pending statistics");
                    let shortcut = y.clone();
                    if owned {
                        layer.forward_residual(x, shortcut);
                    } else {
                        borrowed.forward_residual(x, shortcut);
                    }
                }
            }
        }
    };
}

states!(
    one_dimension,
    3,
    Conv1d,
    ConvBn1d,
    ConvBn1dConfig::new(3, 4, 3)
);
states!(
    two_dimensions,
    4,
    Conv2d,
    ConvBn2d,
    ConvBn2dConfig::new([3, 4], [3, 3])
);
states!(
    three_dimensions,
    5,
    Conv3d,
    ConvBn3d,
    ConvBn3dConfig::new([3, 4], [3, 3, 3])
);

/// The pool has no state of its own: what counts is that of the block before it.
#[test]
fn a_max_pool_in_every_state() {
    let device = Device::flex().autodiff();
    let new = || MaxPool2dConfig::new([2, 2]).init();
    let pools: [MaxPool2d; 6] = [
        new(),
        new().valid(),
        new().freeze(),
        new().no_grad(),
        new().fork(&device),
        new().load_record(new().into_record()),
    ];
    let block = ConvBn2dConfig::new([3, 4], [3, 3]).init(&device);
    for pool in pools {
        for block in [block.clone(), block.valid(), block.clone().freeze()] {
            for device in [Device::flex(), device.clone()] {
                let x = input::<4>(&device);
                let borrowed = fuse(&block.conv, &block.norm);
                let joined = values(block.forward_max_pool(x.clone(), &pool));
                assert_eq!(values(borrowed.forward_max_pool(x.clone(), &pool)), joined);
                let apart = values(pool.forward(block.forward(x.clone())));
                assert_close("joined", &joined, &apart, 1e-5, 1e-6);
                let saved = block.saved_for_backward_max_pool(x.dims(), &pool);
                assert!(!saved.is_empty());
                assert_eq!(borrowed.saved_for_backward_max_pool(x.dims(), &pool), saved);
                assert!(!pool.saved_for_backward([2, 4, 5, 5]).is_empty());
            }
        }
        assert!(format!("{pool}").contains("kernel_size"));
    }
}

/// A record replaces statistics that a forward pass has just moved.
#[test]
fn a_record_is_loaded_after_a_forward_pass() {
    let device = Device::flex().autodiff();
    let config = ConvBn2dConfig::new([3, 4], [3, 3]).with_bias(true);
    let trained = config.init(&device);
    for _ in 0..20 {
        trained.forward(input::<4>(&device));
    }
    let x = input::<4>(&Device::flex());
    let wanted = values(trained.valid().forward(x.clone()));
    let block = config.init(&device);
    block.forward(input::<4>(&device) * 3.0 + 1.0);
    let block = block.load_record(trained.into_record());
    assert_close(
        "loaded",
        &values(block.valid().forward(x)),
        &wanted,
        1e-6,
        1e-6,
    );
}

/// With a momentum of 1 the running mean is the last batch's, wherever that was.
#[test]
fn statistics_are_the_same_from_any_thread() {
    let device = Device::flex().autodiff();
    let block = ConvBn2dConfig::new([3, 4], [3, 3])
        .with_momentum(1.0)
        .init(&device);
    let means = |block: &ConvBn2d| values(block.norm.running_mean.value_sync());
    let trained = thread::spawn({
        let (block, device) = (block.clone(), device.clone());
        move || drop(block.forward(input::<4>(&device)))
    });
    trained.join().unwrap();
    // Read here first: turning to evaluation takes in what is pending.
    let here = values(block.norm.running_mean.value());
    assert!(here.iter().all(|mean| *mean != 0.0), "{here:?}");
    assert_eq!(means(&block), here);
    assert_eq!(values(block.valid().norm.running_mean.value()), here);
}

/// Updates that Burn's own norm has left pending, in this thread or another, are not lost.
#[test]
fn pending_updates_of_burns_norm_are_taken_over() {
    let device = Device::flex().autodiff();
    let block = ConvBn2dConfig::new([3, 4], [3, 3])
        .with_momentum(1.0)
        .init(&device);
    let burn = thread::spawn({
        let (block, device) = (block.clone(), device.clone());
        move || block.norm.forward(block.conv.forward(input::<4>(&device)))
    });
    drop(burn.join().unwrap());
    let frozen = block.freeze();
    let x = input::<4>(&device);
    let y = values(frozen.forward(x.clone()));
    let wanted = frozen.valid().forward(x.inner());
    assert_close("frozen", &y, &values(wanted.clone()), 1e-5, 1e-6);
    let means = values(wanted.mean_dims(&[0, 2, 3]));
    assert_close("normalized with the batch's", &means, &[0.0; 4], 0.0, 1e-4);
}
