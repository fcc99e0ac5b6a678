//! Torchvision's networks with PyTorch's weights, loaded through burn-store, against what PyTorch
//! computes with them: logits in evaluation and training, loss, every gradient and the running
//! statistics, in f64 and in f32.
//!
//! Both are held against PyTorch's f64. In f64 each element is compared. In f32 each tensor is, by the
//! 2-norm of its difference: the derivative of ReLU jumps at zero, and among a network's millions of
//! pre-activations there are always some that rounding carries across. Each switches an element of a
//! gradient on or off, so that a bound that every single element keeps would say nothing. The yardstick
//! is PyTorch's own f32, which rounds no less.
//!
//! The files are those of `scripts/pytorch_models.py`, too large to be kept here; `cargo xtask
//! torchvision` writes them and runs these tests, which are skipped without.

mod close;

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_conv_bn::{ConvBnModule, RunningVariance};
#[cfg(feature = "pytorch")]
use burn_conv_bn_models::weights;
use burn_conv_bn_models::{
    DenseNet, DenseNetConfig, EfficientNet, EfficientNetConfig, Form, MobileNetV2,
    MobileNetV2Config, ResNet, ResNetConfig, Vgg, VggConfig,
};
use burn_store::{
    ApplyResult, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, PytorchStore, SafetensorsStore,
    bridge,
};

use close::{Named, assert_close, collect, is_statistic, largest, values};

const CLASSES: usize = 10;

/// In f64, the largest difference relative to the largest of the values that are compared.
const TOLERANCE: f64 = 1e-9;

/// In f32, how many times as far from PyTorch's f64 a tensor may be as PyTorch's f32 is, which is the
/// farthest of four runs that round differently. A part of the tensor's norm comes on top: [`SMOOTH`]
/// or [`KINKED`].
const FACTOR: f64 = 4.0;

/// The part where nothing jumps: outputs, running statistics, and the last layer's gradients, after
/// which no ReLU comes. It is 17 units in the last place, and keeps runs of PyTorch's that are exact by
/// chance from being the measure.
const SMOOTH: f64 = 2e-6;

/// The part for all other gradients, about twice what a single ReLU that rounding switches moves them
/// by: 1/sqrt(n), where n of its layer are on. n is 4096 in the smallest layers, of 512 channels of 2x2
/// pixels in 4 images. It has to be allowed whatever PyTorch's distance is, for the switches of two
/// programs differ.
const KINKED: f64 = 3e-2;

/// The names of a network's outputs in the files.
const OUTPUTS: [&str; 3] = ["evaluation", "logits", "loss"];

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

/// File and network hold the same tensors, except counters that Burn does not have.
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

    fn floats<const D: usize>(&mut self, name: &str, device: &Device, dtype: DType) -> Tensor<D> {
        Tensor::from_data(self.get(name), (device, dtype))
    }

    fn ints<const D: usize>(&mut self, name: &str, device: &Device) -> Tensor<D, Int> {
        Tensor::from_data(self.get(name), (device, DType::I64))
    }

    fn numbers(&mut self, name: &str) -> Vec<f64> {
        self.get(name).iter::<f64>().collect()
    }
}

/// Rounds all parameters and buffers to f32.
struct Single;

impl ModuleMapper for Single {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let (tracked, device) = (tensor.is_require_grad(), tensor.device());
            // A leaf: what was computed on an autodiff device cannot be tracked anew.
            let tensor = Tensor::<D>::from_data(tensor.into_data(), (&device, DType::F32));
            tensor.set_require_grad(tracked)
        })
    }
}

/// What an evaluation and the training step after it yield.
struct Step {
    /// By the names in [`OUTPUTS`].
    outputs: Named,
    /// By the names of the network's tensors: gradients of parameters, and buffers after the step.
    tensors: Named,
}

impl Step {
    /// PyTorch's, from the file of outputs and a network with gradients for parameters.
    fn read<N: Module>(expected: &mut Values, gradients: &N) -> Self {
        let outputs = OUTPUTS.map(|name| (name.to_owned(), expected.numbers(name)));
        Self {
            outputs: outputs.into(),
            tensors: collect(&gradients.valid(), None),
        }
    }

