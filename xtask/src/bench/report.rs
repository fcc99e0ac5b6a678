//! Results as data: for the tables and `--json`.

use std::collections::BTreeMap;
use std::fmt;

use burn_conv_bn_bench::catalogue::{Entry, Work};
use burn_conv_bn_bench::precision::Precision;
use burn_conv_bn_bench::protocol::{Contender, KernelTime, StepMemory, StepTime};
use serde::Serialize;

/// [`EntryReport::problem`] of an entry whose turn has not come.
const PENDING: &str = "not run yet";

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Start of the run in UTC, as RFC 3339 writes it.
    pub date: String,
    pub quick: bool,
    pub device: String,
    pub precision: Precision,
    pub machine: Machine,
    /// Version by name.
    pub versions: BTreeMap<String, String>,
    /// Commit of this repository, with `-dirty` behind it if something was changed since. `None`
    /// outside of a repository.
    pub commit: Option<String>,
    /// Version of this workspace's packages.
    pub version: &'static str,
    /// Seed of all data.
    pub seed: u64,
    /// Bytes of `--largest-batch`.
    pub largest_batch: Option<u64>,
    /// The selected entries, in order. Those that did not run have the reason in
    /// [`EntryReport::problem`].
    pub entries: Vec<EntryReport>,
    /// The fused form against others, for people.
    pub summary: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// Name of the processor, and the numbers that distinguish models of one name.
    pub cpu: String,
    /// Model of the GPU, if one was used and its name is known.
    pub gpu: Option<String>,
    /// Vector instructions that kernels choose by.
    pub vector_units: Vec<String>,
    /// The widest vectors in use, by engine.
    pub vectors: BTreeMap<String, String>,
    /// Size of each cache of the first core, as `L2 512K`.
    pub caches: Vec<String>,
    /// Threads that the machine runs at once.
    pub cores: usize,
    /// Threads of each contender.
    pub threads: usize,
    /// Operating system and architecture.
    pub system: String,
    /// Variables that change allocators, thread pools or compilers, as far as set. All contenders
    /// inherit them.
    pub environment: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct EntryReport {
    pub entry: Entry,
    /// The work, for people.
    pub title: String,
    /// Images.
    pub batch: usize,
    /// Largest allowed error of a result, relative to its tensor's largest value.
    pub tolerance: f64,
    /// Timed rounds.
    pub rounds: usize,
    /// Duration of the entry.
    pub seconds: f64,
    /// The reason if the entry itself did not run.
    pub problem: Option<String>,
    pub contenders: Vec<ContenderReport>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ContenderReport {
    pub contender: Contender,
    pub problem: Option<Problem>,
    /// Difference of its results from the reference, by tensor.
    pub errors: Vec<TensorError>,
    pub largest_error: Option<f64>,
    /// Its steps, one a round; none if some round is missing.
    pub steps: Vec<StepTime>,
    pub timing: Option<Timing>,
    /// Memory of a step in a fresh process.
    pub memory: Option<StepMemory>,
    /// Ratio of its peak to that of Burn's unfused layers.
    pub peak_to_unfused: Option<f64>,
    /// Kernels of one more step, with `--profile`, the slowest first.
    pub kernels: Vec<KernelTime>,
    /// With `--largest-batch`, in place of all of the above.
    pub largest: Option<Largest>,
}

/// The largest batch that trains within a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Largest {
    /// Images.
    pub batch: usize,
    /// Most bytes in use while it trains.
    pub peak_bytes: u64,
    /// Milliseconds of a step for each image.
    pub image_ms: f64,
    /// Ratio of the batch to that of Burn's unfused layers.
    pub to_unfused: Option<f64>,
}

/// Difference of a result from the reference.
#[derive(Clone, Debug, Serialize)]
pub struct TensorError {
    pub name: String,
    /// Largest difference, relative to the reference's largest value; `None` where the two cannot
    /// be compared, as for values that are not finite.
    pub error: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub kind: ProblemKind,
    /// For people.
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The machine lacks something: no failure.
    Unavailable,
    Failed,
    /// It ran, and its results are not those of the reference.
    Mismatch,
}

impl Problem {
    pub fn new(kind: ProblemKind, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self { kind, reason }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ProblemKind::Unavailable => "not available",
            ProblemKind::Failed => "FAILED",
            ProblemKind::Mismatch => "FAILED ITS CHECK",
        };
        write!(f, "{kind}: {}", self.reason)
    }
}

