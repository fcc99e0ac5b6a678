//! Count of kernels that CubeCL tunes.

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

use crate::lines::Lines;

/// Reports how many kernels the process has tuned so far, one for each shape of an operation, until it is dropped.
///
/// CubeCL 0.11.3 reports its tuning only in logs: this reads the file to which `autotune.decisions` of `cubecl.toml`
/// directs them, or one of its own. What CubeCL finds in its cache is not tuned, and not counted. Other processes' lines in
/// that file are counted. A file that exists is not counted at all if `autotune.decisions.append` is off. CubeCL panics
/// where it cannot write the file.
///
/// ```
/// use std::time::Duration;
///
/// use burn_conv_bn_memory::TuningMeter;
///
/// let decisions = std::env::temp_dir().join(format!("decisions-{}", std::process::id()));
/// let meter = TuningMeter::start(decisions, Duration::from_secs(5), |kernels| {
///     eprintln!("{kernels} kernels tuned so far");
/// });
/// assert!(meter.is_some(), "no device was used before");
/// // Training.
/// drop(meter);
/// ```
#[derive(Debug)]
pub struct TuningMeter {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TuningMeter {
    /// Counts from now on. After each period in which kernels were tuned, and at the end, `report` gets the number of all.
    /// `decisions` is a file that CubeCL creates, in a folder that outlives the last kernel tuned.
    ///
    /// None after the first use of a CubeCL device, when CubeCL has read its configuration.
    pub fn start(
        decisions: PathBuf,
        period: Duration,
        report: impl FnMut(usize) + Send + 'static,
    ) -> Option<Self> {
        let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
        let own = config.autotune.decisions.file.get_or_insert(decisions);
        let lines = Lines::behind(own);
        if !CubeClRuntimeConfig::try_set(config) {
            return None;
        }
        let (stop, stopped) = channel();
        let watch = move || {
            let ended = || stopped.recv_timeout(period) != Err(RecvTimeoutError::Timeout);
            lines.watch(ended, report);
        };
        let thread = thread::Builder::new().name("tuning".to_string());
        Some(Self {
            stop: Some(stop),
            thread: Some(thread.spawn(watch).ok()?),
        })
    }
}

impl Drop for TuningMeter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Its panic has been printed.
            drop(thread.join());
        }
    }
}
