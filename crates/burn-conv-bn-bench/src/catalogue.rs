//! The entries of the benchmark.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::FLEX;
use crate::precision::Precision;

/// Divisor of the quick variant's batches.
const QUICK_DIVISOR: usize = 8;

/// Least height and width that the quick variant halves.
const LARGE: usize = 100;

/// One line of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Short and stable, the same for the quick variant.
    pub id: String,
    /// What it does.
    pub work: Work,
}

/// What an entry does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// One conv -> batch norm -> ReLU block, forward and backward.
    Layer(Layer),
    /// A training step of the tutorial's network.
    Network(Network),
    /// A training step of a network over images of three channels.
    Classifier(Classifier),
}

/// A block over images or volumes, with the same geometry in every dimension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Images.
    pub batch: usize,
    /// Input and output channels.
    pub channels: [usize; 2],
    /// Spatial dimensions: 2 or 3.
    pub dims: usize,
    /// Length of the images in each dimension.
    pub size: usize,
    /// Length of the kernel in each dimension.
    pub kernel: usize,
    /// Stride.
    pub stride: usize,
    /// Padding on every side.
    pub padding: usize,
    /// Distance between two taps of the kernel.
    pub dilation: usize,
    /// Groups of channels.
    pub groups: usize,
    /// Whether the input's gradient is computed: not in a network's first layer.
    pub input_grad: bool,
}

/// The tutorial's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Images.
    pub batch: usize,
}

/// A network over square images of three channels, with scores of classes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classifier {
    /// Its layers.
    pub architecture: Architecture,
    /// Images.
    pub batch: usize,
    /// Height and width of the images.
    pub size: usize,
}

/// A network of `burn-conv-bn-models`. The protocol uses torchvision's name if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// ResNet-18.
    #[serde(rename = "resnet18")]
    ResNet18,
    /// ResNet-50, version 1.5.
    #[serde(rename = "resnet50")]
    ResNet50,
    /// VGG-16 with batch norm.
    #[serde(rename = "vgg16_bn")]
    Vgg16Bn,
    /// MobileNetV2.
    #[serde(rename = "mobilenet_v2")]
    MobileNetV2,
    /// ResNet-101, version 1.5.
    #[serde(rename = "resnet101")]
    ResNet101,
    /// EfficientNet-B0.
    #[serde(rename = "efficientnet_b0")]
    EfficientNetB0,
    /// DenseNet-121.
    #[serde(rename = "densenet121")]
    DenseNet121,
    /// ResNet-18 for images of 32x32 pixels, as CIFAR's: a 3x3 stem and no max pool.
    #[serde(rename = "cifar_resnet18")]
    CifarResNet18,
    /// CSPDarknet, YOLOX-nano's backbone. Its scores are the means of the channels of its three outputs.
    #[serde(rename = "yolox_nano")]
    YoloxNano,
}

/// The entries of a run that names none; with smaller batches, and large images halved, if `quick`.
pub fn catalogue(quick: bool) -> Vec<Entry> {
    let layer = Layer::new;
    let layers = [
        (
            "tutorial-k3",
            Layer {
                padding: 0,
                ..layer(256, [32, 64], 26, 3)
            },
        ),
        ("k3", layer(32, [64, 64], 56, 3)),
        ("k1", layer(32, [256, 64], 56, 1)),
        (
            "k3-s2",
            Layer {
                stride: 2,
                ..layer(32, [128, 128], 28, 3)
            },
        ),
        (
            "k7-s2",
            Layer {
                stride: 2,
                input_grad: false,
                ..layer(32, [3, 64], 224, 7)
            },
        ),
        (
            "dw",
            Layer {
                groups: 144,
                ..layer(32, [144, 144], 28, 3)
            },
        ),
    ];
    let networks = [("net-256", 256), ("net-2048", 2048)];
    let classifiers = [
        ("resnet18", Architecture::ResNet18, 16, 224),
        ("resnet50", Architecture::ResNet50, 8, 224),
        ("vgg16-bn", Architecture::Vgg16Bn, 4, 224),
        ("mobilenet-v2", Architecture::MobileNetV2, 16, 224),
        ("resnet101", Architecture::ResNet101, 8, 224),
        ("efficientnet-b0", Architecture::EfficientNetB0, 16, 224),
        ("densenet121", Architecture::DenseNet121, 8, 224),
    ];
    let mut entries: Vec<Entry> = layers.map(|layer| layer_entry(layer, quick)).into();
    entries.extend(networks.map(|(id, batch)| Entry {
        id: id.to_string(),
        work: Work::Network(Network {
            batch: shrunk(batch, quick),
        }),
    }));
    entries.extend(classifiers.map(|classifier| classifier_entry(classifier, quick)));
    entries
}

