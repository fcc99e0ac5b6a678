//! Figures of memory, and their ratios.

use crate::protocol::StepMemory;

/// A figure of memory, in the ways in which it may be known, the most telling first.
pub type Figure = [fn(StepMemory) -> Option<u64>; 2];

pub const FORWARD_END: Figure = [
    |memory| memory.resident_forward_end,
    |memory| memory.heap_forward_end,
];
pub const SAVED: Figure = [|memory| memory.saved, |_| None];
pub const PEAK: Figure = [|memory| memory.resident_peak, |memory| memory.heap_peak];

/// The ratio of the peaks of the resident sets, or of the pools: of two of a kind.
pub fn peak_ratio(memory: StepMemory, base: StepMemory) -> Option<f64> {
    memory_ratio(&PEAK, memory, base)
}

/// The ratio of a figure that both have in the same way.
pub fn memory_ratio(figure: &Figure, memory: StepMemory, base: StepMemory) -> Option<f64> {
    figure.iter().find_map(|of| {
        let (value, base) = of(memory).zip(of(base).filter(|base| *base > 0))?;
        Some(value as f64 / base as f64)
    })
}
