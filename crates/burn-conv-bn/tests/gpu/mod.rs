//! The CubeCL device that this build tests on.

use burn::tensor::Device;

/// The first device of the runtime that was compiled in.
#[allow(unreachable_code, reason = "a build may have several runtimes")]
pub fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(feature = "rocm")]
    return Device::rocm(0);
    #[cfg(feature = "metal")]
    return Device::metal(Default::default());
    #[cfg(feature = "vulkan")]
    return Device::vulkan(Default::default());
    // Burn's own `Device::webgpu` is the browser's; its feature chooses WGSL for every wgpu device.
    #[cfg(any(feature = "webgpu", feature = "wgpu"))]
    return Device::wgpu(Default::default());
    #[cfg(feature = "cpu")]
    return Device::cpu();
    panic!("the feature `cubecl` alone has no device: choose a runtime")
}
