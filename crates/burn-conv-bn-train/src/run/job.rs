//! A training run as data.

use burn::module::Module;
use burn::tensor::Device;
use burn_conv_bn::{ConvBnModule, NormVariant, Recompute};
use burn_conv_bn_models::{AnyNetwork, Form};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::choice::{Choice, ON_COMPUTATION, ON_DATA, ON_NETWORK, ON_OUTPUT, ON_TRAINING, finite};
use crate::data::{DataRequest, MnistData, resolve};
use crate::device::DeviceChoice;
use crate::measure::memory::MemoryProbe;
use crate::measure::report::{BURN_VERSION, Report, SCHEMA};
use crate::model::{ModelChoice, saved_for_backward};
use crate::optim::OptimizerChoice;
use crate::persist::run_file::Options;
pub use crate::precision::Precision;
use crate::print::say;
use crate::step::Classifier;

/// Which form of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Each block one op that recomputes its convolution.
    Fused,
    /// Burn's own convolution, batch norm and ReLU.
    Unfused,
    /// Fused, with the outputs inside chains of blocks rebuilt from convolutions' outputs: as few bytes,
    /// and fewer convolutions recomputed.
    NormConv,
}

impl Variant {
    /// What a comparison trains.
    pub(crate) const TRAINED: [Self; 2] = [Self::Fused, Self::Unfused];

    /// In the order of a comparison.
    pub(crate) const ALL: [Self; 3] = [Self::Fused, Self::Unfused, Self::NormConv];

    pub(crate) fn form(self) -> Form {
        match self {
            Self::Fused | Self::NormConv => Form::Fused,
            Self::Unfused => Form::Unfused,
        }
    }
}

/// Which batch norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Burn's and PyTorch's: biased variance, epsilon under the root.
    Burn,
    /// The tutorial's: unbiased variance, epsilon outside the root.
    Tutorial,
}

impl Norm {
    pub(crate) fn variant(self) -> NormVariant {
        match self {
            Self::Burn => NormVariant::BatchNorm,
            Self::Tutorial => NormVariant::Tutorial,
        }
    }
}

/// What fused blocks do with the convolution's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputePolicy {
    /// Recompute it in the backward pass.
    Conv,
    /// Keep it, and rebuild the blocks' outputs from it.
    Norm,
    /// Keep it.
    Never,
}

/// Options of every job.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Setup {
    /// Which network. Torchvision's take one channel, and digits padded with black to 32x32.
    #[arg(long, value_enum, default_value = "tutorial", help_heading = ON_NETWORK)]
    pub model: ModelChoice,
    /// Batch norm: Burn's, or the tutorial's (unbiased variance, epsilon outside the root).
    #[arg(long, value_enum, default_value = "burn", help_heading = ON_NETWORK)]
    pub norm: Norm,
    /// Which optimizer.
    #[arg(long, value_enum, default_value = "adadelta", help_heading = ON_TRAINING)]
    pub optimizer: OptimizerChoice,
    /// Learning rate of the first epoch [default: 1 for adadelta, 0.001 for adam and adamw, 0.05
    /// for sgd].
    #[arg(long, value_name = "RATE", value_parser = finite, help_heading = ON_TRAINING)]
    pub lr: Option<f64>,
    /// Digits a step.
    #[arg(long, value_name = "N", default_value_t = 2048, help_heading = ON_TRAINING)]
    pub batch_size: usize,
    #[command(flatten)]
    #[serde(flatten)]
    #[allow(missing_docs, reason = "it would be the help of the command")]
    pub data: DataRequest,
    /// Device. Each needs Burn's feature of the same name in this build.
    #[arg(long, value_enum, default_value = "flex", help_heading = ON_COMPUTATION)]
    pub device: DeviceChoice,
    /// Element type. f16 and bf16 are mixed precision: convolutions and saved tensors in that type;
    /// parameters, norms, linear layers and checkpoints in f32.
    #[arg(long, value_enum, default_value = "f32", help_heading = ON_COMPUTATION)]
    pub precision: Precision,
    /// CPU threads [default: one per hardware thread].
    #[arg(long, value_name = "N", help_heading = ON_COMPUTATION)]
    pub threads: Option<usize>,
    /// Whether fused blocks recompute the convolution's output in the backward pass, or keep it.
    #[arg(long, value_enum, default_value = "conv", help_heading = ON_COMPUTATION)]
    pub recompute: RecomputePolicy,
    /// Most bytes of workspace in the backward pass of a fused block.
    #[arg(long, value_name = "BYTES", help_heading = ON_COMPUTATION)]
    pub max_workspace: Option<usize>,
}

/// Options of full trainings alone.
#[derive(Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Learning {
    /// Probability of dropping a hidden value [default: 0.5 for tutorial and vgg16-bn, 0.2 for
    /// mobilenet-v2 and efficientnet-b0; the others have no dropout].
    #[arg(long, value_name = "P", value_parser = finite, help_heading = ON_NETWORK)]
    pub dropout: Option<f64>,
    /// Factor on the learning rate after every epoch.
    #[arg(long, value_name = "FACTOR", default_value_t = 0.7, value_parser = finite, help_heading = ON_TRAINING)]
    pub gamma: f64,
    /// Test on the first N digits only.
    #[arg(long, value_name = "N", help_heading = ON_DATA)]
    pub test_limit: Option<usize>,
    /// Print the loss of every so many batches; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = ON_OUTPUT)]
    pub log_interval: usize,
}