    /// Ours, in the type of the network's parameters.
    fn run<N: Module>(
        network: &N,
        forward: impl Fn(&N, Tensor<4>) -> Tensor<2>,
        expected: &mut Values,
        dtype: DType,
    ) -> Self {
        let plain = Device::flex();
        let device = Device::flex().autodiff();
        let images = expected.floats("images", &plain, dtype);
        let evaluation = values(forward(&network.valid(), images));

        let logits = forward(network, expected.floats("images", &device, dtype));
        assert_eq!(logits.dtype(), dtype);
        let targets = expected.ints("targets", &device);
        let loss = CrossEntropyLossConfig::new()
            .init(&device)
            .forward(logits.clone(), targets);
        let gradients = loss.backward();
        let mut tensors = collect(network, Some(&gradients));
        // Without autodiff, running statistics are read as they are after the step.
        let after = collect(&network.valid(), None).into_iter();
        tensors.extend(after.filter(|(name, _)| is_statistic(name)));

        let outputs = [evaluation, values(logits), values(loss)];
        let names = OUTPUTS.map(str::to_owned).into_iter();
        Self {
            outputs: names.zip(outputs).collect(),
            tensors,
        }
    }

    fn tensors(&self) -> impl Iterator<Item = (&String, &Vec<f64>)> {
        self.outputs.iter().chain(&self.tensors)
    }
}

/// Compares a step in f64, element by element.
fn assert_double(got: &Step, wanted: &Step) {
    for (name, wanted) in &wanted.outputs {
        assert_close(name, &got.outputs[name], wanted, TOLERANCE, 0.0);
    }
    assert!(got.tensors.keys().eq(wanted.tensors.keys()));
    // A bias before a norm has no gradient; PyTorch's is what rounding leaves of a sum.
    let largest_of_all = wanted.tensors.values().map(|values| largest(values));
    let rounding = TOLERANCE * largest_of_all.fold(0.0, f64::max);
    for (name, wanted) in &wanted.tensors {
        assert_close(name, &got.tensors[name], wanted, TOLERANCE, rounding);
    }
}

/// How far a tensor in f32 is from PyTorch's in f64.
struct Distance {
    name: String,
    /// 2-norm of PyTorch's in f64.
    norm: f64,
    /// 2-norm of the difference.
    ours: f64,
    /// The same of PyTorch's f32.
    pytorch: f64,
    /// What is allowed beyond that, as a part of the norm.
    floor: f64,
}

impl Distance {
    fn of(name: &str, got: &[f64], wanted: &[f64], pytorch: f64, floor: f64) -> Self {
        assert_eq!(got.len(), wanted.len(), "{name}");
        let differences = got.iter().zip(wanted).map(|(got, wanted)| got - wanted);
        Self {
            name: name.to_owned(),
            norm: norm(wanted.iter().copied()),
            ours: norm(differences),
            pytorch,
            floor,
        }
    }

    /// Over PyTorch's distance.
    fn ratio(&self) -> f64 {
        self.ours / self.pytorch.max(f64::MIN_POSITIVE)
    }

    /// Over what is allowed.
    fn share(&self) -> f64 {
        let allowed = FACTOR * self.pytorch + self.floor * self.norm;
        self.ours / allowed.max(f64::MIN_POSITIVE)
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// The distances of PyTorch's f32, by the names of outputs and of the network's tensors.
fn pytorch_distances(path: &Path, keys: Keys) -> BTreeMap<String, f64> {
    let mut store = safetensors(path, keys);
    let tensors = store.get_all_tensors().unwrap_or_else(|error| {
        let path = path.display();
        panic!("{path}: {error}; `cargo xtask torchvision` writes it")
    });
    let distance = |tensor| bridge::to_data(tensor).unwrap().iter::<f64>().sum::<f64>();
    tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), distance(tensor)))
        .collect()
}