/// Further entries: layers of other kinds, small images of many channels among them, a network of small images,
/// and a detector's backbone.
pub fn more(quick: bool) -> Vec<Entry> {
    let layer = Layer::new;
    let layers = [
        ("one-image", layer(1, [64, 64], 256, 3)),
        (
            "dilated",
            Layer {
                padding: 2,
                dilation: 2,
                ..layer(32, [128, 128], 28, 3)
            },
        ),
        ("k5", layer(32, [64, 64], 56, 5)),
        (
            "groups",
            Layer {
                groups: 32,
                ..layer(32, [256, 256], 14, 3)
            },
        ),
        (
            "3d",
            Layer {
                dims: 3,
                ..layer(2, [32, 32], 64, 3)
            },
        ),
        ("deep-1", layer(32, [512, 512], 1, 3)),
        ("deep-2", layer(32, [512, 512], 2, 3)),
        ("deep-4", layer(32, [512, 512], 4, 3)),
        ("deep-7", layer(32, [512, 512], 7, 3)),
        ("deep-4-b128", layer(128, [512, 512], 4, 3)),
        ("deep-8-b128", layer(128, [256, 256], 8, 3)),
        ("deep-k1", layer(32, [1024, 2048], 2, 1)),
    ];
    let cifar = Architecture::CifarResNet18;
    let classifiers = [
        ("cifar-resnet18-128", cifar, 128, 32),
        ("cifar-resnet18-32", cifar, 32, 32),
        ("yolox-nano", Architecture::YoloxNano, 8, 416),
    ];
    let mut entries: Vec<Entry> = layers.map(|layer| layer_entry(layer, quick)).into();
    entries.extend(classifiers.map(|classifier| classifier_entry(classifier, quick)));
    entries
}

fn layer_entry((id, layer): (&str, Layer), quick: bool) -> Entry {
    let batch = shrunk(layer.batch, quick);
    Entry {
        id: id.to_string(),
        work: Work::Layer(Layer { batch, ..layer }),
    }
}

fn classifier_entry(
    (id, architecture, batch, size): (&str, Architecture, usize, usize),
    quick: bool,
) -> Entry {
    let is_halved = quick && size >= LARGE;
    Entry {
        id: id.to_string(),
        work: Work::Classifier(Classifier {
            architecture,
            // Two images at least: the last maps of small batches have few values.
            batch: shrunk(batch, quick).max(2),
            size: if is_halved { size / 2 } else { size },
        }),
    }
}

fn shrunk(batch: usize, quick: bool) -> usize {
    if quick {
        (batch / QUICK_DIVISOR).max(1)
    } else {
        batch
    }
}

impl Layer {
    /// A layer of images with stride 1 and a padding that keeps their size, for odd kernels.
    pub fn new(batch: usize, channels: [usize; 2], size: usize, kernel: usize) -> Self {
        Self {
            batch,
            channels,
            dims: 2,
            size,
            kernel,
            stride: 1,
            padding: kernel / 2,
            dilation: 1,
            groups: 1,
            input_grad: true,
        }
    }

    /// Length of the output in each dimension.
    pub fn output_size(&self) -> usize {
        let reach = self.dilation * (self.kernel - 1);
        (self.size + 2 * self.padding - reach - 1) / self.stride + 1
    }

    /// `[batch, channels_in, size..]`, of rank `D = dims + 2`.
    pub fn input_shape<const D: usize>(&self) -> [usize; D] {
        shape(self.batch, self.channels[0], self.size)
    }

    /// `[channels_out, channels_in / groups, kernel..]`, of rank `D = dims + 2`.
    pub fn weight_shape<const D: usize>(&self) -> [usize; D] {
        let [channels_in, channels_out] = self.channels;
        shape(channels_out, channels_in / self.groups, self.kernel)
    }

    /// `[batch, channels_out, output_size..]`, of rank `D = dims + 2`.
    pub fn output_shape<const D: usize>(&self) -> [usize; D] {
        shape(self.batch, self.channels[1], self.output_size())
    }

    /// Inputs of one output value.
    pub fn fan_in(&self) -> usize {
        let taps: usize = (0..self.dims).map(|_| self.kernel).product();
        self.channels[0] / self.groups * taps
    }
}

fn shape<const D: usize>(first: usize, second: usize, length: usize) -> [usize; D] {
    let mut shape = [length; D];
    shape[..2].copy_from_slice(&[first, second]);
    shape
}

impl Network {
    /// Height and width of the images: MNIST's.
    pub const IMAGE_SIZE: usize = 28;

    /// Classes.
    pub const CLASSES: usize = 10;
}

impl Classifier {
    /// `[batch, 3, size, size]`.
    pub fn input_shape(&self) -> [usize; 4] {
        [self.batch, 3, self.size, self.size]
    }
}

