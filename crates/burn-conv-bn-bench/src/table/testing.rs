//! Reports for the tests of tables.

use crate::catalogue::catalogue;
use crate::device::FLEX;
use crate::precision::Precision;
use crate::protocol::{Contender, StepMemory, StepTime};
use crate::report::{ContenderReport, EntryReport, Report};

/// A contender of one step, with its forward pass in ms and its peak in MiB.
pub fn contender(contender: Contender, forward_ms: f64, peak: u64) -> ContenderReport {
    ContenderReport {
        steps: vec![StepTime {
            forward_ms,
            backward_ms: 2.0 * forward_ms,
            optimizer_ms: None,
        }],
        memory: Some(StepMemory {
            resident_forward_end: Some(3 << 19),
            resident_peak: Some(peak << 20),
            ..StepMemory::default()
        }),
        ..ContenderReport::new(contender)
    }
}

/// An entry of these contenders.
pub fn report(contenders: Vec<ContenderReport>) -> EntryReport {
    let mut report = EntryReport {
        contenders,
        ..EntryReport::new(catalogue(false).remove(1), FLEX, Precision::F32)
    };
    report.summarize();
    report
}

/// A run of nothing.
pub fn run() -> Report {
    Report {
        date: "2026-01-02T03:04:05Z".to_string(),
        device: FLEX.to_string(),
        ..Report::default()
    }
}
