//! Torchvision's networks in each of Burn's forms.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Gradients, Int, Tensor, TensorData};
use burn_conv_bn::{ConvBnModule, Recompute, SavedTensor};
use burn_conv_bn_bench::catalogue::{Architecture, Classifier};
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::{
    DenseNet, DenseNetConfig, Form, MobileNetV2, MobileNetV2Config, ResNet, ResNetConfig, Vgg,
    VggConfig,
};

use crate::device::{Stopwatch, is_cube};
use crate::files::{read, write};
use crate::meter::Meter;
use crate::precision::Computing;
use crate::tensors::{into_values, tensor, values, write_tensor};
use crate::workload::{Workload, chain_ends, form, loss, recompute, saved_bytes};

/// Small enough that random images do not throw the weights far off.
const LEARNING_RATE: f64 = 1e-3;

/// Images, and their height and width, of the step that warms up before memory is measured.
const SMALL: [usize; 2] = [2, 64];

/// File of all parameters and running statistics, in the order in which a network is visited.
const PARAMETERS: &str = "parameters";

/// One of torchvision's networks.
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Module, Debug)]
enum Model {
    ResNet(ResNet),
    Vgg(Vgg),
    MobileNetV2(MobileNetV2),
    DenseNet(DenseNet),
}

impl Model {
    fn new(architecture: Architecture, form: Form, device: &Device) -> Self {
        match architecture {
            Architecture::ResNet18 => Self::ResNet(ResNetConfig::resnet18(form).init(device)),
            Architecture::ResNet50 => Self::ResNet(ResNetConfig::resnet50(form).init(device)),
            Architecture::Vgg16Bn => {
                let config = VggConfig::vgg16_bn(form).with_dropout(0.0);
                Self::Vgg(config.init(device))
            }
            Architecture::DenseNet121 => {
                Self::DenseNet(DenseNetConfig::densenet121(form).init(device))
            }
            Architecture::MobileNetV2 => {
                let config = MobileNetV2Config::new(form).with_dropout(0.0);
                Self::MobileNetV2(config.init(device))
            }
        }
    }

    fn with_rebuilt_chains(self, ends: Recompute) -> Self {
        match self {
            Self::ResNet(network) => Self::ResNet(network.with_rebuilt_chains(ends)),
            Self::Vgg(network) => Self::Vgg(network.with_rebuilt_chains(ends)),
            Self::MobileNetV2(network) => Self::MobileNetV2(network.with_rebuilt_chains(ends)),
            Self::DenseNet(network) => Self::DenseNet(network.with_rebuilt_chains(ends)),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        match self {
            Self::ResNet(network) => network.forward(images),
            Self::Vgg(network) => network.forward(images),
            Self::MobileNetV2(network) => network.forward(images),
            Self::DenseNet(network) => network.forward(images),
        }
    }

    fn saved_for_backward(&self, shape: [usize; 4]) -> Vec<(String, SavedTensor)> {
        match self {
            Self::ResNet(network) => network.saved_for_backward(shape),
            Self::Vgg(network) => network.saved_for_backward(shape),
            Self::MobileNetV2(network) => network.saved_for_backward(shape),
            Self::DenseNet(network) => network.saved_for_backward(shape),
        }
    }
}

/// Draws parameters, images and classes from a seed.
pub fn prepare(classifier: &Classifier, seed: u64, folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(seed);
    let mut parameters = Parameters { values: Ok(vec![]) };
    Model::new(classifier.architecture, Form::Fused, &device).visit(&mut parameters);
    write(folder, PARAMETERS, &parameters.values?)?;
    let images = Tensor::<4>::random(
        classifier.input_shape(),
        Distribution::Normal(0.0, 1.0),
        &device,
    );
    write_tensor(folder, "images", images)?;
    let classes = Distribution::Uniform(0.0, Classifier::CLASSES as f64);
    let targets = Tensor::<1>::random([classifier.batch], classes, &device);
    write_tensor(folder, "targets", targets.floor())
}

/// The network with its data and its optimizer.
pub struct ClassifierWork {
    /// Taken out while the optimizer works on it: a second handle would keep it from working in
    /// place.
    model: Option<Model>,
    optimizer: ModuleOptimizer,
    images: Tensor<4>,
    targets: Tensor<1, Int>,
    computing: Computing,
    device: Device,
}

const PUT_BACK: &str = "a step puts the network back";

impl ClassifierWork {
    /// Reads the data that `prepare` wrote.
    pub fn load(
        classifier: &Classifier,
        contender: Contender,
        computing: Computing,
        device: Device,
        data: &Path,
    ) -> Result<Self> {
        let mut fill = Fill {
            values: read(data, PARAMETERS)?,
            taken: 0,
        };
        let model = Model::new(classifier.architecture, form(contender), &device);
        let model = match chain_ends(contender) {
            Some(ends) => model.with_rebuilt_chains(ends),
            None => model.with_recompute(recompute(contender)),
        };
        let model = model.map(&mut fill);
        ensure!(
            fill.taken == fill.values.len(),
            "{} values for a network that has {}",
            fill.values.len(),
            fill.taken
        );
        let targets = values(data, "targets", classifier.batch)?;
        let targets: Vec<i64> = targets.into_iter().map(|class| class as i64).collect();
        let momentum = MomentumConfig::new();
        let images = tensor(data, "images", classifier.input_shape(), &device)?;
        Ok(Self {
            model: Some(model),
            optimizer: SgdConfig::new().with_momentum(Some(momentum)).init(),
            images: computing.activations(images),
            targets: Tensor::from_data(TensorData::new(targets, [classifier.batch]), &device),
            computing,
            device,
        })
    }