/// A median and the spread of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    /// The lower and the upper quartile, interpolated between two values.
    pub quartiles: [f64; 2],
    /// The smallest and the largest value.
    pub range: [f64; 2],
}

impl Spread {
    /// Of values in any order. `None` if there are none.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (first, last) = (*values.first()?, *values.last()?);
        let quantile = |share: f64| {
            let place = share * (values.len() - 1) as f64;
            let [below, above] = [place.floor(), place.ceil()].map(|place| values[place as usize]);
            below + place.fract() * (above - below)
        };
        Some(Self {
            median: quantile(0.5),
            quartiles: [0.25, 0.75].map(quantile),
            range: [first, last],
        })
    }
}

/// A contender's steps over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Timing {
    pub forward_ms: Spread,
    pub backward_ms: Spread,
    pub optimizer_ms: Option<Spread>,
    pub step_ms: Spread,
    /// Each round's ratio of its step to PyTorch's eager one.
    pub to_eager: Option<Spread>,
    /// Each round's ratio of its step to Burn's unfused one.
    pub to_unfused: Option<Spread>,
}

/// The contenders in the denominators of ratios.
pub const BASES: [Contender; 2] = [Contender::Unfused, Contender::Eager];

/// A figure of memory in its forms, the most comparable first.
pub type Figure = fn(&StepMemory) -> [Option<u64>; 2];

pub const FORWARD_END: Figure = |memory| [memory.resident_forward_end, memory.heap_forward_end];
pub const PEAK: Figure = |memory| [memory.resident_peak, memory.heap_peak];
pub const SAVED: Figure = |memory| [memory.saved, None];

/// The ratio of a figure that both have in the same form.
pub fn memory_ratio(figure: Figure, memory: &StepMemory, base: &StepMemory) -> Option<f64> {
    let pairs = figure(memory).into_iter().zip(figure(base));
    let mut ratios = pairs.filter_map(|(value, base)| {
        let base = base.filter(|base| *base > 0)?;
        Some(value? as f64 / base as f64)
    });
    ratios.next()
}

impl ContenderReport {
    /// A contender without results.
    pub fn new(contender: Contender) -> Self {
        Self {
            contender,
            problem: None,
            errors: Vec::new(),
            largest_error: None,
            steps: Vec::new(),
            timing: None,
            memory: None,
            peak_to_unfused: None,
            kernels: Vec::new(),
            largest: None,
        }
    }

    /// Notes a problem, unless there is one: later ones follow from the first.
    pub fn fail(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    /// Takes the errors of the check, and notes a problem if one exceeds `tolerance`.
    pub fn check(&mut self, errors: Vec<TensorError>, tolerance: f64) {
        // Not `error > tolerance`, which a missing error would pass.
        let within = |error: &TensorError| error.error.is_some_and(|error| error <= tolerance);
        let describe = |error: &TensorError| match error.error {
            Some(value) => format!("{} by {value:.1e} of its largest value", error.name),
            None => format!("{}, which cannot even be compared", error.name),
        };
        let wrong: Vec<String> = errors.iter().filter(|e| !within(e)).map(describe).collect();
        if !wrong.is_empty() {
            let list = wrong.join("; ");
            let reason = format!("more than {tolerance:.0e} off the reference in {list}");
            self.fail(Problem::new(ProblemKind::Mismatch, reason));
        }
        let values = errors.iter().filter_map(|error| error.error);
        self.largest_error = values.max_by(f64::total_cmp);
        self.errors = errors;
    }

    /// Its steps over those of a base, round by round: slow drift of the machine cancels. `None` unless
    /// both have the same rounds.
    fn ratios(&self, base: &[StepTime]) -> Option<Spread> {
        let pairs = self.steps.iter().zip(base);
        let ratios = pairs.map(|(step, base)| step.total_ms() / base.total_ms());
        (self.steps.len() == base.len()).then_some(())?;
        Spread::of(ratios.collect())
    }

    fn timing(&self, [unfused, eager]: [&[StepTime]; 2]) -> Option<Timing> {
        let of = |part: fn(&StepTime) -> Option<f64>| {
            Spread::of(self.steps.iter().filter_map(part).collect())
        };
        Some(Timing {
            forward_ms: of(|step| Some(step.forward_ms))?,
            backward_ms: of(|step| Some(step.backward_ms))?,
            optimizer_ms: of(|step| step.optimizer_ms),
            step_ms: of(|step| Some(step.total_ms()))?,
            to_eager: self.ratios(eager),
            to_unfused: self.ratios(unfused),
        })
    }
}

impl EntryReport {
    /// A pending entry, for a device and a precision.
    pub fn new(entry: Entry, device: &str, precision: Precision) -> Self {
        Self {
            title: entry.work.to_string(),
            batch: entry.work.batch(),
            tolerance: entry.work.tolerance(device, precision),
            rounds: 0,
            seconds: 0.0,
            problem: Some(PENDING.to_string()),
            contenders: Vec::new(),
            entry,
        }
    }

