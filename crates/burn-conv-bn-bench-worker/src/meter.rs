//! Memory of a step: on the host, the resident set as Linux reports it and the heap as the
//! allocator counts it; on a CubeCL device, its pool.

use std::fs;

use burn::tensor::Device;
use burn_conv_bn_bench::protocol::StepMemory;
use burn_conv_bn_memory::CountingAllocator;
#[cfg(feature = "cubecl")]
use burn_conv_bn_memory::PoolMeter;

#[cfg(feature = "cubecl")]
use crate::device::{finish, pool};

/// Measures from just before forward to the end of backward, in the memory that the device computes
/// in.
pub enum Meter {
    Host(HostMeter),
    #[cfg(feature = "cubecl")]
    Pool(PoolStep),
}

impl Meter {
    /// Call just before forward.
    pub fn start(device: &Device, allocator: &'static CountingAllocator) -> Self {
        #[cfg(feature = "cubecl")]
        if let Some(pool) = pool(device) {
            return Self::Pool(PoolStep::start(device, pool));
        }
        let _ = device;
        Self::Host(HostMeter::start(allocator))
    }

    /// Call just after forward, with its output alive.
    pub fn forward_end(&mut self) {
        match self {
            Self::Host(meter) => meter.forward_end(),
            #[cfg(feature = "cubecl")]
            Self::Pool(meter) => meter.forward_end(),
        }
    }

    /// Call just after backward, with output and gradients alive.
    pub fn finish(self) -> StepMemory {
        match self {
            Self::Host(meter) => meter.finish(),
            #[cfg(feature = "cubecl")]
            Self::Pool(meter) => meter.finish(),
        }
    }
}

/// Measures a step in a device's pool. What the device has yet to do is no memory yet, so each look
/// waits for it.
#[cfg(feature = "cubecl")]
pub struct PoolStep {
    device: Device,
    pool: PoolMeter,
    base: usize,
    forward_end: Option<u64>,
}

#[cfg(feature = "cubecl")]
impl PoolStep {
    fn start(device: &Device, pool: PoolMeter) -> Self {
        finish(device);
        Self {
            base: pool.reset_peak(),
            device: device.clone(),
            pool,
            forward_end: None,
        }
    }

    fn forward_end(&mut self) {
        finish(&self.device);
        self.forward_end = Some(self.above_base(self.pool.current()));
    }

    fn finish(self) -> StepMemory {
        finish(&self.device);
        StepMemory {
            heap_forward_end: self.forward_end,
            heap_peak: Some(self.above_base(self.pool.peak())),
            ..StepMemory::default()
        }
    }

    fn above_base(&self, bytes: usize) -> u64 {
        bytes.saturating_sub(self.base) as u64
    }
}

/// Measures a step on the host.
pub struct HostMeter {
    allocator: &'static CountingAllocator,
    heap_base: usize,
    /// Whether the largest resident set could be set back to the one of now.
    peak_was_reset: bool,
    resident_base: Option<u64>,
    memory: StepMemory,
}

impl HostMeter {
    fn start(allocator: &'static CountingAllocator) -> Self {
        let peak_was_reset = fs::write("/proc/self/clear_refs", "5").is_ok();
        Self {
            allocator,
            heap_base: allocator.reset_peak(),
            peak_was_reset,
            resident_base: status("VmRSS"),
            memory: StepMemory::default(),
        }
    }

    fn forward_end(&mut self) {
        self.memory.heap_forward_end = Some(self.heap(self.allocator.current()));
        self.memory.resident_forward_end = self.resident("VmRSS");
    }

    fn finish(mut self) -> StepMemory {
        self.memory.heap_peak = Some(self.heap(self.allocator.peak()));
        if self.peak_was_reset {
            self.memory.resident_peak = self.resident("VmHWM");
        }
        self.memory
    }

    fn heap(&self, bytes: usize) -> u64 {
        bytes.saturating_sub(self.heap_base) as u64
    }

    fn resident(&self, name: &str) -> Option<u64> {
        let base = self.resident_base?;
        Some(status(name)?.saturating_sub(base))
    }
}

/// A size in this process's status, in bytes. `None` elsewhere than on Linux.
fn status(name: &str) -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// A size of a line like `VmRSS:     13560 kB`.
fn field(status: &str, name: &str) -> Option<u64> {
    let mut values = status.lines().filter_map(|line| {
        let value = line.strip_prefix(name)?.strip_prefix(':')?;
        value.trim().strip_suffix("kB")
    });
    let kibibytes: u64 = values.next()?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_by_their_whole_name() {
        let status = "Name:\tx\nVmRSSX:\t 1 kB\nVmHWM:\t   13564 kB\nVmRSS:\t   13560 kB\n";
        assert_eq!(field(status, "VmRSS"), Some(13560 * 1024));
        assert_eq!(field(status, "VmHWM"), Some(13564 * 1024));
        assert_eq!(field(status, "Vm"), None);
        assert_eq!(field(status, "Name"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn sees_a_buffer_come_and_go() {
        const BYTES: usize = 64 << 20;
        static ALLOCATOR: CountingAllocator = CountingAllocator::new();
        let mut meter = Meter::start(&Device::flex(), &ALLOCATOR);
        let touched = |bytes: usize| std::hint::black_box(vec![1u8; bytes]);
        let kept = touched(BYTES);
        meter.forward_end();
        drop(touched(2 * BYTES));
        let memory = meter.finish();
        // Other tests come and go at the same time, with less than this.
        let at_least = |bytes: Option<u64>, wanted: usize| {
            bytes.is_some_and(|bytes| bytes + (32 << 20) > wanted as u64)
        };
        assert!(at_least(memory.resident_forward_end, BYTES), "{memory:?}");
        if let Some(peak) = memory.resident_peak {
            assert!(at_least(Some(peak), 3 * BYTES), "{memory:?}");
        }
        drop(kept);
    }
}
