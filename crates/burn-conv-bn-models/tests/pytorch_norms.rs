//! Files of PyTorch for blocks without an affine norm, without running statistics, or with a bias too many.
//!
//! They are written by burn-store from modules with PyTorch's names, and hold what its `state_dict` does.

use burn::module::{Module, Param, ParamId};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::tensor::{Device, Int, Tensor};
use burn_conv_bn::{ConvBn2d, ConvBn2dConfig, ConvBnModule};
use burn_store::{ApplyResult, ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};

const MEAN: [f32; 3] = [0.5, -1.0, 2.0];
const VARIANCE: [f32; 3] = [0.25, 1.0, 4.0];
const SCALE: [f32; 3] = [3.0, -2.0, 0.5];
const SHIFT: [f32; 3] = [0.0, 1.0, -1.0];

#[derive(Module, Debug)]
struct TorchBlock {
    conv: Conv2d,
    bn: TorchNorm,
}

#[derive(Module, Debug)]
struct TorchNorm {
    weight: Option<Param<Tensor<1>>>,
    bias: Option<Param<Tensor<1>>>,
    running_mean: Option<Param<Tensor<1>>>,
    running_var: Option<Param<Tensor<1>>>,
    num_batches_tracked: Option<Param<Tensor<1, Int>>>,
}

fn device() -> Device {
    Device::flex()
}

/// The file of a `Conv2d` and a `BatchNorm2d`, with the convolution that is in it.
fn file(affine: bool, track_running_stats: bool, bias: bool) -> (Vec<u8>, Conv2d) {
    let vector = |values: [f32; 3]| Param::from_tensor(Tensor::from_floats(values, &device()));
    let count = || Param::initialized(ParamId::new(), Tensor::from_ints([7], &device()));
    let conv = Conv2dConfig::new([2, 3], [3, 3])
        .with_bias(bias)
        .init(&device());
    let block = TorchBlock {
        conv: conv.clone(),
        bn: TorchNorm {
            weight: affine.then(|| vector(SCALE)),
            bias: affine.then(|| vector(SHIFT)),
            running_mean: track_running_stats.then(|| vector(MEAN)),
            running_var: track_running_stats.then(|| vector(VARIANCE)),
            num_batches_tracked: track_running_stats.then(count),
        },
    };
    let mut store = SafetensorsStore::from_bytes(None);
    block.save_into(&mut store).expect("memory takes it");
    (store.get_bytes().expect("it was saved"), conv)
}

/// Loads as `docs/migration.md` says.
fn load(block: &mut ConvBn2d, file: Vec<u8>) -> ApplyResult {
    let mut store = SafetensorsStore::from_bytes(Some(file))
        .with_from_adapter(PyTorchToBurnAdapter)
        .with_key_remapping(r"^bn\.weight$", "norm.gamma")
        .with_key_remapping(r"^bn\.bias$", "norm.beta")
        .with_key_remapping(r"^bn\.", "norm.")
        .allow_partial(true);
    block.load_from(&mut store).expect("the file is whole")
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[test]
fn what_a_block_does_not_use_may_be_missing() {
    let x = Tensor::<4>::from_data(
        burn::tensor::TensorData::new((0..98).map(|i| i as f32 / 50.0).collect(), [1, 2, 7, 7]),
        &device(),
    );
    for (affine, track_running_stats) in
        [(true, true), (false, true), (true, false), (false, false)]
    {
        let context = format!("affine {affine}, track_running_stats {track_running_stats}");
        let (file, conv) = file(affine, track_running_stats, false);
        let mut block = ConvBn2dConfig::new([2, 3], [3, 3])
            .with_affine(affine)
            .with_track_running_stats(track_running_stats)
            .init(&device());
        let result = load(&mut block, file);
        let missing: Vec<String> = result.missing.into_iter().map(|(path, _)| path).collect();
        let mut unused = block.unused_parameters();
        unused.sort();
        assert_eq!(missing, unused, "{context}");
        let count = usize::from(track_running_stats);
        assert_eq!(
            result.unused,
            vec!["norm.num_batches_tracked"; count],
            "{context}"
        );

        // By hand, in f64.
        let z = conv.forward(x.clone());
        let z: Vec<f64> = z.into_data().iter::<f64>().collect();
        let positions = z.len() / 3;
        let got = values(block.forward(x.clone()));
        for channel in 0..3 {
            let z = &z[channel * positions..][..positions];
            let of_batch = z.iter().sum::<f64>() / positions as f64;
            let spread = z.iter().map(|z| (z - of_batch).powi(2)).sum::<f64>();
            let (mean, variance) = if track_running_stats {
                (f64::from(MEAN[channel]), f64::from(VARIANCE[channel]))
            } else {
                (of_batch, spread / positions as f64)
            };
            let (scale, shift) = if affine {
                (f64::from(SCALE[channel]), f64::from(SHIFT[channel]))
            } else {
                (1.0, 0.0)
            };
            let got = &got[channel * positions..][..positions];
            for (got, z) in got.iter().zip(z) {
                let wanted = (z - mean) / (variance + 1e-5).sqrt() * scale + shift;
                let difference = (f64::from(*got) - wanted).abs();
                assert!(difference < 1e-3, "{context}: {got}, not {wanted}");
            }
        }
    }
}

/// A block that uses its norm's parameters does miss them.
#[test]
fn what_a_block_uses_must_be_there() {
    let (file, _) = file(false, true, false);
    let mut block = ConvBn2dConfig::new([2, 3], [3, 3]).init(&device());
    let missing = load(&mut block, file).missing.into_iter();
    let missing: Vec<String> = missing.map(|(path, _)| path).collect();
    assert_eq!(missing, ["norm.beta", "norm.gamma"]);
    assert!(block.unused_parameters().is_empty());
}

#[test]
fn a_bias_that_the_block_has_not_is_named() {
    let (file, conv) = file(true, true, true);
    let config = ConvBn2dConfig::new([2, 3], [3, 3]);
    let without = load(&mut config.init(&device()), file.clone());
    assert!(without.missing.is_empty());
    assert_eq!(without.unused, ["conv.bias", "norm.num_batches_tracked"]);

    let mut block = config.with_bias(true).init(&device());
    let with = load(&mut block, file);
    assert!(with.missing.is_empty());
    assert_eq!(with.unused, ["norm.num_batches_tracked"]);
    let bias = block.conv.bias.expect("it was asked for").val();
    assert_eq!(values(bias), values(conv.bias.expect("it has one").val()));
}