/// Compares a step in f32, tensor by tensor. The names of the last layer's start with `last`.
fn assert_single(
    network: &str,
    last: &str,
    got: &Step,
    wanted: &Step,
    pytorch: &BTreeMap<String, f64>,
) {
    let mut quantities = BTreeMap::<&str, Vec<Distance>>::new();
    assert!(got.tensors.keys().eq(wanted.tensors.keys()));
    assert_eq!(pytorch.len(), wanted.tensors().count());
    let wanted_logits = wanted.outputs["logits"].len();
    for ((name, got), (_, wanted)) in got.tensors().zip(wanted.tensors()) {
        let (quantity, floor) = match name.as_str() {
            output if OUTPUTS.contains(&output) => (output, SMOOTH),
            statistic if is_statistic(statistic) => ("running statistics", SMOOTH),
            gradient if gradient.starts_with(last) => ("gradients of the last layer", SMOOTH),
            _ => ("all other gradients", KINKED),
        };
        let mut yardstick = pytorch[name];
        if name == "loss" {
            // One number is exact by chance; logits off by d in norm move it by up to sqrt(2 / images) d.
            let images = (wanted_logits / CLASSES) as f64;
            yardstick = yardstick.max((2.0 / images).sqrt() * pytorch["logits"]);
        }
        let distance = Distance::of(name, got, wanted, yardstick, floor);
        quantities.entry(quantity).or_default().push(distance);
    }
    let mut allowed = true;
    for (quantity, found) in &quantities {
        allowed &= judge(&format!("{network}, f32, {quantity}"), found);
    }
    assert!(
        allowed,
        "{network}: farther from PyTorch in f32 than is allowed, see above"
    );
}

