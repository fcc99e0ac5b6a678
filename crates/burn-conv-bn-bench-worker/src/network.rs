//! The tutorial's network in each of Burn's forms.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Param;
use burn::nn::DropoutConfig;
use burn::optim::ModuleOptimizer;
use burn::tensor::{Device, Distribution, Gradients, Int, Tensor, TensorData};
use burn_conv_bn_bench::catalogue::Network;
use burn_conv_bn_bench::protocol::{Contender, StepMemory, StepTime};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::{Net, NetConfig};
use burn_conv_bn_train::optim::AdadeltaConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::Stopwatch;
use crate::files::write;
use crate::meter::Meter;
use crate::precision::Computing;
use crate::tensors::{parameter, tensor, values, write_tensor};
use crate::workload::{Workload, chain_ends, form, loss, recompute, saved_bytes};

/// The tutorial's.
const LEARNING_RATE: f64 = 1.0;

/// Name of each parameter, its number of values, and the inputs of one output.
const PARAMETERS: [(&str, usize, usize); 6] = [
    ("conv1.weight", 32 * 9, 9),
    ("conv2.weight", 64 * 32 * 9, 32 * 9),
    ("fc1.weight", 9216 * 128, 9216),
    ("fc1.bias", 128, 9216),
    ("fc2.weight", 128 * Network::CLASSES, 128),
    ("fc2.bias", Network::CLASSES, 128),
];

/// Images of the step that warms up before memory is measured.
const SMALL_BATCH: usize = 2;

/// Draws the targets, the images and the parameters from a seed.
pub fn prepare(network: &Network, seed: u64, folder: &Path) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let targets: Vec<f32> = (0..network.batch)
        .map(|_| rng.random_range(0..Network::CLASSES) as f32)
        .collect();
    write(folder, "targets", &targets)?;
    let mut uniform = |count: usize, bound: f32| -> Vec<f32> {
        (0..count)
            .map(|_| rng.random_range(-bound..bound))
            .collect()
    };
    let pixels = network.batch * Network::IMAGE_SIZE * Network::IMAGE_SIZE;
    write(folder, "images", &uniform(pixels, 1.0))?;
    for (name, count, fan_in) in PARAMETERS {
        // As initialized by default.
        let bound = 1.0 / (fan_in as f32).sqrt();
        write(folder, name, &uniform(count, bound))?;
    }
    Ok(())
}

/// The network with its data and its optimizer.
pub struct NetworkWork {
    /// Taken out while the optimizer works on it: a second handle would keep it from working in
    /// place.
    net: Option<Net>,
    optimizer: ModuleOptimizer,
    images: Tensor<4>,
    targets: Tensor<1, Int>,
    computing: Computing,
    device: Device,
}

impl NetworkWork {
    /// Reads the data that `prepare` wrote.
    pub fn load(
        network: &Network,
        contender: Contender,
        computing: Computing,
        device: Device,
        data: &Path,
    ) -> Result<Self> {
        let config = NetConfig::new(form(contender)).with_recompute(recompute(contender));
        let mut net = config.init(&device);
        if let Some(ends) = chain_ends(contender) {
            net = net.with_rebuilt_chains(ends);
        }
        read_parameters(&mut net, data, &device)?;
        let size = Network::IMAGE_SIZE;
        let targets = values(data, "targets", network.batch)?;
        let targets: Vec<i64> = targets.into_iter().map(|class| class as i64).collect();
        let images = tensor(data, "images", [network.batch, 1, size, size], &device)?;
        Ok(Self {
            net: Some(net),
            optimizer: AdadeltaConfig::new().init(),
            images: computing.activations(images),
            targets: Tensor::from_data(TensorData::new(targets, [network.batch]), &device),
            computing,
            device,
        })
    }

    fn net(&self) -> &Net {
        self.net.as_ref().expect(PUT_BACK)
    }

    fn loss(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        loss(self.computing.module(self.net()).forward(images), targets)
    }
}

const PUT_BACK: &str = "a step puts the network back";

