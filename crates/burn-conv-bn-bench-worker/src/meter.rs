//! Memory of a step: on the host, the resident set as Linux reports it and the heap as the
//! allocator counts it; on a CubeCL device, its pool.

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use burn_conv_bn_bench::linux::bytes;
use burn_conv_bn_bench::protocol::StepMemory;
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_train::memory::MemoryProbe;

use crate::device::is_cube;

/// Measures from just before forward to the end of backward, in the memory that the device computes
/// in.
pub struct Meter {
    probe: MemoryProbe,
    /// The resident set before forward. `None` where the device's memory is not the process's.
    base: Option<u64>,
    /// Bytes of a CubeCL device's pool before forward.
    pool: Option<u64>,
    /// Whether the largest resident set could be set back to the one of now.
    peak_was_reset: bool,
    forward_end: Option<u64>,
}

impl Meter {
    /// Call just before forward.
    pub fn start(device: &Device, allocator: &'static CountingAllocator) -> Self {
        let mut meter = Self {
            probe: MemoryProbe::of(device, allocator),
            base: None,
            pool: None,
            peak_was_reset: false,
            forward_end: None,
        };
        if is_cube(device) {
            meter.pool = Some(meter.probe.level() as u64);
        } else {
            return_freed_memory();
            meter.peak_was_reset = fs::write("/proc/self/clear_refs", "5").is_ok();
            meter.base = status("VmRSS");
        }
        meter.probe.begin();
        meter
    }

    /// Call just after forward, with its output alive.
    pub fn forward_end(&mut self) {
        self.probe.forward_end();
        self.forward_end = self.above_base("VmRSS");
    }

    /// Call just after backward, with output and gradients alive.
    pub fn finish(self) -> StepMemory {
        let counted = self.probe.backward_end();
        let peak = self.peak_was_reset.then(|| self.above_base("VmHWM"));
        StepMemory {
            heap_forward_end: Some(counted.forward_end_bytes as u64),
            heap_peak: Some(counted.peak_bytes as u64),
            peak_kernel: self.probe.peak_kernel(),
            resident_forward_end: self.forward_end,
            resident_peak: peak.flatten(),
            saved: None,
        }
    }

    /// Most bytes in use since the start, those from before it included. `None` where the resident
    /// set is unknown.
    pub fn whole_peak(self) -> Option<u64> {
        match self.pool {
            Some(level) => Some(level + self.probe.backward_end().peak_bytes as u64),
            None => status("VmHWM"),
        }
    }

    fn above_base(&self, name: &str) -> Option<u64> {
        Some(status(name)?.saturating_sub(self.base?))
    }
}

/// Returns freed memory that the C library keeps: gradients of the warm-up, as large as the parameters. A
/// step that reuses it would seem to need that much less.
#[allow(unsafe_code)]
fn return_freed_memory() {
    // SAFETY: it takes no pointer, touches freed memory alone, and may be called at any time.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// A size in this process's status, in bytes. `None` elsewhere than on Linux.
fn status(name: &str) -> Option<u64> {
    bytes(Path::new("/proc/self/status"), name)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        // Slack for other tests at the same time.
        let at_least = |bytes: Option<u64>, wanted: usize| {
            bytes.is_some_and(|bytes| bytes + (32 << 20) > wanted as u64)
        };
        assert!(at_least(memory.resident_forward_end, BYTES), "{memory:?}");
        if let Some(peak) = memory.resident_peak {
            assert!(at_least(Some(peak), 3 * BYTES), "{memory:?}");
        }
        let meter = Meter::start(&Device::flex(), &ALLOCATOR);
        drop(touched(2 * BYTES));
        let whole = meter.whole_peak();
        assert!(at_least(whole, 3 * BYTES), "{whole:?}");
        drop(kept);
    }
}
