//! Files with the weights of PyTorch's networks: a `state_dict` as `torch.save` or safetensors write it.
//!
//! ```no_run
//! # #[cfg(feature = "flex")] {
//! use burn::module::{Module, ParamGroup};
//! use burn::nn::LinearConfig;
//! use burn::tensor::Device;
//! use burn_conv_bn_models::{Form, ResNet, Vgg, VggConfig, weights};
//!
//! let device = Device::flex().autodiff();
//! // Depth and classes are the file's.
//! let mut network = weights::load_resnet("resnet18.pth", &device)?;
//! let [features, _] = network.fc.weight.dims();
//! network.fc = LinearConfig::new(features, 5).init(&device); // a head of five classes
//! let norms = ParamGroup::from_predicate("norm.");
//! let network = network.freeze_group(norms.clone()); // train it, then the norms as well:
//! let network = network.unfreeze_group(norms);
//! weights::save(&network, ResNet::TO_PYTORCH_KEYS, "resnet18-mine.safetensors")?;
//!
//! let vgg = VggConfig::vgg16_bn(Form::Fused).init(&device);
//! let vgg = weights::load(vgg, Vgg::PYTORCH_KEYS, "vgg16_bn.pth")?;
//! # }
//! # Ok::<(), burn_conv_bn_models::weights::WeightsError>(())
//! ```

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use burn_conv_bn::{ConvBnModule, RunningVariance};
use burn_store::{
    BurnToPyTorchAdapter, KeyRemapper, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter,
    PytorchStore, SafetensorsStore,
};

use crate::{Form, ResNet, ResNetBlockKind, ResNetConfig};

/// Patterns and replacements of keys, as a network's `PYTORCH_KEYS`.
type Keys<'a> = &'a [(&'a str, &'a str)];

/// A file of weights that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file cannot be opened or read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file to be written has another ending, by which PyTorch's users would call `torch.load`.
    #[error("{}: the file would be safetensors; name it .safetensors", file.display())]
    NotSafetensors {
        /// The file.
        file: PathBuf,
    },
    /// burn-store cannot read or write the file, or tensors are missing or of other shapes.
    #[error("{}: {message}", file.display())]
    Store {
        /// The file.
        file: PathBuf,
        /// What burn-store says.
        message: String,
    },
    /// The file holds no ResNet of torchvision's.
    #[error(
        "{}: expected the state_dict of a torchvision ResNet (conv1.weight, layer1.0.conv1.weight, .., fc.weight), \
         got {names:?} and so on",
        file.display()
    )]
    NoResNet {
        /// The file.
        file: PathBuf,
        /// The first of the names it has, as they are here.
        names: Vec<String>,
    },
    /// The file holds tensors that the network lacks: it is another network's.
    #[error(
        "{}: {count} tensors are not of this network, {names:?} among them: is it another depth or variant?",
        file.display()
    )]
    LeftOver {
        /// The file.
        file: PathBuf,
        /// Number of tensors.
        count: usize,
        /// The first of their names.
        names: Vec<String>,
    },
}

/// Loads a file into a network, by the network's table of keys.
///
/// The content decides the format: safetensors or `torch.save`'s. The latter may hold a `state_dict`, a dict with one under
/// the key `state_dict`, or a whole model. A prefix `module.`, as of `DistributedDataParallel`, is dropped. Tensors have the
/// file's dtype: [`with_precision`](ConvBnModule::with_precision) casts those in half. To train on as PyTorch would, set
/// [`RunningVariance::Unbiased`].
///
/// # Errors
///
/// A file that cannot be read, lacks a tensor, or holds more than the network; `num_batches_tracked`, which Burn's
/// norms have not, may be left.
pub fn load<M: Module>(
    network: M,
    keys: Keys<'_>,
    file: impl AsRef<Path>,
) -> Result<M, WeightsError> {
    let file = file.as_ref();
    match open(file, keys)? {
        Weights::PyTorch(mut store) => fill(network, &mut *store, file),
        Weights::Safetensors(mut store) => fill(network, &mut *store, file),
    }
}

/// Loads a ResNet of torchvision's, of the depth and number of classes that the file has, as [`load`] does. Its running
/// variances go on as PyTorch's.
///
/// # Errors
///
/// As [`load`], and for a file of another network.
pub fn load_resnet(file: impl AsRef<Path>, device: &Device) -> Result<ResNet, WeightsError> {
    let file = file.as_ref();
    let network = match open(file, ResNet::PYTORCH_KEYS)? {
        Weights::PyTorch(mut store) => {
            fill(resnet_of(&mut *store, file, device)?, &mut *store, file)
        }
        Weights::Safetensors(mut store) => {
            fill(resnet_of(&mut *store, file, device)?, &mut *store, file)
        }
    };
    Ok(network?.with_running_variance(RunningVariance::Unbiased))
}