impl Architecture {
    /// Classes: CIFAR-10's, the channels of a backbone's outputs, or ImageNet's.
    pub fn classes(self) -> usize {
        match self {
            Self::CifarResNet18 => 10,
            Self::YoloxNano => 64 + 128 + 256,
            _ => 1000,
        }
    }
}

impl Work {
    /// Images.
    pub fn batch(&self) -> usize {
        match self {
            Self::Layer(layer) => layer.batch,
            Self::Network(network) => network.batch,
            Self::Classifier(classifier) => classifier.batch,
        }
    }

    /// The same over another number of images.
    pub fn with_batch(self, batch: usize) -> Self {
        match self {
            Self::Layer(layer) => Self::Layer(Layer { batch, ..layer }),
            Self::Network(_) => Self::Network(Network { batch }),
            Self::Classifier(classifier) => Self::Classifier(Classifier {
                batch,
                ..classifier
            }),
        }
    }

    /// Largest allowed error of a contender's result, relative to the largest value of the same tensor
    /// from Burn's unfused layers on the same device in the same precision.
    ///
    /// It is larger on devices other than Flex: on a GPU with tensor cores some of the kernels that
    /// autotuning chooses from multiply f32 as TF32, with a mantissa of ten bits, and two contenders may
    /// get different kernels.
    pub fn tolerance(&self, device: &str, precision: Precision) -> f64 {
        match self {
            // A value is rounded to 4e-3 of itself in bf16, 5e-4 in f16, several times within a layer;
            // Burn accumulates some depthwise gradients in f16.
            Self::Layer(_) if precision.is_mixed() => 5e-2,
            // Rounding flips more ReLUs and argmaxes of the pooling than in f32, and PyTorch rounds in
            // linear layers, too: with 32 images that alone moves a gradient of the first convolution by
            // 0.2. In networks the check shows that no part is missing; the tests show accuracy.
            Self::Network(_) | Self::Classifier(_) if precision.is_mixed() => 5e-1,
            Self::Layer(_) if device != FLEX => 5e-3,
            // On an H200, where Burn multiplied as TF32, PyTorch's f32 was up to 5.6e-2 off, and the fused
            // form up to 4e-3.
            Self::Network(_) if device != FLEX => 1e-1,
            // Rounding alone: the upstream gradient is zero where rounding could flip a ReLU.
            Self::Layer(_) => 1e-3,
            // Burn's statistics are one long sum: over the 1.2 million values of a channel at batch 2048
            // this layer and PyTorch's both differ by 3.4e-3 in the second convolution's gradient.
            // Rounding also flips a few ReLUs and argmaxes of the pooling. A flip moves a whole value;
            // parameters' gradients are sums over many.
            Self::Network(_) => 1e-2,
            // Dozens of layers amplify rounding: in f32 the check shows that the same network ran. The
            // networks' tests compare both forms in f64. TF32 is as coarse as f16.
            Self::Classifier(_) if device != FLEX => 5e-1,
            Self::Classifier(_) => 1e-1,
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer) => write!(f, "{layer}"),
            Self::Network(network) => write!(f, "{network}"),
            Self::Classifier(classifier) => write!(f, "{classifier}"),
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [channels_in, channels_out] = self.channels;
        write!(f, "{}x{channels_in}x{}", self.batch, self.size)?;
        if self.dims != 2 {
            write!(f, "^{}", self.dims)?;
        }
        match self.groups {
            1 => write!(f, " -> {channels_out}")?,
            groups if groups == channels_in => write!(f, " dw")?,
            groups => write!(f, " -> {channels_out} g{groups}")?,
        }
        write!(f, " k{}", self.kernel)?;
        for (value, usual, letter) in [
            (self.stride, 1, 's'),
            (self.dilation, 1, 'd'),
            (self.padding, 0, 'p'),
        ] {
            if value != usual {
                write!(f, " {letter}{value}")?;
            }
        }
        if self.input_grad {
            Ok(())
        } else {
            write!(f, " (first layer)")
        }
    }
}

