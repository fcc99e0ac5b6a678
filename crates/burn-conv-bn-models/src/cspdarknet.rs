use burn::config::Config;
use burn::module::Module;
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig, MaxPool2d, MaxPool2dConfig, Recompute};

use crate::Form;
use crate::walk::Walk;

/// Windows of the spatial pyramid's max pools.
const WINDOWS: [usize; 3] = [5, 9, 13];

/// Configuration of [`CspDarknet`], made by [`init`](Self::init).
///
/// ```
/// use burn_conv_bn_models::{CspDarknetConfig, Form};
///
/// let config = CspDarknetConfig::yolox_nano(Form::Fused);
/// assert_eq!((config.width, config.depth), (0.25, 0.33));
/// ```
#[derive(Config, Debug)]
#[non_exhaustive]
pub struct CspDarknetConfig {
    /// How the blocks run.
    pub form: Form,
    /// Factor on the numbers of channels, 64 to 1024; the products are rounded down.
    pub width: f64,
    /// Factor on the numbers of bottlenecks, 3 or 9 in a stage; the products are rounded, to 1 at least.
    pub depth: f64,
    /// Channels of the images. Default: 3.
    #[config(default = 3)]
    pub input_channels: usize,
}

/// The backbone of the detector YOLOX ([Ge et al. 2021](https://arxiv.org/abs/2107.08430)) in its depthwise form,
/// with its layers, names and initial distributions: cross stage partial stages
/// ([Wang et al. 2019](https://arxiv.org/abs/1911.11929)) with SiLU.
///
/// Fused, concatenations are kept by nobody and rebuilt in the backward pass
/// ([`cat_channels`](burn_conv_bn::functional::cat_channels)).
///
/// ```
/// # #[cfg(feature = "flex")] {
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_conv_bn_models::{CspDarknetConfig, Form};
///
/// let device = Device::flex().autodiff();
/// let backbone = CspDarknetConfig::yolox_nano(Form::Fused).init(&device);
/// let images = Tensor::<4>::random([2, 3, 64, 64], Distribution::Default, &device);
/// let shapes = backbone.forward(images).map(|map| map.dims());
/// assert_eq!(shapes, [[2, 64, 8, 8], [2, 128, 4, 4], [2, 256, 2, 2]]);
/// # }
/// ```
#[derive(Module, Debug)]
pub struct CspDarknet {
    /// 3x3 convolution over blocks of 2x2 pixels.
    pub stem: ConvBn2d,
    /// First stage.
    pub dark2: CspDarknetStage,
    /// Stage of the first output.
    pub dark3: CspDarknetStage,
    /// Stage of the second output.
    pub dark4: CspDarknetStage,
    /// Stage of the last output, with a spatial pyramid and without shortcuts.
    pub dark5: CspDarknetStage,
    #[module(skip)]
    pub(crate) form: Form,
}

/// Halves height and width, doubles the channels, and runs bottlenecks.
#[derive(Module, Debug)]
pub struct CspDarknetStage {
    /// With stride 2.
    pub down: SeparableConv,
    /// Spatial pyramid pooling, in the last stage.
    pub spp: Option<SppBottleneck>,
    /// Bottlenecks.
    pub csp: CspLayer,
}

/// A depthwise 3x3 convolution and a 1x1 convolution.
#[derive(Module, Debug)]
pub struct SeparableConv {
    /// Depthwise, with the stride.
    pub dconv: ConvBn2d,
    /// 1x1.
    pub pconv: ConvBn2d,
}

/// A 1x1 convolution to half the channels, the concatenation of its output and max pools of it, and a 1x1
/// convolution back.
#[derive(Module, Debug)]
pub struct SppBottleneck {
    /// To half the channels.
    pub conv1: ConvBn2d,
    /// Back.
    pub conv2: ConvBn2d,
}

/// Bottlenecks over half of the channels, concatenated with the other half.
#[derive(Module, Debug)]
pub struct CspLayer {
    /// 1x1 convolution before the bottlenecks.
    pub conv1: ConvBn2d,
    /// 1x1 convolution beside them.
    pub conv2: ConvBn2d,
    /// 1x1 convolution of the concatenation.
    pub conv3: ConvBn2d,
    /// The bottlenecks.
    pub m: Vec<CspBottleneck>,
}

