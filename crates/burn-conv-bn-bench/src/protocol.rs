//! What the driver and a contender's process say to each other: a [`Request`] a line on the
//! process's standard input, and a [`Reply`] a line on its standard output for each.
//!
//! Tensors pass between them in folders that requests name, the tensor `input` as the file
//! `input.f32`: raw little-endian f32, without a header.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::catalogue::Entry;
use crate::precision::Precision;

/// Results of a check that a contender is to be compared with are in this folder of the check's
/// own, if [`Checked::own_reference`] says so.
pub const OWN_REFERENCE: &str = "own";

/// Who is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// The fused layer, which recomputes the convolution.
    Fused,
    /// The fused layer with `Recompute::Never`.
    Never,
    /// Fused networks with `Recompute::Norm` inside chains and `Recompute::Conv` at their ends; a layer alone
    /// with `Recompute::Norm`.
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
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 10] = [
        Self::Fused,
        Self::Never,
        Self::NormConv,
        Self::NormNever,
        Self::Unfused,
        Self::UnfusedCheckpointed,
        Self::Eager,
        Self::Compile,
        Self::Tutorial,
        Self::Checkpoint,
    ];

    /// As in the protocol and the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Never => "never",
            Self::NormConv => "norm-conv",
            Self::NormNever => "norm-never",
            Self::Unfused => "unfused",
            Self::UnfusedCheckpointed => "unfused-checkpointed",
            Self::Eager => "eager",
            Self::Compile => "compile",
            Self::Tutorial => "tutorial",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// What runs it.
    pub fn engine(self) -> Engine {
        match self {
            Self::Fused
            | Self::Never
            | Self::NormConv
            | Self::NormNever
            | Self::Unfused
            | Self::UnfusedCheckpointed => Engine::Burn,
            Self::Eager | Self::Compile | Self::Tutorial | Self::Checkpoint => Engine::PyTorch,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What the driver asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Which versions of what it would run on. Answered by [`Reply::Hello`].
    Hello {},
    /// Draw an entry's data from a seed and write them to a folder, by the CPU whatever the device
    /// of the contenders. For `bench-worker` alone; answered by [`Reply::Done`].
    Prepare {
        /// The entry.
        entry: Entry,
        /// The seed.
        seed: u64,
        /// The folder.
        data_dir: PathBuf,
    },
    /// Become a contender and read the data. Answered by [`Reply::Done`].
    Load {
        /// The entry.
        entry: Entry,
        /// Which contender.
        variant: Contender,
        /// Where to compute: one of [`DEVICES`](crate::device::DEVICES).
        device: String,
        /// What to compute in.
        precision: Precision,
        /// Where the data are.
        data_dir: PathBuf,
        /// Threads to compute with.
        threads: usize,
    },
    /// Run forward and backward once, without dropout, and write the results to a folder.
    /// Answered by [`Reply::Checked`].
    Check {
        /// The folder.
        dir: PathBuf,
    },
    /// Compare tensors of two folders. For `bench-worker` alone; answered by
    /// [`Reply::Compared`].
    Compare {
        /// The folder with the results.
        dir: PathBuf,
        /// The folder with what they should be.
        reference: PathBuf,
        /// Names of the tensors.
        tensors: Vec<String>,
    },
    /// Run a timed step. Answered by [`Reply::Ran`].
    Run {},
    /// Run a step and time the kernels of the device. Answered by [`Reply::Profiled`].
    Profile {},
    /// Measure the memory of one step, in a process that has done nothing but load. Answered by
    /// [`Reply::Measured`].
    Memory {},
}

/// What a contender answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// Version by name.
        versions: BTreeMap<String, String>,
        /// The widest vectors that it computes with on this processor, if it can tell.
        #[serde(default)]
        vectors: Option<String>,
    },
    /// It was done, and there is nothing to say about it.
    Done {},
    /// To [`Request::Check`].
    Checked(Checked),
    /// To [`Request::Compare`].
    Compared {
        /// In the order of the request.
        tensors: Vec<TensorError>,
    },
    /// To [`Request::Run`].
    Ran(StepTime),
    /// To [`Request::Profile`].
    Profiled(StepProfile),
    /// To [`Request::Memory`].
    Measured(StepMemory),
    /// To anything: this machine lacks what that needs.
    Unavailable {
        /// What it lacks.
        reason: String,
    },
    /// To anything: it was tried and went wrong.
    Failed {
        /// What went wrong.
        reason: String,
    },
}

/// What a check wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Names of the tensors.
    pub tensors: Vec<String>,
    /// Whether it computes something else than the others, and wrote what that should be, by the
    /// framework's own differentiation, to [`OWN_REFERENCE`].
    pub own_reference: bool,
}

/// How far a result is off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    /// Name of the tensor.
    pub name: String,
    /// Largest difference, relative to the reference's largest value; `None` where the two cannot
    /// be compared, as for values that are not finite.
    pub error: Option<f64>,
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

/// What a device did in one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepProfile {
    /// Its kernels, the one that took longest first.
    pub kernels: Vec<KernelTime>,
}

/// The launches of one kernel in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelTime {
    /// Its name.
    pub name: String,
    /// How often it was launched.
    pub launches: usize,
    /// Milliseconds of the device, over all launches.
    pub ms: f64,
}

impl StepProfile {
    /// The profile of kernels in any order.
    pub fn new(mut kernels: Vec<KernelTime>) -> Self {
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Self { kernels }
    }

