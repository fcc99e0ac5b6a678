//! Where a job computes.

use burn::tensor::{Device, DeviceType};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::choice::Choice;
use crate::precision::Precision;

/// A device, named as Burn's feature for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The CPU, through Burn's Flex.
    Flex,
    /// The CPU, through CubeCL's own runtime.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU, through wgpu.
    Metal,
    /// An AMD GPU.
    Rocm,
    /// Any GPU with Vulkan, through wgpu and SPIR-V.
    Vulkan,
    /// Any GPU, through wgpu and its own shading language, WGSL.
    Webgpu,
    /// Any GPU, through wgpu's own choice.
    Wgpu,
}

/// Why there is no such device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The feature was not compiled in.
    #[error(
        "this build has no device {name:?}: build it with `--features {name},fusion,autotune` \
         (it has: {built})", name = .0.name(), built = built()
    )]
    NotBuilt(DeviceChoice),
    /// The machine has no such device, or no driver for it.
    #[error("this machine has no device {:?}, or no driver for one", .0.name())]
    NotFound(DeviceChoice),
    /// The device is there, and does not compute in a type.
    #[error(
        "the device {:?} of this machine does not compute in {}; use --precision f32",
        .device.name(), .precision.name()
    )]
    Precision {
        /// The device.
        device: DeviceChoice,
        /// The types.
        precision: Precision,
    },
}

impl DeviceChoice {
    /// The CPU, where everything else can be compared with, if Flex was compiled in.
    pub(crate) fn host() -> Option<Self> {
        cfg!(feature = "flex").then_some(Self::Flex)
    }

    /// What the first steps on the device wait for, in a build with autotuning or without it.
    pub(crate) fn tuning_notice(self, autotunes: bool) -> Option<String> {
        let name = self.name();
        let kept = if cfg!(feature = "persistence") {
            "The findings are kept for the next run"
        } else {
            "Build with the feature `persistence` to keep the findings for the next run"
        };
        (autotunes && self != Self::Flex).then(|| {
            format!(
                "Tuning: the first steps on {name} try several kernels for each shape, which may take \
                 minutes. {kept}."
            )
        })
    }

    /// The device, without autodiff: the best of its kind where there are several.
    ///
    /// # Errors
    ///
    /// If this build or this machine has none.
    pub fn open(self) -> Result<Device, DeviceError> {
        let (kind, device) = self.built().ok_or(DeviceError::NotBuilt(self))?;
        // Burn opens a device when it is first used, and panics if it is not there.
        if Device::enumerate(kind).is_empty() {
            Err(DeviceError::NotFound(self))
        } else {
            Ok(device)
        }
    }

    /// As [`open`](Self::open), a device that computes in that precision.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Precision`], and those of [`open`](Self::open).
    pub fn open_for(self, precision: Precision) -> Result<Device, DeviceError> {
        let device = self.open()?;
        // What cannot be computed in yields garbage there, or a panic in the middle of a training.
        if device.supports_dtype(precision.activations()) {
            Ok(device)
        } else {
            let device = self;
            Err(DeviceError::Precision { device, precision })
        }
    }

    /// What lists such devices, and the one to use, if it was compiled in.
    fn built(self) -> Option<(DeviceType, Device)> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex => Some((DeviceType::Flex, Device::flex())),
            #[cfg(feature = "cpu")]
            Self::Cpu => Some((DeviceType::Cpu, Device::cpu())),
            #[cfg(feature = "cuda")]
            Self::Cuda => Some((DeviceType::Cuda, Device::cuda(0))),
            #[cfg(feature = "metal")]
            Self::Metal => Some((DeviceType::Metal, Device::metal(Default::default()))),
            #[cfg(feature = "rocm")]
            Self::Rocm => Some((DeviceType::Rocm, Device::rocm(0))),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Some((DeviceType::Vulkan, Device::vulkan(Default::default()))),
            // Burn's own `Device::webgpu` is the browser's; its feature chooses WGSL.
            #[cfg(feature = "webgpu")]
            Self::Webgpu => Some((DeviceType::Wgpu, Device::wgpu(Default::default()))),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some((DeviceType::Wgpu, Device::wgpu(Default::default()))),
            #[allow(unreachable_patterns, reason = "a build may have them all")]
            _ => None,
        }
    }
}

/// The devices of this build, by name.
fn built() -> String {
    let all = DeviceChoice::value_variants().iter();
    let built = all.filter(|choice| choice.built().is_some());
    let names: Vec<_> = built.map(|choice| choice.name()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "flex")]
    #[test]
    fn the_cpu_computes_in_every_precision() {
        for &precision in Precision::value_variants() {
            assert!(DeviceChoice::Flex.open_for(precision).is_ok());
        }
    }

    #[test]
    fn tuning_is_announced_where_it_happens() {
        assert_eq!(DeviceChoice::Flex.tuning_notice(true), None);
        assert_eq!(DeviceChoice::Cuda.tuning_notice(false), None);
        let notice = DeviceChoice::Cuda.tuning_notice(true).unwrap();
        assert!(notice.contains("first steps on cuda"), "{notice}");
        assert!(notice.contains("next run"), "{notice}");
    }

    #[cfg(not(feature = "rocm"))]
    #[test]
    fn what_is_not_built_says_how() {
        let error = DeviceChoice::Rocm.open().unwrap_err().to_string();
        assert!(error.contains("no device \"rocm\""), "{error}");
        assert!(error.contains("--features rocm,fusion,autotune"), "{error}");
        assert!(error.contains("flex"), "{error}");
    }
}
