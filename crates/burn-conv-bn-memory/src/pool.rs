//! The memory pool of a CubeCL device.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::config::{TypeNameFormatLevel, type_name_format};
use cubecl::logging::{LaunchObservation, LaunchObserver};

/// Counts the bytes in use of a CubeCL device's pool, and their peak.
///
/// A pool reports the bytes in use now, not their peak. The meter reads it at every kernel launch, when all
/// buffers of the kernel are alive: between two launches a pool grows by the next one's buffers alone.
/// Scratch of a library's kernels counts, and so does that of autotuning: warm up first.
///
/// Each launch costs a query to the device's thread. One meter of a process at a time counts a peak. Clones
/// share the measurement.
///
/// ```no_run
/// use burn_conv_bn_memory::PoolMeter;
/// use cubecl::client::Client;
///
/// /// The most bytes that a step has in use above the level before it. The step must wait until the
/// /// device is done.
/// fn measure(client: Client, step: impl FnOnce()) -> usize {
///     let meter = PoolMeter::new(client);
///     let level = meter.reset_peak();
///     step();
///     meter.peak() - level
/// }
/// ```
#[derive(Clone)]
pub struct PoolMeter {
    samples: Arc<Samples>,
    observation: Arc<Mutex<Option<LaunchObservation>>>,
}

struct Samples {
    client: Client,
    peak: Mutex<Peak>,
    launches: Mutex<BTreeMap<&'static str, usize>>,
}

/// Most bytes in use, and the kernel that was launched then.
#[derive(Clone, Copy, Default)]
struct Peak {
    bytes: usize,
    kernel: Option<&'static str>,
}

impl Peak {
    fn raise(&mut self, bytes: usize, kernel: Option<&'static str>) {
        if bytes > self.bytes {
            *self = Self { bytes, kernel };
        }
    }
}

/// Starts a new peak at the bytes that `look` finds, which raises it.
///
/// The old peak is cleared first. Cleared after the level was read, it would take the peak of a launch in
/// between with it.
fn restart(peak: &Mutex<Peak>, look: impl FnOnce() -> usize) -> usize {
    *lock(peak) = Peak::default();
    look()
}

impl PoolMeter {
    /// A meter of the pool behind `client`.
    pub fn new(client: Client) -> Self {
        Self {
            samples: Arc::new(Samples {
                client,
                peak: Mutex::default(),
                launches: Mutex::default(),
            }),
            observation: Arc::default(),
        }
    }

    /// Bytes in use now, without padding. Queued work, as of Burn's fusion, does not count: synchronize
    /// first.
    pub fn current(&self) -> usize {
        self.samples.look(None)
    }

    /// Starts a new peak at the bytes in use now, which it returns, and a new count of launches.
    pub fn reset_peak(&self) -> usize {
        let current = restart(&self.samples.peak, || self.samples.look(None));
        lock(&self.samples.launches).clear();
        *lock(&self.observation) = Some(LaunchObservation::new(self.samples.clone()));
        current
    }

    /// Most bytes in use at any launch since [`reset_peak`](Self::reset_peak). Stops looking.
    pub fn peak(&self) -> usize {
        *lock(&self.observation) = None;
        self.samples.look(None);
        lock(&self.samples.peak).bytes
    }

    /// The kernel whose launch had the most bytes in use since [`reset_peak`](Self::reset_peak), by its name
    /// without paths; `None` if no launch had more than before or after.
    pub fn peak_kernel(&self) -> Option<String> {
        let kernel = lock(&self.samples.peak).kernel?;
        Some(type_name_format(kernel, TypeNameFormatLevel::Balanced))
    }

    /// How often each kernel was launched since [`reset_peak`](Self::reset_peak), by its own name.
    pub fn launches(&self) -> BTreeMap<&'static str, usize> {
        lock(&self.samples.launches).clone()
    }
}

/// A lock poisoned by a panic elsewhere guards a sound value: each update is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Samples {
    fn look(&self, kernel: Option<&'static str>) -> usize {
        let report = self.client.memory_report(MemoryScope::Device);
        let bytes = usize::try_from(report.usage().bytes_in_use).unwrap_or(usize::MAX);
        lock(&self.peak).raise(bytes, kernel);
        bytes
    }
}

impl LaunchObserver for Samples {
    fn launched(&self, kernel: &'static str) {
        *lock(&self.launches).entry(kernel).or_default() += 1;
        self.look(Some(kernel));
    }
}

impl fmt::Debug for PoolMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolMeter")
            .field("device", &self.samples.client.name())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_while_a_peak_starts_is_not_lost() {
        let peak = Mutex::new(Peak {
            bytes: 100,
            kernel: Some("before"),
        });
        let level = restart(&peak, || {
            // As on another thread, between the level and its peak.
            lock(&peak).raise(70, Some("between"));
            lock(&peak).raise(40, None);
            40
        });
        let Peak { bytes, kernel } = *lock(&peak);
        assert_eq!((level, bytes, kernel), (40, 70, Some("between")));
    }
}
