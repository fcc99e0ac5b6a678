//! Requests to replies.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Error, Result};
use burn_conv_bn_bench::catalogue::{Entry, Work};
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Checked, Contender, Reply, Request, StepMemory, TensorError};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_train::device::DeviceError;
use burn_conv_bn_train::report::BURN_VERSION;

use crate::classifier::{self, ClassifierWork};
use crate::device::{open, vectors};
use crate::files::{read, relative_error};
#[cfg(feature = "cubecl")]
use crate::kernels;
use crate::layer::{self, LayerWork};
use crate::network::{self, NetworkWork};
use crate::precision::Computing;
use crate::workload::Workload;

/// What went wrong as a reply: what a device lacks is nobody's fault.
pub fn explain(error: Error) -> Reply {
    let reason = format!("{error:#}");
    match error.downcast_ref() {
        Some(DeviceError::Precision { .. }) => Reply::Unavailable { reason },
        _ => Reply::Failed { reason },
    }
}

/// What one process has been told so far.
pub struct Session {
    allocator: &'static CountingAllocator,
    contender: Option<Contender>,
    workload: Option<Box<dyn Workload>>,
}

impl Session {
    pub fn new(allocator: &'static CountingAllocator) -> Self {
        Self {
            allocator,
            contender: None,
            workload: None,
        }
    }

    pub fn answer(&mut self, request: Request) -> Result<Reply> {
        match request {
            Request::Hello {} => Ok(Reply::Hello {
                versions: BTreeMap::from([("burn".to_string(), BURN_VERSION.to_string())]),
                vectors: Some(vectors()),
            }),
            Request::Prepare {
                entry,
                seed,
                data_dir,
            } => {
                prepare(&entry.work, seed, &data_dir)?;
                Ok(Reply::Done {})
            }
            // The threads are rayon's, whose pool the driver sizes through the environment.
            Request::Load {
                entry,
                variant,
                device,
                precision,
                data_dir,
                threads: _,
            } => {
                self.workload = Some(load(&entry, variant, &device, precision, &data_dir)?);
                self.contender = Some(variant);
                Ok(Reply::Done {})
            }
            Request::Check { dir } => Ok(Reply::Checked(Checked {
                tensors: self.loaded()?.check(&dir)?,
                own_reference: false,
            })),
            Request::Compare {
                dir,
                reference,
                tensors,
            } => compare(&dir, &reference, tensors),
            Request::Run {} => Ok(Reply::Ran(self.loaded()?.step())),
            Request::Profile {} => Ok(profile(self.loaded()?)),
            Request::Memory {} => {
                let allocator = self.allocator;
                // What Burn's gradient checkpointing leaves out is in no list.
                let is_listed = self.contender != Some(Contender::UnfusedCheckpointed);
                let workload = self.loaded()?;
                let memory = workload.memory(allocator);
                Ok(Reply::Measured(StepMemory {
                    saved: is_listed.then(|| workload.saved()),
                    ..memory
                }))
            }
        }
    }

    fn loaded(&mut self) -> Result<&mut (dyn Workload + 'static)> {
        let workload = self.workload.as_deref_mut();
        workload.context("nothing was loaded")
    }
}

/// Draws the data of an entry from a seed, and writes them to a folder.
fn prepare(work: &Work, seed: u64, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match work {
        Work::Layer(layer) => layer::prepare(layer, seed, folder),
        Work::Network(network) => network::prepare(network, seed, folder),
        Work::Classifier(classifier) => classifier::prepare(classifier, seed, folder),
    }
}

/// An entry in the form of a contender, with its data, on the device of that name, in a precision.
fn load(
    entry: &Entry,
    contender: Contender,
    device: &str,
    precision: Precision,
    data: &Path,
) -> Result<Box<dyn Workload>> {
    let device = open(contender, device, precision)?;
    let computing = Computing::new(precision);
    let workload: Box<dyn Workload> = match &entry.work {
        Work::Layer(layer) => Box::new(LayerWork::load(layer, contender, computing, device, data)?),
        Work::Network(network) => Box::new(NetworkWork::load(
            network, contender, computing, device, data,
        )?),
        Work::Classifier(classifier) => Box::new(ClassifierWork::load(
            classifier, contender, computing, device, data,
        )?),
    };
    Ok(workload)
}

/// The kernels of a step, where there are any.
fn profile(workload: &mut dyn Workload) -> Reply {
    #[cfg(feature = "cubecl")]
    {
        let profile = kernels::profile(|| {
            workload.step();
        });
        if !profile.kernels.is_empty() {
            return Reply::Profiled(profile);
        }
    }
    let _ = workload;
    Reply::Unavailable {
        reason: "what computes here launches no kernels".to_string(),
    }
}

