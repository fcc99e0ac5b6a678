//! What was measured, as data: what the tables show and `--json` writes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::catalogue::{Entry, Work};
use crate::precision::Precision;
use crate::protocol::{Contender, StepMemory, StepProfile, StepTime, TensorError};
use crate::statistics::{Spread, geometric_mean, median, ratios};

/// [`EntryReport::problem`] of an entry whose turn has not come.
const PENDING: &str = "not run yet";

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// When it started: date and time in UTC, as RFC 3339 writes them.
    pub date: String,
    /// Whether batches and images were the smaller ones.
    pub quick: bool,
    /// Where the contenders computed: one of [`DEVICES`](crate::device::DEVICES).
    pub device: String,
    /// What they computed in.
    pub precision: Precision,
    /// What it ran on.
    pub machine: Machine,
    /// Version by name.
    pub versions: BTreeMap<String, String>,
    /// Commit of this repository, with `-dirty` behind it if something was changed since. `None`
    /// outside of a repository.
    pub commit: Option<String>,
    /// Version of this workspace's packages.
    pub version: String,
    /// Seed of all data.
    pub seed: u64,
    /// What was asked for, in order. Those that were not run say why in [`EntryReport::problem`].
    pub entries: Vec<EntryReport>,
    /// The fused layer against the two that matter.
    pub summary: Vec<Comparison>,
}

/// What a run ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor: its name, and the numbers that tell models of one name apart.
    pub cpu: String,
    /// Model of the GPU, if one was used and its name could be had.
    pub gpu: Option<String>,
    /// Those of its vector instructions that kernels choose by.
    pub vector_units: Vec<String>,
    /// The widest vectors that are used, by who uses them.
    pub vectors: BTreeMap<String, String>,
    /// Size of each cache of the first core, as `L2 512K`.
    pub caches: Vec<String>,
    /// Threads that the machine runs at once.
    pub cores: usize,
    /// Threads that each contender was given.
    pub threads: usize,
    /// Operating system and architecture.
    pub system: String,
    /// Variables that change what allocators, thread pools or compilers do, as far as set. All
    /// contenders inherit them.
    pub environment: BTreeMap<String, String>,
}

/// One entry of the catalogue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntryReport {
    /// The entry.
    pub entry: Entry,
    /// It, for people.
    pub title: String,
    /// Most that a result may be off, relative to its tensor's largest value.
    pub tolerance: f64,
    /// Timed rounds.
    pub rounds: usize,
    /// How long all of it took, in seconds.
    pub seconds: f64,
    /// Why there is nothing else, if the entry itself went wrong.
    pub problem: Option<String>,
    /// Who ran it.
    pub contenders: Vec<ContenderReport>,
}

/// One contender of one entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContenderReport {
    /// Which.
    pub contender: Contender,
    /// What is wrong with it.
    pub problem: Option<Problem>,
    /// How far its results are off from the reference, by tensor.
    pub errors: Vec<TensorError>,
    /// Its steps, one a round; none if it did not finish them all.
    pub steps: Vec<StepTime>,
    /// What follows from them.
    pub timing: Option<Timing>,
    /// Memory of a step in a fresh process.
    pub memory: Option<StepMemory>,
    /// Where the device spent the time of one more step, if that was asked for.
    #[serde(default)]
    pub profile: Option<StepProfile>,
}

/// What is wrong with a contender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Of which kind.
    pub kind: ProblemKind,
    /// For people.
    pub reason: String,
}

/// Kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// This machine lacks what it needs. Nobody's fault.
    Unavailable,
    /// It went wrong.
    Failed,
    /// It ran, and its results are not those of the reference.
    Mismatch,
}

