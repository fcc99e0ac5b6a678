//! Devices of the contenders, and their clocks.

use std::time::Instant;

use anyhow::{Context, Result, bail};
#[cfg(feature = "cubecl")]
use burn::backend::DispatchDevice;
use burn::tensor::Device;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, Engine};
use burn_conv_bn_train::device::DeviceChoice;
use pulp::{Arch, Simd, WithSimd};

use crate::precision::types;

/// The device of a contender, with autodiff.
pub fn open(contender: Contender, name: &str, precision: Precision) -> Result<Device> {
    if contender.engine() != Engine::Burn {
        bail!("{contender} is not one of Burn's contenders");
    }
    let choice: DeviceChoice = serde_json::from_value(name.into())
        .with_context(|| format!("there is no device {name:?}"))?;
    let device = choice.open_for(types(precision))?.autodiff();
    match contender {
        Contender::UnfusedCheckpointed => Ok(device.gradient_checkpointing()),
        _ => Ok(device),
    }
}

/// Waits until the device has finished. Flex always has: its calls are synchronous.
pub fn finish(device: &Device) {
    // The driver reports the last words of a process.
    device
        .sync()
        .unwrap_or_else(|error| panic!("the device failed: {error}"));
}

/// Whether the device is one of CubeCL's, which compile and tune kernels for new shapes and have a memory
/// pool.
pub fn is_cube(device: &Device) -> bool {
    #[cfg(feature = "cubecl")]
    if let DispatchDevice::Cube(_) = device.clone().without_autodiff().as_dispatch() {
        return true;
    }
    let _ = device;
    false
}

/// The widest vectors of our CPU kernels in this build on this processor, for people.
pub fn vectors() -> String {
    struct Width;

    impl WithSimd for Width {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            8 * size_of::<S::f32s>()
        }
    }

    format!("{}-bit vectors", Arch::new().dispatch(Width))
}

/// Times the parts of a step, each to the end of the device's work.
pub struct Stopwatch {
    device: Device,
    started: Instant,
}

impl Stopwatch {
    /// Starts once the device is idle.
    pub fn start(device: &Device) -> Self {
        finish(device);
        Self {
            device: device.clone(),
            started: Instant::now(),
        }
    }

    /// Milliseconds of the part that ends here. The next one starts.
    pub fn lap(&mut self) -> f64 {
        finish(&self.device);
        let ended = Instant::now();
        let part = ended - self.started;
        self.started = ended;
        1e3 * part.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::device::{DEVICES, FLEX};

    #[test]
    fn devices_are_those_of_the_protocol() {
        for name in DEVICES {
            let choice: DeviceChoice = serde_json::from_value(name.into()).unwrap();
            assert_eq!(serde_json::to_value(choice).unwrap(), name);
        }
        let error = open(Contender::Fused, "abacus", Precision::F32)
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("abacus"), "{error:#}");
    }

    #[test]
    fn vectors_hold_whole_values() {
        let vectors = vectors();
        let bits = vectors.strip_suffix("-bit vectors").unwrap();
        let bits: usize = bits.parse().unwrap();
        assert!(bits >= 32 && bits.is_power_of_two(), "{bits}");
    }

    #[test]
    fn parts_are_timed_one_after_the_other() {
        let device = open(Contender::UnfusedCheckpointed, FLEX, Precision::F32).unwrap();
        assert!(!is_cube(&device));
        let mut watch = Stopwatch::start(&device);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let first = watch.lap();
        let second = watch.lap();
        assert!(first >= 20.0 && second >= 0.0, "{first} and {second}");
    }
}
