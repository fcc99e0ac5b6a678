//! From requests to replies.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Write, stdout};
use std::path::Path;
#[cfg(feature = "cubecl")]
use std::time::Duration;

use anyhow::{Context, Error, Result};
use burn_conv_bn_bench::catalogue::Work;
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Checked, Contender, Reply, Request, Software, StepMemory};
use burn_conv_bn_memory::CountingAllocator;
#[cfg(feature = "cubecl")]
use burn_conv_bn_memory::TuningMeter;
use burn_conv_bn_train::device::DeviceError;
use burn_conv_bn_train::report::BURN_VERSION;

use crate::device::{open, vectors};
#[cfg(feature = "cubecl")]
use crate::kernels;
use crate::layer;
use crate::network::{self, NetworkWork, Spec};
use crate::precision::Computing;
use crate::workload::Workload;

/// An error as a reply: `Unavailable` where the device lacks something.
pub fn explain(error: Error) -> Reply {
    let reason = format!("{error:#}");
    match error.downcast_ref() {
        Some(DeviceError::Precision { .. }) => Reply::Unavailable { reason },
        _ => Reply::Failed { reason },
    }
}

/// Writes a reply, whole whatever other threads write.
pub fn send(reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut output = stdout().lock();
    output.write_all(&line).context("cannot reply")?;
    output.flush().context("cannot reply")
}

pub struct Session {
    allocator: &'static CountingAllocator,
    workload: Option<(Contender, Box<dyn Workload>)>,
    #[cfg(feature = "cubecl")]
    _tuning: Option<TuningMeter>,
}

/// Time between two reports of tuned kernels.
#[cfg(feature = "cubecl")]
const TUNING_PERIOD: Duration = Duration::from_secs(10);

impl Session {
    pub fn new(allocator: &'static CountingAllocator) -> Self {
        Self {
            allocator,
            workload: None,
            #[cfg(feature = "cubecl")]
            _tuning: None,
        }
    }

