//! Changes to every layer of a model at once.

use std::collections::HashSet;
use std::rc::Rc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, FloatDType, Tensor};

use super::error::or_panic;
use super::settings::{Edit, take_visited};
use super::{ConvBnSettings, RunningVariance};
use crate::spec::{ConvBnError, Recompute};

/// Changes to every fused layer of a module, which may be a whole model or a layer itself.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{DType, Device, FloatDType};
/// use burn_conv_bn::{ConvBn2dConfig, ConvBnModule, Recompute};
///
/// let device = Device::flex();
/// // Any module will do, such as a model with layers among its fields.
/// let model = vec![
///     ConvBn2dConfig::new([3, 8], [3, 3]).init(&device),
///     ConvBn2dConfig::new([8, 8], [3, 3]).init(&device),
/// ];
/// let model = model
///     .with_recompute(Recompute::Never)
///     .with_precision(FloatDType::BF16);
/// assert_eq!(model[1].settings.recompute, Recompute::Never);
/// assert_eq!(model[1].conv.weight.val().dtype(), DType::BF16);
/// assert_eq!(model[1].norm.gamma.val().dtype(), DType::F32);
/// # }
/// ```
pub trait ConvBnModule: Module {
    /// Changes the settings of every fused layer.
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::Device;
    /// use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig, ConvBnModule};
    ///
    /// let device = Device::flex();
    /// let blocks = vec![ConvBn2dConfig::new([3, 8], [3, 3]).init(&device)];
    /// let blocks = blocks.map_settings(|settings| settings.activation = Activation::Silu);
    /// assert_eq!(blocks[0].settings.activation, Activation::Silu);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Panics with [`ConvBnError::NoLayer`] if the module has no fused layer, as a model whose blocks are
    /// [`fuse`](crate::fuse) calls; and so do the methods below that set one thing.
    #[must_use]
    #[track_caller]
    fn map_settings(self, change: impl Fn(&mut ConvBnSettings) + 'static) -> Self {
        require_layers(&self);
        let _restored = Edit::begin(Rc::new(change));
        self.map(&mut KeepParameters)
    }

    /// Sets whether every fused layer keeps or recomputes its convolution's output.
    #[must_use]
    #[track_caller]
    fn with_recompute(self, recompute: Recompute) -> Self {
        self.map_settings(move |settings| settings.recompute = recompute)
    }

    /// Bounds the backward workspace of every fused layer, in bytes; see
    /// [`ConvBnOptions::max_workspace`](crate::ConvBnOptions::max_workspace).
    #[must_use]
    #[track_caller]
    fn with_max_workspace(self, max_workspace: Option<usize>) -> Self {
        self.map_settings(move |settings| settings.max_workspace = max_workspace)
    }

    /// Sets which variance of a batch goes into the running variances.
    #[must_use]
    #[track_caller]
    fn with_running_variance(self, running_variance: RunningVariance) -> Self {
        self.map_settings(move |settings| settings.running_variance = running_variance)
    }

    /// Mixed precision: casts every float parameter to `dtype`, except those of batch norms, whose
    /// running statistics would underflow in f16: a norm in f16 or bf16, as from a file in half, goes to f32.
    ///
    /// With f16 or bf16 a fused layer then takes its input in that dtype, and keeps statistics,
    /// sums and the norm's parameters and gradients in f32. Cast the model's input with
    /// [`Tensor::cast`]; each gradient has its parameter's dtype. [`autocast`](Self::autocast)
    /// leaves the weights themselves as they are.
    #[must_use]
    fn with_precision(self, dtype: FloatDType) -> Self {
        self.map(&mut Precision {
            dtype,
            batch_norms: 0,
        })
    }

    /// Mixed precision with master weights: the module for one forward pass, with the weights and
    /// biases of every fused layer's convolution cast to `dtype`.
    ///
    /// The casts are part of the graph. Gradients arrive at this module's own parameters, in their
    /// dtype, and an optimizer that steps this module loses no small update to rounding. Running
    /// statistics are those of this module, as they are of every clone, and a training step moves
    /// them.
    ///
    /// Norms and layers that are not fused stay as they are: cast the input of the first fused layer and
    /// the output of the last with [`Tensor::cast`].
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::{DType, Device, Distribution, FloatDType, Tensor};
    /// use burn_conv_bn::{ConvBn2dConfig, ConvBnModule};
    ///
    /// let device = Device::flex().autodiff();
    /// let block = ConvBn2dConfig::new([3, 8], [3, 3]).init(&device);
    /// let x = Tensor::<4>::random([2, 3, 16, 16], Distribution::Default, &device);
    ///
    /// let y = block.autocast(FloatDType::BF16).forward(x.cast(DType::BF16));
    /// assert_eq!(y.dtype(), DType::BF16);
    ///
    /// let grads = y.cast(DType::F32).mean().backward();
    /// let grad = block.conv.weight.val().grad(&grads).unwrap();
    /// assert_eq!(grad.dtype(), DType::F32);
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// As [`map_settings`](Self::map_settings).
    #[must_use]
    #[track_caller]
    fn autocast(&self, dtype: FloatDType) -> Self {
        let convolutions = require_layers(self).into_iter().map(|(mut path, _)| {
            path.push("conv".to_string());
            path
        });
        self.clone().map(&mut Autocast {
            dtype,
            convolutions: convolutions.collect(),
            path: Vec::new(),
        })
    }