/// Saves a network as safetensors under PyTorch's names, by a table such as [`ResNet::TO_PYTORCH_KEYS`].
///
/// A strict `load_state_dict` of `safetensors.torch.load_file(..)` takes it, `num_batches_tracked` being made by PyTorch.
///
/// # Errors
///
/// A name that does not end in `.safetensors`, and a file that is there already or cannot be written.
pub fn save<M: Module>(
    network: &M,
    keys: Keys<'_>,
    file: impl AsRef<Path>,
) -> Result<(), WeightsError> {
    let file = file.as_ref();
    if !file
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors"))
    {
        return Err(WeightsError::NotSafetensors {
            file: file.to_path_buf(),
        });
    }
    let mut store = SafetensorsStore::from_file(file)
        .with_to_adapter(BurnToPyTorchAdapter)
        .remap(remapper(keys.iter().copied(), file)?);
    network.save_into(&mut store).map_err(of_store(file))
}

enum Weights {
    PyTorch(Box<PytorchStore>),
    Safetensors(Box<SafetensorsStore>),
}

fn open(file: &Path, keys: Keys<'_>) -> Result<Weights, WeightsError> {
    let prefix = [(r"^module\.", "")];
    let keys = remapper(prefix.into_iter().chain(keys.iter().copied()), file)?;
    let is_safetensors = is_safetensors(file).map_err(|source| WeightsError::Read {
        file: file.to_path_buf(),
        source,
    })?;
    if is_safetensors {
        let store = SafetensorsStore::from_file(file).with_from_adapter(PyTorchToBurnAdapter);
        return Ok(Weights::Safetensors(Box::new(store.remap(keys))));
    }
    let mut store = PytorchStore::from_file(file);
    let names = store.keys().map_err(of_store(file))?;
    if names.iter().any(|name| name.starts_with("state_dict.")) {
        store = PytorchStore::from_file(file).with_top_level_key("state_dict");
    }
    Ok(Weights::PyTorch(Box::new(store.remap(keys))))
}

/// Safetensors start with the length of a header in eight bytes, and its JSON.
fn is_safetensors(file: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(file)?.take(9).read_to_end(&mut start)?;
    Ok(start.get(8) == Some(&b'{') && !start.starts_with(b"PK"))
}

fn remapper<'a>(
    keys: impl Iterator<Item = (&'a str, &'a str)>,
    file: &Path,
) -> Result<KeyRemapper, WeightsError> {
    KeyRemapper::from_pattern_iter(keys).map_err(of_store(file))
}

fn of_store<E: ToString>(file: &Path) -> impl Fn(E) -> WeightsError {
    move |error| WeightsError::Store {
        file: file.to_path_buf(),
        message: error.to_string(),
    }
}

fn fill<M: Module, S: ModuleStore>(
    mut network: M,
    store: &mut S,
    file: &Path,
) -> Result<M, WeightsError> {
    let result = network.load_from(store).map_err(of_store(file))?;
    let mut left = result.unused;
    left.retain(|name| !name.ends_with("num_batches_tracked"));
    if left.is_empty() {
        Ok(network)
    } else {
        Err(WeightsError::LeftOver {
            file: file.to_path_buf(),
            count: left.len(),
            names: first(left),
        })
    }
}

fn first(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names.truncate(3);
    names
}