    pub fn contender(&self, contender: Contender) -> Option<&ContenderReport> {
        let mut contenders = self.contenders.iter();
        contenders.find(|report| report.contender == contender)
    }

    /// A contender without a problem.
    pub fn sound(&self, contender: Contender) -> Option<&ContenderReport> {
        let report = self.contender(contender);
        report.filter(|report| report.problem.is_none())
    }

    /// Fills in times and ratios from steps, memory and largest batches.
    pub fn summarize(&mut self) {
        let of = |base| self.contender(base).cloned();
        let bases = BASES.map(|base| of(base).unwrap_or_else(|| ContenderReport::new(base)));
        for report in &mut self.contenders {
            report.timing = report.timing([&bases[0].steps, &bases[1].steps]);
            let memory = report.memory.as_ref().zip(bases[0].memory.as_ref());
            report.peak_to_unfused =
                memory.and_then(|(memory, base)| memory_ratio(PEAK, memory, base));
            if let (Some(largest), Some(base)) = (&mut report.largest, bases[0].largest) {
                largest.to_unfused = Some(largest.batch as f64 / base.batch as f64);
            }
        }
    }

    pub fn is_failure(&self) -> bool {
        let mut problems = self.contenders.iter().filter_map(|c| c.problem.as_ref());
        self.problem.is_some() || problems.any(|p| p.kind != ProblemKind::Unavailable)
    }

    /// Step of the fused form over that of `base`, round by round, if both are sound.
    pub fn fused_to(&self, base: Contender) -> Option<f64> {
        let (fused, base) = (self.sound(Contender::Fused)?, self.sound(base)?);
        Some(fused.ratios(&base.steps)?.median)
    }
}

impl Report {
    /// Ends an unfinished run: pending entries get the reason.
    pub fn abandon(&mut self, reason: &str) {
        for entry in &mut self.entries {
            if entry.problem.as_deref() == Some(PENDING) {
                entry.problem = Some(format!("not run: {reason}"));
            }
        }
    }

    /// Fills in the comparisons.
    pub fn summarize(&mut self) {
        let bases = BASES.into_iter();
        self.summary = bases.filter_map(|base| self.comparison(base)).collect();
    }