/// A 1x1 and a separable convolution, and a shortcut behind their activations.
#[derive(Module, Debug)]
pub struct CspBottleneck {
    /// 1x1 convolution.
    pub conv1: ConvBn2d,
    /// Separable convolution.
    pub conv2: SeparableConv,
    /// Whether the bottleneck adds its input.
    #[module(skip)]
    residual: bool,
}

impl CspDarknetConfig {
    /// YOLOX-nano's, which takes images of 416x416 pixels.
    pub fn yolox_nano(form: Form) -> Self {
        Self::new(form, 0.25, 0.33)
    }

    /// Each parameter is drawn on first use.
    pub(crate) fn init_lazy(&self, device: &Device) -> CspDarknet {
        let (width, depth) = (self.width, self.depth);
        assert!(
            width.is_finite() && depth.is_finite() && 64.0 * width >= 1.0,
            "width and depth must be finite, with one channel in 64 at least, got {width} and {depth}"
        );
        let channels = (64.0 * width) as usize;
        let count = ((3.0 * depth).round_ties_even() as usize).max(1);
        let stage = |factor: usize, count: usize, is_last: bool| {
            let (input, output) = (factor * channels, 2 * factor * channels);
            CspDarknetStage {
                down: separable([input, output], 2, device),
                spp: is_last.then(|| SppBottleneck {
                    conv1: pointwise([output, output / 2], device),
                    conv2: pointwise([output / 2 * (1 + WINDOWS.len()), output], device),
                }),
                csp: csp(output, count, !is_last, device),
            }
        };
        CspDarknet {
            stem: conv([4 * self.input_channels, channels], 3, 1, 1, device),
            dark2: stage(1, count, false),
            dark3: stage(2, 3 * count, false),
            dark4: stage(4, 3 * count, false),
            dark5: stage(8, count, true),
            form: self.form,
        }
    }
}

fn csp(channels: usize, count: usize, residual: bool, device: &Device) -> CspLayer {
    let hidden = channels / 2;
    let bottleneck = |_| CspBottleneck {
        conv1: pointwise([hidden, hidden], device),
        conv2: separable([hidden, hidden], 1, device),
        residual,
    };
    CspLayer {
        conv1: pointwise([channels, hidden], device),
        conv2: pointwise([channels, hidden], device),
        conv3: pointwise([2 * hidden, channels], device),
        m: (0..count).map(bottleneck).collect(),
    }
}

fn separable(channels: [usize; 2], stride: usize, device: &Device) -> SeparableConv {
    let input = channels[0];
    SeparableConv {
        dconv: conv([input, input], 3, stride, input, device),
        pconv: pointwise(channels, device),
    }
}

fn pointwise(channels: [usize; 2], device: &Device) -> ConvBn2d {
    conv(channels, 1, 1, 1, device)
}

/// A block with PyTorch's initial distribution and YOLOX's norm.
fn conv(
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    groups: usize,
    device: &Device,
) -> ConvBn2d {
    let side = kernel / 2;
    ConvBn2dConfig::new(channels, [kernel; 2])
        .with_stride([stride; 2])
        .with_padding(PaddingConfig2d::Explicit(side, side, side, side))
        .with_groups(groups)
        .with_epsilon(1e-3)
        .with_momentum(0.03)
        .with_activation(Activation::Silu)
        .init(device)
}

