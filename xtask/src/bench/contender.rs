//! A contender of an entry while it runs.

use std::path::Path;

use anyhow::Result;
use burn_conv_bn_bench::protocol::{
    Checked, Contender, OWN_REFERENCE, Reply, Request, StepMemory, StepTime,
};
use burn_conv_bn_bench::report::{ContenderReport, ProblemKind};

use super::process::{Process, refusal};

/// A contender with its process, which it has until something goes wrong.
pub struct Running {
    process: Option<Process>,
    report: ContenderReport,
}

impl Running {
    /// Tells a process which contender it is.
    pub fn load(contender: Contender, process: Result<Process>, load: Request) -> Self {
        let mut running = Self {
            process: None,
            report: ContenderReport::new(contender),
        };
        match process {
            Ok(process) => running.process = Some(process),
            Err(error) => running.fail(ProblemKind::Failed, format!("{error:#}")),
        }
        match running.ask(&load) {
            None | Some(Reply::Done {}) => {}
            Some(other) => running.refuse(other),
        }
        running
    }

    /// Which contender.
    pub fn contender(&self) -> Contender {
        self.report.contender
    }

    /// Lets it write its results to a folder.
    pub fn check(&mut self, folder: &Path) -> Option<Checked> {
        let dir = folder.to_path_buf();
        match self.ask(&Request::Check { dir })? {
            Reply::Checked(checked) => return Some(checked),
            other => self.refuse(other),
        }
        None
    }

    /// Compares its results with the `tensors` in the folder of the reference, or with its own if
    /// it computes something else. They may be off by `tolerance`.
    pub fn compare(
        &mut self,
        helper: &mut Process,
        folder: &Path,
        reference: &Path,
        tensors: Option<&[String]>,
        checked: &Checked,
        tolerance: f64,
    ) {
        let (reference, tensors) = match (checked.own_reference, tensors) {
            (true, _) => (folder.join(OWN_REFERENCE), checked.tensors.as_slice()),
            (false, Some(tensors)) => (reference.to_path_buf(), tensors),
            (false, None) => {
                let reason = "not checked: there is no reference";
                return self.report.fail(ProblemKind::Unavailable, reason);
            }
        };
        let compare = Request::Compare {
            dir: folder.to_path_buf(),
            reference,
            tensors: tensors.to_vec(),
        };
        match helper.ask(&compare) {
            Ok(Reply::Compared { tensors }) => self.report.check(tensors, tolerance),
            Ok(other) => {
                let (_, reason) = refusal(other);
                self.report.fail(ProblemKind::Mismatch, reason);
            }
            Err(error) => {
                let reason = format!("cannot compare: {error:#}");
                self.report.fail(ProblemKind::Failed, reason);
            }
        }
    }

    /// Runs a step, for its time alone.
    pub fn step(&mut self) -> Option<StepTime> {
        match self.ask(&Request::Run {})? {
            Reply::Ran(step) => return Some(step),
            other => self.refuse(other),
        }
        None
    }

    /// Runs a step that counts.
    pub fn timed_step(&mut self) {
        if let Some(step) = self.step() {
            self.report.steps.push(step);
        }
    }

    /// Whether nothing has gone wrong that ended it.
    pub fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    /// Measures the memory of a step. Its process must be fresh.
    pub fn memory(&mut self) -> Option<StepMemory> {
        match self.ask(&Request::Memory {})? {
            Reply::Measured(memory) => return Some(memory),
            other => self.refuse(other),
        }
        None
    }

    /// Has the device's kernels timed over one more step. One that launches none keeps its steps.
    pub fn profile(&mut self) {
        match self.ask(&Request::Profile {}) {
            None | Some(Reply::Unavailable { .. }) => {}
            Some(Reply::Profiled(profile)) => self.report.profile = Some(profile),
            Some(other) => self.refuse(other),
        }
    }

    /// Ends the process and returns the report.
    pub fn finish(self) -> ContenderReport {
        self.report
    }

