use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::PaddingConfig2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{DType, Shape, Tensor};

use super::convolution::{plane_padding, same_padding};
use super::error::or_panic;
use crate::functional::max_pool2d;
use crate::spec::{MaxPoolProblem, SavedTensor, check_window};

/// Configuration of [`MaxPool2d`], made by [`init`](Self::init).
///
/// Fields and defaults are those of Burn's `MaxPool2dConfig`.
///
/// # Examples
///
/// ```
/// use burn::config::Config;
/// use burn::nn::PaddingConfig2d;
/// use burn_conv_bn::MaxPool2dConfig;
///
/// // ResNet's.
/// let config = MaxPool2dConfig::new([3, 3])
///     .with_strides([2, 2])
///     .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1));
/// // As every configuration of Burn's, it prints as JSON and is read from it.
/// let copy = MaxPool2dConfig::load_binary(config.to_string().as_bytes()).unwrap();
/// assert_eq!(copy.strides, config.strides);
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct MaxPool2dConfig {
    /// Height and width of the window.
    pub kernel_size: [usize; 2],
    /// Steps between two windows. Default: the window's size.
    #[config(default = "kernel_size")]
    pub strides: [usize; 2],
    /// Padding of the input, which is never the maximum. Default: none.
    #[config(default = "PaddingConfig2d::Valid")]
    pub padding: PaddingConfig2d,
    /// Distance between two pixels of a window. Default: 1.
    #[config(default = "[1, 1]")]
    pub dilation: [usize; 2],
    /// Whether a last window that the padded input does not fill counts. Default: false.
    #[config(default = false)]
    pub ceil_mode: bool,
}

impl MaxPool2dConfig {
    /// Initializes a pool. It has no parameters.
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if the window's size, a stride or a dilation
    /// is zero.
    #[track_caller]
    pub fn init(&self) -> MaxPool2d {
        or_panic(check_window(self.kernel_size, self.strides, self.dilation));
        MaxPool2d {
            stride: self.strides,
            kernel_size: self.kernel_size,
            padding: self.padding.clone(),
            dilation: self.dilation,
            ceil_mode: self.ceil_mode,
        }
    }
}

/// Max pool over `[batch, channels, height, width]`, as Burn's `MaxPool2d`, that keeps one byte for each
/// output instead of its input where [`max_pool2d`] does. Made by [`MaxPool2dConfig`].
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn::{Activation, ConvBn2dConfig, MaxPool2dConfig};
///
/// let device = Device::flex().autodiff();
/// let block = ConvBn2dConfig::new([3, 8], [3, 3])
///     .with_activation(Activation::Relu)
///     .init(&device);
/// let pool = MaxPool2dConfig::new([2, 2]).init();
/// let x = Tensor::<4>::random([2, 3, 16, 16], Distribution::Default, &device);
/// // The block keeps x, and the pool the argmax: nothing keeps the tensor between the two.
/// let y = pool.forward(block.forward(x));
/// assert_eq!(y.dims(), [2, 8, 7, 7]);
///
/// let kept = pool.saved_for_backward([2, 8, 14, 14]);
/// assert_eq!((kept[0].name, kept[0].bytes()), ("argmax", 2 * 8 * 7 * 7));
/// # }
/// ```
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MaxPool2d {
    /// Steps between two windows.
    pub stride: [usize; 2],
    /// Height and width of the window.
    pub kernel_size: [usize; 2],
    /// Padding of the input.
    #[module(skip)]
    pub padding: PaddingConfig2d,
    /// Distance between two pixels of a window.
    pub dilation: [usize; 2],
    /// Whether a last window that the padded input does not fill counts.
    pub ceil_mode: bool,
}

impl From<&MaxPool2d> for MaxPool2d {
    fn from(pool: &MaxPool2d) -> Self {
        pool.clone()
    }
}