    /// Paths of what the module's fused layers hold and do not use: `norm.gamma` and `norm.beta` of a
    /// layer that is not affine, `norm.running_mean` and `norm.running_var` of one without running
    /// statistics. Variants of enums are part of a path.
    ///
    /// A file of PyTorch lacks just these. A store of burn-store that allows partial loads lists what was
    /// missing: it should be nothing else. `docs/migration.md` has the code.
    ///
    /// ```
    /// # #[cfg(feature = "flex")] {
    /// use burn::tensor::Device;
    /// use burn_conv_bn::{ConvBn2dConfig, ConvBnModule};
    ///
    /// let config = ConvBn2dConfig::new([3, 8], [3, 3]);
    /// let device = Device::flex();
    /// let model = vec![config.init(&device), config.with_affine(false).init(&device)];
    /// assert_eq!(model.unused_parameters(), ["1.norm.gamma", "1.norm.beta"]);
    /// # }
    /// ```
    fn unused_parameters(&self) -> Vec<String> {
        let mut unused = Vec::new();
        for (path, settings) in layers(self) {
            let mut add = |names: [&str; 2]| {
                for name in names {
                    let path = path.iter().map(String::as_str);
                    let path: Vec<&str> = path.chain(["norm", name]).collect();
                    unused.push(path.join("."));
                }
            };
            if !settings.affine {
                add(["gamma", "beta"]);
            }
            if !settings.track_running_stats {
                add(["running_mean", "running_var"]);
            }
        }
        unused
    }
}

impl<M: Module> ConvBnModule for M {}

/// Path and settings of every fused layer of a module.
fn layers<M: Module>(module: &M) -> Vec<(Vec<String>, ConvBnSettings)> {
    let mut layers = Layers::default();
    take_visited();
    module.visit(&mut layers);
    layers.found
}

/// As [`layers`]; panics if there is none.
#[track_caller]
fn require_layers<M: Module>(module: &M) -> Vec<(Vec<String>, ConvBnSettings)> {
    let layers = layers(module);
    or_panic(if layers.is_empty() {
        Err(ConvBnError::NoLayer)
    } else {
        Ok(layers)
    })
}

#[derive(Default)]
struct Layers {
    path: Vec<String>,
    found: Vec<(Vec<String>, ConvBnSettings)>,
}

impl ModuleVisitor for Layers {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    // A layer has settings among its fields; a user's struct of the same name has none.
    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.pop();
        let settings = take_visited();
        if let Some(settings) = settings.filter(|_| FUSED.contains(&container_type)) {
            self.found.push((self.path.clone(), settings));
        }
    }
}

struct KeepParameters;

impl ModuleMapper for KeepParameters {}

struct Precision {
    dtype: FloatDType,
    /// How many batch norms are being mapped: 0 or 1.
    batch_norms: usize,
}

impl ModuleMapper for Precision {
    fn enter_module(&mut self, _name: &str, container_type: &str) {
        self.batch_norms += usize::from(container_type == BATCH_NORM);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.batch_norms -= usize::from(container_type == BATCH_NORM);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let is_norms = self.batch_norms > 0;
        let dtype = if is_norms {
            FloatDType::F32
        } else {
            self.dtype
        };
        param.map(|tensor| {
            if is_norms && !matches!(tensor.dtype(), DType::F16 | DType::BF16) {
                return tensor;
            }
            let tracked = tensor.is_require_grad();
            tensor.cast(dtype).detach().set_require_grad(tracked)
        })
    }
}

const BATCH_NORM: &str = "Struct:BatchNorm";

struct Autocast {
    dtype: FloatDType,
    /// Paths of the fused layers' convolutions.
    convolutions: HashSet<Vec<String>>,
    path: Vec<String>,
}

impl ModuleMapper for Autocast {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let is_within = |depth| self.convolutions.contains(&self.path[..depth]);
        if !(0..self.path.len()).any(is_within) {
            return param;
        }
        let dtype = self.dtype;
        // Not detached: the cast leads the gradient back to the parameter.
        param.map(|tensor| tensor.cast(dtype))
    }
}

const FUSED: [&str; 4] = [
    "Struct:BatchNormActivation",
    "Struct:ConvBn1d",
    "Struct:ConvBn2d",
    "Struct:ConvBn3d",
];
