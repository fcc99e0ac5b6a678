//! A training step of a network, in each of Burn's forms.

use std::path::Path;
use std::vec;

use anyhow::{Result, ensure};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::DropoutConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Gradients, Int, Tensor, TensorData};
use burn_conv_bn::ConvBnModule;
use burn_conv_bn_bench::catalogue::{Architecture, Classifier, Network};
use burn_conv_bn_bench::protocol::Contender;
use burn_conv_bn_bench::tensor_file::{read, write};
use burn_conv_bn_models::{
    AnyNetwork, CspDarknetConfig, DenseNetConfig, EfficientNetConfig, Form, MobileNetV2Config,
    NetConfig, ResNetConfig, VggConfig, optim::AdadeltaConfig,
};

use crate::device::is_cube;
use crate::precision::Computing;
use crate::tensors::{into_values, tensor, write_tensor};
use crate::workload::{Passed, Workload, chain_ends, form, recompute, saved_bytes};

/// File of all parameters and running statistics of a network, in the order in which Burn visits them. The
/// tutorial's network has a file for each.
const PARAMETERS: &str = "parameters";

/// Images of the step that warms up before memory is measured.
const SMALL_BATCH: usize = 2;

/// A network and the shape of its images.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// `None` for the tutorial's network.
    architecture: Option<Architecture>,
    images: [usize; 4],
    classes: usize,
    /// Height and width of the images of the step that warms up.
    small_size: usize,
    /// The tutorial's for its network; for others small, since random images would blow the weights up.
    learning_rate: f64,
}

impl From<&Network> for Spec {
    fn from(network: &Network) -> Self {
        let size = Network::IMAGE_SIZE;
        Self {
            architecture: None,
            images: [network.batch, 1, size, size],
            classes: Network::CLASSES,
            small_size: size,
            learning_rate: 1.0,
        }
    }
}

impl From<&Classifier> for Spec {
    fn from(classifier: &Classifier) -> Self {
        Self {
            architecture: Some(classifier.architecture),
            images: classifier.input_shape(),
            classes: classifier.architecture.classes(),
            small_size: 64,
            learning_rate: 1e-3,
        }
    }
}

fn network(architecture: Option<Architecture>, form: Form, device: &Device) -> AnyNetwork {
    let architecture = match architecture {
        None => return NetConfig::new(form).init(device).into(),
        Some(architecture) => architecture,
    };
    let residual = |config: ResNetConfig| config.init(device).into();
    match architecture {
        Architecture::ResNet18 => residual(ResNetConfig::resnet18(form)),
        Architecture::ResNet50 => residual(ResNetConfig::resnet50(form)),
        Architecture::ResNet101 => residual(ResNetConfig::resnet101(form)),
        Architecture::CifarResNet18 => {
            let config = ResNetConfig::resnet18(form).with_small_images(true);
            residual(config.with_classes(architecture.classes()))
        }
        Architecture::Vgg16Bn => {
            let config = VggConfig::vgg16_bn(form);
            config.with_dropout(0.0).init(device).into()
        }
        Architecture::MobileNetV2 => {
            let config = MobileNetV2Config::new(form);
            config.with_dropout(0.0).init(device).into()
        }
        Architecture::EfficientNetB0 => {
            let config = EfficientNetConfig::new(form).with_dropout(0.0);
            config.with_stochastic_depth(0.0).init(device).into()
        }
        Architecture::DenseNet121 => DenseNetConfig::densenet121(form).init(device).into(),
        Architecture::YoloxNano => CspDarknetConfig::yolox_nano(form).init(device).into(),
    }
}

/// Mean of the images' negative log-likelihoods, as in `burn-conv-bn-train`.
fn loss(network: &AnyNetwork, output: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let log_probabilities = match network {
        AnyNetwork::Tutorial(_) => output,
        _ => log_softmax(output, 1),
    };
    let own = log_probabilities.gather(1, targets.unsqueeze_dim::<2>(1));
    own.squeeze_dim::<1>(1).neg().mean()
}

/// Draws parameters, images and classes from a seed.
pub fn prepare(spec: Spec, seed: u64, folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(seed);
    let model = network(spec.architecture, Form::Fused, &device);
    let mut all = Vec::new();
    visit(&model, None, |name, _, values| match spec.architecture {
        None => write(folder, name, &values),
        Some(_) => {
            all.extend(values);
            Ok(())
        }
    })?;
    if spec.architecture.is_some() {
        write(folder, PARAMETERS, &all)?;
    }
    let images = Tensor::<4>::random(spec.images, Distribution::Normal(0.0, 1.0), &device);
    write_tensor(folder, "images", images)?;
    let classes = Distribution::Uniform(0.0, spec.classes as f64);
    let targets = Tensor::<1>::random([spec.images[0]], classes, &device);
    write_tensor(folder, "targets", targets.floor())
}