    fn ask(&mut self, request: &Request) -> Option<Reply> {
        match self.process.as_mut()?.ask(request) {
            Ok(reply) => Some(reply),
            Err(error) => {
                self.fail(ProblemKind::Failed, format!("{error:#}"));
                None
            }
        }
    }

    /// Notes a reply that is not the one that was wanted.
    fn refuse(&mut self, reply: Reply) {
        let (kind, reason) = refusal(reply);
        self.fail(kind, reason);
    }

    /// Notes a problem and ends the process. Steps of only some rounds would be compared with
    /// those of other rounds, so they do not count.
    fn fail(&mut self, kind: ProblemKind, reason: String) {
        self.report.fail(kind, reason);
        self.report.steps.clear();
        self.process = None;
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::process::Command;

    /// A contender that answers with these lines and then dies.
    fn running(answers: &[&str]) -> Running {
        let echo = |answer: &&str| format!("read line; echo '{answer}'; ");
        let script: String = answers.iter().map(echo).collect();
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        let process = Process::start(command, "sh");
        Running::load(Contender::Fused, process, Request::Hello {})
    }

    const DONE: &str = r#"{"done":{}}"#;
    const RAN: &str = r#"{"ran":{"forward_ms":1.0,"backward_ms":2.0}}"#;

    #[test]
    fn timed_steps_are_kept_and_others_not() {
        let mut running = running(&[DONE, RAN, RAN]);
        assert!(running.is_alive());
        assert_eq!(running.step().unwrap().total_ms(), 3.0);
        running.timed_step();
        let report = running.finish();
        assert_eq!(report.problem, None);
        assert_eq!(report.steps.len(), 1);
    }

    #[test]
    fn a_profile_is_kept_and_counts_no_step() {
        let profiled = r#"{"profiled":{"kernels":[{"name":"k","launches":3,"ms":0.5}]}}"#;
        let mut running = running(&[DONE, RAN, profiled]);
        running.timed_step();
        running.profile();
        let report = running.finish();
        assert_eq!(report.problem, None);
        assert_eq!(report.steps.len(), 1);
        let profile = report.profile.unwrap();
        assert_eq!((profile.launches(), profile.busy_ms()), (3, 0.5));
    }

    #[test]
    fn one_without_kernels_keeps_its_steps() {
        let mut running = running(&[DONE, RAN, r#"{"unavailable":{"reason":"a CPU"}}"#]);
        running.timed_step();
        running.profile();
        let report = running.finish();
        assert_eq!((report.problem, report.profile), (None, None));
        assert_eq!(report.steps.len(), 1);
    }

    #[test]
    fn one_that_dies_keeps_no_steps() {
        let mut running = running(&[DONE, RAN]);
        running.timed_step();
        running.timed_step();
        running.timed_step();
        let report = running.finish();
        assert!(report.steps.is_empty());
        assert_eq!(report.problem.unwrap().kind, ProblemKind::Failed);
    }

    #[test]
    fn one_that_cannot_run_here_says_so() {
        let mut running = running(&[r#"{"unavailable":{"reason":"no compiler"}}"#, RAN]);
        assert_eq!(running.step(), None);
        assert!(!running.is_alive());
        let problem = running.finish().problem.unwrap();
        assert_eq!(problem.kind, ProblemKind::Unavailable);
        assert_eq!(problem.reason, "no compiler");
    }

    #[test]
    fn without_a_reference_nothing_is_checked() {
        let mut running = running(&[DONE]);
        let mut helper = Process::start(Command::new("cat"), "cat").unwrap();
        let checked = Checked {
            tensors: vec!["output".to_string()],
            own_reference: false,
        };
        let nowhere = Path::new("nowhere");
        running.compare(&mut helper, nowhere, nowhere, None, &checked, 0.0);
        let problem = running.finish().problem.unwrap();
        assert_eq!(problem.kind, ProblemKind::Unavailable);
    }
}