impl From<&burn::nn::pool::MaxPool2d> for MaxPool2d {
    fn from(pool: &burn::nn::pool::MaxPool2d) -> Self {
        Self {
            stride: pool.stride,
            kernel_size: pool.kernel_size,
            padding: pool.padding.clone(),
            dilation: pool.dilation,
            ceil_mode: pool.ceil_mode,
        }
    }
}

impl MaxPool2d {
    /// The maximum of each window.
    ///
    /// # Shapes
    ///
    /// - `input`: `[batch, channels, height, width]`
    /// - output: `[batch, channels, height_out, width_out]`
    ///
    /// # Panics
    ///
    /// Panics with a [`ConvBnError`](crate::ConvBnError) if a window does not fit into the padded input,
    /// unless in ceil mode.
    #[track_caller]
    pub fn forward(&self, input: Tensor<4>) -> Tensor<4> {
        let options = self.options(&input.shape());
        or_panic(max_pool2d(input, options))
    }

    /// What a training step on Flex keeps for the backward pass of [`forward`](Self::forward), for an
    /// input of that shape that is itself tracked, by name and bytes: `argmax`.
    ///
    /// For a window that Burn's own op pools on Flex (see [`max_pool2d`]) the list is Burn's, as on backends
    /// without kernels: `input`, counted in f32, and `indices`, counted as 32-bit integers. The input is a copy,
    /// padded, if the padding of the two sides differs.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    #[track_caller]
    pub fn saved_for_backward(&self, input_shape: [usize; 4]) -> Vec<SavedTensor> {
        self.problem(Shape::from(input_shape)).saved(DType::F32)
    }

    /// As [`saved_for_backward`](Self::saved_for_backward), of Burn's own max pool with the same options.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_conv_bn::MaxPool2dConfig;
    ///
    /// let kept = MaxPool2dConfig::new([2, 2]).init().saved_by_burn([2, 8, 14, 14]);
    /// let bytes = kept.iter().map(|tensor| (tensor.name, tensor.bytes()));
    /// let input = 4 * 2 * 8 * 14 * 14;
    /// assert!(bytes.eq([("input", input), ("indices", input / 4)]));
    /// ```
    #[track_caller]
    pub fn saved_by_burn(&self, input_shape: [usize; 4]) -> Vec<SavedTensor> {
        self.problem(Shape::from(input_shape))
            .saved_by_burn(DType::F32)
    }

    /// Shape of the output for an input of that shape.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), for the shape.
    ///
    /// # Examples
    ///
    /// ```
    /// use burn_conv_bn::MaxPool2dConfig;
    ///
    /// let pool = MaxPool2dConfig::new([3, 3]).with_strides([2, 2]).init();
    /// assert_eq!(pool.output_shape([2, 8, 15, 9]), [2, 8, 7, 4]);
    /// ```
    #[track_caller]
    pub fn output_shape(&self, input_shape: [usize; 4]) -> [usize; 4] {
        self.problem(Shape::from(input_shape)).output().dims()
    }

    #[track_caller]
    pub(super) fn problem(&self, input: Shape) -> MaxPoolProblem {
        let options = self.options(&input);
        or_panic(MaxPoolProblem::new(input, options))
    }

    /// The op's options for an input of that shape, on which `Same` padding depends.
    pub(super) fn options(&self, input: &Shape) -> MaxPoolOptions<2> {
        let same =
            |dim: usize| same_padding(input[dim + 2], self.kernel_size[dim], self.stride[dim]);
        MaxPoolOptions {
            kernel_size: self.kernel_size,
            stride: self.stride,
            padding: plane_padding(&self.padding, same),
            dilation: self.dilation,
            ceil_mode: self.ceil_mode,
        }
    }
}

impl ModuleDisplay for MaxPool2d {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        content
            .add_debug_attribute("kernel_size", &self.kernel_size)
            .add_debug_attribute("stride", &self.stride)
            .add_debug_attribute("padding", &self.padding)
            .add_debug_attribute("dilation", &self.dilation)
            .add("ceil_mode", &self.ceil_mode)
            .optional()
    }
}
