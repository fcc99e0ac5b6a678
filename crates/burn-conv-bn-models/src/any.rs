use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};
use burn_conv_bn::{FoldError, Recompute, SavedTensor};

use crate::{CspDarknet, DenseNet, EfficientNet, Form, MobileNetV2, Net, ResNet, Vgg};

macro_rules! networks {
    ($($(#[doc = $about:literal])* $name:ident($network:ident),)*) => {
        /// One of this crate's networks, for a program that chooses it as it runs.
        ///
        /// ```
        /// # #[cfg(feature = "flex")] {
        /// use burn::tensor::{Device, Tensor};
        /// use burn_conv_bn_models::{AnyNetwork, Form, NetConfig};
        ///
        /// let device = Device::flex();
        /// let network = AnyNetwork::from(NetConfig::new(Form::Fused).init(&device));
        /// assert_eq!(network.forward(Tensor::zeros([2, 1, 28, 28], &device)).dims(), [2, 10]);
        /// # }
        /// ```
        #[allow(clippy::large_enum_variant, reason = "there are few at a time")]
        #[derive(Module, Debug)]
        pub enum AnyNetwork {
            $($(#[doc = $about])* $name($network),)*
        }

        impl AnyNetwork {
            /// How the blocks run.
            pub fn form(&self) -> Form {
                match self { $(Self::$name(network) => network.form(),)* }
            }

            /// The same network, with the same tensors, in another form.
            #[must_use]
            pub fn with_form(self, form: Form) -> Self {
                match self { $(Self::$name(network) => network.with_form(form).into(),)* }
            }

            /// The network with [`Recompute::Norm`] inside its chains of blocks and `ends` at their ends; see
            /// [`ResNet::with_rebuilt_chains`] and its like.
            #[must_use]
            pub fn with_rebuilt_chains(self, ends: Recompute) -> Self {
                match self { $(Self::$name(network) => network.with_rebuilt_chains(ends).into(),)* }
            }

            /// The network for evaluation, with norms folded into their convolutions; see [`ResNet::folded`] and
            /// its like.
            ///
            /// # Errors
            ///
            /// As the network's own.
            pub fn folded(&self) -> Result<Self, FoldError> {
                Ok(match self { $(Self::$name(network) => network.folded()?.into(),)* })
            }

            /// What a training step on images of that shape keeps for the backward pass; see
            /// [`ResNet::saved_for_backward`] and its like.
            ///
            /// # Panics
            ///
            /// As [`forward`](Self::forward), for the shape.
            pub fn saved_for_backward(&self, input_shape: [usize; 4]) -> Vec<(String, SavedTensor)> {
                match self { $(Self::$name(network) => network.walk(input_shape).into_saved(),)* }
            }
        }

        $(
            impl From<$network> for AnyNetwork {
                fn from(network: $network) -> Self {
                    Self::$name(network)
                }
            }
        )*
    };
}

networks! {
    /// The tutorial's.
    Tutorial(Net),
    /// A residual network.
    ResNet(ResNet),
    /// VGG with batch norm.
    Vgg(Vgg),
    /// MobileNetV2.
    MobileNetV2(MobileNetV2),
    /// EfficientNet.
    EfficientNet(EfficientNet),
    /// DenseNet.
    DenseNet(DenseNet),
    /// YOLOX's backbone.
    CspDarknet(CspDarknet),
}

impl AnyNetwork {
    /// Scores, `[batch, classes]`: the tutorial's log-probabilities, others' logits, and of [`CspDarknet`] the
    /// means of its three outputs' channels, in f32.
    ///
    /// # Panics
    ///
    /// As the network's own, for the shape of `images`.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        match self {
            Self::Tutorial(network) => network.forward(images),
            Self::ResNet(network) => network.forward(images),
            Self::Vgg(network) => network.forward(images),
            Self::MobileNetV2(network) => network.forward(images),
            Self::EfficientNet(network) => network.forward(images),
            Self::DenseNet(network) => network.forward(images),
            Self::CspDarknet(network) => {
                let means = network.forward(images).map(|map| {
                    let means = map.mean_dim(3).mean_dim(2);
                    means.flatten::<2>(1, 3).cast(FloatDType::F32)
                });
                Tensor::cat(means.to_vec(), 1)
            }
        }
    }
}