    fn model(&self) -> &Model {
        self.model.as_ref().expect(PUT_BACK)
    }

    fn forward(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        let model = self.computing.module(self.model());
        loss(log_softmax(model.forward(images), 1), targets)
    }
}

impl Workload for ClassifierWork {
    fn check(&self, folder: &Path) -> Result<Vec<String>> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let model = self.computing.module(self.model());
        let logits = model.forward(self.images.clone());
        let loss = loss(log_softmax(logits.clone(), 1), self.targets.clone());
        let grads = self.computing.backward(&loss);
        write_tensor(folder, "logits", logits)?;
        write_tensor(folder, "loss", loss)?;
        let mut gradients = WriteGradients {
            grads: &grads,
            computing: self.computing,
            is_coarse: self.computing.is_mixed() || is_cube(&self.device),
            path: Vec::new(),
            vectors: Vec::new(),
            weights: Vec::new(),
            result: Ok(()),
        };
        self.model().visit(&mut gradients);
        let mut names = vec!["logits".to_string(), "loss".to_string()];
        names.extend(gradients.finish(folder)?);
        Ok(names)
    }

    fn step(&mut self) -> StepTime {
        let mut watch = Stopwatch::start(&self.device);
        let loss = self.forward(self.images.clone(), self.targets.clone());
        let forward_ms = watch.lap();
        let grads = self.computing.backward(&loss);
        let backward_ms = watch.lap();
        let model = self.model.take().expect(PUT_BACK);
        let grads = self.computing.gradients(grads, &model);
        self.model = Some(self.optimizer.step(LEARNING_RATE, model, grads));
        let optimizer_ms = watch.lap();
        StepTime {
            forward_ms,
            backward_ms,
            optimizer_ms: Some(optimizer_ms),
        }
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn warm_up(&self) {
        let [batch, size] = SMALL;
        let images = Tensor::random([batch, 3, size, size], Distribution::Default, &self.device);
        let images = self.computing.activations(images);
        let targets = Tensor::zeros([batch], &self.device);
        self.computing.backward(&self.forward(images, targets));
    }

    fn measure(&self, allocator: &'static CountingAllocator) -> StepMemory {
        let mut meter = Meter::start(&self.device, allocator);
        let loss = self.forward(self.images.clone(), self.targets.clone());
        meter.forward_end();
        let grads = self.computing.backward(&loss);
        // Without the optimizer: by then the activations are gone, and its state stays.
        let memory = meter.finish();
        drop((grads, loss));
        memory
    }

    fn saved(&self) -> u64 {
        let model = self.computing.module(self.model());
        let listed = model.saved_for_backward(self.images.dims());
        saved_bytes(listed.iter().map(|(_, kept)| kept))
    }
}

/// Collects the values of a network.
struct Parameters {
    values: Result<Vec<f32>>,
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Ok(values) = &mut self.values {
            match into_values(param.val()) {
                Ok(new) => values.extend(new),
                Err(error) => self.values = Err(error),
            }
        }
    }
}

/// Gives a network the values that [`Parameters`] collected.
struct Fill {
    values: Vec<f32>,
    /// May be more than there are values: then the parameters keep their own.
    taken: usize,
}

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.dims();
        let start = self.taken;
        self.taken += shape.iter().product::<usize>();
        let Some(values) = self.values.get(start..self.taken) else {
            return param;
        };
        param.map(|old| {
            let data = TensorData::new(values.to_vec(), shape);
            Tensor::from_data(data, &old.device()).set_require_grad(old.is_require_grad())
        })
    }
}

/// Gathers the gradients of all norms and biases as one tensor, and the Euclidean norms of those of
/// the weights as another.
///
/// A shift that the next norm takes away again has rounding noise for a gradient, which is to be
/// judged beside the others. In a weight's gradient one ReLU that rounding turned over moves single
/// values by a good part of the largest: the last maps of ResNet-50 have 392 values a channel, and a
/// million values that may lie near the kink. In mixed precision it moves as much of a norm's, and where f32
/// may be multiplied as TF32: on an H200, values of the fused form and of PyTorch's were 0.5 and 0.7 of the
/// largest away from Burn's, and norms of weights 2e-3. Of those, too, the Euclidean norms are gathered there.
struct WriteGradients<'a> {
    grads: &'a Gradients,
    computing: Computing,
    /// Whether the norms of the vectors' gradients are gathered in their place.
    is_coarse: bool,
    path: Vec<String>,
    vectors: Vec<f32>,
    weights: Vec<f32>,
    result: Result<()>,
}

impl WriteGradients<'_> {
    fn add<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Result<()> {
        let grad = self.computing.gradient(&param.val(), self.grads);
        let grad = grad.with_context(|| format!("{} has no gradient", self.path.join(".")))?;
        let norm = |grad: Tensor<D>| into_values((grad.clone() * grad).sum().sqrt());
        match D {
            1 if self.is_coarse => self.vectors.extend(norm(grad)?),
            1 => self.vectors.extend(into_values(grad)?),
            _ => self.weights.extend(norm(grad)?),
        }
        Ok(())
    }

    /// The names of what was written.
    fn finish(self, folder: &Path) -> Result<[String; 2]> {
        self.result?;
        let names = ["norms_and_biases_grad", "weight_grad_norms"];
        for (name, values) in names.into_iter().zip([self.vectors, self.weights]) {
            write(folder, name, &values)?;
        }
        Ok(names.map(String::from))
    }
}

impl ModuleVisitor for WriteGradients<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Running statistics have none.
        if self.result.is_ok() && param.val().is_require_grad() {
            self.result = self.add(param);
        }
    }
}
