//! The tutorial's network: values of PyTorch, the two forms against each other, what they keep.

mod close;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_conv_bn::{ConvBnModule, NormVariant, Recompute};
use burn_conv_bn_models::{Form, Net, NetConfig};
use serde::Deserialize;

use close::{assert_close, distance, values};

const FORMS: [Form; 2] = [Form::Fused, Form::Unfused];
const NORMS: [NormVariant; 2] = [NormVariant::BatchNorm, NormVariant::Tutorial];

fn device() -> Device {
    Device::flex().autodiff()
}

/// A network from a seed. Flex has one generator for the whole process, which the tests' threads
/// share: none may draw between another's seed and its last draw.
fn init(config: NetConfig, seed: u64) -> Net {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    device().seed(seed);
    config.init(&device())
}

/// `data/pytorch_net.json`, which `scripts/pytorch_reference.py` writes, in f64.
#[derive(Deserialize)]
struct File {
    x: Values,
    targets: Vec<i64>,
    weights: HashMap<String, Values>,
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
struct Variant {
    norm: String,
    epsilon: f64,
    log_probabilities: Values,
    loss: f64,
    gradients: HashMap<String, Values>,
}

#[derive(Deserialize)]
struct Values {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Values {
    fn tensor<const D: usize>(&self, device: &Device, dtype: DType) -> Tensor<D> {
        let data = TensorData::new(self.data.clone(), self.shape.clone());
        Tensor::from_data(data, (device, dtype))
    }
}

fn file() -> File {
    serde_json::from_str(include_str!("data/pytorch_net.json")).unwrap()
}

impl File {
    fn weight<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.weights[name].tensor(&device(), DType::F64)
    }

    /// The network of the file. PyTorch's linear weights are `[out, in]`, Burn's `[in, out]`.
    fn net(&self, config: NetConfig) -> Net {
        let mut net = init(config, 0);
        net.conv1.conv.weight = Param::from_tensor(self.weight("conv1.weight"));
        net.conv2.conv.weight = Param::from_tensor(self.weight("conv2.weight"));
        net.fc1.weight = Param::from_tensor(self.weight::<2>("fc1.weight").transpose());
        net.fc1.bias = Some(Param::from_tensor(self.weight("fc1.bias")));
        net.fc2.weight = Param::from_tensor(self.weight::<2>("fc2.weight").transpose());
        net.fc2.bias = Some(Param::from_tensor(self.weight("fc2.bias")));
        // Burn's own batch norm has a scale and a shift in any case, and wants one dtype.
        for norm in [&mut net.conv1.norm, &mut net.conv2.norm] {
            norm.gamma = Param::from_tensor(norm.gamma.val().cast(DType::F64).detach());
            norm.beta = Param::from_tensor(norm.beta.val().cast(DType::F64).detach());
        }
        net
    }

    fn check(&self, variant: &Variant, form: Form, recompute: Recompute) {
        let norm = match variant.norm.as_str() {
            "batch_norm" => NormVariant::BatchNorm,
            "tutorial" => NormVariant::Tutorial,
            other => panic!("unknown norm {other}"),
        };
        let config = NetConfig::new(form)
            .with_norm(norm)
            .with_channels([2, 3])
            .with_hidden(5)
            .with_dropout(0.0);
        assert_eq!(config.epsilon(), variant.epsilon);
        let net = self.net(config).with_recompute(recompute);
        let context = format!("{norm:?}, {form:?}, {recompute:?}");
        let compare = |what: &str, got: Vec<f64>, wanted: &[f64]| {
            assert_close(&format!("{context}: {what}"), &got, wanted, 1e-10, 1e-12);
        };

        let output = net.forward(self.x.tensor(&device(), DType::F64));
        let targets = TensorData::new(self.targets.clone(), [self.targets.len(), 1]);
        let targets = Tensor::<2, Int>::from_data(targets, &device());
        let loss = output.clone().gather(1, targets).mean().neg();
        let grads = loss.backward();
        compare(
            "log-probabilities",
            values(output),
            &variant.log_probabilities.data,
        );
        compare("loss", values(loss), &[variant.loss]);

        let bias = |linear: &burn::nn::Linear| {
            let bias = linear.bias.as_ref().unwrap().val();
            values(bias.grad(&grads).unwrap())
        };
        let weight = |linear: &burn::nn::Linear| {
            values(linear.weight.val().grad(&grads).unwrap().transpose())
        };
        let gradients = [
            (
                "conv1.weight",
                values(net.conv1.conv.weight.val().grad(&grads).unwrap()),
            ),
            (
                "conv2.weight",
                values(net.conv2.conv.weight.val().grad(&grads).unwrap()),
            ),
            ("fc1.weight", weight(&net.fc1)),
            ("fc1.bias", bias(&net.fc1)),
            ("fc2.weight", weight(&net.fc2)),
            ("fc2.bias", bias(&net.fc2)),
        ];
        assert_eq!(gradients.len(), variant.gradients.len());
        for (name, gradient) in gradients {
            compare(name, gradient, &variant.gradients[name].data);
        }
    }
}

#[test]
fn values_of_pytorch() {
    let file = file();
    assert_eq!(file.variants.len(), 2);
    for variant in &file.variants {
        for form in FORMS {
            for recompute in [Recompute::Conv, Recompute::Norm, Recompute::Never] {
                file.check(variant, form, recompute);
            }
        }
    }
}

/// Every float parameter and buffer, in the order of the module's fields.
#[derive(Default)]
struct Parameters {
    ids: Vec<ParamId>,
    values: Vec<Vec<f64>>,
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.ids.push(param.id);
        self.values.push(values(param.val()));
    }
}