fn compare(folder: &Path, reference: &Path, tensors: Vec<String>) -> Result<Reply> {
    let compare = |name: String| -> Result<TensorError> {
        let error = relative_error(&read(folder, &name)?, &read(reference, &name)?);
        Ok(TensorError { name, error })
    };
    let tensors = tensors.into_iter().map(compare).collect::<Result<_>>()?;
    Ok(Reply::Compared { tensors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::catalogue::{Architecture, Classifier, Layer, Network};
    use burn_conv_bn_bench::device::FLEX;

    static ALLOCATOR: CountingAllocator = CountingAllocator::new();

    const OURS: [Contender; 4] = [
        Contender::Fused,
        Contender::Never,
        Contender::Unfused,
        Contender::UnfusedCheckpointed,
    ];

    /// Less than the catalogue's: the sums of these sizes are short.
    const LAYER_TOLERANCE: f64 = 1e-4;

    fn small_layer(input_grad: bool) -> Entry {
        Entry {
            id: "layer".to_string(),
            work: Work::Layer(Layer {
                batch: 3,
                channels: [4, 6],
                size: 9,
                kernel: 3,
                stride: 2,
                padding: 1,
                groups: 2,
                input_grad,
            }),
        }
    }

    fn small_network() -> Entry {
        Entry {
            id: "network".to_string(),
            work: Work::Network(Network { batch: 4 }),
        }
    }

    fn small_classifier(architecture: Architecture) -> Entry {
        Entry {
            id: "classifier".to_string(),
            work: Work::Classifier(Classifier {
                architecture,
                batch: 4,
                size: 64,
            }),
        }
    }

    /// Checks every contender of Burn against the unfused one, by the protocol alone.
    fn check_all(entry: &Entry, precision: Precision, tolerance: f64) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut session = Session::new(&ALLOCATOR);
        let done = session.answer(Request::Prepare {
            entry: entry.clone(),
            seed: 1,
            data_dir: path("data"),
        });
        assert_eq!(done.unwrap(), Reply::Done {});
        let mut names = Vec::new();
        for variant in OURS {
            let load = Request::Load {
                entry: entry.clone(),
                variant,
                device: FLEX.to_string(),
                precision,
                data_dir: path("data"),
                threads: 1,
            };
            session.answer(load).unwrap();
            let dir = path(variant.name());
            let Ok(Reply::Checked(checked)) = session.answer(Request::Check { dir }) else {
                panic!("{variant} did not check");
            };
            assert!(!checked.own_reference);
            names = checked.tensors;
        }
        for variant in OURS {
            let compare = Request::Compare {
                dir: path(variant.name()),
                reference: path("unfused"),
                tensors: names.clone(),
            };
            let Ok(Reply::Compared { tensors }) = session.answer(compare) else {
                panic!("{variant} cannot be compared");
            };
            assert_eq!(tensors.len(), names.len());
            for tensor in tensors {
                let error = tensor.error.unwrap_or(f64::INFINITY);
                assert!(error <= tolerance, "{variant}, {}: {error:e}", tensor.name);
            }
        }
        names
    }

    /// As in the benchmark.
    fn check(entry: &Entry, precision: Precision) -> Vec<String> {
        check_all(entry, precision, entry.work.tolerance(FLEX, precision))
    }

    #[test]
    fn all_forms_agree_in_mixed_precision() {
        for precision in [Precision::F16, Precision::Bf16] {
            for entry in [
                small_layer(true),
                small_network(),
                small_classifier(Architecture::ResNet18),
            ] {
                assert!(check(&entry, precision).len() >= 4);
            }
        }
    }

    #[test]
    fn what_a_device_does_not_compute_in_is_unavailable() {
        let lacking = DeviceError::Precision {
            device: "webgpu",
            dtype: "bf16",
        };
        assert!(matches!(explain(lacking.into()), Reply::Unavailable { .. }));
        let missing = DeviceError::NotFound("cuda");
        assert!(matches!(explain(missing.into()), Reply::Failed { .. }));
    }

    #[test]
    fn all_forms_of_a_layer_agree() {
        let names = check_all(&small_layer(true), Precision::F32, LAYER_TOLERANCE);
        let wanted = [
            "output",
            "input_grad",
            "weight_grad",
            "gamma_grad",
            "beta_grad",
        ];
        assert_eq!(names, wanted);
        // A first layer's input has no gradient.
        let names = check_all(&small_layer(false), Precision::F32, LAYER_TOLERANCE);
        assert!(!names.contains(&"input_grad".to_string()), "{names:?}");
    }

    #[test]
    fn all_forms_of_the_network_agree() {
        let network = small_network();
        let names = check(&network, Precision::F32);
        assert_eq!(names.len(), 8, "{names:?}");
        assert_eq!(names[..2], ["log_probabilities", "loss"]);
    }

    #[test]
    fn all_forms_of_a_classifier_agree() {
        for architecture in [
            Architecture::ResNet18,
            Architecture::MobileNetV2,
            Architecture::DenseNet121,
        ] {
            let classifier = small_classifier(architecture);
            let names = check(&classifier, Precision::F32);
            assert_eq!(names[..2], ["logits", "loss"]);
            assert_eq!(names[2..], ["norms_and_biases_grad", "weight_grad_norms"]);
        }
    }

    /// What each contender says that it keeps.
    fn saved(entry: &Entry, precision: Precision) -> [Option<u64>; 4] {
        let folder = tempfile::tempdir().unwrap();
        prepare(&entry.work, 5, folder.path()).unwrap();
        OURS.map(|variant| {
            let mut session = Session::new(&ALLOCATOR);
            let load = Request::Load {
                entry: entry.clone(),
                variant,
                device: FLEX.to_string(),
                precision,
                data_dir: folder.path().to_path_buf(),
                threads: 1,
            };
            session.answer(load).unwrap();
            let Ok(Reply::Measured(memory)) = session.answer(Request::Memory {}) else {
                panic!("{variant} did not measure");
            };
            memory.saved
        })
    }

    #[test]
    fn memory_has_what_a_layer_lists_as_kept() {
        // Mean and variance; the input; the output, of the convolution and of the norm.
        let (statistics, input, output) = (2 * 6 * 4, 3 * 4 * 9 * 9 * 4, 3 * 6 * 5 * 5 * 4);
        let never = statistics + input + output;
        let wanted = [
            Some(statistics + input),
            Some(never),
            Some(never + output),
            None,
        ];
        assert_eq!(saved(&small_layer(true), Precision::F32), wanted);
        // Images are no activation.
        let first = wanted.map(|bytes| bytes.map(|bytes| bytes - input));
        assert_eq!(saved(&small_layer(false), Precision::F32), first);
        // Half of all but the statistics, and of the cast that Burn's norm wants.
        let [fused, never, unfused] = [input, input + output, input + 2 * output + output];
        let wanted = [fused, never, unfused].map(|bytes| Some(statistics + bytes / 2));
        let [mixed @ .., checkpointed] = saved(&small_layer(true), Precision::Bf16);
        assert_eq!((mixed, checkpointed), (wanted, None));
    }

    #[test]
    fn memory_has_what_a_network_lists_as_kept() {
        // The second block's input, the pooled output, places or indices; outputs of both convolutions and
        // norms, and what Burn's pool reads; statistics, and the linear layers' part.
        let (first, second) = (4 * 32 * 26 * 26 * 4, 4 * 64 * 24 * 24 * 4);
        let pooled = second / 4;
        // Dropout's draws, ReLU's input and output, log-softmax's scores and their sums.
        let head = 4 * (3 * 128 + 10 + 1) * 4;
        let rest = 2 * (32 + 64) * 4 + head;
        let fused = first + pooled + pooled / 4 + rest;
        let never = fused + first + second;
        let unfused = 3 * first + 3 * second + 2 * pooled + rest;
        let wanted = [Some(fused), Some(never), Some(unfused), None];
        assert_eq!(saved(&small_network(), Precision::F32), wanted);

        let [fused, never, unfused, checkpointed] =
            saved(&small_classifier(Architecture::ResNet18), Precision::F32);
        assert!(fused < never && never < unfused, "{fused:?} {never:?}");
        assert_eq!(checkpointed, None);
    }

    #[test]
    fn steps_are_timed_in_their_parts() {
        for (entry, optimizer) in [
            (small_layer(true), false),
            (small_network(), true),
            (small_classifier(Architecture::ResNet18), true),
        ] {
            let folder = tempfile::tempdir().unwrap();
            prepare(&entry.work, 2, folder.path()).unwrap();
            for contender in OURS {
                let mut workload =
                    load(&entry, contender, FLEX, Precision::F32, folder.path()).unwrap();
                for _ in 0..2 {
                    let step = workload.step();
                    assert!(step.forward_ms > 0.0 && step.backward_ms > 0.0, "{step:?}");
                    assert_eq!(step.optimizer_ms.is_some(), optimizer, "{step:?}");
                }
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_data() {
        for entry in [small_layer(true), small_network()] {
            let read = |seed: u64| {
                let folder = tempfile::tempdir().unwrap();
                prepare(&entry.work, seed, folder.path()).unwrap();
                let mut files: Vec<_> = fs::read_dir(folder.path())
                    .unwrap()
                    .map(|file| file.unwrap().path())
                    .collect();
                files.sort();
                let contents = files.iter().map(|path| fs::read(path).unwrap());
                contents.collect::<Vec<_>>()
            };
            let first = read(7);
            assert!(first.len() > 4);
            assert_eq!(first, read(7));
            assert_ne!(first, read(8));
        }
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let mut session = Session::new(&ALLOCATOR);
        assert!(session.answer(Request::Run {}).is_err());
        let folder = tempfile::tempdir().unwrap();
        let entry = small_layer(true);
        prepare(&entry.work, 3, folder.path()).unwrap();
        let error = load(
            &entry,
            Contender::Eager,
            FLEX,
            Precision::F32,
            folder.path(),
        )
        .err()
        .unwrap();
        assert!(error.to_string().contains("eager"), "{error:#}");
    }
}