fn read_parameters(net: &mut Net, data: &Path, device: &Device) -> Result<()> {
    for (name, block) in [("conv1", &mut net.conv1), ("conv2", &mut net.conv2)] {
        let weight = &mut block.conv.weight;
        *weight = parameter(data, &format!("{name}.weight"), weight.dims(), device)?;
    }
    for (name, linear) in [("fc1", &mut net.fc1), ("fc2", &mut net.fc2)] {
        let weight = &mut linear.weight;
        *weight = parameter(data, &format!("{name}.weight"), weight.dims(), device)?;
        let bias = linear
            .bias
            .as_mut()
            .context("the linear layers have a bias")?;
        *bias = parameter(data, &format!("{name}.bias"), bias.dims(), device)?;
    }
    Ok(())
}

/// Writes the gradient of every parameter, in Burn's layout. Returns their names.
fn write_gradients(
    net: &Net,
    grads: &Gradients,
    computing: Computing,
    folder: &Path,
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (name, block) in [("conv1", &net.conv1), ("conv2", &net.conv2)] {
        let (weight, name) = (&block.conv.weight, format!("{name}.weight_grad"));
        names.push(write_gradient(weight, grads, computing, folder, name)?);
    }
    for (name, linear) in [("fc1", &net.fc1), ("fc2", &net.fc2)] {
        let bias = linear
            .bias
            .as_ref()
            .context("the linear layers have a bias")?;
        let weight_name = format!("{name}.weight_grad");
        names.push(write_gradient(
            &linear.weight,
            grads,
            computing,
            folder,
            weight_name,
        )?);
        let bias_name = format!("{name}.bias_grad");
        names.push(write_gradient(bias, grads, computing, folder, bias_name)?);
    }
    Ok(names)
}

fn write_gradient<const D: usize>(
    parameter: &Param<Tensor<D>>,
    grads: &Gradients,
    computing: Computing,
    folder: &Path,
    name: String,
) -> Result<String> {
    let grad = computing.gradient(&parameter.val(), grads);
    let grad = grad.with_context(|| format!("there is no {name}"))?;
    write_tensor(folder, &name, grad)?;
    Ok(name)
}

impl Workload for NetworkWork {
    fn check(&self, folder: &Path) -> Result<Vec<String>> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let mut net = self.net().clone();
        net.dropout = DropoutConfig::new(0.0).init();
        let log_probabilities = self.computing.module(&net).forward(self.images.clone());
        let loss = loss(log_probabilities.clone(), self.targets.clone());
        let grads = self.computing.backward(&loss);
        write_tensor(folder, "log_probabilities", log_probabilities)?;
        write_tensor(folder, "loss", loss)?;
        let mut names = vec!["log_probabilities".to_string(), "loss".to_string()];
        names.extend(write_gradients(&net, &grads, self.computing, folder)?);
        Ok(names)
    }

    fn step(&mut self) -> StepTime {
        let mut watch = Stopwatch::start(&self.device);
        let loss = self.loss(self.images.clone(), self.targets.clone());
        let forward_ms = watch.lap();
        let grads = self.computing.backward(&loss);
        let backward_ms = watch.lap();
        let net = self.net.take().expect(PUT_BACK);
        let grads = self.computing.gradients(grads, &net);
        self.net = Some(self.optimizer.step(LEARNING_RATE, net, grads));
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
        let size = Network::IMAGE_SIZE;
        let shape = [SMALL_BATCH, 1, size, size];
        let images = Tensor::<4>::random(shape, Distribution::Default, &self.device);
        let images = self.computing.activations(images);
        let targets = Tensor::<1, Int>::zeros([SMALL_BATCH], &self.device);
        self.computing.backward(&self.loss(images, targets));
    }

    fn measure(&self, allocator: &'static CountingAllocator) -> StepMemory {
        let mut meter = Meter::start(&self.device, allocator);
        let loss = self.loss(self.images.clone(), self.targets.clone());
        meter.forward_end();
        let grads = self.computing.backward(&loss);
        // Without the optimizer: by then the activations are gone, and its state stays.
        let memory = meter.finish();
        drop((grads, loss));
        memory
    }

    fn saved(&self) -> u64 {
        let [batch, ..] = self.images.dims();
        let net = self.computing.module(self.net());
        let listed = net.saved_for_backward(batch, Network::IMAGE_SIZE);
        saved_bytes(listed.iter().map(|(_, kept)| kept))
    }
}
