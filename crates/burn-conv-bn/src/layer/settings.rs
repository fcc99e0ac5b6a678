use std::cell::RefCell;
use std::rc::Rc;

use burn::config::Config;
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::Device;

use crate::spec::{Activation, NormVariant, Recompute};

/// Which variance of a batch goes into the running variance.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::Device;
/// use burn_conv_bn::{ConvBn2dConfig, RunningVariance};
///
/// let block = ConvBn2dConfig::new([3, 8], [3, 3])
///     .with_running_variance(RunningVariance::Unbiased)
///     .init(&Device::flex());
/// assert_eq!(block.settings.running_variance, RunningVariance::Unbiased);
/// # }
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub enum RunningVariance {
    /// Over the number of values, as Burn does.
    Biased,
    /// Over one less, as PyTorch does.
    Unbiased,
}

/// What a fused layer does besides what its convolution and norm say: the part that is not in a
/// record.
///
/// [`ConvBnModule`](crate::ConvBnModule) changes it in every layer of a model.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::nn::BatchNormConfig;
/// use burn::nn::conv::Conv2dConfig;
/// use burn::tensor::Device;
/// use burn_conv_bn::{Activation, ConvBn2d, ConvBnSettings, Recompute};
///
/// let device = Device::flex();
/// let conv = Conv2dConfig::new([3, 8], [3, 3]).init(&device);
/// let norm = BatchNormConfig::new(8).init(&device);
/// let mut settings = ConvBnSettings::new(Activation::Silu);
/// settings.recompute = Recompute::Never;
/// let block = ConvBn2d::with_settings(conv, norm, settings);
/// assert_eq!(block.settings.activation, Activation::Silu);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConvBnSettings {
    /// Applied last.
    pub activation: Activation,
    /// How the norm is formed.
    pub norm_variant: NormVariant,
    /// Whether gamma and beta take part. Where they do not, they get no gradient.
    pub affine: bool,
    /// Whether running statistics are kept and used in evaluation. Without, evaluation and a
    /// frozen norm use the batch's.
    pub track_running_stats: bool,
    /// Which variance goes into the running variance.
    pub running_variance: RunningVariance,
    /// Whether the convolution's output is kept or recomputed.
    pub recompute: Recompute,
    /// As [`ConvBnOptions::max_workspace`](crate::ConvBnOptions::max_workspace).
    pub max_workspace: Option<usize>,
}

impl ConvBnSettings {
    /// An affine Burn batch norm with tracked statistics, recomputed without a bound.
    pub fn new(activation: Activation) -> Self {
        Self {
            activation,
            norm_variant: NormVariant::BatchNorm,
            affine: true,
            track_running_stats: true,
            running_variance: RunningVariance::Biased,
            recompute: Recompute::Conv,
            max_workspace: None,
        }
    }

    /// Adds what differs from the defaults, and what a reader looks for first.
    pub(super) fn describe(&self, content: Content) -> Content {
        let mut content = content
            .add_debug_attribute("activation", &self.activation)
            .add_debug_attribute("recompute", &self.recompute);
        if self.norm_variant != NormVariant::BatchNorm {
            content = content.add_debug_attribute("norm_variant", &self.norm_variant);
        }
        if !self.affine {
            content = content.add("affine", &self.affine);
        }
        if !self.track_running_stats {
            content = content.add("track_running_stats", &self.track_running_stats);
        }
        if self.running_variance != RunningVariance::Biased {
            content = content.add_debug_attribute("running_variance", &self.running_variance);
        }
        if let Some(bytes) = self.max_workspace {
            content = content.add("max_workspace", &bytes);
        }
        content
    }
}

/// A module without parameters, which no record holds: being one lets an edit of a whole model
/// reach it.
impl Module for ConvBnSettings {
    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _device: &Device) -> Self {
        self
    }

    fn to_device(self, _device: &Device) -> Self {
        self
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<Visitor: ModuleVisitor>(&self, _visitor: &mut Visitor) {
        VISITED.set(Some(self.clone()));
    }

    fn map<Mapper: ModuleMapper>(mut self, _mapper: &mut Mapper) -> Self {
        if let Some(change) = CURRENT.with_borrow(Clone::clone) {
            change(&mut self);
        }
        self
    }
}

impl ModuleDisplayDefault for ConvBnSettings {
    fn content(&self, content: Content) -> Option<Content> {
        self.describe(content).optional()
    }
}

impl ModuleDisplay for ConvBnSettings {}

type Change = Rc<dyn Fn(&mut ConvBnSettings)>;

thread_local! {
    // Burn's mappers reach parameters only: a change to settings travels beside them while one model is
    // mapped.
    static CURRENT: RefCell<Option<Change>> = const { RefCell::new(None) };

    // The settings visited last, during the search for layers.
    static VISITED: RefCell<Option<ConvBnSettings>> = const { RefCell::new(None) };
}

/// A change to the settings of every layer that is mapped until it is dropped.
pub(super) struct Edit {
    outer: Option<Change>,
}

impl Edit {
    pub(super) fn begin(change: Change) -> Self {
        Self {
            outer: CURRENT.replace(Some(change)),
        }
    }
}

impl Drop for Edit {
    fn drop(&mut self) {
        CURRENT.set(self.outer.take());
    }
}

/// The settings visited last, once.
pub(super) fn take_visited() -> Option<ConvBnSettings> {
    VISITED.take()
}