fn parameters(net: &Net) -> Parameters {
    let mut parameters = Parameters::default();
    net.visit(&mut parameters);
    parameters
}

#[test]
fn the_same_seed_starts_both_forms_alike() {
    let fused = init(NetConfig::new(Form::Fused), 7);
    let unfused = init(NetConfig::new(Form::Unfused), 7);
    let other = init(NetConfig::new(Form::Fused), 8);
    // Drawn on first use, as Burn does by itself, the last layer's would now be the first's.
    unfused.fc2.weight.val();
    let wanted = parameters(&fused).values;
    assert!(parameters(&unfused).values == wanted);
    assert!(parameters(&other).values != wanted);
}

#[test]
fn another_form_has_the_same_parameters_and_output() {
    let x = file().x.tensor::<4>(&device(), DType::F32);
    for norm in NORMS {
        let config = NetConfig::new(Form::Fused)
            .with_norm(norm)
            .with_dropout(0.0);
        let fused = init(config, 9);
        let unfused = fused.clone().with_form(Form::Unfused);
        assert_eq!((fused.form(), unfused.form()), (Form::Fused, Form::Unfused));

        let (before, after) = (parameters(&fused), parameters(&unfused));
        assert_eq!(before.ids, after.ids);
        assert!(before.values == after.values);

        let (got, wanted) = (fused.forward(x.clone()), unfused.forward(x.clone()));
        assert_close(
            &format!("{norm:?}"),
            &values(got),
            &values(wanted),
            1e-5,
            0.0,
        );
    }
}

#[test]
fn fused_blocks_keep_one_activation_and_unfused_ones_three() {
    const BATCH: usize = 4;
    let image = BATCH * 28 * 28 * 4;
    let first = BATCH * 32 * 26 * 26 * 4;
    let second = BATCH * 64 * 24 * 24 * 4;
    let pooled = second / 4;
    // Where the linear layer's input is the block's own handle, one of the two shares the other's buffer.
    let fused = vec![
        ("conv1", "input", image, true),
        ("conv2", "input", first, false),
        ("conv2", "pooled", pooled, false),
        ("conv2", "argmax", pooled / 4, false),
        ("fc1", "input", pooled, true),
    ];
    let unfused = vec![
        ("conv1", "input", image, true),
        ("conv1", "conv_output", first, false),
        ("conv1", "norm_output", first, false),
        ("conv2", "input", first, false),
        ("conv2", "conv_output", second, false),
        ("conv2", "norm_output", second, false),
        ("conv2", "output", second, false),
        ("conv2", "indices", pooled, false),
        ("fc1", "input", pooled, false),
    ];
    for norm in NORMS {
        for (form, wanted) in [(Form::Fused, &fused), (Form::Unfused, &unfused)] {
            let net = init(NetConfig::new(form).with_norm(norm), 1);
            let saved = net.saved_for_backward([BATCH, 1, 28, 28]);
            let activations: Vec<_> = saved
                .iter()
                .map(|(layer, kept)| (layer.as_str(), kept.name, kept.bytes(), kept.shared))
                .filter(|(_, name, ..)| !["weight", "mean", "variance"].contains(name))
                .take_while(|(layer, ..)| *layer != "dropout")
                .collect();
            assert_eq!(&activations, wanted, "{norm:?}, {form:?}");
        }
    }
}

#[test]
fn evaluation_uses_the_statistics_of_the_batch() {
    let x = file().x.tensor::<4>(&Device::flex(), DType::F32);
    for norm in NORMS {
        for form in FORMS {
            let context = format!("{norm:?}, {form:?}");
            let config = NetConfig::new(form).with_norm(norm).with_dropout(0.0);
            let net = init(config, 2);
            let trained = values(net.forward(x.clone().autodiff()));
            let valid = net.valid();
            let evaluated = values(valid.forward(x.clone()));
            assert_close(&context, &evaluated, &trained, 1e-6, 0.0);

            // With running statistics, a digit's result would not depend on its company.
            let alone = values(valid.forward(x.clone().narrow(0, 0, 1)));
            let difference = distance(&alone, &evaluated[..10]);
            assert!(difference > 1e-4, "{context}: {difference:e}");
        }
    }
}
