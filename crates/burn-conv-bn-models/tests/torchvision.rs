//! Torchvision's networks with PyTorch's weights, loaded through burn-store, against what PyTorch
//! computes with them: logits, loss, every gradient and the running statistics in f64.
//!
//! The files are those of `scripts/pytorch_models.py`, too large to be kept here; `cargo xtask
//! torchvision` writes them and runs these tests, which are skipped without.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use burn_conv_bn::{ConvBnModule, RunningVariance};
use burn_conv_bn_models::{
    Form, MobileNetV2, MobileNetV2Config, ResNet, ResNetConfig, Vgg, VggConfig,
};
use burn_store::{
    ApplyResult, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, PytorchStore, SafetensorsStore,
    bridge,
};

const CLASSES: usize = 10;

/// Largest difference, relative to the largest of the values that are compared.
const TOLERANCE: f64 = 1e-9;

/// The folder with the files, or `None` after saying so.
fn files() -> Option<PathBuf> {
    let folder = env::var_os("BURN_CONV_BN_TORCHVISION").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIPPED: no BURN_CONV_BN_TORCHVISION; `cargo xtask torchvision` sets it");
    }
    folder
}

type Keys = &'static [(&'static str, &'static str)];

fn safetensors(path: &Path, keys: Keys) -> SafetensorsStore {
    let store = SafetensorsStore::from_file(path).with_from_adapter(PyTorchToBurnAdapter);
    keys.iter().fold(store, |store, (pattern, replacement)| {
        store.with_key_remapping(pattern, *replacement)
    })
}

fn pytorch(path: &Path, keys: Keys) -> PytorchStore {
    let store = PytorchStore::from_file(path);
    keys.iter().fold(store, |store, (pattern, replacement)| {
        store.with_key_remapping(pattern, *replacement)
    })
}

/// All of the network was in the file, and all of the file in the network, but for counters that
/// Burn does not have.
fn assert_complete(result: ApplyResult) {
    assert!(result.errors.is_empty(), "{:?}", result.errors);
    assert!(result.missing.is_empty(), "{:?}", result.missing);
    let mut unused = result.unused.iter();
    assert!(
        unused.all(|name| name.ends_with("num_batches_tracked")),
        "{:?}",
        result.unused
    );
}

/// The tensors of a file that belong to no network.
struct Values(SafetensorsStore);

impl Values {
    fn get(&mut self, name: &str) -> TensorData {
        let tensor = self.0.get_tensor(name).expect("the file is readable");
        bridge::to_data(tensor.unwrap_or_else(|| panic!("there is no {name}"))).unwrap()
    }

    fn floats<const D: usize>(&mut self, name: &str, device: &Device) -> Tensor<D> {
        Tensor::from_data(self.get(name), (device, DType::F64))
    }

    fn ints<const D: usize>(&mut self, name: &str, device: &Device) -> Tensor<D, Int> {
        Tensor::from_data(self.get(name), (device, DType::I64))
    }

    fn numbers(&mut self, name: &str) -> Vec<f64> {
        self.get(name).iter::<f64>().collect()
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, value| value.abs().max(max))
}

#[track_caller]
fn assert_close(what: &str, got: &[f64], wanted: &[f64], absolute: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let tolerance = TOLERANCE * largest(wanted) + absolute;
    for (got, wanted) in got.iter().zip(wanted) {
        // Not the other way round, which would let NaN pass.
        assert!(
            (got - wanted).abs() <= tolerance,
            "{what}: {got:e}, not {wanted:e}, {tolerance:e} allowed"
        );
    }
}

/// Lists a network's tensors by name, or the gradients of its parameters.
struct Collect<'a> {
    gradients: Option<&'a Gradients>,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f64>>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.join(".");
        let tensor = match self.gradients {
            Some(_) if name.contains(".running_") => return,
            Some(gradients) => {
                let gradient = param.val().grad(gradients);
                gradient.unwrap_or_else(|| panic!("{name} has no gradient"))
            }
            None => param.val(),
        };
        self.found.insert(name, values(tensor));
    }
}

fn collect<M: Module>(network: &M, gradients: Option<&Gradients>) -> BTreeMap<String, Vec<f64>> {
    let mut collect = Collect {
        gradients,
        path: Vec::new(),
        found: BTreeMap::new(),
    };
    network.visit(&mut collect);
    collect.found
}