/// The network with its data and its optimizer.
pub struct NetworkWork {
    spec: Spec,
    /// `None` within an optimizer's step: a second handle would keep it from working in place.
    model: Option<AnyNetwork>,
    optimizer: ModuleOptimizer,
    images: Tensor<4>,
    targets: Tensor<1, Int>,
    computing: Computing,
    device: Device,
}

const PUT_BACK: &str = "a step puts the network back";

impl NetworkWork {
    /// Reads the data that `prepare` wrote.
    pub fn load(
        spec: Spec,
        contender: Contender,
        computing: Computing,
        device: Device,
        data: &Path,
    ) -> Result<Self> {
        let model = network(spec.architecture, form(contender), &device);
        let model = match chain_ends(contender) {
            Some(ends) => model.with_rebuilt_chains(ends),
            None => model.with_recompute(recompute(contender)),
        };
        let images = tensor(data, "images", spec.images, &device)?;
        let targets = read(data, "targets")?;
        let targets: Vec<i64> = targets.into_iter().map(|class| class as i64).collect();
        Ok(Self {
            spec,
            model: Some(fill(model, spec.architecture.is_some(), data)?),
            optimizer: match spec.architecture {
                None => AdadeltaConfig::new().init(),
                Some(_) => {
                    let momentum = MomentumConfig::new();
                    SgdConfig::new().with_momentum(Some(momentum)).init()
                }
            },
            images: computing.activations(images),
            targets: Tensor::from_data(TensorData::new(targets, [spec.images[0]]), &device),
            computing,
            device,
        })
    }

    fn model(&self) -> &AnyNetwork {
        self.model.as_ref().expect(PUT_BACK)
    }
}

impl Workload for NetworkWork {
    fn check(&self, folder: &Path) -> Result<Vec<String>> {
        let mut model = self.model().clone();
        let output_name = match &mut model {
            AnyNetwork::Tutorial(net) => {
                net.dropout = DropoutConfig::new(0.0).init();
                "log_probabilities"
            }
            _ => "logits",
        };
        let cast = self.computing.module(&model);
        let output = cast.forward(self.images.clone());
        let loss = loss(&cast, output.clone(), self.targets.clone());
        let grads = self.computing.backward(&loss);
        write_tensor(folder, output_name, output)?;
        write_tensor(folder, "loss", loss)?;
        let mut names = vec![output_name.to_string(), "loss".to_string()];
        let is_coarse = self.computing.is_mixed() || is_cube(&self.device);
        let (mut vectors, mut weights) = (Vec::new(), Vec::new());
        visit(
            &model,
            Some((&grads, self.computing)),
            |name, rank, values| {
                match self.spec.architecture {
                    None => {
                        let name = format!("{name}_grad");
                        write(folder, &name, &values)?;
                        names.push(name);
                    }
                    Some(_) if rank > 1 => weights.push(euclidean(&values)),
                    Some(_) if is_coarse => vectors.push(euclidean(&values)),
                    Some(_) => vectors.extend(values),
                }
                Ok(())
            },
        )?;
        // The gradients of all norms and biases as one tensor, and the Euclidean norms of the weights'
        // gradients as another.
        //
        // Together, because the gradient of a shift before another norm is rounding noise. Euclidean norms,
        // because one ReLU that rounding flips moves single values of a weight's gradient by much of the
        // largest: the last maps of ResNet-50 have 392 values a channel, and a million that may lie near the
        // kink. In mixed precision and with TF32 the same holds for norms and biases: on an H200, values of
        // the fused form and of PyTorch were 0.5 and 0.7 of the largest away from Burn's, Euclidean norms of
        // weights' gradients 2e-3.
        if self.spec.architecture.is_some() {
            for (name, values) in [
                ("norms_and_biases_grad", vectors),
                ("weight_grad_norms", weights),
            ] {
                write(folder, name, &values)?;
                names.push(name.to_string());
            }
        }
        Ok(names)
    }

