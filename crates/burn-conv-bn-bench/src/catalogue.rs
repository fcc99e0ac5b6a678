//! What is timed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::FLEX;
use crate::precision::Precision;

/// How much smaller the quick variant's batches are.
const QUICK_DIVISOR: usize = 8;

/// Height and width of the images of the quick variant's classifiers: a quarter of the pixels.
const QUICK_IMAGE_SIZE: usize = 112;

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
    /// A training step of one of torchvision's networks.
    Classifier(Classifier),
}

/// A block over square images with a square kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Images.
    pub batch: usize,
    /// Input and output channels.
    pub channels: [usize; 2],
    /// Height and width of the images.
    pub size: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Padding on every side.
    pub padding: usize,
    /// Groups of channels.
    pub groups: usize,
    /// Whether the input's gradient is wanted: not in a network's first layer.
    pub input_grad: bool,
}

/// The tutorial's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Images.
    pub batch: usize,
}

/// One of torchvision's networks, on square images of three channels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classifier {
    /// Which one.
    pub architecture: Architecture,
    /// Images.
    pub batch: usize,
    /// Height and width of the images.
    pub size: usize,
}

/// A network of `burn-conv-bn-models`, in the protocol by torchvision's name.
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
}

/// The whole catalogue; with smaller batches, and smaller images of the classifiers, if `quick`.
pub fn catalogue(quick: bool) -> Vec<Entry> {
    let layer = |id: &str, images: [usize; 2], channels: [usize; 2], geometry: [usize; 4]| {
        let [batch, size] = images;
        let [kernel, stride, padding, groups] = geometry;
        Entry {
            id: id.to_string(),
            work: Work::Layer(Layer {
                batch: shrunk(batch, quick),
                channels,
                size,
                kernel,
                stride,
                padding,
                groups,
                input_grad: channels[0] > 3,
            }),
        }
    };
    let network = |id: &str, batch| Entry {
        id: id.to_string(),
        work: Work::Network(Network {
            batch: shrunk(batch, quick),
        }),
    };
    let classifier = |id: &str, architecture, batch| Entry {
        id: id.to_string(),
        work: Work::Classifier(Classifier {
            architecture,
            // Two images at least: the last maps of small batches have few values.
            batch: shrunk(batch, quick).max(2),
            size: match quick {
                true => QUICK_IMAGE_SIZE,
                false => Classifier::IMAGE_SIZE,
            },
        }),
    };
    vec![
        layer("tutorial-k3", [256, 26], [32, 64], [3, 1, 0, 1]),
        layer("k3", [32, 56], [64, 64], [3, 1, 1, 1]),
        layer("k1", [32, 56], [256, 64], [1, 1, 0, 1]),
        layer("k3-s2", [32, 28], [128, 128], [3, 2, 1, 1]),
        layer("k7-s2", [32, 224], [3, 64], [7, 2, 3, 1]),
        layer("dw", [32, 28], [144, 144], [3, 1, 1, 144]),
        network("net-256", 256),
        network("net-2048", 2048),
        classifier("resnet18", Architecture::ResNet18, 16),
        classifier("resnet50", Architecture::ResNet50, 8),
        classifier("vgg16-bn", Architecture::Vgg16Bn, 4),
        classifier("mobilenet-v2", Architecture::MobileNetV2, 16),
        classifier("resnet101", Architecture::ResNet101, 8),
        classifier("efficientnet-b0", Architecture::EfficientNetB0, 16),
        classifier("densenet121", Architecture::DenseNet121, 8),
    ]
}

fn shrunk(batch: usize, quick: bool) -> usize {
    match quick {
        true => batch / QUICK_DIVISOR,
        false => batch,
    }
}

