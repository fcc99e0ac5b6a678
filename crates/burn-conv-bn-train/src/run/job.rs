//! A training run as data.

use burn::module::Module;
use burn::tensor::Device;
use burn_conv_bn::{ConvBnModule, NormVariant, Recompute};
use burn_conv_bn_models::{AnyNetwork, Form};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::choice::Choice;
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

/// Everything that decides the result of a run, the same for all variants. As JSON, options of the command
/// line by their long names; those that `parity` has not may be absent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Which data, and the seed.
    #[serde(flatten)]
    pub data: DataRequest,
    /// Epochs.
    #[serde(default)]
    pub epochs: usize,
    /// Digits a step.
    pub batch_size: usize,
    /// Which network.
    pub model: ModelChoice,
    /// Which optimizer.
    pub optimizer: OptimizerChoice,
    /// Learning rate of the first epoch.
    #[serde(rename = "lr")]
    pub learning_rate: f64,
    /// Factor on it after every epoch.
    #[serde(default, rename = "gamma")]
    pub decay: f64,
    /// Which batch norm.
    pub norm: Norm,
    /// Probability of dropping a hidden value.
    #[serde(default)]
    pub dropout: f64,
    /// Types of activations and parameters.
    pub precision: Precision,
    /// What fused blocks do with the convolution's output.
    pub recompute: RecomputePolicy,
    /// Where it is computed.
    pub device: DeviceChoice,
    /// Bound on the fused blocks' workspace, in bytes.
    pub max_workspace: Option<usize>,
    /// Print the loss of every so many batches; never if 0.
    #[serde(default)]
    pub log_interval: usize,
}

impl Job {
    /// The device, with autodiff.
    ///
    /// # Panics
    ///
    /// Panics where [`DeviceChoice::open`] is an error.
    pub fn device(&self) -> Device {
        let device = self.device.open();
        device.unwrap_or_else(|error| panic!("{error}")).autodiff()
    }

    /// The job of some options.
    pub(crate) fn of(options: &Options) -> anyhow::Result<Self> {
        Ok(serde_json::from_value(Value::Object(options.clone()))?)
    }

    /// Checks that there is such a network, and such a device, which computes in the job's precision.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.device.open_for(self.precision)?;
        self.model.check(self.norm.variant(), self.dropout)
    }

    /// Checks the job, and finds its data, which it names on standard output.
    pub(crate) fn begin(&self) -> anyhow::Result<MnistData> {
        self.check()?;
        let data = self.data()?;
        say!("Data: {}", data.origin)?;
        if self.precision.is_mixed() {
            say!("Precision: {}", self.precision.describe())?;
        }
        if let Some(notice) = self.device.tuning_notice(cfg!(feature = "autotune")) {
            say!("{notice}")?;
        }
        self.model
            .check_batches(data.train.len(), self.batch_size)?;
        Ok(data)
    }

    /// Training steps an epoch, on that many digits.
    pub(crate) fn steps(&self, digits: usize) -> usize {
        digits.div_ceil(self.batch_size)
    }

    /// Finds the data.
    ///
    /// # Errors
    ///
    /// If they are not found or not sound.
    pub fn data(&self) -> anyhow::Result<MnistData> {
        resolve(&self.data)
    }

    /// A report on these data, without variants yet.
    pub(crate) fn report(&self, data: &MnistData) -> Report {
        Report {
            schema: SCHEMA,
            dataset: data.name.to_string(),
            train_digits: data.train.len(),
            test_digits: data.test.len(),
            device: self.device.name(),
            dtype: self.precision.dtype_name(),
            batch_size: self.batch_size,
            model: self.model.name(),
            optimizer: self.optimizer.name(),
            norm: self.norm.name(),
            seed: self.data.seed,
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
        drawn_on.seed(self.data.seed);
        // The dropout's draws are the device's own.
        device.seed(self.data.seed);
        let recompute = match self.recompute {
            RecomputePolicy::Conv => Recompute::Conv,
            RecomputePolicy::Norm => Recompute::Norm,
            RecomputePolicy::Never => Recompute::Never,
        };
        self.model
            .init(form, self.norm.variant(), self.dropout, &drawn_on)
            .fork(&device)
            .with_recompute(recompute)
            .with_max_workspace(self.max_workspace)
    }

    /// The network in its initial state, ready to be trained.
    pub fn classifier(&self, variant: Variant, probe: MemoryProbe) -> Classifier {
        let mut network = self.network(variant.form());
        if variant == Variant::NormConv {
            network = network.with_rebuilt_chains(Recompute::Conv);
        }
        Classifier::new(network, probe, self.precision)
    }

    /// Bytes of the tensors that a step of `batch_size` digits keeps for its backward pass, each once, as
    /// the network lists them: without digits, parameters and casts of these.
    pub fn saved_bytes(&self, variant: Variant) -> usize {
        let network = self.classifier(variant, MemoryProbe::off()).computing();
        let saved = saved_for_backward(&network, self.batch_size);
        let own = saved.iter().filter(|(_, tensor)| !tensor.shared);
        own.map(|(_, tensor)| tensor.bytes()).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests;
