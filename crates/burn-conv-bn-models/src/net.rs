use burn::config::Config;
use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::tensor::activation::{log_softmax, relu};
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{
    Activation, ConvBn2d, ConvBn2dConfig, MaxPool2d, MaxPool2dConfig, NormVariant, Recompute,
};

use crate::Form;
use crate::head::rows;
use crate::walk::Walk;

/// Configuration of [`Net`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{Form, NetConfig};
///
/// let config = NetConfig::new(Form::Fused).with_channels([8, 16]);
/// assert_eq!(config.classes, 10);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct NetConfig {
    /// How the blocks run.
    pub form: Form,
    /// The norm of both blocks, not affine and without running statistics. Default: Burn's.
    #[config(default = "NormVariant::BatchNorm")]
    pub norm: NormVariant,
    /// Output channels of the two blocks. Default: the tutorial's 32 and 64.
    #[config(default = "[32, 64]")]
    pub channels: [usize; 2],
    /// Height and width of the images; at least 6. Default: 28.
    #[config(default = 28)]
    pub image_size: usize,
    /// Width of the hidden linear layer. Default: 128.
    #[config(default = 128)]
    pub hidden: usize,
    /// Number of classes. Default: 10.
    #[config(default = 10)]
    pub classes: usize,
    /// Probability with which the hidden layer's values are dropped in training. Default: 0.5.
    #[config(default = 0.5)]
    pub dropout: f64,
}

/// The network of the PyTorch tutorial "Fusing Convolution and Batch Norm using Custom
/// Function": two 3x3 conv -> batch norm -> ReLU blocks without bias, scale, shift or running
/// statistics, a 2x2 max pool, and two linear layers with dropout between them.
///
/// It evaluates on the batch's statistics, as the tutorial's does. The tutorial applies ReLU once
/// more after the pool, in place: a maximum of values that are not negative is not negative, so
/// that is left out here, in both forms.
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{Form, NetConfig};
///
/// let device = Device::flex().autodiff();
/// let net = NetConfig::new(Form::Fused).with_hidden(16).init(&device);
/// let images = Tensor::<4>::random([4, 1, 28, 28], Distribution::Default, &device);
/// assert_eq!(net.forward(images).dims(), [4, 10]);
///
/// // What the second block keeps, and would keep as Burn's own layers.
/// let bytes = |form| -> usize {
///     let saved = net.clone().with_form(form);
///     let saved = saved.saved_for_backward([4, 1, 28, 28]);
///     let second = saved.iter().filter(|(block, _)| block == "conv2");
///     second.map(|(_, tensor)| tensor.bytes()).sum()
/// };
/// assert!(bytes(Form::Fused) < bytes(Form::Unfused) / 3);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct Net {
    /// First block, from 1 channel.
    pub conv1: ConvBn2d,
    /// Second block.
    pub conv2: ConvBn2d,
    /// Hidden linear layer.
    pub fc1: Linear,
    /// Between the linear layers.
    pub dropout: Dropout,
    /// Output linear layer.
    pub fc2: Linear,
    #[module(skip)]
    pub(crate) form: Form,
}

impl NetConfig {
    /// Epsilon of the norm: the tutorial's own for its variant, otherwise Burn's and PyTorch's.
    pub fn epsilon(&self) -> f64 {
        match self.norm {
            NormVariant::BatchNorm => 1e-5,
            NormVariant::Tutorial => 1e-3,
        }
    }

    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> Net {
        assert!(
            self.image_size >= 6,
            "images must be at least 6 pixels wide, got {}",
            self.image_size
        );
        let [first, second] = self.channels;
        let block = |channels| {
            ConvBn2dConfig::new(channels, [3, 3])
                .with_epsilon(self.epsilon())
                .with_norm_variant(self.norm)
                .with_affine(false)
                .with_track_running_stats(false)
                .with_activation(Activation::Relu)
                .init(device)
        };
        let pooled = (self.image_size - 4) / 2;
        Net {
            conv1: block([1, first]),
            conv2: block([first, second]),
            fc1: LinearConfig::new(second * pooled * pooled, self.hidden).init(device),
            dropout: DropoutConfig::new(self.dropout).init(),
            fc2: LinearConfig::new(self.hidden, self.classes).init(device),
            form: self.form,
        }
    }
}

impl Net {
    /// Log-probabilities of the classes.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, 1, image_size, image_size]`
    /// - output: `[batch, classes]`
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.form.forward(&self.conv1, images);
        let x = self.form.forward_max_pool(&self.conv2, x, &pool());
        let x = self.fc1.forward(rows(x, &self.fc1));
        let x = relu(self.dropout.forward(x));
        log_softmax(self.fc2.forward(x), 1)
    }

    /// Sets [`Recompute::Norm`] for the first block, and `ends` for the second, which is one op with the max pool
    /// behind.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        self.conv1.settings.recompute = Recompute::Norm;
        self.conv2.settings.recompute = ends;
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, images: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, images, &self.conv1);
        walk.block("conv1", &self.conv1);
        walk.block_max_pool("conv2", &self.conv2, &pool());
        walk.rows(&self.fc1);
        walk.linear("fc1", &self.fc1);
        walk.dropout(&self.dropout);
        walk.relu();
        walk.linear("fc2", &self.fc2);
        walk.log_softmax();
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        vec![
            ("conv1".to_owned(), &mut self.conv1),
            ("conv2".to_owned(), &mut self.conv2),
        ]
    }
}

/// Behind the second block.
fn pool() -> MaxPool2d {
    MaxPool2dConfig::new([2, 2]).init()
}