/// Everything that decides the result of a run, the same for all variants: options of the command line, in JSON by
/// their long names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Epochs.
    #[serde(default)]
    pub epochs: usize,
    /// Of every job.
    #[serde(flatten)]
    pub setup: Setup,
    /// Of full trainings.
    #[serde(flatten)]
    pub learning: Learning,
}

impl Setup {
    /// The learning rate of the first epoch.
    pub fn learning_rate(&self) -> f64 {
        self.lr.unwrap_or(self.optimizer.default_learning_rate())
    }
}

impl Job {
    /// The device, with autodiff.
    ///
    /// # Panics
    ///
    /// Panics where [`DeviceChoice::open`] is an error.
    pub fn device(&self) -> Device {
        let device = self.setup.device.open();
        device.unwrap_or_else(|error| panic!("{error}")).autodiff()
    }

    /// The job of some options.
    pub(crate) fn of(options: &Options) -> anyhow::Result<Self> {
        Ok(serde_json::from_value(Value::Object(options.clone()))?)
    }

    /// Checks that there is such a network, and such a device, which computes in the job's precision.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.setup.device.open_for(self.setup.precision)?;
        self.setup
            .model
            .check(self.setup.norm.variant(), self.dropout())
    }

    /// Checks the job, and finds its data, which it names on standard output.
    pub(crate) fn begin(&self) -> anyhow::Result<MnistData> {
        self.check()?;
        let data = self.data()?;
        say!("Data: {}", data.origin)?;
        if self.setup.precision.is_mixed() {
            say!("Precision: {}", self.setup.precision.describe())?;
        }
        if let Some(notice) = self.setup.device.tuning_notice(cfg!(feature = "autotune")) {
            say!("{notice}")?;
        }
        self.setup
            .model
            .check_batches(data.train.len(), self.setup.batch_size)?;
        Ok(data)
    }

    /// Of a hidden value; 0 where the job has no such option.
    fn dropout(&self) -> f64 {
        self.learning.dropout.unwrap_or_default()
    }

    /// Training steps an epoch, on that many digits.
    pub(crate) fn steps(&self, digits: usize) -> usize {
        digits.div_ceil(self.setup.batch_size)
    }

    /// Finds the data.
    ///
    /// # Errors
    ///
    /// If they are not found or not sound.
    pub fn data(&self) -> anyhow::Result<MnistData> {
        resolve(&self.setup.data, self.learning.test_limit)
    }

    /// A report on these data, without variants yet.
    pub(crate) fn report(&self, data: &MnistData) -> Report {
        Report {
            schema: SCHEMA,
            dataset: data.name.to_string(),
            train_digits: data.train.len(),
            test_digits: data.test.len(),
            device: self.setup.device.name(),
            dtype: self.setup.precision.dtype_name(),
            batch_size: self.setup.batch_size,
            model: self.setup.model.name(),
            optimizer: self.setup.optimizer.name(),
            norm: self.setup.norm.name(),
            seed: self.setup.data.seed,
            threads: rayon::current_num_threads(),
            burn_version: BURN_VERSION.to_string(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            variants: Vec::new(),
        }
    }

    /// A network in its initial state: the same for all variants, and, where Flex was compiled
    /// in, on all devices.
    pub(crate) fn network(&self, form: Form) -> AnyNetwork {
        let device = self.device();
        let host = DeviceChoice::host().and_then(|host| host.open().ok());
        let drawn_on = host.map_or(device.clone(), Device::autodiff);
        drawn_on.seed(self.setup.data.seed);
        // The dropout's draws are the device's own.
        device.seed(self.setup.data.seed);
        let recompute = match self.setup.recompute {
            RecomputePolicy::Conv => Recompute::Conv,
            RecomputePolicy::Norm => Recompute::Norm,
            RecomputePolicy::Never => Recompute::Never,
        };
        self.setup
            .model
            .init(form, self.setup.norm.variant(), self.dropout(), &drawn_on)
            .fork(&device)
            .with_recompute(recompute)
            .with_max_workspace(self.setup.max_workspace)
    }

    /// The network in its initial state, ready to be trained.
    pub fn classifier(&self, variant: Variant, probe: MemoryProbe) -> Classifier {
        let mut network = self.network(variant.form());
        if variant == Variant::NormConv {
            network = network.with_rebuilt_chains(Recompute::Conv);
        }
        Classifier::new(network, probe, self.setup.precision)
    }

    /// Bytes of the tensors that a step of `batch_size` digits keeps for its backward pass, each once, as
    /// the network lists them: without digits, parameters and casts of these.
    pub fn saved_bytes(&self, variant: Variant) -> usize {
        let network = self.classifier(variant, MemoryProbe::off()).computing();
        let saved = saved_for_backward(&network, self.setup.batch_size);
        let own = saved.iter().filter(|(_, tensor)| !tensor.shared);
        own.map(|(_, tensor)| tensor.bytes()).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests;