impl CspDarknet {
    /// Patterns and replacements from the keys of YOLOX's `CSPDarknet`, alone or as `backbone.backbone` of a
    /// detector, to the names here; see [the crate](crate#weights-of-pytorch). The checkpoints that YOLOX
    /// publishes have them below the key `model`.
    pub const PYTORCH_KEYS: &'static [(&'static str, &'static str)] = &[
        (r"^backbone\.backbone\.", ""),
        (r"^stem\.conv\.", "stem."),
        (r"^(dark\d)\.0\.", "$1.down."),
        (r"^(dark[234])\.1\.", "$1.csp."),
        (r"^dark5\.1\.", "dark5.spp."),
        (r"^dark5\.2\.", "dark5.csp."),
        (r"\.bn\.", ".norm."),
        (r"\.norm\.weight$", ".norm.gamma"),
        (r"\.norm\.bias$", ".norm.beta"),
    ];

    /// Maps at an eighth, a sixteenth and a thirty-second of the images' height and width.
    ///
    /// # Shapes
    ///
    /// - `images`: `[batch, input_channels, height, width]`, of even height and width
    /// - output: `[batch, 256 * width factor, height / 8, width / 8]`, and twice and four times the channels at
    ///   half and a quarter of that, rounded up
    ///
    /// # Panics
    ///
    /// If height or width is odd, and as [`ConvBn2d::forward`]: among others if a training batch leaves a single
    /// value per channel, as one image of up to 32x32 does.
    pub fn forward(&self, images: Tensor<4>) -> [Tensor<4>; 3] {
        let form = self.form;
        let x = form.forward(&self.stem, pixel_blocks(images));
        let dark3 = self.dark3.forward(self.dark2.forward(x, form), form);
        let dark4 = self.dark4.forward(dark3.clone(), form);
        let dark5 = self.dark5.forward(dark4.clone(), form);
        [dark3, dark4, dark5]
    }

    /// Sets [`Recompute::Norm`] for all convolutions but those whose output is an output of the network or gets a
    /// shortcut added: these get `ends`.
    /// See [the crate](crate#chains).
    #[must_use]
    pub fn with_rebuilt_chains(mut self, ends: Recompute) -> Self {
        for (name, block) in self.blocks_mut() {
            let is_output = name.ends_with("csp.conv3") && !name.starts_with("dark2");
            let is_added = name.ends_with("conv2.pconv") && !name.starts_with("dark5");
            let is_end = is_output || is_added;
            block.settings.recompute = if is_end { ends } else { Recompute::Norm };
        }
        self
    }

    /// Goes through the network in the order of [`forward`](Self::forward).
    pub(crate) fn walk(&self, input_shape: [usize; 4]) -> Walk {
        let mut walk = Walk::new(self.form, input_shape, &self.stem);
        walk.pixel_blocks();
        walk.block("stem", &self.stem);
        for (name, stage) in [
            ("dark2", &self.dark2),
            ("dark3", &self.dark3),
            ("dark4", &self.dark4),
            ("dark5", &self.dark5),
        ] {
            stage.walk(name, &mut walk);
        }
        walk
    }

    /// The blocks by name.
    pub(crate) fn blocks_mut(&mut self) -> Vec<(String, &mut ConvBn2d)> {
        let mut blocks = vec![("stem".to_owned(), &mut self.stem)];
        for (stage, parts) in [
            ("dark2", &mut self.dark2),
            ("dark3", &mut self.dark3),
            ("dark4", &mut self.dark4),
            ("dark5", &mut self.dark5),
        ] {
            let mut add = |name: String, block| blocks.push((format!("{stage}.{name}"), block));
            add("down.dconv".to_owned(), &mut parts.down.dconv);
            add("down.pconv".to_owned(), &mut parts.down.pconv);
            if let Some(spp) = &mut parts.spp {
                add("spp.conv1".to_owned(), &mut spp.conv1);
                add("spp.conv2".to_owned(), &mut spp.conv2);
            }
            let csp = &mut parts.csp;
            add("csp.conv1".to_owned(), &mut csp.conv1);
            add("csp.conv2".to_owned(), &mut csp.conv2);
            add("csp.conv3".to_owned(), &mut csp.conv3);
            for (index, bottleneck) in csp.m.iter_mut().enumerate() {
                let name = format!("csp.m.{index}");
                add(format!("{name}.conv1"), &mut bottleneck.conv1);
                add(format!("{name}.conv2.dconv"), &mut bottleneck.conv2.dconv);
                add(format!("{name}.conv2.pconv"), &mut bottleneck.conv2.pconv);
            }
        }
        blocks
    }
}

