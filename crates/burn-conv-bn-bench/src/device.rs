//! Names of the devices that Burn's contenders compute on.
//!
//! PyTorch's compute on the same kind of device, where they have one.

/// The CPU, through Burn's Flex: the default, and the only device that computes at once. All others
/// are CubeCL's, which compile kernels when they first run, try several, and do the work later than
/// they are told to.
pub const FLEX: &str = "flex";

/// An NVIDIA GPU.
pub const CUDA: &str = "cuda";

/// Any GPU, through wgpu and its own shading language, WGSL.
pub const WEBGPU: &str = "webgpu";

/// All of them, each named as Burn's feature for it.
pub const DEVICES: [&str; 8] = [FLEX, "cpu", CUDA, "metal", "rocm", "vulkan", WEBGPU, "wgpu"];
