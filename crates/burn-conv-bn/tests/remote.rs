//! The op on a device of a server, over loopback, against the same on Flex in this process.
//!
//! The server has Flex as well, but computes with Burn's operations what Flex's kernels compute here: both round.

#[allow(dead_code, reason = "it is written for the program `it`")]
#[path = "it/common.rs"]
mod common;

use std::net::TcpListener;
use std::sync::LazyLock;

use burn::module::{Module, Param, RunningState};
use burn::nn::PaddingConfig2d;
use burn::optim::{GradientsParams, SgdConfig};
use burn::remote::RemoteHost;
use burn::server::{RemoteServer, WebSocketTransport};
use burn::tensor::{DType, Device, Tensor};
use burn_conv_bn::functional::{ConvBnParams, cat_channels, conv_bn};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBn2dConfig, ConvBnError, ConvBnOptions, ConvSpec, MaxPool2dConfig,
    Recompute,
};
use tokio::runtime::{Builder, Runtime};

use common::{assert_close, random, values};

const INPUT: [usize; 4] = [3, 3, 9, 7];

const POLICIES: [Recompute; 3] = [Recompute::Conv, Recompute::Norm, Recompute::Never];

/// Types, and how far results may be apart in each, relative to the largest.
const DTYPES: [(DType, f64); 2] = [(DType::F32, 1e-4), (DType::F64, 1e-10)];

/// The device of a new server, which serves until the process ends.
fn remote() -> Device {
    static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
        let mut builder = Builder::new_multi_thread();
        builder.enable_all().build().expect("threads start")
    });
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    let address = listener.local_addr().expect("it is bound");
    let serving = RemoteServer::new([Device::flex()])
        .serve_async(WebSocketTransport::from_listener(listener));
    RUNTIME.spawn(async move { serving.await.expect("nothing ends the server") });
    let host = RemoteHost::websocket(&format!("ws://{address}"));
    let device = Device::remote_options(&host).init();
    device.expect("the server listens already")
}

/// Where a test computes, and in which type.
struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    /// On autodiff.
    fn new(device: &Device, dtype: DType) -> Self {
        Self {
            device: device.clone().autodiff(),
            dtype,
        }
    }

    fn tensor<const D: usize>(&self, shape: [usize; D], seed: u64) -> Tensor<D> {
        Tensor::from_data(random(&shape, seed), (&self.device, self.dtype))
    }

    /// A layer with a bias, and parameters and running statistics from that seed.
    fn layer(&self, config: &ConvBn2dConfig, seed: u64) -> ConvBn2d {
        let [channels_in, channels] = config.channels;
        let [height, width] = config.kernel_size;
        let row = |seed| self.tensor([channels], seed);
        let weight = self.tensor([channels, channels_in, height, width], seed);
        let mut layer = config.init(&self.device);
        layer.conv.weight = Param::from_tensor(weight);
        layer.conv.bias = Some(Param::from_tensor(row(seed + 1)));
        layer.norm.gamma = Param::from_tensor(row(seed + 2));
        layer.norm.beta = Param::from_tensor(row(seed + 3));
        layer.norm.running_mean = RunningState::new(row(seed + 4));
        layer.norm.running_var = RunningState::new(row(seed + 5) + 2.0);
        layer
    }
}

/// A kernel and a stride of two sizes each, which leave a rest of the input, and another padding on each side.
fn uneven() -> ConvBn2dConfig {
    ConvBn2dConfig::new([INPUT[1], 5], [3, 2])
        .with_stride([2, 1])
        .with_padding(PaddingConfig2d::Explicit(1, 0, 0, 2))
        .with_activation(Activation::Relu)
}