/// Loads the weights from both kinds of files, and compares a training step and an evaluation.
fn check<N: Module>(
    name: &str,
    keys: Keys,
    init: impl Fn(&Device) -> N,
    forward: impl Fn(&N, Tensor<4>) -> Tensor<2>,
) {
    let Some(files) = files() else { return };
    let plain = Device::flex();
    let device = Device::flex().autodiff();
    let mut network = init(&device).with_running_variance(RunningVariance::Unbiased);
    let weights = files.join(format!("{name}.safetensors"));
    assert_complete(network.load_from(&mut safetensors(&weights, keys)).unwrap());
    let mut from_pt = init(&device);
    let weights = files.join(format!("{name}.pt"));
    assert_complete(from_pt.load_from(&mut pytorch(&weights, keys)).unwrap());
    assert!(
        collect(&network, None) == collect(&from_pt, None),
        "{name}: both files hold the same"
    );
    drop(from_pt);

    let file = files.join(format!("{name}.values.safetensors"));
    let mut expected = Values(SafetensorsStore::from_file(file));
    let evaluation = forward(&network.valid(), expected.floats("images", &plain));
    let wanted = expected.numbers("evaluation");
    assert_close("evaluation", &values(evaluation), &wanted, 0.0);

    let logits = forward(&network, expected.floats("images", &device));
    let wanted = expected.numbers("logits");
    assert_close("logits", &values(logits.clone()), &wanted, 0.0);
    let targets = expected.ints("targets", &device);
    let loss = CrossEntropyLossConfig::new()
        .init(&device)
        .forward(logits, targets);
    let wanted = expected.numbers("loss");
    assert_close("loss", &values(loss.clone()), &wanted, 0.0);

    let gradients = loss.backward();
    let mut wanted = init(&device);
    let file = files.join(format!("{name}.grads.safetensors"));
    assert_complete(wanted.load_from(&mut safetensors(&file, keys)).unwrap());
    // Without autodiff, running statistics are read as they are after the step.
    let wanted = collect(&wanted.valid(), None);
    let mut got = collect(&network, Some(&gradients));
    for (name, tensor) in collect(&network.valid(), None) {
        if name.contains(".running_") {
            got.insert(name, tensor);
        }
    }
    assert!(got.keys().eq(wanted.keys()));
    // A bias before a norm has no gradient; PyTorch's is what rounding leaves of a sum.
    let rounding = TOLERANCE
        * wanted
            .values()
            .map(|values| largest(values))
            .fold(0.0, f64::max);
    for ((name, got), wanted) in got.iter().zip(wanted.values()) {
        assert_close(name, got, wanted, rounding);
    }
}

#[test]
fn resnet18() {
    let config = ResNetConfig::resnet18(Form::Fused).with_classes(CLASSES);
    check(
        "resnet18",
        ResNet::PYTORCH_KEYS,
        |device| config.init(device),
        ResNet::forward,
    );
}

#[test]
fn resnet34() {
    let config = ResNetConfig::resnet34(Form::Fused).with_classes(CLASSES);
    check(
        "resnet34",
        ResNet::PYTORCH_KEYS,
        |device| config.init(device),
        ResNet::forward,
    );
}

#[test]
fn resnet50() {
    let config = ResNetConfig::resnet50(Form::Fused).with_classes(CLASSES);
    check(
        "resnet50",
        ResNet::PYTORCH_KEYS,
        |device| config.init(device),
        ResNet::forward,
    );
}

#[test]
fn vgg16_bn() {
    let config = VggConfig::vgg16_bn(Form::Fused)
        .with_classes(CLASSES)
        .with_hidden(32)
        .with_dropout(0.0);
    check(
        "vgg16_bn",
        Vgg::PYTORCH_KEYS,
        |device| config.init(device),
        Vgg::forward,
    );
}

#[test]
fn mobilenet_v2() {
    let config = MobileNetV2Config::new(Form::Fused)
        .with_classes(CLASSES)
        .with_dropout(0.0);
    check(
        "mobilenet_v2",
        MobileNetV2::PYTORCH_KEYS,
        |device| config.init(device),
        MobileNetV2::forward,
    );
}

/// The losses of 30 training steps from the same weights.
#[test]
fn resnet18_trains_as_in_pytorch() {
    let Some(files) = files() else { return };
    let device = Device::flex().autodiff();
    let config = ResNetConfig::resnet18(Form::Fused).with_classes(CLASSES);
    let mut network = config.init(&device);
    let weights = files.join("resnet18.safetensors");
    let mut store = safetensors(&weights, ResNet::PYTORCH_KEYS);
    assert_complete(network.load_from(&mut store).unwrap());
    let file = files.join("resnet18.values.safetensors");
    let mut expected = Values(SafetensorsStore::from_file(file));
    let batches = expected.floats::<5>("batches", &device);
    let labels = expected.ints::<2>("labels", &device);
    let wanted = expected.numbers("losses");

    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut optimizer = SgdConfig::new().init();
    let mut worst = 0.0f64;
    for (step, wanted) in wanted.iter().enumerate() {
        let index = step % batches.dims()[0];
        let images = batches.clone().narrow(0, index, 1).squeeze_dim(0);
        let targets = labels.clone().narrow(0, index, 1).squeeze_dim(0);
        let loss = cross_entropy.forward(network.forward(images), targets);
        let got = loss.clone().into_scalar::<f64>();
        let difference = (got - wanted).abs() / wanted.abs();
        println!("step {step:2}: {got:.12}, PyTorch {wanted:.12}, {difference:.1e} apart");
        worst = worst.max(difference);
        assert!(difference <= 1e-6, "step {step}: {got}, not {wanted}");
        let gradients = GradientsParams::from_grads(loss.backward(), &network);
        network = optimizer.step(0.01, network, gradients);
    }
    println!("{} steps, at most {worst:.1e} apart", wanted.len());
}