impl fmt::Display for Classifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.architecture {
            Architecture::ResNet18 => "ResNet-18",
            Architecture::ResNet50 => "ResNet-50",
            Architecture::Vgg16Bn => "VGG-16-BN",
            Architecture::MobileNetV2 => "MobileNetV2",
            Architecture::ResNet101 => "ResNet-101",
            Architecture::EfficientNetB0 => "EfficientNet-B0",
            Architecture::DenseNet121 => "DenseNet-121",
            Architecture::CifarResNet18 => "ResNet-18 with a 3x3 stem",
            Architecture::YoloxNano => "YOLOX-nano's backbone",
        };
        write!(f, "{name}, batch {} at {}", self.batch, self.size)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tutorial's network, batch {}", self.batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn ids_are_unique_and_stay_under_quick() {
        let all = |quick| [catalogue(quick), more(quick)].concat();
        let ids = |quick| all(quick).into_iter().map(|entry| entry.id);
        assert!(ids(false).eq(ids(true)));
        let unique: BTreeSet<String> = ids(false).collect();
        assert_eq!(unique.len(), ids(false).count());
    }

    #[test]
    fn another_batch_is_all_that_changes() {
        for entry in [catalogue(false), more(false)].concat() {
            let work = entry.work.clone().with_batch(77);
            assert_eq!(work.batch(), 77);
            assert_eq!(work.with_batch(entry.work.batch()), entry.work);
        }
    }

    #[test]
    fn entries_are_named_by_their_geometry() {
        let names = |entries: Vec<Entry>| -> Vec<String> {
            let works = entries.into_iter().map(|entry| entry.work.to_string());
            works.collect()
        };
        assert_eq!(
            names(catalogue(false)),
            [
                "256x32x26 -> 64 k3",
                "32x64x56 -> 64 k3 p1",
                "32x256x56 -> 64 k1",
                "32x128x28 -> 128 k3 s2 p1",
                "32x3x224 -> 64 k7 s2 p3 (first layer)",
                "32x144x28 dw k3 p1",
                "the tutorial's network, batch 256",
                "the tutorial's network, batch 2048",
                "ResNet-18, batch 16 at 224",
                "ResNet-50, batch 8 at 224",
                "VGG-16-BN, batch 4 at 224",
                "MobileNetV2, batch 16 at 224",
                "ResNet-101, batch 8 at 224",
                "EfficientNet-B0, batch 16 at 224",
                "DenseNet-121, batch 8 at 224",
            ]
        );
        let further = names(more(false));
        assert_eq!(
            further[..6],
            [
                "1x64x256 -> 64 k3 p1",
                "32x128x28 -> 128 k3 d2 p2",
                "32x64x56 -> 64 k5 p2",
                "32x256x14 -> 256 g32 k3 p1",
                "2x32x64^3 -> 32 k3 p1",
                "32x512x1 -> 512 k3 p1",
            ]
        );
        assert_eq!(further[11], "32x1024x2 -> 2048 k1");
        assert_eq!(
            further[12..],
            [
                "ResNet-18 with a 3x3 stem, batch 128 at 32",
                "ResNet-18 with a 3x3 stem, batch 32 at 32",
                "YOLOX-nano's backbone, batch 8 at 416",
            ]
        );
        let quick = catalogue(true);
        assert_eq!(quick[0].work.to_string(), "32x32x26 -> 64 k3");
        assert_eq!(quick[9].work.to_string(), "ResNet-50, batch 2 at 112");
        let quick = more(true);
        assert_eq!(quick[0].work.to_string(), "1x64x256 -> 64 k3 p1");
        assert_eq!(quick[12].work.batch(), 16);
    }

    #[test]
    fn shapes_follow_the_geometry() {
        let layer = |id: &str| -> Layer {
            let mut entries = [catalogue(false), more(false)].concat().into_iter();
            match entries.find(|entry| entry.id == id).unwrap().work {
                Work::Layer(layer) => layer,
                _ => unreachable!("a layer's id"),
            }
        };
        let k7 = layer("k7-s2");
        assert_eq!(k7.weight_shape::<4>(), [64, 3, 7, 7]);
        assert_eq!(k7.output_shape::<4>(), [32, 64, 112, 112]);
        assert_eq!(k7.fan_in(), 3 * 49);
        let depthwise = layer("dw");
        assert_eq!(depthwise.weight_shape::<4>(), [144, 1, 3, 3]);
        assert_eq!(depthwise.fan_in(), 9);
        assert_eq!(layer("k3-s2").output_shape::<4>(), [32, 128, 14, 14]);
        assert_eq!(layer("dilated").output_shape::<4>(), [32, 128, 28, 28]);
        let volumes = layer("3d");
        assert_eq!(volumes.input_shape::<5>(), [2, 32, 64, 64, 64]);
        assert_eq!(volumes.weight_shape::<5>(), [32, 32, 3, 3, 3]);
        assert_eq!(volumes.fan_in(), 32 * 27);
    }

    #[test]
    fn flex_is_held_to_the_smaller_tolerance() {
        for entry in catalogue(true) {
            let [flex, cuda] =
                [FLEX, "cuda"].map(|device| entry.work.tolerance(device, Precision::F32));
            assert!(flex < cuda, "{}: {flex} and {cuda}", entry.id);
            for mixed in [Precision::F16, Precision::Bf16] {
                assert!(cuda <= entry.work.tolerance("cuda", mixed), "{}", entry.id);
            }
        }
    }
}
