//! Messages between the driver and a contender's process: a [`Request`] a line on the process's standard
//! input, and a [`Reply`] a line on its standard output for each, besides any number of [`Reply::Tuned`]. Tensors are
//! [files](crate::tensor_file) in folders that requests name.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::catalogue::Entry;
use crate::precision::Precision;

/// Subfolder of a check's results: the contender's own reference, if [`Checked::own_reference`] is set.
pub const OWN_REFERENCE: &str = "own";

/// Contenders in the order of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// The fused layer, which recomputes the convolution.
    Fused,
    /// The fused layer with `Recompute::Never`.
    Never,
    /// Fused networks with `Recompute::Norm` inside chains and `Recompute::Conv` at their ends; a layer
    /// alone with `Recompute::Norm`.
    NormConv,
    /// The same with `Recompute::Never` at the ends.
    NormNever,
    /// Burn's own `Conv2d`, `BatchNorm` and ReLU: the reference of every check.
    Unfused,
    /// The same on a device with Burn's gradient checkpointing.
    UnfusedCheckpointed,
    /// PyTorch's own layers.
    Eager,
    /// The same through `torch.compile`.
    Compile,
    /// The tutorial's custom function.
    Tutorial,
    /// PyTorch's own layers under `torch.utils.checkpoint`.
    Checkpoint,
}

/// Which framework a contender runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Burn, in `bench-worker`.
    Burn,
    /// PyTorch, in `peer/pytorch.py`.
    PyTorch,
}

impl Contender {
    /// The contenders of an engine.
    pub fn of(engine: Engine) -> impl Iterator<Item = Self> {
        let all = Self::value_variants().iter().copied();
        all.filter(move |contender| contender.engine() == engine)
    }

    /// What runs it.
    pub fn engine(self) -> Engine {
        match self {
            Self::Eager | Self::Compile | Self::Tutorial | Self::Checkpoint => Engine::PyTorch,
            _ => Engine::Burn,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().ok_or(fmt::Error)?;
        f.pad(value.get_name())
    }
}

/// A message of the driver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Names and versions of the software. Answered by [`Reply::Hello`].
    Hello {},
    /// Draw an entry's data on the CPU and write them; `bench-worker` alone does. Answered by
    /// [`Reply::Done`].
    Prepare {
        /// The entry.
        entry: Entry,
        /// Seed of the data.
        seed: u64,
        /// Folder of the data.
        data_dir: PathBuf,
    },
    /// Become a contender of an entry and read its data. Answered by [`Reply::Done`].
    Load {
        /// The entry.
        entry: Entry,
        /// The contender.
        variant: Contender,
        /// One of [`DEVICES`](crate::device::DEVICES).
        device: String,
        /// Precision of the computation.
        precision: Precision,
        /// Folder of the data.
        data_dir: PathBuf,
        /// Threads to compute with.
        threads: usize,
    },
    /// Run forward and backward once, without dropout, and write the results. Answered by
    /// [`Reply::Checked`].
    Check {
        /// Folder of the results.
        dir: PathBuf,
    },
    /// Run a timed step. Answered by [`Reply::Ran`].
    Run {},
    /// Run a step and time the device's kernels. Answered by [`Reply::Profiled`].
    Profile {},
    /// Measure the memory of one step, in a process that has only loaded. Answered by
    /// [`Reply::Measured`].
    Memory {},
    /// Run training steps and measure their memory. Answered by [`Reply::Trained`].
    Train {
        /// Number of steps. The first pays the one-time costs.
        steps: usize,
    },
}

/// An answer of a contender.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello(Software),
    /// Success without a result.
    Done {},
    /// To [`Request::Check`].
    Checked(Checked),
    /// To [`Request::Run`].
    Ran(StepTime),
    /// To [`Request::Profile`].
    Profiled {
        /// The slowest first.
        kernels: Vec<KernelTime>,
    },
    /// To [`Request::Memory`].
    Measured(StepMemory),
    /// To [`Request::Train`].
    Trained(Training),
    /// To any request: the machine or the framework lacks something. No failure.
    Unavailable {
        /// The lack, for people.
        reason: String,
    },
    /// Before the answer to any request, or between two: the process tunes kernels.
    Tuned {
        /// Number of them so far.
        kernels: usize,
    },
    /// To any request: a failure.
    Failed {
        /// The failure, for people.
        reason: String,
    },
}

/// Software of a contender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Software {
    /// Version by name.
    pub versions: BTreeMap<String, String>,
    /// The widest vectors in use on this processor, if known.
    #[serde(default)]
    pub vectors: Option<String>,
}

/// Results of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Names of the tensors.
    pub tensors: Vec<String>,
    /// Whether the contender computes another function than the others and wrote a reference of its own,
    /// by the framework's differentiation, to [`OWN_REFERENCE`].
    pub own_reference: bool,
}

/// Time of one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Milliseconds of the forward pass, to the output of a layer and the loss of a network.
    pub forward_ms: f64,
    /// Milliseconds of the backward pass.
    pub backward_ms: f64,
    /// Milliseconds of the optimizer; only networks have one.
    pub optimizer_ms: Option<f64>,
}