/// Values by name.
type Results = Vec<(&'static str, Vec<f64>)>;

/// A training step of the layer: output, gradients, and the running statistics after it.
fn step(
    place: &Place,
    layer: &ConvBn2d,
    forward: impl Fn(&ConvBn2d, Tensor<4>) -> Tensor<4>,
) -> Results {
    let input = place.tensor(INPUT, 1).require_grad();
    let output = forward(layer, input.clone());
    let upstream = place.tensor(output.dims(), 2);
    let grads = (output.clone() * upstream).sum().backward();
    let bias = layer.conv.bias.as_ref().expect("it was given one");
    let input = input.grad(&grads).expect("tracked");
    let weight = layer.conv.weight.val().grad(&grads).expect("tracked");
    let rows = [bias, &layer.norm.gamma, &layer.norm.beta];
    let [bias, gamma, beta] = rows.map(|row| values(row.val().grad(&grads).expect("tracked")));
    vec![
        ("output", values(output)),
        ("input's gradient", values(input)),
        ("weight's gradient", values(weight)),
        ("bias's gradient", bias),
        ("gamma's gradient", gamma),
        ("beta's gradient", beta),
        ("running mean", values(layer.norm.running_mean.value_sync())),
        (
            "running variance",
            values(layer.norm.running_var.value_sync()),
        ),
    ]
}

/// Compares what a function returns on the remote device with what it returns on Flex.
fn compare(
    what: &str,
    remote: &Device,
    (dtype, tolerance): (DType, f64),
    run: impl Fn(&Place) -> Results,
) {
    let got = run(&Place::new(remote, dtype));
    let wanted = run(&Place::new(&Device::flex(), dtype));
    assert_eq!(got.len(), wanted.len());
    for ((name, got), (_, wanted)) in got.iter().zip(&wanted) {
        let name = format!("{name}, {what}, {dtype:?}");
        assert_close(&name, got, wanted, tolerance, tolerance);
    }
}

#[test]
fn a_layer_in_training() {
    let remote = remote();
    for dtype in DTYPES {
        for recompute in POLICIES {
            let config = uneven().with_recompute(recompute);
            compare(&format!("{recompute:?}"), &remote, dtype, |place| {
                step(place, &place.layer(&config, 10), ConvBn2d::forward)
            });
        }
    }
}

#[test]
fn a_layer_with_a_frozen_norm() {
    let remote = remote();
    for dtype in DTYPES {
        for recompute in POLICIES {
            let config = uneven().with_recompute(recompute);
            compare(&format!("{recompute:?}"), &remote, dtype, |place| {
                let mut layer = place.layer(&config, 10);
                layer.norm.training = Param::from_bool(false);
                step(place, &layer, ConvBn2d::forward)
            });
        }
    }
}

#[test]
fn a_layer_in_evaluation_and_folded() {
    let remote = remote();
    for dtype in DTYPES {
        compare("evaluated", &remote, dtype, |place| {
            let layer = place.layer(&uneven(), 10).valid();
            let x = place.tensor(INPUT, 1).inner();
            let folded = layer.fold().expect("its statistics are finite");
            let folded = layer.settings.activation.forward(folded.forward(x.clone()));
            let evaluated = values(layer.forward(x));
            assert_close("folded", &values(folded), &evaluated, dtype.1, dtype.1);
            vec![("output", evaluated)]
        });
    }
}

#[test]
fn a_max_pool_behind_the_layer() {
    let remote = remote();
    let pool = MaxPool2dConfig::new([2, 2]).init();
    for dtype in DTYPES {
        for recompute in POLICIES {
            let config = uneven().with_recompute(recompute);
            compare(&format!("{recompute:?}"), &remote, dtype, |place| {
                step(place, &place.layer(&config, 10), |layer, x| {
                    layer.forward_max_pool(x, &pool)
                })
            });
        }
    }
}

/// Two blocks and a concatenation. All three read what `Recompute::Norm` rebuilds; the second block also adds its
/// input.
#[derive(Module, Debug)]
struct Network {
    first: ConvBn2d,
    second: ConvBn2d,
}

impl Network {
    fn new(place: &Place, recompute: Recompute) -> Self {
        let layer = |channels, seed| {
            let config = ConvBn2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Same)
                .with_activation(Activation::Silu)
                .with_recompute(recompute);
            place.layer(&config, seed)
        };
        Self {
            first: layer([INPUT[1], 4], 10),
            second: layer([4, 4], 20),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        let x = self.first.forward(images);
        let y = self.second.forward_residual(x.clone(), x.clone());
        cat_channels(vec![x, y]).expect("of one shape")
    }

    /// The losses of a few steps, and what they made of the model.
    fn train(mut self, place: &Place) -> Results {
        let mut optimizer = SgdConfig::new().init();
        let mut losses = Vec::new();
        for seed in 0..5 {
            let images = place.tensor(INPUT, 100 + seed);
            let [batch, _, height, width] = INPUT;
            let wanted = place.tensor([batch, 8, height, width], 200 + seed);
            let error = self.forward(images) - wanted;
            let loss = (error.clone() * error).mean();
            losses.extend(values(loss.clone()));
            let grads = GradientsParams::from_grads(loss.backward(), &self);
            self = optimizer.step(0.1, self, grads);
        }
        let mut results = vec![("losses", losses)];
        for ConvBn2d { conv, norm, .. } in [self.first, self.second] {
            results.extend([
                ("weight", values(conv.weight.val())),
                ("gamma", values(norm.gamma.val())),
                ("beta", values(norm.beta.val())),
                ("running mean", values(norm.running_mean.value_sync())),
                ("running variance", values(norm.running_var.value_sync())),
            ]);
        }
        results
    }
}

#[test]
fn a_network_in_training() {
    let remote = remote();
    for recompute in POLICIES {
        for checkpointing in [false, true] {
            let what = format!("{recompute:?}, gradient checkpointing {checkpointing}");
            // Training amplifies the rounding of f32.
            compare(&what, &remote, (DType::F64, 1e-9), |place| {
                let device = place.device.clone();
                let place = Place {
                    device: if checkpointing {
                        device.gradient_checkpointing()
                    } else {
                        device
                    },
                    dtype: place.dtype,
                };
                Network::new(&place, recompute).train(&place)
            });
        }
    }
}

#[test]
fn tensors_of_two_devices_are_an_error() {
    let (local, first, second) = (Device::flex(), remote(), remote());
    for (input, weight) in [(&first, &local), (&local, &first), (&first, &second)] {
        let x = Tensor::<4>::zeros([2, 3, 4, 4], input);
        let params = ConvBnParams::new(Tensor::<4>::zeros([5, 3, 3, 3], weight));
        let error = conv_bn(x, params, ConvBnOptions::new(ConvSpec::unit(2))).unwrap_err();
        assert!(
            matches!(&error, ConvBnError::Device { what: "weight", .. }),
            "{error}"
        );
        let message = error.to_string();
        assert!(
            message.contains("Remote(") && message.contains("`to_device`"),
            "{message}"
        );
    }
}