    /// Milliseconds of the device, over all kernels.
    pub fn busy_ms(&self) -> f64 {
        self.kernels.iter().map(|kernel| kernel.ms).sum()
    }

    /// Launches of all kernels.
    pub fn launches(&self) -> usize {
        self.kernels.iter().map(|kernel| kernel.launches).sum()
    }
}

/// Memory of one step, in bytes above the level just before its forward pass: data, parameters
/// and the upstream gradient were there before. `None` is what cannot be had.
///
/// The heap is the memory that the contender computes in: the host's, or that of a device's pool.
/// With a pool the resident set tells nothing, and is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepMemory {
    /// Resident set at the end of forward, with the output alive.
    pub resident_forward_end: Option<u64>,
    /// Largest resident set from the start of forward to the end of backward.
    pub resident_peak: Option<u64>,
    /// As [`resident_forward_end`](Self::resident_forward_end), counted by the allocator or the
    /// pool.
    pub heap_forward_end: Option<u64>,
    /// As [`resident_peak`](Self::resident_peak), counted by the allocator or the pool.
    pub heap_peak: Option<u64>,
    /// What the layers list as kept for the backward pass, each buffer once, without parameters and
    /// images. It follows from shapes, and leaves out what a network's other layers keep.
    pub saved: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::catalogue;

    fn json(message: &impl Serialize) -> String {
        serde_json::to_string(message).unwrap()
    }

    #[test]
    fn requests_are_what_peers_read() {
        let entry = catalogue(false).remove(4);
        let load = Request::Load {
            entry,
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
                + r#""size":224,"kernel":7,"stride":2,"padding":3,"groups":1,"input_grad":false}}},"#
                + r#""variant":"unfused-checkpointed","device":"flex","precision":"bf16","data_dir":"/data","threads":3}}"#
        );
        assert_eq!(json(&Request::Hello {}), r#"{"hello":{}}"#);
        assert_eq!(json(&Request::Memory {}), r#"{"memory":{}}"#);
        assert_eq!(json(&Request::Profile {}), r#"{"profile":{}}"#);
        assert_eq!(json(&Request::Run {}), r#"{"run":{}}"#);
        let network = catalogue(true).remove(7);
        assert_eq!(json(&network.work), r#"{"network":{"batch":256}}"#);
        let classifier = catalogue(false).remove(11);
        assert_eq!(
            json(&classifier.work),
            r#"{"classifier":{"architecture":"mobilenet_v2","batch":16,"size":224}}"#
        );
    }

    #[test]
    fn messages_survive_the_line() {
        let requests = [
            Request::Prepare {
                entry: catalogue(false).remove(0),
                seed: u64::MAX,
                data_dir: "a b".into(),
            },
            Request::Check { dir: "c".into() },
            Request::Compare {
                dir: "c".into(),
                reference: "d".into(),
                tensors: vec!["output".to_string()],
            },
        ];
        for request in requests {
            let line = json(&request);
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        }
        let replies = [
            Reply::Done {},
            Reply::Measured(StepMemory {
                resident_peak: Some(7),
                ..StepMemory::default()
            }),
            Reply::Compared {
                tensors: vec![TensorError {
                    name: "output".to_string(),
                    error: None,
                }],
            },
            Reply::Failed {
                reason: "two\nlines".to_string(),
            },
        ];
        for reply in replies {
            let line = json(&reply);
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
        }
    }

    #[test]
    fn a_peer_may_leave_out_what_it_has_not() {
        let ran = r#"{"ran":{"forward_ms":1,"backward_ms":2.5}}"#;
        let Reply::Ran(step) = serde_json::from_str(ran).unwrap() else {
            panic!("not the reply that it is");
        };
        assert_eq!(step.optimizer_ms, None);
        assert_eq!(step.total_ms(), 3.5);
        let measured = r#"{"measured":{"resident_forward_end":5,"resident_peak":null}}"#;
        let memory = StepMemory {
            resident_forward_end: Some(5),
            ..StepMemory::default()
        };
        assert_eq!(
            serde_json::from_str::<Reply>(measured).unwrap(),
            Reply::Measured(memory)
        );
        let hello = Reply::Hello {
            versions: BTreeMap::new(),
            vectors: None,
        };
        let line = r#"{"hello":{"versions":{}}}"#;
        assert_eq!(serde_json::from_str::<Reply>(line).unwrap(), hello);
    }

    #[test]
    fn names_are_those_of_the_protocol() {
        for contender in Contender::ALL {
            assert_eq!(json(&contender), format!("{:?}", contender.name()));
        }
    }

    #[test]
    fn the_peer_knows_its_contenders_and_requests() {
        let peer = include_str!("../peer/pytorch.py");
        for contender in Contender::ALL {
            if contender.engine() == Engine::PyTorch {
                assert!(peer.contains(&format!("\"{contender}\"")), "{contender}");
            }
        }
        for request in ["hello", "load", "check", "run", "memory"] {
            assert!(peer.contains(&format!("\"{request}\"")), "{request}");
        }
    }

    #[test]
    fn the_peer_knows_the_catalogue() {
        let peer = include_str!("../peer/pytorch.py");
        for entry in catalogue(false) {
            let work = serde_json::to_value(&entry.work).unwrap();
            let (kind, shape) = work.as_object().unwrap().iter().next().unwrap();
            assert!(peer.contains(&format!("\"{kind}\"")), "{kind}");
            if let Some(architecture) = shape.get("architecture") {
                assert!(peer.contains(&architecture.to_string()), "{architecture}");
            }
        }
    }
}
