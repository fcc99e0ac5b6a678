//! The device's time in each kernel of a step.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use burn_conv_bn_bench::protocol::KernelTime;
use cubecl::config::{TypeNameFormatLevel, type_name_format};
use cubecl::future::block_on;
use cubecl::logging::{
    LaunchObservation, LaunchObserver, ProfileDuration, TimingMethod, TimingRequest,
};

/// Times every kernel that `step` launches, the slowest first; `step` must wait until the device is
/// done. No kernel is waited for: they follow each other as without a profile.
pub fn profile(step: impl FnOnce()) -> Vec<KernelTime> {
    let launches = Arc::new(Launches::default());
    let observation = LaunchObservation::new(launches.clone());
    step();
    drop(observation);
    let mut kernels: BTreeMap<String, KernelTime> = BTreeMap::new();
    for (kernel, measurement) in mem::take(&mut *launches.lock()) {
        let time = match measurement {
            Measurement::Unread(ticks) => block_on(ticks.resolve()).map(|ticks| ticks.duration()),
            Measurement::Read(time) => Some(time),
        };
        let name = type_name_format(kernel, TypeNameFormatLevel::Balanced);
        let kernel = kernels.entry(name.clone()).or_insert(KernelTime {
            name,
            launches: 0,
            ms: 0.0,
        });
        kernel.launches += 1;
        kernel.ms += 1e3 * time.unwrap_or_default().as_secs_f64();
    }
    let mut kernels: Vec<KernelTime> = kernels.into_values().collect();
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    kernels
}

enum Measurement {
    /// The device may not have run it yet.
    Unread(ProfileDuration),
    Read(Duration),
}

/// What was launched, in order.
#[derive(Default)]
struct Launches(Mutex<Vec<(&'static str, Measurement)>>);

impl Launches {
    fn lock(&self) -> MutexGuard<'_, Vec<(&'static str, Measurement)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LaunchObserver for Launches {
    fn launched(&self, _: &'static str) {}

    fn timing(&self) -> TimingRequest {
        TimingRequest::Deferred
    }

    fn profiled(&self, kernel: &'static str, profile: ProfileDuration) {
        self.lock().push((kernel, Measurement::Unread(profile)));
    }

    fn timed(&self, kernel: &'static str, duration: Duration, _: TimingMethod) {
        self.lock().push((kernel, Measurement::Read(duration)));
    }
}
