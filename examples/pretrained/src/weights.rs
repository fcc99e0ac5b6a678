//! Files with the weights of torchvision's ResNets.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::tensor::Device;
use burn_conv_bn::{ConvBnModule, RunningVariance};
use burn_conv_bn_models::{Form, ResNet, ResNetBlockKind, ResNetConfig};
use burn_store::{
    BurnToPyTorchAdapter, KeyRemapper, ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter,
    PytorchStore, SafetensorsStore,
};

/// Patterns and replacements from our names to torchvision's: the way back of [`ResNet::PYTORCH_KEYS`].
const TORCHVISION_KEYS: [(&str, &str); 4] = [
    (r"(^|\.)conv(\d)\.conv\.", "${1}conv${2}."),
    (r"(^|\.)conv(\d)\.norm\.", "${1}bn${2}."),
    (r"\.downsample\.conv\.", ".downsample.0."),
    (r"\.downsample\.norm\.", ".downsample.1."),
];

/// Loads a ResNet of torchvision's, of any depth, from its `state_dict`: safetensors, or what `torch.save`
/// writes.
///
/// # Errors
///
/// A file that cannot be read, or holds more or less than a ResNet.
pub fn load(file: &Path, device: &Device) -> Result<ResNet> {
    let keys = ResNet::PYTORCH_KEYS.iter().copied();
    let keys = KeyRemapper::from_pattern_iter(keys).context("invalid pattern of a key")?;
    let network = if file.extension().is_some_and(|kind| kind == "safetensors") {
        let store = SafetensorsStore::from_file(file).with_from_adapter(PyTorchToBurnAdapter);
        read(store.remap(keys), device)
    } else {
        read(PytorchStore::from_file(file).remap(keys), device)
    };
    network.with_context(|| format!("cannot load {}", file.display()))
}

/// Depth and number of classes follow from the file's names and shapes.
fn read<S: ModuleStore>(mut store: S, device: &Device) -> Result<ResNet> {
    let text = |error: S::Error| anyhow!("{error}");
    let names = store.keys().map_err(text)?;
    let count = |start: &str, end: &str| {
        let found = |name: &&String| name.starts_with(start) && name.ends_with(end);
        names.iter().filter(found).count()
    };
    let blocks = ["layer1.", "layer2.", "layer3.", "layer4."]
        .map(|layer| count(layer, ".conv1.conv.weight"));
    let head = store.get_tensor("fc.weight").map_err(text)?;
    let classes = head.map(|weight| weight.shape[0]);
    let Some(classes) = classes.filter(|_| !blocks.contains(&0)) else {
        bail!("it is not the state_dict of one of torchvision's ResNets");
    };
    let kind = match count("layer1.", ".conv3.conv.weight") {
        0 => ResNetBlockKind::Basic,
        _ => ResNetBlockKind::Bottleneck,
    };
    let mut network = ResNetConfig::new(Form::Fused, kind, blocks)
        .with_classes(classes)
        .init(device)
        // As PyTorch would go on with them.
        .with_running_variance(RunningVariance::Unbiased);
    let result = network.load_from(&mut store).map_err(text)?;
    let mut unused = result.unused.iter();
    ensure!(
        unused.all(|name| name.ends_with("num_batches_tracked")),
        "it holds more than the ResNet of {blocks:?} blocks that it looks like: {:?}",
        result.unused
    );
    Ok(network)
}

/// Saves a ResNet as safetensors with torchvision's names.
///
/// # Errors
///
/// A file that cannot be written.
pub fn save(network: &ResNet, file: &Path) -> Result<()> {
    let keys = KeyRemapper::from_pattern_iter(TORCHVISION_KEYS);
    let mut store = SafetensorsStore::from_file(file)
        .with_to_adapter(BurnToPyTorchAdapter)
        .remap(keys.context("invalid pattern of a key")?);
    let saved = network.save_into(&mut store);
    saved.with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    use burn::tensor::{Distribution, Tensor};

    #[test]
    fn a_saved_network_has_torchvisions_names_and_loads() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resnet.safetensors");
        let device = Device::flex();
        let config = ResNetConfig::new(Form::Fused, ResNetBlockKind::Bottleneck, [1, 2, 1, 1]);
        let network = config.with_classes(3).init(&device);
        save(&network, &file).unwrap();

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

        let images = Tensor::<4>::random([2, 3, 40, 40], Distribution::Default, &device);
        let loaded = load(&file, &device).unwrap();
        let difference = loaded.forward(images.clone()) - network.forward(images);
        assert_eq!(difference.abs().max().into_scalar::<f32>(), 0.0);
    }

    #[test]
    fn a_file_that_is_none_is_an_error_with_its_name() {
        for name in ["none.safetensors", "none.pth"] {
            let error = load(Path::new(name), &Device::flex()).unwrap_err();
            assert!(format!("{error:#}").contains(name), "{error:#}");
        }
    }
}
