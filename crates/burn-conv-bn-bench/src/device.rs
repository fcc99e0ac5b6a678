//! Names of the devices that contenders compute on, each that of Burn's feature for it.

/// The CPU, through Burn's Flex: the default, and the only device that computes at once. All others
/// are CubeCL's, which compile and try kernels when they first run, and work asynchronously.
pub const FLEX: &str = "flex";

/// An NVIDIA GPU.
pub const CUDA: &str = "cuda";

/// Any GPU, through wgpu and WGSL.
pub const WEBGPU: &str = "webgpu";

/// All of them.
pub const DEVICES: [&str; 8] = [FLEX, "cpu", CUDA, "metal", "rocm", "vulkan", WEBGPU, "wgpu"];