impl Layer {
    /// Height and width of the output.
    pub fn output_size(&self) -> usize {
        (self.size + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// `[batch, channels_in, size, size]`.
    pub fn input_shape(&self) -> [usize; 4] {
        [self.batch, self.channels[0], self.size, self.size]
    }

    /// `[channels_out, channels_in / groups, kernel, kernel]`.
    pub fn weight_shape(&self) -> [usize; 4] {
        let [channels_in, channels_out] = self.channels;
        [
            channels_out,
            channels_in / self.groups,
            self.kernel,
            self.kernel,
        ]
    }

    /// `[batch, channels_out, output_size, output_size]`.
    pub fn output_shape(&self) -> [usize; 4] {
        let size = self.output_size();
        [self.batch, self.channels[1], size, size]
    }

    /// Inputs of one output value.
    pub fn fan_in(&self) -> usize {
        self.weight_shape()[1..].iter().product()
    }
}

impl Network {
    /// Height and width of the images: MNIST's.
    pub const IMAGE_SIZE: usize = 28;

    /// Classes.
    pub const CLASSES: usize = 10;
}

impl Classifier {
    /// Height and width of the images, as in ImageNet's training.
    pub const IMAGE_SIZE: usize = 224;

    /// Classes.
    pub const CLASSES: usize = 1000;

    /// `[batch, 3, size, size]`.
    pub fn input_shape(&self) -> [usize; 4] {
        [self.batch, 3, self.size, self.size]
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

    /// Most that a result of a contender may be off, relative to the largest value of the same
    /// tensor from Burn's unfused layers on the same device in the same precision.
    ///
    /// More is allowed elsewhere than on Flex: where a GPU has tensor cores, some of the kernels
    /// that autotuning chooses from multiply f32 as TF32, which has a mantissa of
    /// ten bits. Two contenders need not get the same kernel.
    pub fn tolerance(&self, device: &str, precision: Precision) -> f64 {
        match self {
            // Values are rounded to 4e-3 of themselves in bf16, 5e-4 in f16, several times on the way
            // through a layer; and Burn adds up some depthwise gradients in f16.
            Self::Layer(_) if precision.is_mixed() => 5e-2,
            // That turns over more ReLUs and winners of the pooling than f32 does, and PyTorch's
            // linear layers are rounded, too: with 32 images that alone moves a gradient of the first
            // convolution by 0.2. Here, as in all networks, the check tells that nothing is left out;
            // that it is computed well is shown by the tests, beside the same in f32.
            Self::Network(_) | Self::Classifier(_) if precision.is_mixed() => 5e-1,
            Self::Layer(_) if device != FLEX => 5e-3,
            // Burn's is not the only arithmetic there: on an H200, with TF32, PyTorch's in f32 was up to
            // 5.6e-2 off, and the fused form up to 4e-3.
            Self::Network(_) if device != FLEX => 1e-1,
            // Rounding alone: the upstream gradient is zero where it could turn a ReLU over.
            Self::Layer(_) => 1e-3,
            // Burn takes a batch's statistics as one long sum: over the 1.2 million values of a
            // channel at batch 2048 this layer and PyTorch's are both 3.4e-3 away from it in the
            // second convolution's gradient. Rounding also turns a few ReLUs and winners of the
            // pooling over, which moves a whole value from one place to another; the gradients of
            // the parameters are sums over very many.
            Self::Network(_) => 1e-2,
            // Dozens of layers amplify that: in f32 this only tells that the same network was run.
            // That both forms compute the same is shown in f64, by the tests of the networks.
            // TF32 is as coarse as f16.
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
        match self.groups {
            1 => write!(f, " -> {channels_out}")?,
            groups if groups == channels_in => write!(f, " dw")?,
            groups => write!(f, " -> {channels_out} g{groups}")?,
        }
        write!(f, " k{}", self.kernel)?;
        if self.stride != 1 {
            write!(f, " s{}", self.stride)?;
        }
        if self.padding != 0 {
            write!(f, " p{}", self.padding)?;
        }
        match self.input_grad {
            true => Ok(()),
            false => write!(f, " (first layer)"),
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
        let ids = |quick| catalogue(quick).into_iter().map(|entry| entry.id);
        assert!(ids(false).eq(ids(true)));
        let unique: BTreeSet<String> = ids(false).collect();
        assert_eq!(unique.len(), ids(false).count());
    }

    #[test]
    fn another_batch_is_all_that_changes() {
        for entry in catalogue(false) {
            let work = entry.work.clone().with_batch(77);
            assert_eq!(work.batch(), 77);
            assert_eq!(work.with_batch(entry.work.batch()), entry.work);
        }
    }

    #[test]
    fn entries_are_named_as_in_the_design() {
        let names: Vec<String> = catalogue(false)
            .iter()
            .map(|entry| entry.work.to_string())
            .collect();
        assert_eq!(
            names,
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
        let quick = catalogue(true);
        assert_eq!(quick[0].work.to_string(), "32x32x26 -> 64 k3");
        assert_eq!(quick[9].work.to_string(), "ResNet-50, batch 2 at 112");
    }

    #[test]
    fn shapes_follow_the_geometry() {
        let entries = catalogue(false);
        let shapes = |id: &str| match &entries.iter().find(|e| e.id == id).unwrap().work {
            Work::Layer(layer) => (layer.weight_shape(), layer.output_shape(), layer.fan_in()),
            _ => unreachable!("a layer's id"),
        };
        assert_eq!(shapes("k7-s2"), ([64, 3, 7, 7], [32, 64, 112, 112], 3 * 49));
        assert_eq!(shapes("dw"), ([144, 1, 3, 3], [32, 144, 28, 28], 9));
        assert_eq!(shapes("k3-s2").1, [32, 128, 14, 14]);
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