/// Channels of blocks of 2x2 pixels at half the height and width, in YOLOX's order: column by column.
pub(crate) fn pixel_blocks(images: Tensor<4>) -> Tensor<4> {
    let [batch, channels, height, width] = images.dims();
    assert!(
        height.is_multiple_of(2) && width.is_multiple_of(2),
        "height and width must be even, got {height}x{width}"
    );
    let (height, width) = (height / 2, width / 2);
    images
        .reshape([batch, channels, height, 2, width, 2])
        .permute([0, 5, 3, 1, 2, 4])
        .reshape([batch, 4 * channels, height, width])
}

/// The spatial pyramid's max pools.
fn pools() -> [MaxPool2d; 3] {
    WINDOWS.map(|size| {
        let side = size / 2;
        MaxPool2dConfig::new([size; 2])
            .with_strides([1, 1])
            .with_padding(PaddingConfig2d::Explicit(side, side, side, side))
            .init()
    })
}

impl CspDarknetStage {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let mut x = self.down.forward(input, form);
        if let Some(spp) = &self.spp {
            x = spp.forward(x, form);
        }
        self.csp.forward(x, form)
    }

    /// Lists what it keeps, in the order of [`forward`](Self::forward), as the parts below.
    fn walk(&self, name: &str, walk: &mut Walk) {
        self.down.walk(&format!("{name}.down"), walk);
        if let Some(spp) = &self.spp {
            spp.walk(&format!("{name}.spp"), walk);
        }
        self.csp.walk(&format!("{name}.csp"), walk);
    }
}

impl SeparableConv {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        form.forward(&self.pconv, form.forward(&self.dconv, input))
    }

    fn walk(&self, name: &str, walk: &mut Walk) {
        walk.block(&format!("{name}.dconv"), &self.dconv);
        walk.block(&format!("{name}.pconv"), &self.pconv);
    }
}

impl SppBottleneck {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let x = form.forward(&self.conv1, input);
        let pooled = pools().map(|pool| form.max_pool(&pool, x.clone()));
        let all = [x].into_iter().chain(pooled).collect();
        form.forward(&self.conv2, form.concatenate(all))
    }

    fn walk(&self, name: &str, walk: &mut Walk) {
        walk.block(&format!("{name}.conv1"), &self.conv1);
        let mut all = vec![walk.current.clone()];
        for pool in pools() {
            walk.current = all[0].clone();
            walk.max_pool(name, &pool);
            all.push(walk.current.clone());
        }
        walk.concatenate(name, &all);
        walk.block(&format!("{name}.conv2"), &self.conv2);
    }
}

impl CspLayer {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let beside = form.forward(&self.conv2, input.clone());
        let mut x = form.forward(&self.conv1, input);
        for bottleneck in &self.m {
            x = bottleneck.forward(x, form);
        }
        form.forward(&self.conv3, form.concatenate(vec![x, beside]))
    }

    fn walk(&self, name: &str, walk: &mut Walk) {
        let input = walk.current.clone();
        walk.block(&format!("{name}.conv2"), &self.conv2);
        let beside = walk.current.clone();
        walk.current = input;
        walk.block(&format!("{name}.conv1"), &self.conv1);
        for (index, bottleneck) in self.m.iter().enumerate() {
            bottleneck.walk(&format!("{name}.m.{index}"), walk);
        }
        walk.concatenate(name, &[walk.current.clone(), beside]);
        walk.block(&format!("{name}.conv3"), &self.conv3);
    }
}

impl CspBottleneck {
    fn forward(&self, input: Tensor<4>, form: Form) -> Tensor<4> {
        let x = form.forward(&self.conv1, input.clone());
        let x = self.conv2.forward(x, form);
        if self.residual { x + input } else { x }
    }

    fn walk(&self, name: &str, walk: &mut Walk) {
        walk.block(&format!("{name}.conv1"), &self.conv1);
        self.conv2.walk(&format!("{name}.conv2"), walk);
        if self.residual {
            walk.sum();
        }
    }
}
