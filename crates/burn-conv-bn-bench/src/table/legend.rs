//! The text below the tables that says what their numbers are.

use std::fmt::Write as _;

use crate::device::FLEX;
use crate::precision::Precision;

/// What the numbers of an entry's tables are, on a device in a precision.
pub fn legend(device: &str, precision: Precision) -> String {
    let memory = match device {
        FLEX => HOST_MEMORY,
        _ => POOL_MEMORY,
    };
    let mut text = format!("{TIMES}\n{memory}");
    if precision.is_mixed() {
        let _ = write!(text, "\n{}", mixed(precision));
    } else if device != FLEX {
        let _ = write!(text, "\n{}", single(precision));
    }
    text
}

const TIMES: &str = "\
Times are medians over the rounds, in ms; min..max are the fastest and the slowest step. x eager and
x unfused are medians over the rounds of each round's ratio of whole steps. off is the largest
difference from the results of Burn's unfused layers, relative to the largest value of the same
tensor; for PyTorch's tutorial, whose norm is another, from its own formula.";

const HOST_MEMORY: &str = "\
Memory is in MiB above the level just before forward, in a fresh process: rss is the resident set at
the end of forward and at its peak up to the end of backward, heap the same counted by the
allocator, and x unfused the ratio of the peaks of rss. saved is what the layers list as kept for
the backward pass, each buffer once, without parameters and images; there is no such list of what
Burn's gradient checkpointing keeps, and none of PyTorch's.";

const POOL_MEMORY: &str = "\
Memory is in MiB above the level just before forward, in a fresh process that has run one step: pool
is what is in use of the device's memory pool at the end of forward and at its peak up to the end of
backward, and x unfused the ratio of the peaks; rss, where PyTorch is on the CPU, is the resident
set at the same times. saved is what the layers list as kept for the backward pass, each buffer
once, without parameters and images; there is no such list of what Burn's gradient checkpointing
keeps, and none of PyTorch's.";

/// Why f32 is not f32 everywhere.
fn single(precision: Precision) -> String {
    let peer = match precision {
        Precision::Tf32 => "PyTorch may, too.",
        _ => "PyTorch is told not to.",
    };
    format!(
        "Where a GPU has tensor cores, Burn may multiply f32 as TF32, whichever is faster;\n{peer}"
    )
}

/// What mixed precision is here.
fn mixed(precision: Precision) -> String {
    format!(
        "\
Convolutions, and what blocks pass on and keep, are in {precision}, parameters and optimizers in f32.
Burn's unfused norms run in f32 between casts, and its linear layers in f32; PyTorch's run as its
autocast has them."
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CUDA;
    use clap::ValueEnum as _;

    #[test]
    fn the_legend_speaks_of_the_memory_that_is_shown() {
        let [flex, cuda] = [FLEX, CUDA].map(|device| legend(device, Precision::F32));
        assert!(flex.contains("heap") && !flex.contains("pool"));
        assert!(cuda.contains("pool") && !cuda.contains("heap"));
    }

    #[test]
    fn the_legend_says_what_is_not_f32() {
        let of = |device, precision| legend(device, precision);
        assert!(!of(FLEX, Precision::F32).contains("TF32"));
        assert!(of(CUDA, Precision::F32).contains("PyTorch is told not"));
        assert!(of(CUDA, Precision::Tf32).contains("PyTorch may, too"));
        assert!(of(FLEX, Precision::Bf16).contains("are in bf16"));
        for device in [FLEX, CUDA] {
            for precision in Precision::value_variants() {
                for line in of(device, *precision).lines() {
                    assert!(line.chars().count() <= 100, "{line}");
                }
            }
        }
    }
}