    /// Geometric means of the fused form's ratios to a base, and the largest.
    fn comparison(&self, base: Contender) -> Option<String> {
        let entries = self.entries.iter();
        let ratios = entries.filter_map(|report| Some((&report.entry, report.fused_to(base)?)));
        let ratios: Vec<(&Entry, f64)> = ratios.collect();
        let (worst, worst_ratio) = ratios.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let mut text = format!("fused / {base}: ");
        for (kind, of_layers) in [("layer", true), ("network", false)] {
            let mut own = ratios.clone();
            own.retain(|(entry, _)| matches!(entry.work, Work::Layer(_)) == of_layers);
            let count = own.len();
            if count > 0 {
                let logarithms: f64 = own.iter().map(|(_, ratio)| ratio.ln()).sum();
                let mean = (logarithms / count as f64).exp();
                let plural = if count == 1 { "" } else { "s" };
                text += &format!("{mean:.3} geometric mean over {count} {kind}{plural}; ");
            }
        }
        text += &format!("worst entry {} at {worst_ratio:.3}", worst.id);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing::{contender, entry, report};

    fn error(error: Option<f64>) -> TensorError {
        let name = "output".to_string();
        TensorError { name, error }
    }

    #[test]
    fn spreads_reach_from_the_smallest_to_the_largest() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        let wanted = Spread {
            median: 3.0,
            quartiles: [2.0, 4.0],
            range: [1.0, 5.0],
        };
        assert_eq!(spread, wanted);
        // Of two values a quartile is a quarter of the way from one to the other.
        let spread = Spread::of(vec![8.0, 4.0]).unwrap();
        assert_eq!((spread.median, spread.quartiles), (6.0, [5.0, 7.0]));
        let one = Spread::of(vec![7.0]).unwrap();
        assert_eq!((one.quartiles, one.range), ([7.0; 2], [7.0; 2]));
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn ratios_are_round_by_round_and_parts_are_medians() {
        let report = entry(
            0,
            vec![
                contender(Contender::Fused, &[1.0, 40.0, 4.0], 3),
                contender(Contender::Unfused, &[4.0, 160.0, 8.0], 4),
                contender(Contender::Eager, &[], 4),
            ],
        );
        let timing = report.contenders[0].timing.unwrap();
        assert_eq!(timing.forward_ms.median, 4.0);
        assert_eq!(timing.backward_ms.median, 8.0);
        assert_eq!(timing.step_ms.median, 12.0);
        assert_eq!(timing.step_ms.range, [3.0, 120.0]);
        assert_eq!(timing.optimizer_ms, None);
        // The ratio of the medians would be 0.5.
        let ratio = timing.to_unfused.unwrap();
        assert_eq!((ratio.median, ratio.range), (0.25, [0.25, 0.5]));
        // Without the same rounds there are no ratios, and without steps no times.
        assert_eq!(timing.to_eager, None);
        assert!(report.contenders[2].timing.is_none());
        assert_eq!(report.contenders[0].peak_to_unfused, Some(0.75));
    }

    #[test]
    fn pools_are_compared_with_pools() {
        let pool = |peak| StepMemory {
            heap_peak: Some(peak),
            ..StepMemory::default()
        };
        let resident = StepMemory {
            resident_peak: Some(9),
            ..StepMemory::default()
        };
        assert_eq!(memory_ratio(PEAK, &pool(5), &pool(20)), Some(0.25));
        assert_eq!(memory_ratio(PEAK, &resident, &pool(20)), None);
        assert_eq!(memory_ratio(PEAK, &pool(5), &pool(0)), None);
    }

    #[test]
    fn what_was_not_run_says_why() {
        let mut failed = entry(1, Vec::new());
        failed.problem = Some("no room".to_string());
        let mut pending = entry(2, Vec::new());
        pending.problem = Some(PENDING.to_string());
        let mut report = report(vec![entry(0, Vec::new()), failed, pending]);
        report.abandon("interrupted");
        let problems: Vec<_> = report
            .entries
            .iter()
            .map(|e| e.problem.as_deref())
            .collect();
        assert_eq!(
            problems,
            [None, Some("no room"), Some("not run: interrupted")]
        );
    }

    #[test]
    fn checks_judge_by_the_largest_error() {
        let mut report = ContenderReport::new(Contender::Fused);
        report.check(vec![error(Some(1e-3)), error(Some(1e-4))], 1e-3);
        assert_eq!(report.problem, None);
        assert_eq!(report.largest_error, Some(1e-3));
        for bad in [Some(1.1e-3), None] {
            let mut report = ContenderReport::new(Contender::Fused);
            report.check(vec![error(Some(0.0)), error(bad)], 1e-3);
            let problem = report.problem.unwrap();
            assert_eq!(problem.kind, ProblemKind::Mismatch);
            assert!(problem.reason.contains("output"), "{problem}");
        }
    }

    #[test]
    fn the_first_problem_stays_and_some_are_failures() {
        let mut report = ContenderReport::new(Contender::Compile);
        report.fail(Problem::new(ProblemKind::Unavailable, "no compiler"));
        report.fail(Problem::new(ProblemKind::Failed, "nothing was loaded"));
        let mut whole = entry(0, vec![report]);
        let problem = whole.contenders[0].problem.clone().unwrap();
        assert_eq!(problem.to_string(), "not available: no compiler");
        assert!(!whole.is_failure());
        whole.contenders[0].problem = Some(Problem::new(ProblemKind::Mismatch, "wrong"));
        assert!(whole.is_failure());
    }

    #[test]
    fn the_summary_is_over_sound_layers_and_the_worst_of_all() {
        let pair = |index, ratio| {
            let fused = contender(Contender::Fused, &[ratio], 1);
            entry(index, vec![fused, contender(Contender::Unfused, &[1.0], 1)])
        };
        let mut wrong = pair(2, 100.0);
        wrong.contenders[0].fail(Problem::new(ProblemKind::Mismatch, "wrong"));
        let report = report(vec![pair(0, 0.25), pair(1, 1.0), wrong, pair(6, 2.0)]);
        assert_eq!(
            report.summary,
            [
                "fused / unfused: 0.500 geometric mean over 2 layers; 2.000 geometric mean over 1 \
                 network; worst entry net-256 at 2.000"
            ]
        );
    }
}
