//! Memory of a step: the resident set as Linux reports it, and the heap as the allocator counts it.

use std::fs;

use burn_conv_bn_bench::protocol::StepMemory;
use burn_conv_bn_memory::CountingAllocator;

/// Measures from just before forward to the end of backward.
pub struct Meter {
    allocator: &'static CountingAllocator,
    heap_base: usize,
    /// Whether the largest resident set could be set back to the one of now.
    peak_was_reset: bool,
    resident_base: Option<u64>,
    memory: StepMemory,
}

impl Meter {
    /// Call just before forward.
    pub fn start(allocator: &'static CountingAllocator) -> Self {
        let peak_was_reset = fs::write("/proc/self/clear_refs", "5").is_ok();
        Self {
            allocator,
            heap_base: allocator.reset_peak(),
            peak_was_reset,
            resident_base: status("VmRSS"),
            memory: StepMemory::default(),
        }
    }

    /// Call just after forward, with its output alive.
    pub fn forward_end(&mut self) {
        self.memory.heap_forward_end = Some(self.heap(self.allocator.current()));
        self.memory.resident_forward_end = self.resident("VmRSS");
    }

    /// Call just after backward, with output and gradients alive.
    pub fn finish(mut self) -> StepMemory {
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
        let mut meter = Meter::start(&ALLOCATOR);
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
