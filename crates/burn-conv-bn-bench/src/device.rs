//! Names of the contenders' devices, those of Burn's features.

/// The CPU, through Burn's Flex: the default, and the only synchronous device. All others are CubeCL's, which
/// compile and tune kernels at the first run.
pub const FLEX: &str = "flex";

/// An NVIDIA GPU.
pub const CUDA: &str = "cuda";

/// Any GPU, through wgpu and WGSL.
pub const WEBGPU: &str = "webgpu";

/// All devices.
pub const DEVICES: [&str; 8] = [FLEX, "cpu", CUDA, "metal", "rocm", "vulkan", WEBGPU, "wgpu"];