impl StepTime {
    /// Milliseconds of the whole step.
    pub fn total_ms(&self) -> f64 {
        self.forward_ms + self.backward_ms + self.optimizer_ms.unwrap_or_default()
    }
}

/// Training steps and their memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Times of the steps, in order.
    pub steps: Vec<StepTime>,
    /// Most bytes in use meanwhile, data, parameters and optimizer state included: the process's
    /// resident set, or a device's pool. `None` if the system does not tell.
    pub peak_bytes: Option<u64>,
}

/// The launches of one kernel in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelTime {
    /// Name of the kernel.
    pub name: String,
    /// Number of launches.
    pub launches: usize,
    /// Milliseconds of the device, over all launches.
    pub ms: f64,
}

/// Memory of one step, in bytes above the level just before its forward pass: data, parameters
/// and the upstream gradient were there before. `None` where unknown.
///
/// Heap is the allocator on the host or a device's pool, for which there is no resident set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepMemory {
    /// Resident set at the end of forward, with the output alive.
    pub resident_forward_end: Option<u64>,
    /// Largest resident set from the start of forward to the end of backward.
    pub resident_peak: Option<u64>,
    /// Bytes of the allocator or the pool at the end of forward.
    pub heap_forward_end: Option<u64>,
    /// Most bytes of the allocator or the pool.
    pub heap_peak: Option<u64>,
    /// Name of the kernel at whose launch the pool had the most.
    pub peak_kernel: Option<String>,
    /// What is kept for the backward pass, each buffer once, without parameters and images: by the list
    /// of Burn's layers, which follows from shapes, or as PyTorch's hooks count.
    pub saved: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{catalogue, more};

    const PEER: &str = include_str!("../peer/pytorch.py");

    fn json(message: &impl Serialize) -> String {
        serde_json::to_string(message).unwrap()
    }

    #[test]
    fn requests_are_what_peers_read() {
        let load = Request::Load {
            entry: catalogue(false).remove(4),
            variant: Contender::UnfusedCheckpointed,
            device: "flex".to_string(),
            precision: Precision::Bf16,
            data_dir: "/data".into(),
            threads: 3,
        };
        assert_eq!(
            json(&load),
            r#"{"load":{"entry":{"id":"k7-s2","work":{"layer":{"batch":32,"channels":[3,64],"#
                .to_string()
                + r#""dims":2,"size":224,"kernel":7,"stride":2,"padding":3,"dilation":1,"groups":1,"#
                + r#""input_grad":false}}},"#
                + r#""variant":"unfused-checkpointed","device":"flex","precision":"bf16","data_dir":"/data","threads":3}}"#
        );
        for (request, line) in [
            (Request::Hello {}, r#"{"hello":{}}"#),
            (
                Request::Check { dir: "c".into() },
                r#"{"check":{"dir":"c"}}"#,
            ),
            (Request::Run {}, r#"{"run":{}}"#),
            (Request::Profile {}, r#"{"profile":{}}"#),
            (Request::Memory {}, r#"{"memory":{}}"#),
            (Request::Train { steps: 3 }, r#"{"train":{"steps":3}}"#),
        ] {
            assert_eq!(json(&request), line);
            let (name, _) = line[2..].split_once('"').unwrap();
            assert!(PEER.contains(&format!("name == \"{name}\"")), "{name}");
        }
    }

    #[test]
    fn replies_are_one_line_and_a_peer_may_leave_out_what_it_has_not() {
        let reason = "two\nlines".to_string();
        assert!(!json(&Reply::Failed { reason }).contains('\n'));
        let read = |line: &str| serde_json::from_str::<Reply>(line).unwrap();
        let step = StepTime {
            forward_ms: 1.0,
            backward_ms: 2.5,
            optimizer_ms: None,
        };
        assert_eq!(step.total_ms(), 3.5);
        assert_eq!(
            read(r#"{"ran":{"forward_ms":1,"backward_ms":2.5}}"#),
            Reply::Ran(step)
        );
        let memory = StepMemory {
            resident_forward_end: Some(5),
            ..StepMemory::default()
        };
        assert_eq!(
            read(r#"{"measured":{"resident_forward_end":5,"resident_peak":null}}"#),
            Reply::Measured(memory)
        );
        let software = Software {
            versions: BTreeMap::new(),
            vectors: None,
        };
        assert_eq!(read(r#"{"hello":{"versions":{}}}"#), Reply::Hello(software));
    }

    #[test]
    fn the_peer_knows_its_contenders_its_precisions_and_the_catalogue() {
        for contender in Contender::value_variants() {
            assert_eq!(json(contender), format!("\"{contender}\""));
        }
        let mut names: Vec<String> = Contender::of(Engine::PyTorch).map(|c| json(&c)).collect();
        for precision in Precision::value_variants() {
            assert_eq!(json(precision), format!("\"{precision}\""));
            names.push(json(precision));
        }
        for entry in [catalogue(false), more(false)].concat() {
            let work = serde_json::to_value(&entry.work).unwrap();
            let (kind, shape) = work.as_object().unwrap().iter().next().unwrap();
            names.push(format!("\"{kind}\""));
            names.extend(shape.get("architecture").map(ToString::to_string));
        }
        for name in names {
            assert!(PEER.contains(&name), "{name}");
        }
    }
}