impl ProblemKind {
    /// Whether the run as a whole counts as failed by it.
    pub fn is_failure(self) -> bool {
        self != Self::Unavailable
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

/// A contender's steps over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Milliseconds of the forward pass.
    pub forward_ms: Spread,
    /// Milliseconds of the backward pass.
    pub backward_ms: Spread,
    /// Milliseconds of the optimizer.
    pub optimizer_ms: Option<Spread>,
    /// Milliseconds of the step.
    pub step_ms: Spread,
    /// Each round's ratio of its step to PyTorch's eager one.
    pub to_eager: Option<Spread>,
    /// Each round's ratio of its step to Burn's unfused one.
    pub to_unfused: Option<Spread>,
}

/// The fused form against another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The other.
    pub base: Contender,
    /// Geometric mean of the layers' ratios, where there are layers.
    pub layers_mean: Option<f64>,
    /// How many layers.
    pub layers: usize,
    /// Geometric mean of the networks' ratios, where there are networks.
    pub networks_mean: Option<f64>,
    /// How many networks.
    pub networks: usize,
    /// Id of the entry with the largest ratio, networks included.
    pub worst_id: String,
    /// Its ratio.
    pub worst_ratio: f64,
}

impl ContenderReport {
    /// A contender that has done nothing yet.
    pub fn new(contender: Contender) -> Self {
        Self {
            contender,
            problem: None,
            errors: Vec::new(),
            steps: Vec::new(),
            timing: None,
            memory: None,
            profile: None,
        }
    }

    /// Notes a problem, unless there is one already: what follows from the first is no news.
    pub fn fail(&mut self, kind: ProblemKind, reason: impl Into<String>) {
        let reason = reason.into();
        self.problem.get_or_insert(Problem { kind, reason });
    }

    /// Takes the errors of the check, and notes if one is more than `tolerance`.
    pub fn check(&mut self, errors: Vec<TensorError>, tolerance: f64) {
        // Not `error > tolerance`, which a missing one would pass.
        let within = |error: &TensorError| error.error.is_some_and(|error| error <= tolerance);
        let describe = |error: &TensorError| match error.error {
            Some(value) => format!("{} by {value:.1e} of its largest value", error.name),
            None => format!("{}, which cannot even be compared", error.name),
        };
        let wrong: Vec<String> = errors.iter().filter(|e| !within(e)).map(describe).collect();
        if !wrong.is_empty() {
            let list = wrong.join("; ");
            let reason = format!("more than {tolerance:.0e} off the reference in {list}");
            self.fail(ProblemKind::Mismatch, reason);
        }
        self.errors = errors;
    }

    /// The largest error of the check.
    pub fn largest_error(&self) -> Option<f64> {
        let errors = self.errors.iter().filter_map(|error| error.error);
        errors.max_by(f64::total_cmp)
    }

    fn totals(&self) -> Vec<f64> {
        self.steps.iter().map(StepTime::total_ms).collect()
    }

    fn timing(&self, eager: Option<&[f64]>, unfused: Option<&[f64]>) -> Option<Timing> {
        let of = |part: fn(&StepTime) -> f64| {
            let values: Vec<f64> = self.steps.iter().map(part).collect();
            Spread::of(&values)
        };
        let totals = self.totals();
        let optimizer: Option<Vec<f64>> = self.steps.iter().map(|step| step.optimizer_ms).collect();
        Some(Timing {
            forward_ms: of(|step| step.forward_ms)?,
            backward_ms: of(|step| step.backward_ms)?,
            optimizer_ms: optimizer.and_then(|values| Spread::of(&values)),
            step_ms: Spread::of(&totals)?,
            to_eager: eager.and_then(|base| Spread::of(&ratios(&totals, base))),
            to_unfused: unfused.and_then(|base| Spread::of(&ratios(&totals, base))),
        })
    }
}

impl EntryReport {
    /// An entry that nobody has run yet, to be run on a device in a precision.
    pub fn new(entry: Entry, device: &str, precision: Precision) -> Self {
        Self {
            title: entry.work.to_string(),
            tolerance: entry.work.tolerance(device, precision),
            rounds: 0,
            seconds: 0.0,
            problem: None,
            contenders: Vec::new(),
            entry,
        }
    }