    pub fn answer(&mut self, request: Request) -> Result<Reply> {
        match request {
            Request::Hello {} => {
                return Ok(Reply::Hello(Software {
                    versions: BTreeMap::from([("burn".to_string(), BURN_VERSION.to_string())]),
                    vectors: Some(vectors()),
                }));
            }
            Request::Prepare {
                entry,
                seed,
                data_dir,
            } => {
                create(&data_dir)?;
                match &entry.work {
                    Work::Layer(layer) => layer::prepare(layer, seed, &data_dir)?,
                    Work::Network(work) => network::prepare(work.into(), seed, &data_dir)?,
                    Work::Classifier(work) => network::prepare(work.into(), seed, &data_dir)?,
                }
                return Ok(Reply::Done {});
            }
            // The driver sets rayon's number of threads through the environment.
            Request::Load {
                entry,
                variant,
                device,
                precision,
                data_dir,
                threads: _,
            } => {
                #[cfg(feature = "cubecl")]
                if self.workload.is_none() {
                    let decisions = data_dir.join(format!("decisions-{}", std::process::id()));
                    self._tuning = TuningMeter::start(decisions, TUNING_PERIOD, |kernels| {
                        // A driver that is gone is noticed at its next request.
                        drop(send(&Reply::Tuned { kernels }));
                    });
                }
                let workload = load(&entry.work, variant, &device, precision, &data_dir)?;
                self.workload = Some((variant, workload));
                return Ok(Reply::Done {});
            }
            _ => {}
        }
        let (contender, workload) = self.workload.as_mut().context("nothing was loaded")?;
        Ok(match request {
            Request::Check { dir } => {
                create(&dir)?;
                Reply::Checked(Checked {
                    tensors: workload.check(&dir)?,
                    own_reference: false,
                })
            }
            Request::Profile {} => profile(workload.as_mut()),
            Request::Memory {} => {
                let memory = workload.memory(self.allocator);
                // The lists do not know Burn's gradient checkpointing.
                let is_listed = *contender != Contender::UnfusedCheckpointed;
                Reply::Measured(StepMemory {
                    saved: workload.saved().filter(|_| is_listed),
                    ..memory
                })
            }
            Request::Train { steps } => Reply::Trained(workload.train(steps, self.allocator)),
            _ => Reply::Ran(workload.step()),
        })
    }
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// An entry in the form of a contender, with its data, on the device of that name, in a precision.
fn load(
    work: &Work,
    contender: Contender,
    device: &str,
    precision: Precision,
    data: &Path,
) -> Result<Box<dyn Workload>> {
    let device = open(contender, device, precision)?;
    let computing = Computing::new(precision);
    let spec: Spec = match work {
        Work::Layer(layer) => return layer::load(layer, contender, computing, device, data),
        Work::Network(network) => network.into(),
        Work::Classifier(classifier) => classifier.into(),
    };
    let work = NetworkWork::load(spec, contender, computing, device, data)?;
    Ok(Box::new(work))
}

/// The kernels of a step, on a device that launches any.
fn profile(workload: &mut dyn Workload) -> Reply {
    #[cfg(feature = "cubecl")]
    {
        let kernels = kernels::profile(|| {
            workload.step();
        });
        if !kernels.is_empty() {
            return Reply::Profiled { kernels };
        }
    }
    let _ = workload;
    Reply::Unavailable {
        reason: "this device launches no kernels".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::catalogue::{Architecture, Classifier, Entry, Layer, Network};
    use burn_conv_bn_bench::device::FLEX;
    use burn_conv_bn_bench::protocol::Engine;
    use burn_conv_bn_bench::tensor_file::{read, relative_error};
    use burn_conv_bn_train::device::DeviceChoice;
    use burn_conv_bn_train::job;
    use tempfile::TempDir;

    static ALLOCATOR: CountingAllocator = CountingAllocator::new();

    /// Less than the catalogue's: the sums of these sizes are short.
    const LAYER_TOLERANCE: f64 = 1e-4;

    fn small_layer(input_grad: bool) -> Work {
        Work::Layer(Layer {
            stride: 2,
            groups: 2,
            input_grad,
            ..Layer::new(3, [4, 6], 9, 3)
        })
    }

    fn small_volumes() -> Work {
        Work::Layer(Layer {
            dims: 3,
            dilation: 2,
            padding: 2,
            ..Layer::new(3, [4, 6], 5, 3)
        })
    }

    const NETWORK: Work = Work::Network(Network { batch: 4 });

    fn small_classifier(architecture: Architecture) -> Work {
        Work::Classifier(Classifier {
            architecture,
            batch: 4,
            size: 64,
        })
    }

    fn entry(work: &Work) -> Entry {
        Entry {
            id: "entry".to_string(),
            work: work.clone(),
        }
    }

    /// A folder with the data of an entry.
    fn drawn(work: &Work, seed: u64) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let prepare = Request::Prepare {
            entry: entry(work),
            seed,
            data_dir: folder.path().join("data"),
        };
        let done = Session::new(&ALLOCATOR).answer(prepare).unwrap();
        assert_eq!(done, Reply::Done {});
        folder
    }

    fn loaded(work: &Work, variant: Contender, precision: Precision, folder: &TempDir) -> Session {
        let mut session = Session::new(&ALLOCATOR);
        let load = Request::Load {
            entry: entry(work),
            variant,
            device: FLEX.to_string(),
            precision,
            data_dir: folder.path().join("data"),
            threads: 1,
        };
        assert_eq!(session.answer(load).unwrap(), Reply::Done {});
        session
    }

    /// Checks every contender of Burn against the unfused one. Returns the names of the results.
    fn check_all(work: &Work, precision: Precision, tolerance: f64) -> Vec<String> {
        let folder = drawn(work, 1);
        let dir = |contender: Contender| folder.path().join(contender.to_string());
        let mut names = Vec::new();
        for contender in Contender::of(Engine::Burn) {
            let mut session = loaded(work, contender, precision, &folder);
            let check = Request::Check {
                dir: dir(contender),
            };
            let Reply::Checked(checked) = session.answer(check).unwrap() else {
                panic!("{contender} did not check");
            };
            assert!(!checked.own_reference);
            names = checked.tensors;
        }
        for contender in Contender::of(Engine::Burn) {
            for name in &names {
                let [values, reference] =
                    [contender, Contender::Unfused].map(|c| read(&dir(c), name).unwrap());
                let error = relative_error(&values, &reference).unwrap_or(f64::INFINITY);
                assert!(error <= tolerance, "{contender}, {name}: {error:e}");
            }
        }
        names
    }

    /// The same with the catalogue's tolerance.
    fn check(work: &Work, precision: Precision) -> Vec<String> {
        check_all(work, precision, work.tolerance(FLEX, precision))
    }

    #[test]
    fn all_forms_agree_in_mixed_precision() {
        for precision in [Precision::F16, Precision::Bf16] {
            for work in [
                small_layer(true),
                NETWORK,
                small_classifier(Architecture::ResNet18),
            ] {
                assert!(check(&work, precision).len() >= 4);
            }
        }
    }

    #[test]
    fn all_forms_of_a_layer_agree() {
        let names = check_all(&small_layer(true), Precision::F32, LAYER_TOLERANCE);
        let wanted = [
            "output",
            "weight_grad",
            "gamma_grad",
            "beta_grad",
            "input_grad",
        ];
        assert_eq!(names, wanted);
        let names = check_all(&small_volumes(), Precision::F32, LAYER_TOLERANCE);
        assert_eq!(names, wanted);
        // A first layer's input has no gradient.
        let names = check_all(&small_layer(false), Precision::F32, LAYER_TOLERANCE);
        assert_eq!(names, wanted[..4]);
    }

    #[test]
    fn all_forms_of_the_networks_agree() {
        let names = check(&NETWORK, Precision::F32);
        let wanted = [
            "log_probabilities",
            "loss",
            "conv1.weight_grad",
            "conv2.weight_grad",
            "fc1.weight_grad",
            "fc1.bias_grad",
            "fc2.weight_grad",
            "fc2.bias_grad",
        ];
        assert_eq!(names, wanted);
        for architecture in [
            Architecture::ResNet18,
            Architecture::MobileNetV2,
            Architecture::DenseNet121,
            Architecture::CifarResNet18,
            Architecture::YoloxNano,
        ] {
            let names = check(&small_classifier(architecture), Precision::F32);
            assert_eq!(names[..2], ["logits", "loss"]);
            assert_eq!(names[2..], ["norms_and_biases_grad", "weight_grad_norms"]);
        }
    }

    #[test]
    fn what_a_device_does_not_compute_in_is_unavailable() {
        let lacking = DeviceError::Precision {
            device: DeviceChoice::Webgpu,
            precision: job::Precision::BF16,
        };
        assert!(matches!(explain(lacking.into()), Reply::Unavailable { .. }));
        let missing = DeviceError::NotFound(DeviceChoice::Cuda);
        assert!(matches!(explain(missing.into()), Reply::Failed { .. }));
    }

    /// Saved bytes of the fused form, the one that never recomputes, the unfused and the checkpointed one.
    fn saved(work: &Work, precision: Precision) -> [Option<u64>; 4] {
        let folder = drawn(work, 5);
        [
            Contender::Fused,
            Contender::Never,
            Contender::Unfused,
            Contender::UnfusedCheckpointed,
        ]
        .map(|contender| {
            let mut session = loaded(work, contender, precision, &folder);
            let Ok(Reply::Measured(memory)) = session.answer(Request::Memory {}) else {
                panic!("{contender} did not measure");
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
        // Volumes have no list of the unfused form.
        let volumes = 3 * 5 * 5 * 5 * 4;
        let fused = statistics + 4 * volumes;
        let wanted_volumes = [Some(fused), Some(fused + 6 * volumes), None, None];
        assert_eq!(saved(&small_volumes(), Precision::F32), wanted_volumes);
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
        assert_eq!(saved(&NETWORK, Precision::F32), wanted);

        let [fused, never, unfused, checkpointed] =
            saved(&small_classifier(Architecture::ResNet18), Precision::F32);
        assert!(fused < never && never < unfused, "{fused:?} {never:?}");
        assert_eq!(checkpointed, None);
    }

    #[test]
    fn steps_are_timed_in_their_parts() {
        for (work, optimizer) in [
            (small_layer(true), false),
            (NETWORK, true),
            (small_classifier(Architecture::ResNet18), true),
        ] {
            let folder = drawn(&work, 2);
            for contender in Contender::of(Engine::Burn) {
                let mut session = loaded(&work, contender, Precision::F32, &folder);
                for _ in 0..2 {
                    let Ok(Reply::Ran(step)) = session.answer(Request::Run {}) else {
                        panic!("{contender} did not run");
                    };
                    assert!(step.forward_ms > 0.0 && step.backward_ms > 0.0, "{step:?}");
                    assert_eq!(step.optimizer_ms.is_some(), optimizer, "{step:?}");
                }
            }
        }
    }

    #[test]
    fn training_is_measured_with_all_that_is_there() {
        let folder = drawn(&NETWORK, 6);
        let mut session = loaded(&NETWORK, Contender::Fused, Precision::F32, &folder);
        let Ok(Reply::Trained(training)) = session.answer(Request::Train { steps: 2 }) else {
            panic!("it did not train");
        };
        assert_eq!(training.steps.len(), 2);
        // Parameters, gradients and Adadelta's two states of the first linear layer.
        let least = 4 * 4 * 9216 * 128;
        let is_known = cfg!(target_os = "linux");
        assert_eq!(
            training.peak_bytes.is_some_and(|bytes| bytes > least),
            is_known
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_data() {
        let read = |seed: u64| {
            let folder = drawn(&small_layer(true), seed);
            let names = ["input", "weight", "gamma", "beta", "upstream"];
            names.map(|name| read(&folder.path().join("data"), name).unwrap())
        };
        let first = read(7);
        assert_eq!(first, read(7));
        assert_ne!(first, read(8));
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let error = Session::new(&ALLOCATOR).answer(Request::Run {});
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("nothing was loaded")
        );
        let layer = small_layer(true);
        let folder = drawn(&layer, 3);
        let data = folder.path().join("data");
        let eager = load(&layer, Contender::Eager, FLEX, Precision::F32, &data);
        assert!(eager.err().unwrap().to_string().contains("eager"));
        // Data that are not those of the entry.
        let loaded = load(&NETWORK, Contender::Fused, FLEX, Precision::F32, &data);
        assert!(loaded.err().unwrap().to_string().contains("images.f32"));
        let images = data.join("input.f32");
        fs::write(images, [0; 4]).unwrap();
        let loaded = load(&layer, Contender::Fused, FLEX, Precision::F32, &data);
        let error = loaded.err().unwrap().to_string();
        assert!(
            error.contains("input has 1 values instead of 972"),
            "{error}"
        );
    }
}