    fn pass(&self, is_small: bool, forward_end: &mut dyn FnMut()) -> Passed {
        let (images, targets) = if is_small {
            let (channels, size) = (self.spec.images[1], self.spec.small_size);
            let shape = [SMALL_BATCH, channels, size, size];
            let images = Tensor::random(shape, Distribution::Default, &self.device);
            let targets = Tensor::zeros([SMALL_BATCH], &self.device);
            (self.computing.activations(images), targets)
        } else {
            (self.images.clone(), self.targets.clone())
        };
        let model = self.computing.module(self.model());
        let loss = loss(&model, model.forward(images), targets);
        drop(model);
        forward_end();
        (self.computing.backward(&loss), None)
    }

    fn optimize(&mut self, grads: Gradients) -> bool {
        let model = self.model.take().expect(PUT_BACK);
        let grads = self.computing.gradients(grads, &model);
        let rate = self.spec.learning_rate;
        self.model = Some(self.optimizer.step(rate, model, grads));
        true
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn saved(&self) -> Option<u64> {
        let model = self.computing.module(self.model());
        let saved = model.saved_for_backward(self.images.dims());
        Some(saved_bytes(saved.iter().map(|(_, kept)| kept)))
    }
}

fn euclidean(values: &[f32]) -> f32 {
    let squares = values.iter().map(|value| f64::from(*value).powi(2));
    squares.sum::<f64>().sqrt() as f32
}

/// Name of a parameter's file: its path in the network, without the block's convolution.
fn file_name(path: &[String]) -> String {
    // The first is the model's variant.
    path[1..].join(".").replace(".conv.", ".")
}

/// Hands out a network's parameters, or the gradients of those that have one, by name, rank and
/// values.
fn visit(
    model: &AnyNetwork,
    grads: Option<(&Gradients, Computing)>,
    each: impl FnMut(&str, usize, Vec<f32>) -> Result<()>,
) -> Result<()> {
    let mut visitor = Visitor {
        grads,
        path: Vec::new(),
        each,
        result: Ok(()),
    };
    model.visit(&mut visitor);
    visitor.result
}

struct Visitor<'a, F> {
    grads: Option<(&'a Gradients, Computing)>,
    path: Vec<String>,
    each: F,
    result: Result<()>,
}

impl<F: FnMut(&str, usize, Vec<f32>) -> Result<()>> Visitor<'_, F> {
    fn hand_out<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Result<()> {
        let name = file_name(&self.path);
        let mut value = param.val();
        if let Some((grads, computing)) = self.grads {
            // Running statistics have none, nor has a norm without scale and shift. The comparison finds a
            // missing one.
            let is_trained = value.is_require_grad();
            let grad = is_trained.then(|| computing.gradient(&value, grads));
            let Some(grad) = grad.flatten() else {
                return Ok(());
            };
            value = grad;
        }
        (self.each)(&name, D, into_values(value)?)
    }
}

impl<F: FnMut(&str, usize, Vec<f32>) -> Result<()>> ModuleVisitor for Visitor<'_, F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.result.is_ok() {
            self.result = self.hand_out(param);
        }
    }
}

/// Gives a network the values that [`prepare`] wrote, in one file or in one for each parameter.
fn fill(model: AnyNetwork, is_one_file: bool, data: &Path) -> Result<AnyNetwork> {
    let all = is_one_file.then(|| read(data, PARAMETERS)).transpose()?;
    let mut fill = Fill {
        data,
        all: all.map(Vec::into_iter),
        path: Vec::new(),
        result: Ok(()),
    };
    let model = model.map(&mut fill);
    fill.result?;
    let left = fill.all.map_or(0, |all| all.len());
    ensure!(left == 0, "{left} values more than the network has");
    Ok(model)
}

struct Fill<'a> {
    data: &'a Path,
    all: Option<vec::IntoIter<f32>>,
    path: Vec<String>,
    result: Result<()>,
}

impl Fill<'_> {
    fn values(&mut self, count: usize) -> Result<Vec<f32>> {
        let name = file_name(&self.path);
        let values: Vec<f32> = match &mut self.all {
            Some(all) => all.by_ref().take(count).collect(),
            None => read(self.data, &name)?,
        };
        let found = values.len();
        ensure!(found == count, "{found} values for the {count} of {name}");
        Ok(values)
    }
}

impl ModuleMapper for Fill<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.dims();
        match self.values(shape.iter().product()) {
            Ok(values) => param.map(|old| {
                let new = Tensor::from_data(TensorData::new(values, shape), &old.device());
                new.set_require_grad(old.is_require_grad())
            }),
            Err(error) => {
                if self.result.is_ok() {
                    self.result = Err(error);
                }
                param
            }
        }
    }
}