    /// The same, which says in a report of an unfinished run that it has not been run.
    pub fn pending(entry: Entry, device: &str, precision: Precision) -> Self {
        Self {
            problem: Some(PENDING.to_string()),
            ..Self::new(entry, device, precision)
        }
    }

    /// The report of a contender.
    pub fn contender(&self, contender: Contender) -> Option<&ContenderReport> {
        let mut contenders = self.contenders.iter();
        contenders.find(|report| report.contender == contender)
    }

    /// Fills in what follows from the steps.
    pub fn summarize(&mut self) {
        let totals = |contender| self.contender(contender).map(ContenderReport::totals);
        let (eager, unfused) = (totals(Contender::Eager), totals(Contender::Unfused));
        for report in &mut self.contenders {
            report.timing = report.timing(eager.as_deref(), unfused.as_deref());
        }
    }

    /// Whether anything went wrong.
    pub fn is_failure(&self) -> bool {
        let failed = |report: &ContenderReport| {
            let problem = report.problem.as_ref();
            problem.is_some_and(|problem| problem.kind.is_failure())
        };
        self.problem.is_some() || self.contenders.iter().any(failed)
    }

    /// Step of the fused form over that of `base`, if both are right.
    fn fused_to(&self, base: Contender) -> Option<f64> {
        let sound = |contender| {
            let report = self.contender(contender)?;
            report.problem.is_none().then_some(report)
        };
        let (fused, base) = (sound(Contender::Fused)?, sound(base)?);
        median(&ratios(&fused.totals(), &base.totals()))
    }
}

impl Report {
    /// Ends an unfinished run: entries whose turn has not come say why.
    pub fn abandon(&mut self, reason: &str) {
        for entry in &mut self.entries {
            if entry.problem.as_deref() == Some(PENDING) {
                entry.problem = Some(format!("not run: {reason}"));
            }
        }
    }

    /// Fills in the comparisons.
    pub fn summarize(&mut self) {
        let bases = [Contender::Eager, Contender::Unfused];
        self.summary = bases
            .into_iter()
            .filter_map(|base| self.comparison(base))
            .collect();
    }