/// Prints the worst of a quantity, and says whether all of it is allowed.
fn judge(what: &str, found: &[Distance]) -> bool {
    let worst = |of: fn(&Distance) -> f64| {
        let worst = found.iter().max_by(|a, b| of(a).total_cmp(&of(b)));
        worst.expect("there is one of each quantity")
    };
    let mut ratios: Vec<f64> = found.iter().map(Distance::ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let (nearest, farthest) = (worst(Distance::share), worst(Distance::ratio));
    println!(
        "{what}: {:.3} of what is allowed at {} (off by {:.1e} of its norm, PyTorch's f32 by {:.1e}); \
         {:.2} times PyTorch's distance in the median, and at most {:.2} times, at {}",
        nearest.share(),
        nearest.name,
        nearest.ours / nearest.norm,
        nearest.pytorch / nearest.norm,
        ratios[ratios.len() / 2],
        farthest.ratio(),
        farthest.name,
    );
    // Not the other way round, which would let NaN pass.
    found.iter().all(|distance| distance.share() <= 1.0)
}

/// Loads the weights from both kinds of files, and compares a training step and an evaluation. The
/// names of the last layer's tensors start with `last`.
fn check<N: Module>(
    name: &str,
    keys: Keys,
    last: &str,
    init: impl Fn(&Device) -> N,
    forward: impl Fn(&N, Tensor<4>) -> Tensor<2>,
) {
    let Some(files) = files() else { return };
    let device = Device::flex().autodiff();
    let init = || init(&device).with_running_variance(RunningVariance::Unbiased);
    let load = |kind: &str| {
        let mut network = init();
        let mut store = safetensors(&files.join(format!("{name}{kind}.safetensors")), keys);
        assert_complete(network.load_from(&mut store).unwrap());
        network
    };
    let network = load("");
    let mut from_pt = init();
    let weights = files.join(format!("{name}.pt"));
    assert_complete(from_pt.load_from(&mut pytorch(&weights, keys)).unwrap());
    assert!(
        collect(&network, None) == collect(&from_pt, None),
        "{name}: both files hold the same"
    );
    drop(from_pt);

    let file = files.join(format!("{name}.values.safetensors"));
    let mut expected = Values(SafetensorsStore::from_file(file));
    let wanted = Step::read(&mut expected, &load(".grads"));
    let got = Step::run(&network, &forward, &mut expected, DType::F64);
    assert_double(&got, &wanted);
    drop((network, got));

    // From the file again: the step has moved the running statistics.
    let network = load("").map(&mut Single);
    let got = Step::run(&network, &forward, &mut expected, DType::F32);
    let pytorch = pytorch_distances(&files.join(format!("{name}.f32.safetensors")), keys);
    assert_single(name, last, &got, &wanted, &pytorch);
}

#[test]
fn resnet18() {
    let config = ResNetConfig::resnet18(Form::Fused).with_classes(CLASSES);
    check(
        "resnet18",
        ResNet::PYTORCH_KEYS,
        "fc.",
        |device| config.init(device),
        ResNet::forward,
    );
}

#[cfg(feature = "pytorch")]
#[test]
fn a_checkpoint_of_several_gpus_is_the_network() {
    let Some(folder) = files() else { return };
    let [plain, parallel] = ["resnet18.pt", "resnet18.checkpoint.pt"].map(|file| {
        let network = weights::load_resnet(folder.join(file), &Device::flex()).unwrap();
        let variance = network.conv1.norm.running_var.value_sync();
        [network.fc.weight.val().into_data(), variance.into_data()]
    });
    assert_eq!(plain[0].shape()[1], CLASSES);
    for (plain, parallel) in plain.iter().zip(&parallel) {
        plain.assert_eq(parallel, true);
    }
}

#[test]
fn resnet34() {
    let config = ResNetConfig::resnet34(Form::Fused).with_classes(CLASSES);
    check(
        "resnet34",
        ResNet::PYTORCH_KEYS,
        "fc.",
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
        "fc.",
        |device| config.init(device),
        ResNet::forward,
    );
}

#[test]
fn resnet101() {
    let config = ResNetConfig::resnet101(Form::Fused).with_classes(CLASSES);
    check(
        "resnet101",
        ResNet::PYTORCH_KEYS,
        "fc.",
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
        "classifier.2.",
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
        "classifier.",
        |device| config.init(device),
        MobileNetV2::forward,
    );
}

#[test]
fn efficientnet_b0() {
    let config = EfficientNetConfig::new(Form::Fused)
        .with_classes(CLASSES)
        .with_dropout(0.0)
        .with_stochastic_depth(0.0);
    check(
        "efficientnet_b0",
        EfficientNet::PYTORCH_KEYS,
        "classifier.",
        |device| config.init(device),
        EfficientNet::forward,
    );
}

#[test]
fn densenet121() {
    let config = DenseNetConfig::densenet121(Form::Fused).with_classes(CLASSES);
    check(
        "densenet121",
        DenseNet::PYTORCH_KEYS,
        "classifier.",
        |device| config.init(device),
        DenseNet::forward,
    );
}

#[test]
fn resnet18_trains_as_in_pytorch() {
    let config = ResNetConfig::resnet18(Form::Fused).with_classes(CLASSES);
    check_training(
        "resnet18",
        ResNet::PYTORCH_KEYS,
        |device| config.init(device),
        ResNet::forward,
    );
}

#[test]
fn densenet121_trains_as_in_pytorch() {
    let config = DenseNetConfig::densenet121(Form::Fused).with_classes(CLASSES);
    check_training(
        "densenet121",
        DenseNet::PYTORCH_KEYS,
        |device| config.init(device),
        DenseNet::forward,
    );
}

/// The losses of 30 training steps from the same weights.
fn check_training<N: Module>(
    name: &str,
    keys: Keys,
    init: impl Fn(&Device) -> N,
    forward: impl Fn(&N, Tensor<4>) -> Tensor<2>,
) {
    let Some(files) = files() else { return };
    let device = Device::flex().autodiff();
    let mut network = init(&device);
    let weights = files.join(format!("{name}.safetensors"));
    let mut store = safetensors(&weights, keys);
    assert_complete(network.load_from(&mut store).unwrap());
    let file = files.join(format!("{name}.values.safetensors"));
    let mut expected = Values(SafetensorsStore::from_file(file));
    let batches = expected.floats::<5>("batches", &device, DType::F64);
    let labels = expected.ints::<2>("labels", &device);
    let wanted = expected.numbers("losses");

    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut optimizer = SgdConfig::new().init();
    let mut worst = 0.0f64;
    for (step, wanted) in wanted.iter().enumerate() {
        let index = step % batches.dims()[0];
        let images = batches.clone().narrow(0, index, 1).squeeze_dim(0);
        let targets = labels.clone().narrow(0, index, 1).squeeze_dim(0);
        let loss = cross_entropy.forward(forward(&network, images), targets);
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
