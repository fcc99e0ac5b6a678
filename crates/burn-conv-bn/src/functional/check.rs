use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::Running;
use crate::spec::ConvBnError;

/// Checks tensors against the op's input.
pub(super) struct Check {
    pub(super) dtype: DType,
    device: Device,
}

impl Check {
    pub(super) fn new<const D: usize>(input: &Tensor<D>) -> Self {
        Self {
            dtype: input.dtype(),
            device: input.device(),
        }
    }

    /// An error unless this build has the op on the input's device: Burn may have backends whose features of
    /// this crate are off.
    pub(super) fn backend(&self) -> Result<(), ConvBnError> {
        let device: &DispatchDevice = match self.device.as_dispatch() {
            DispatchDevice::Autodiff(device) => device,
            device => device,
        };
        match device {
            #[cfg(feature = "cubecl")]
            DispatchDevice::Cube(_) => Ok(()),
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => Ok(()),
            #[cfg(feature = "ndarray")]
            DispatchDevice::NdArray(_) => Ok(()),
            #[cfg(feature = "tch")]
            DispatchDevice::LibTorch(_) => Ok(()),
            #[cfg(feature = "remote")]
            DispatchDevice::Remote(_) => Ok(()),
            #[allow(unreachable_patterns, reason = "Burn may have no other backend")]
            device => {
                let device = format!("{device:?}");
                Err(ConvBnError::Backend {
                    feature: feature(&device),
                    device,
                })
            }
        }
    }

    /// An op's output of no elements, which is no part of the graph, as Burn's empty tensors are not.
    pub(super) fn empty<const D: usize>(&self, shape: Shape) -> Tensor<D> {
        Tensor::empty(shape, (&self.device, self.dtype))
    }

    pub(super) fn data<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
    ) -> Result<(), ConvBnError> {
        self.dtype_among(what, tensor, &[self.dtype])
    }

    pub(super) fn data_channels(
        &self,
        what: &'static str,
        tensor: Option<&Tensor<1>>,
        channels: usize,
    ) -> Result<(), ConvBnError> {
        let Some(tensor) = tensor else { return Ok(()) };
        self.shape(what, tensor, Shape::new([channels]))?;
        self.data(what, tensor)
    }

    /// The norm's gamma, beta, given mean and given variance.
    pub(super) fn norm(
        &self,
        [gamma, beta, mean, variance]: [Option<&Tensor<1>>; 4],
        channels: usize,
    ) -> Result<(), ConvBnError> {
        for (what, tensor) in [
            ("gamma", gamma),
            ("beta", beta),
            ("mean", mean),
            ("variance", variance),
        ] {
            self.norm_channels(what, tensor, channels)?;
        }
        // Kernels read both as one type.
        match gamma.zip(beta) {
            Some((gamma, beta)) if gamma.dtype() != beta.dtype() => Err(ConvBnError::DType {
                what: "beta",
                input: self.dtype,
                expected: format!("{:?}, as gamma is", gamma.dtype()),
                got: beta.dtype(),
            }),
            _ => Ok(()),
        }
    }

    fn norm_channels(
        &self,
        what: &'static str,
        tensor: Option<&Tensor<1>>,
        channels: usize,
    ) -> Result<(), ConvBnError> {
        let Some(tensor) = tensor else { return Ok(()) };
        self.shape(what, tensor, Shape::new([channels]))?;
        match self.dtype {
            DType::F16 | DType::BF16 => self.dtype_among(what, tensor, &[self.dtype, DType::F32]),
            dtype => self.dtype_among(what, tensor, &[dtype]),
        }
    }

    /// Running statistics are of any dtype.
    pub(super) fn running(
        &self,
        running: Option<&Running>,
        channels: usize,
    ) -> Result<(), ConvBnError> {
        let Some(Running { mean, variance, .. }) = running else {
            return Ok(());
        };
        self.shape("running mean", mean, Shape::new([channels]))?;
        self.shape("running variance", variance, Shape::new([channels]))
    }

    pub(super) fn shape<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
        expected: Shape,
    ) -> Result<(), ConvBnError> {
        let got = tensor.shape();
        if got == expected {
            Ok(())
        } else {
            Err(ConvBnError::Shape {
                what,
                expected,
                got,
            })
        }
    }

    fn dtype_among<const D: usize>(
        &self,
        what: &'static str,
        tensor: &Tensor<D>,
        expected: &[DType],
    ) -> Result<(), ConvBnError> {
        let got = tensor.dtype();
        if !expected.contains(&got) {
            let expected: Vec<String> = expected.iter().map(|dtype| format!("{dtype:?}")).collect();
            return Err(ConvBnError::DType {
                what,
                input: self.dtype,
                expected: expected.join(" or "),
                got,
            });
        }
        let device = tensor.device();
        if device == self.device {
            Ok(())
        } else {
            Err(ConvBnError::Device {
                what,
                expected: format!("{:?}", self.device),
                got: format!("{device:?}"),
            })
        }
    }
}

/// The feature of a backend, by its device as Burn's `DispatchDevice` prints it: the variants of backends that
/// were not compiled in have no name here.
fn feature(device: &str) -> Option<&'static str> {
    let features = [
        ("Cube(Cuda", "cuda"),
        ("Cube(Hip", "rocm"),
        ("Cube(Metal", "metal"),
        ("Cube(Cpu", "cpu"),
        ("Cube(", "wgpu"),
        ("Flex", "flex"),
        ("NdArray", "ndarray"),
        ("LibTorch", "tch"),
        ("Remote", "remote"),
    ];
    let found = features.iter().find(|(name, _)| device.starts_with(name));
    found.map(|(_, feature)| *feature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_backend_is_named_by_its_feature() {
        for (device, wanted) in [
            ("Cube(Cuda(CudaDevice { index: 0 }))", Some("cuda")),
            ("Cube(Hip(AmdDevice { index: 0 }))", Some("rocm")),
            ("Cube(Wgpu(DefaultDevice))", Some("wgpu")),
            ("Cube(Vulkan(DefaultDevice))", Some("wgpu")),
            ("Flex(FlexDevice)", Some("flex")),
            ("NdArray(Cpu)", Some("ndarray")),
            ("Remote(RemoteDevice { device_index: 0 })", Some("remote")),
            ("Capture(CaptureDevice)", None),
        ] {
            assert_eq!(feature(device), wanted, "{device}");
            let error = ConvBnError::Backend {
                device: device.to_string(),
                feature: feature(device),
            };
            let message = error.to_string();
            assert!(message.contains(device), "{message}");
            let named = wanted.map_or("no feature".to_string(), |name| format!("feature `{name}`"));
            assert!(message.contains(&named), "{message}");
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn a_backend_of_this_build_passes() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            let check = Check {
                dtype: DType::F32,
                device,
            };
            assert_eq!(check.backend(), Ok(()));
        }
    }
}