    fn comparison(&self, base: Contender) -> Option<Comparison> {
        let ratios: Vec<(&Entry, f64)> = self
            .entries
            .iter()
            .filter_map(|report| Some((&report.entry, report.fused_to(base)?)))
            .collect();
        let of = |is_layer: bool| -> Vec<f64> {
            ratios
                .iter()
                .filter(|(entry, _)| matches!(entry.work, Work::Layer(_)) == is_layer)
                .map(|(_, ratio)| *ratio)
                .collect()
        };
        let (layers, networks) = (of(true), of(false));
        let (worst, worst_ratio) = ratios.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(Comparison {
            base,
            layers_mean: geometric_mean(&layers),
            layers: layers.len(),
            networks_mean: geometric_mean(&networks),
            networks: networks.len(),
            worst_id: worst.id.clone(),
            worst_ratio: *worst_ratio,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::catalogue;
    use crate::device::FLEX;

    fn steps(totals: &[f64]) -> Vec<StepTime> {
        let step = |total: &f64| StepTime {
            forward_ms: 0.25 * total,
            backward_ms: 0.75 * total,
            optimizer_ms: None,
        };
        totals.iter().map(step).collect()
    }

    fn timed(contender: Contender, totals: &[f64]) -> ContenderReport {
        ContenderReport {
            steps: steps(totals),
            ..ContenderReport::new(contender)
        }
    }

    fn entry(index: usize, contenders: Vec<ContenderReport>) -> EntryReport {
        EntryReport {
            rounds: 3,
            contenders,
            ..EntryReport::new(catalogue(false).remove(index), FLEX, Precision::F32)
        }
    }

    fn error(value: Option<f64>) -> TensorError {
        TensorError {
            name: "output".to_string(),
            error: value,
        }
    }

    #[test]
    fn ratios_are_round_by_round_and_parts_are_medians() {
        let mut report = entry(
            0,
            vec![
                timed(Contender::Fused, &[1.0, 40.0, 4.0]),
                timed(Contender::Unfused, &[4.0, 160.0, 8.0]),
            ],
        );
        report.summarize();
        let timing = report.contenders[0].timing.unwrap();
        assert_eq!(timing.forward_ms.median, 1.0);
        assert_eq!(timing.backward_ms.median, 3.0);
        assert_eq!(timing.step_ms.median, 4.0);
        assert_eq!(timing.step_ms.range, [1.0, 40.0]);
        assert_eq!(timing.optimizer_ms, None);
        // The ratio of the medians would be 0.5.
        let ratio = timing.to_unfused.unwrap();
        assert_eq!((ratio.median, ratio.range), (0.25, [0.25, 0.5]));
        assert_eq!(timing.to_eager, None);
    }

    #[test]
    fn a_contender_without_steps_has_no_timing() {
        let mut report = entry(
            0,
            vec![
                timed(Contender::Fused, &[1.0, 2.0]),
                timed(Contender::Eager, &[]),
            ],
        );
        report.summarize();
        assert_eq!(report.contenders[0].timing.unwrap().to_eager, None);
        assert_eq!(report.contenders[1].timing, None);
    }

    #[test]
    fn what_was_not_run_says_why() {
        let pending = |index| {
            let entry = catalogue(false).remove(index);
            EntryReport::pending(entry, FLEX, Precision::F32)
        };
        let mut failed = entry(1, Vec::new());
        failed.problem = Some("no room".to_string());
        let mut report = Report {
            entries: vec![entry(0, Vec::new()), failed, pending(2)],
            ..Report::default()
        };
        let problems = |report: &Report| -> Vec<Option<String>> {
            let entries = report.entries.iter();
            entries.map(|entry| entry.problem.clone()).collect()
        };
        let with = |last: &str| [None, Some("no room".to_string()), Some(last.to_string())];
        assert_eq!(problems(&report), with("not run yet"));
        report.abandon("interrupted");
        assert_eq!(problems(&report), with("not run: interrupted"));
    }

    #[test]
    fn checks_judge_by_the_largest_error() {
        let mut report = ContenderReport::new(Contender::Fused);
        report.check(vec![error(Some(1e-3)), error(Some(1e-4))], 1e-3);
        assert_eq!(report.problem, None);
        assert_eq!(report.largest_error(), Some(1e-3));
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
        report.fail(ProblemKind::Unavailable, "no compiler");
        report.fail(ProblemKind::Failed, "nothing was loaded");
        let mut whole = entry(0, vec![report]);
        let problem = whole.contenders[0].problem.clone().unwrap();
        assert_eq!(problem.to_string(), "not available: no compiler");
        assert!(!whole.is_failure());
        whole.contenders[0].problem = Some(Problem {
            kind: ProblemKind::Mismatch,
            ..problem
        });
        assert!(whole.is_failure());
    }

    #[test]
    fn the_summary_is_over_sound_layers_and_the_worst_of_all() {
        let pair = |index, ratio| {
            entry(
                index,
                vec![
                    timed(Contender::Fused, &[ratio]),
                    timed(Contender::Unfused, &[1.0]),
                ],
            )
        };
        let mut wrong = pair(2, 100.0);
        wrong.contenders[0].fail(ProblemKind::Mismatch, "wrong");
        let mut report = Report {
            entries: vec![pair(0, 0.25), pair(1, 1.0), wrong, pair(6, 2.0)],
            ..Report::default()
        };
        report.summarize();
        let [comparison] = report.summary.as_slice() else {
            panic!("there is no eager contender: {:?}", report.summary);
        };
        assert_eq!(comparison.base, Contender::Unfused);
        assert_eq!((comparison.layers, comparison.networks), (2, 1));
        assert!((comparison.layers_mean.unwrap() - 0.5).abs() < 1e-12);
        assert!((comparison.networks_mean.unwrap() - 2.0).abs() < 1e-12);
        assert_eq!(comparison.worst_id, "net-256");
        assert_eq!(comparison.worst_ratio, 2.0);

        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }
}