/// A ResNet of the depth and number of classes of the file's names and shapes.
fn resnet_of<S: ModuleStore>(
    store: &mut S,
    file: &Path,
    device: &Device,
) -> Result<ResNet, WeightsError> {
    let names = store.keys().map_err(of_store(file))?;
    let count = |start: &str, end: &str| {
        let found = |name: &&String| name.starts_with(start) && name.ends_with(end);
        names.iter().filter(found).count()
    };
    let blocks = ["layer1.", "layer2.", "layer3.", "layer4."]
        .map(|layer| count(layer, ".conv1.conv.weight"));
    let kind = match count("layer1.", ".conv3.conv.weight") {
        0 => ResNetBlockKind::Basic,
        _ => ResNetBlockKind::Bottleneck,
    };
    let head = store.get_tensor("fc.weight").map_err(of_store(file))?;
    let classes = head.map(|weight| weight.shape[0]);
    let Some(classes) = classes.filter(|_| !blocks.contains(&0)) else {
        return Err(WeightsError::NoResNet {
            file: file.to_path_buf(),
            names: first(names),
        });
    };
    let config = ResNetConfig::new(Form::Fused, kind, blocks).with_classes(classes);
    Ok(config.init(device))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::fs;

    use super::*;

    use burn::module::ParamGroup;
    use burn::tensor::{DType, Distribution, FloatDType, Tensor};
    use tempfile::TempDir;

    fn network(blocks: [usize; 4]) -> ResNet {
        let config = ResNetConfig::new(Form::Fused, ResNetBlockKind::Bottleneck, blocks);
        config.with_classes(3).init(&Device::flex())
    }

    /// A file of that network, its names with a prefix.
    fn saved(network: &ResNet, prefix: &str) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let written = folder.path().join("resnet.safetensors");
        let mut keys = ResNet::TO_PYTORCH_KEYS.to_vec();
        keys.push(("^", prefix));
        save(network, &keys, &written).unwrap();
        // The content tells what it is.
        let file = folder.path().join("resnet.pth");
        fs::rename(written, &file).unwrap();
        (folder, file)
    }

    #[test]
    fn no_file_is_saved_under_another_formats_name_or_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let network = network([1, 1, 1, 1]);
        let file = folder.path().join("resnet.pth");
        let error = save(&network, ResNet::TO_PYTORCH_KEYS, &file).unwrap_err();
        assert!(
            matches!(error, WeightsError::NotSafetensors { .. }),
            "{error}"
        );
        let file = folder.path().join("resnet.safetensors");
        fs::write(&file, "mine").unwrap();
        let error = save(&network, ResNet::TO_PYTORCH_KEYS, &file).unwrap_err();
        assert!(matches!(error, WeightsError::Store { .. }), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }

    #[test]
    fn a_saved_network_has_torchvisions_names_and_loads() {
        let network = network([1, 2, 1, 1]);
        let (_folder, file) = saved(&network, "");
        let names = SafetensorsStore::from_file(&file).keys().unwrap();
        for name in [
            "conv1.weight",
            "bn1.running_var",
            "layer2.0.downsample.1.bias",
            "layer2.1.conv3.weight",
            "layer4.0.bn2.weight",
            "fc.bias",
        ] {
            assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
        }
        let images = Tensor::<4>::random([2, 3, 40, 40], Distribution::Default, &Device::flex());
        let wanted = network.forward(images.clone());
        let (_folder, parallel) = saved(&network, "module.");
        for file in [&file, &parallel] {
            let loaded = load_resnet(file, &Device::flex()).unwrap();
            let variance = loaded.conv1.settings.running_variance;
            assert_eq!(variance, RunningVariance::Unbiased);
            let difference = loaded.forward(images.clone()) - wanted.clone();
            assert_eq!(difference.abs().max().into_scalar::<f32>(), 0.0);
        }
    }

    #[test]
    fn a_deeper_networks_file_is_refused() {
        let (_folder, file) = saved(&network([1, 2, 1, 1]), "");
        let error = load(network([1; 4]), ResNet::PYTORCH_KEYS, &file).unwrap_err();
        assert!(
            matches!(error, WeightsError::LeftOver { count: 15, .. }),
            "{error}"
        );
        let message = error.to_string();
        for part in ["resnet.pth", "layer2.1.conv1.conv.weight", "another depth"] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
        let error = load(network([1, 2, 2, 1]), ResNet::PYTORCH_KEYS, &file).unwrap_err();
        assert!(matches!(error, WeightsError::Store { .. }), "{error}");
    }

    #[test]
    fn files_that_are_none_are_errors_with_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let [text, empty, none] =
            ["text.pth", "empty.pth", "none.pth"].map(|name| folder.path().join(name));
        std::fs::write(&text, "no weights at all").unwrap();
        std::fs::write(&empty, "").unwrap();
        for file in [&text, &empty, &none] {
            let message = load_resnet(file, &Device::flex()).unwrap_err().to_string();
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(message.contains(name), "{message}");
        }
        let linear = folder.path().join("linear.safetensors");
        let model = burn::nn::LinearConfig::new(2, 3).init(&Device::flex());
        save(&model, &[], &linear).unwrap();
        let message = load_resnet(&linear, &Device::flex())
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("torchvision ResNet") && message.contains("weight"),
            "{message}"
        );
    }

    #[test]
    fn weights_in_half_are_cast_with_their_norms() {
        let half = burn_store::HalfPrecisionAdapter::new();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("half.safetensors");
        let keys = remapper(ResNet::TO_PYTORCH_KEYS.iter().copied(), &file).unwrap();
        let mut store = SafetensorsStore::from_file(&file)
            .with_to_adapter(burn_store::ModuleAdapter::chain(BurnToPyTorchAdapter, half))
            .remap(keys);
        network([1; 4]).save_into(&mut store).unwrap();
        let loaded = load_resnet(&file, &Device::flex()).unwrap();
        assert_eq!(loaded.conv1.conv.weight.val().dtype(), DType::F16);
        let cast = loaded.with_precision(FloatDType::F32);
        assert_eq!(cast.conv1.norm.gamma.val().dtype(), DType::F32);
        let images = Tensor::<4>::ones([2, 3, 40, 40], &Device::flex());
        assert_eq!(cast.forward(images).dtype(), DType::F32);
    }

    #[test]
    fn norms_are_a_group() {
        let network = network([1; 4]).train();
        let norms = ParamGroup::from_predicate("norm.");
        let frozen = network.freeze_group(norms.clone());
        let is_training = |network: &ResNet| network.layer1[0].conv2.norm.training.is_enabled();
        assert!(!is_training(&frozen));
        assert!(is_training(&frozen.unfreeze_group(norms)));
    }
}
