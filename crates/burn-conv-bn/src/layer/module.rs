//! Changes to every layer of a model at once.

use std::cell::RefCell;
use std::rc::Rc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{FloatDType, Tensor};

use super::{ConvBnSettings, RunningVariance};
use crate::definition::Recompute;

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
    #[must_use]
    fn map_settings(self, change: impl Fn(&mut ConvBnSettings) + 'static) -> Self {
        let _restored = Edit::begin(Rc::new(change));
        self.map(&mut KeepParameters)
    }

    /// Sets whether every fused layer keeps or recomputes its convolution's output.
    #[must_use]
    fn with_recompute(self, recompute: Recompute) -> Self {
        self.map_settings(move |settings| settings.recompute = recompute)
    }

    /// Bounds the backward workspace of every fused layer, in bytes; see
    /// [`ConvBnOptions::max_workspace`](crate::ConvBnOptions::max_workspace).
    #[must_use]
    fn with_max_workspace(self, max_workspace: Option<usize>) -> Self {
        self.map_settings(move |settings| settings.max_workspace = max_workspace)
    }

    /// Sets which variance of a batch goes into the running variances.
    #[must_use]
    fn with_running_variance(self, running_variance: RunningVariance) -> Self {
        self.map_settings(move |settings| settings.running_variance = running_variance)
    }

    /// Mixed precision: casts every float parameter to `dtype`, but for those of batch norms,
    /// which stay as they are and whose running statistics would underflow in f16.
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
    /// Norms stay as they are, and so does all that is not a fused layer: cast with
    /// [`Tensor::cast`] what goes into the first fused layer, and what goes from the last one into
    /// others.
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
    #[must_use]
    fn autocast(&self, dtype: FloatDType) -> Self {
        self.clone().map(&mut Autocast {
            dtype,
            convolutions: 0,
        })
    }
}

impl<M: Module> ConvBnModule for M {}

type Change = Rc<dyn Fn(&mut ConvBnSettings)>;

thread_local! {
    // Burn's mappers reach parameters only. What is to happen to the settings travels beside
    // them, for as long as the map of one model runs.
    static CURRENT: RefCell<Option<Change>> = const { RefCell::new(None) };
}

/// The current change, until dropped.
struct Edit {
    outer: Option<Change>,
}

impl Edit {
    fn begin(change: Change) -> Self {
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

/// Applies the current change, if a model is being changed.
pub(super) fn edit(settings: &mut ConvBnSettings) {
    let change = CURRENT.with_borrow(Clone::clone);
    if let Some(change) = change {
        change(settings);
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
        if self.batch_norms > 0 {
            return param;
        }
        let dtype = self.dtype;
        param.map(|tensor| {
            let tracked = tensor.is_require_grad();
            tensor.cast(dtype).detach().set_require_grad(tracked)
        })
    }
}

const BATCH_NORM: &str = "Struct:BatchNorm";

struct Autocast {
    dtype: FloatDType,
    /// How many convolutions of fused layers are being mapped: 0 or 1.
    convolutions: usize,
}

impl ModuleMapper for Autocast {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.convolutions += usize::from(is_convolution(name, container_type));
    }

    fn exit_module(&mut self, name: &str, container_type: &str) {
        self.convolutions -= usize::from(is_convolution(name, container_type));
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.convolutions == 0 {
            return param;
        }
        let dtype = self.dtype;
        // Not detached: the cast leads the gradient back to the parameter.
        param.map(|tensor| tensor.cast(dtype))
    }
}

/// Whether a field is the convolution of a fused layer.
fn is_convolution(name: &str, container_type: &str) -> bool {
    name == "conv" && FUSED.contains(&container_type)
}

const FUSED: [&str; 3] = ["Struct:ConvBn1d", "Struct:ConvBn2d", "Struct:ConvBn3d"];
