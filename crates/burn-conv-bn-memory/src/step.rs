//! Memory of a training step: measured, never estimated.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "cubecl")]
use burn::backend::DispatchDevice;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::CountingAllocator;
#[cfg(feature = "cubecl")]
use crate::PoolMeter;

/// Memory of one training step, in bytes above the level just before its forward pass.
///
/// Parameters, optimizer state and data were there before and do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepMemory {
    /// At the end of the forward pass: saved tensors and the result.
    pub forward_end_bytes: usize,
    /// The most at any moment from the start of forward to the end of backward.
    pub peak_bytes: usize,
}

/// Measures a training step of any model: `forward`, whose result stays alive, and `backward` of that
/// result.
///
/// Counts the bytes in use in a CubeCL device's memory pool; for other devices the process's, by its global
/// allocator. Run the step once before: the first one draws parameters, and autotuning allocates.
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn_memory::{CountingAllocator, measure_step};
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// let device = Device::flex().autodiff();
/// let model: Linear = LinearConfig::new(256, 256).init(&device);
/// let x = Tensor::<2>::ones([512, 256], &device);
/// let forward = || model.forward(x.clone()).exp().sum();
/// forward().backward();
///
/// let memory = measure_step(&device, &ALLOCATOR, forward, |loss| loss.backward());
/// // The exponential's output, which its derivative needs.
/// let output = 4 * 512 * 256;
/// assert!((output..2 * output).contains(&memory.forward_end_bytes));
/// assert!(memory.peak_bytes > memory.forward_end_bytes);
/// ```
pub fn measure_step<F, B>(
    device: &Device,
    allocator: &'static CountingAllocator,
    forward: impl FnOnce() -> F,
    backward: impl FnOnce(F) -> B,
) -> StepMemory {
    let probe = MemoryProbe::of(device, allocator);
    probe.begin();
    let output = forward();
    probe.forward_end();
    let _gradients = backward(output);
    probe.backward_end()
}

/// Measures [`StepMemory`] within a training step, where the two closures of [`measure_step`] do not fit.
/// Clones share the measurement.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_conv_bn_memory::{CountingAllocator, MemoryProbe};
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// let device = Device::flex();
/// let probe = MemoryProbe::of(&device, &ALLOCATOR);
/// let weight = Tensor::<2>::ones([64, 64], &device.autodiff()).require_grad();
///
/// probe.begin();
/// let product = weight.clone().matmul(weight.clone());
/// let loss = product.clone().exp().sum();
/// probe.forward_end();
/// let grads = loss.backward();
/// let memory = probe.backward_end();
///
/// // The product, which the graph holds too.
/// assert!(memory.forward_end_bytes >= 4 * 64 * 64);
/// assert!(memory.peak_bytes >= memory.forward_end_bytes);
/// # drop((product, grads));
/// ```
#[derive(Clone, Default)]
pub struct MemoryProbe {
    meter: Meter,
    step: Arc<Mutex<Step>>,
}

/// What counts the bytes.
#[derive(Clone, Default)]
enum Meter {
    #[default]
    Off,
    /// The process's global allocator: every byte, exactly.
    Host(&'static CountingAllocator),
    /// A CubeCL device's memory pool.
    #[cfg(feature = "cubecl")]
    Pool { meter: PoolMeter, device: Device },
}

#[derive(Clone, Copy, Debug, Default)]
struct Step {
    level: usize,
    forward_end: usize,
}

impl MemoryProbe {
    /// Measures the memory that `device` computes in: the host's by the process's global allocator, or the
    /// device's by its memory pool. A remote device's is not seen from here.
    pub fn of(device: &Device, allocator: &'static CountingAllocator) -> Self {
        #[cfg(feature = "cubecl")]
        if let DispatchDevice::Cube(cube) = device.clone().without_autodiff().as_dispatch() {
            return Self {
                meter: Meter::Pool {
                    meter: PoolMeter::new(cube.client()),
                    device: device.clone(),
                },
                step: Arc::default(),
            };
        }
        let _ = device;
        Self::host(allocator)
    }

    /// Measures the host's memory by the process's global allocator.
    pub fn host(allocator: &'static CountingAllocator) -> Self {
        Self {
            meter: Meter::Host(allocator),
            step: Arc::default(),
        }
    }

    /// Waits for the device to finish, and returns the bytes alive then.
    pub fn level(&self) -> usize {
        match &self.meter {
            Meter::Off => 0,
            Meter::Host(allocator) => allocator.current(),
            #[cfg(feature = "cubecl")]
            Meter::Pool { meter, device } => {
                finish(device);
                meter.current()
            }
        }
    }

    /// Host: most bytes alive since the last call. Device: bytes in use now, by the work that it has begun.
    pub fn take_peak(&self) -> usize {
        match &self.meter {
            Meter::Off => 0,
            Meter::Host(allocator) => allocator.take_peak(),
            #[cfg(feature = "cubecl")]
            Meter::Pool { meter, .. } => meter.current(),
        }
    }

    /// Measures nothing; every figure is zero.
    pub fn off() -> Self {
        Self::default()
    }

    /// Starts a measurement, just before the forward pass.
    pub fn begin(&self) {
        let level = match &self.meter {
            Meter::Off => 0,
            Meter::Host(allocator) => allocator.reset_peak(),
            #[cfg(feature = "cubecl")]
            Meter::Pool { meter, device } => {
                finish(device);
                meter.reset_peak()
            }
        };
        self.update(|step| step.level = level);
    }

    /// Ends the forward pass, whose results must still be alive.
    pub fn forward_end(&self) {
        let current = self.level();
        self.update(|step| step.forward_end = current.saturating_sub(step.level));
    }

    /// Ends the backward pass; waits for the device.
    pub fn backward_end(&self) -> StepMemory {
        let peak = match &self.meter {
            Meter::Off => 0,
            Meter::Host(allocator) => allocator.peak(),
            #[cfg(feature = "cubecl")]
            Meter::Pool { meter, device } => {
                finish(device);
                meter.peak()
            }
        };
        let step = self.update(|_| ());
        StepMemory {
            forward_end_bytes: step.forward_end,
            peak_bytes: peak.saturating_sub(step.level),
        }
    }

    /// The kernel of a CubeCL device at whose launch the measurement had its peak.
    pub fn peak_kernel(&self) -> Option<String> {
        match &self.meter {
            #[cfg(feature = "cubecl")]
            Meter::Pool { meter, .. } => meter.peak_kernel(),
            _ => None,
        }
    }

    fn update(&self, change: impl FnOnce(&mut Step)) -> Step {
        // An update is two stores: a lock poisoned by a panic elsewhere guards a sound value.
        let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut step);
        *step
    }
}

/// Waits for the device to finish. Errors surface when results are read.
#[cfg(feature = "cubecl")]
fn finish(device: &Device) {
    let _ = device.sync();
}

impl fmt::Debug for MemoryProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.meter {
            Meter::Off => "MemoryProbe(off)",
            Meter::Host(_) => "MemoryProbe(host)",
            #[cfg(feature = "cubecl")]
            Meter::Pool { .. } => "MemoryProbe(pool)",
        })
    }
}
