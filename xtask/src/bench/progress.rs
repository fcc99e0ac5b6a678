//! How far a run is, and about how long the rest of it takes.
//!
//! What something takes is guessed from its operations, on one machine's terms. Whatever is done
//! then tells how much slower or faster this machine is just now, and the guess at the rest is
//! scaled by that.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use burn_conv_bn_bench::catalogue::{Entry, Work};
use burn_conv_bn_bench::protocol::{Contender, Engine};

use super::PAUSE;

/// Timed rounds of an entry, unless `--rounds` says otherwise: as many as fit the budget.
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 7;
const BUDGET: Duration = Duration::from_secs(120);
const QUICK_BUDGET: Duration = Duration::from_secs(8);

/// Thread-microseconds for a million parameters in a step, mostly those of gradient and optimizer.
const STEP_PER_VALUE: f64 = 12_000.0;

/// Seconds of a contender before its first step: for a million values of activations that it reads,
/// and for a million parameters, which Burn draws before they are read.
const LOAD_PER_ACTIVATION: f64 = 0.01;
const LOAD_PER_VALUE: f64 = 0.03;

/// The same of the data, which are drawn and written.
const PREPARE: f64 = 0.2;
const PREPARE_PER_ACTIVATION: f64 = 0.04;
const PREPARE_PER_VALUE: f64 = 0.03;

/// How many rounds are timed.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// The number that was asked for.
    pub asked: Option<NonZeroUsize>,
    /// Whether the run is to end within minutes.
    pub quick: bool,
}

impl Rounds {
    /// The number for rounds of that length.
    pub fn count(self, round: Duration) -> usize {
        if let Some(asked) = self.asked {
            return asked.get();
        }
        let budget = match self.quick {
            true => QUICK_BUDGET,
            false => BUDGET,
        };
        let fit = budget.as_secs_f64() / round.as_secs_f64();
        (fit as usize).clamp(LEAST_ROUNDS, MOST_ROUNDS)
    }
}

/// What is done with every entry.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Who runs it.
    pub contenders: Vec<Contender>,
    /// Threads of each of them.
    pub threads: usize,
    /// Steps of each of them before the timed ones.
    pub warm_ups: usize,
    /// The timed ones.
    pub rounds: Rounds,
    /// Whether memory is measured.
    pub memory: bool,
    /// Whether a step's kernels are timed.
    pub profile: bool,
}

impl Plan {
    /// A guess at what an entry takes, in seconds.
    pub fn entry(&self, work: &Work) -> f64 {
        let costs: Vec<Cost> = self.costs(work).collect();
        let load: f64 = costs.iter().map(|cost| cost.load).sum();
        let step: f64 = costs.iter().map(|cost| cost.step).sum();
        let rounds = self.rounds.count(Duration::from_secs_f64(step));
        let checks = 1 + self.warm_ups;
        prepare(work) + load + (checks + rounds) as f64 * step + self.measurement(load, step)
    }

    /// A guess at what measuring memory takes, of contenders that load and step so long.
    pub fn measurement(&self, load: f64, step: f64) -> f64 {
        match self.memory {
            true => load + step,
            false => 0.0,
        }
    }

    /// A guess at what a contender takes.
    pub fn cost(&self, work: &Work, contender: Contender) -> Cost {
        let millions = |count: usize| count as f64 / 1e6;
        let (operations, activations) =
            (millions(work.multiply_adds()), millions(work.activations()));
        let values = millions(work.values());
        let [per_operation, per_activation] = rates(contender);
        let microseconds =
            per_operation * operations + per_activation * activations + STEP_PER_VALUE * values;
        let load = LOAD_PER_ACTIVATION * activations + LOAD_PER_VALUE * values;
        Cost {
            load: start(contender, work) + load,
            step: 1e-6 * microseconds / self.threads as f64 + PAUSE.as_secs_f64(),
        }
    }

    fn costs(&self, work: &Work) -> impl Iterator<Item = Cost> {
        let contenders = self.contenders.iter();
        contenders.map(move |contender| self.cost(work, *contender))
    }
}

/// A guess at what a contender takes, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// From the start of its process to its first step.
    pub load: f64,
    /// A step.
    pub step: f64,
}

/// A guess at what drawing an entry's data takes, in seconds.
pub fn prepare(work: &Work) -> f64 {
    let millions = |count: usize| count as f64 / 1e6;
    PREPARE
        + PREPARE_PER_ACTIVATION * millions(work.activations())
        + PREPARE_PER_VALUE * millions(work.values())
}

/// Thread-microseconds of a step: for a million multiplications of the convolutions' forward pass,
/// and for a million values that they read and write in it. From `docs/cpu.md`.
fn rates(contender: Contender) -> [f64; 2] {
    match contender {
        Contender::Fused => [90.0, 12_000.0],
        Contender::Never => [70.0, 10_000.0],
        Contender::Unfused => [160.0, 80_000.0],
        Contender::UnfusedCheckpointed => [170.0, 84_000.0],
        Contender::Eager => [115.0, 22_000.0],
        Contender::Compile => [130.0, 22_000.0],
        Contender::Tutorial => [200.0, 45_000.0],
        Contender::Checkpoint => [150.0, 28_000.0],
    }
}

/// Seconds before a contender reads anything, and those of compiling, which is done once a process.
fn start(contender: Contender, work: &Work) -> f64 {
    let compiling = match (contender, work) {
        (Contender::Compile, Work::Classifier(_)) => 100.0,
        (Contender::Compile, _) => 15.0,
        _ => 0.0,
    };
    let starting = match contender.engine() {
        Engine::Burn => 0.15,
        Engine::PyTorch => 3.0,
    };
    starting + compiling
}

/// What is left of a run, in seconds of the guess, and how those compare with this machine's.
#[derive(Debug)]
struct Forecast {
    /// Of the entries after this one.
    later: f64,
    /// Of this one.
    now: f64,
    /// What is done, by the guess.
    guessed: f64,
    /// What that took.
    taken: f64,
    /// Whether that is enough to judge by.
    is_known: bool,
}

impl Forecast {
    fn passed(&mut self, guessed: f64, taken: Duration) {
        self.now = (self.now - guessed).max(0.0);
        self.guessed += guessed;
        self.taken += taken.as_secs_f64();
    }

    fn begin(&mut self, guessed: f64) {
        self.later = (self.later - guessed).max(0.0);
        self.now = guessed;
    }

    fn left(&self) -> Option<Duration> {
        let left = (self.now + self.later) * self.taken / self.guessed;
        let is_known = self.is_known && self.guessed > 0.0;
        is_known.then(|| Duration::from_secs_f64(left))
    }
}

/// Says on standard error what is being done.
#[derive(Debug)]
pub struct Progress {
    entries: usize,
    begun: usize,
    id: String,
    begun_at: Instant,
    /// When the last thing ended that was counted.
    last: Instant,
    forecast: Forecast,
}

impl Progress {
    /// Before entries that are guessed to take so many seconds each.
    pub fn new(guesses: &[f64]) -> Self {
        let now = Instant::now();
        Self {
            entries: guesses.len(),
            begun: 0,
            id: String::new(),
            begun_at: now,
            last: now,
            forecast: Forecast {
                later: guesses.iter().sum(),
                now: 0.0,
                guessed: 0.0,
                taken: 0.0,
                is_known: false,
            },
        }
    }

    /// The estimate, if something has been timed yet.
    pub fn left(&self) -> Option<Duration> {
        self.forecast.left()
    }

    /// The estimate for something of a guess, scaled as that for the rest.
    pub fn scaled(&self, guessed: f64) -> Option<Duration> {
        let forecast = &self.forecast;
        let scale = forecast.taken / forecast.guessed;
        let known = forecast.left();
        known.map(|_| Duration::from_secs_f64(guessed * scale))
    }

    /// From here on what was timed is taken for enough to judge by.
    pub fn calibrated(&mut self) {
        self.forecast.is_known = true;
    }

    /// Starts an entry, with the guess that it was announced with.
    pub fn begin(&mut self, entry: &Entry, guessed: f64) {
        self.begun += 1;
        self.id.clone_from(&entry.id);
        self.begun_at = Instant::now();
        self.last = self.begun_at;
        self.forecast.begin(guessed);
    }

    /// What is left of the entry turned out to be another guess.
    pub fn replan(&mut self, guessed: f64) {
        self.forecast.now = guessed;
    }

    /// The time from now on is counted.
    pub fn restart(&mut self) {
        self.last = Instant::now();
    }

    /// Counts something that was guessed to take so many seconds, and has been done since the last
    /// one.
    pub fn passed(&mut self, guessed: f64) {
        let taken = self.last.elapsed();
        self.restart();
        self.forecast.passed(guessed, taken);
    }

    /// Ends an entry. Returns how long it took.
    pub fn end(&mut self) -> Duration {
        self.forecast.now = 0.0;
        self.calibrated();
        let took = self.begun_at.elapsed();
        self.say(&format!("took {}", duration(took)));
        took
    }

    /// Says what is done next.
    pub fn say(&self, what: &str) {
        let left = self
            .left()
            .map(|left| format!(", about {} left", duration(left)));
        eprintln!(
            "bench: [{}/{}{}] {}: {what}",
            self.begun,
            self.entries,
            left.unwrap_or_default(),
            self.id
        );
    }
}

/// A duration in two digits or three.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        _ if seconds < 9.5 => format!("{seconds:.1} s"),
        _ if seconds < 99.5 => format!("{seconds:.0} s"),
        _ if seconds < 600.0 => format!("{:.1} min", seconds / 60.0),
        _ => format!("{:.0} min", seconds / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_conv_bn_bench::catalogue::catalogue;

    fn plan(quick: bool, threads: usize) -> Plan {
        let contenders = Contender::ALL.into_iter();
        let ours = contenders.filter(|contender| contender.engine() == Engine::Burn);
        Plan {
            contenders: ours.collect(),
            threads,
            warm_ups: 1,
            rounds: Rounds { asked: None, quick },
            memory: true,
            profile: false,
        }
    }

    fn total(plan: &Plan, quick: bool) -> f64 {
        let entries = catalogue(quick);
        entries.iter().map(|entry| plan.entry(&entry.work)).sum()
    }

    #[test]
    fn a_quick_run_on_two_cores_is_expected_to_end_within_five_minutes() {
        let seconds = total(&plan(true, 2), true);
        assert!((60.0..240.0).contains(&seconds), "{seconds}");
        assert!(total(&plan(false, 2), false) > 3.0 * seconds);
    }

    #[test]
    fn more_work_is_expected_to_take_longer_and_more_threads_less_long() {
        let entries = catalogue(false);
        let work = |id: &str| &entries.iter().find(|entry| entry.id == id).unwrap().work;
        let step = |id: &str, threads: usize, contender: Contender| {
            plan(false, threads).cost(work(id), contender).step - PAUSE.as_secs_f64()
        };
        for contender in Contender::ALL {
            let small = step("net-256", 2, contender);
            assert!(step("net-2048", 2, contender) > 6.0 * small, "{contender}");
            assert!((step("net-256", 4, contender) * 2.0 - small).abs() < 1e-6);
        }
        let without = Plan {
            memory: false,
            ..plan(false, 2)
        };
        assert!(without.entry(work("k3")) < plan(false, 2).entry(work("k3")));
    }

    #[test]
    fn rounds_fit_their_budget() {
        let rounds = |quick| Rounds { asked: None, quick };
        let seconds = Duration::from_secs;
        assert_eq!(rounds(false).count(seconds(1)), MOST_ROUNDS);
        assert_eq!(rounds(false).count(seconds(30)), 4);
        assert_eq!(rounds(false).count(seconds(1000)), LEAST_ROUNDS);
        assert_eq!(rounds(true).count(seconds(2)), 4);
        // Nobody is left to time.
        assert_eq!(rounds(true).count(Duration::ZERO), MOST_ROUNDS);
        let asked = Rounds {
            asked: NonZeroUsize::new(11),
            quick: true,
        };
        assert_eq!(asked.count(seconds(1000)), 11);
    }

    #[test]
    fn the_rest_is_scaled_by_what_is_done() {
        let mut progress = Progress::new(&[10.0, 30.0]);
        let forecast = &mut progress.forecast;
        forecast.begin(10.0);
        assert_eq!(forecast.left(), None);
        // Twice as long as guessed.
        forecast.passed(4.0, Duration::from_secs(8));
        assert_eq!(forecast.left(), None);
        forecast.is_known = true;
        assert_eq!(forecast.left(), Some(Duration::from_secs(72)));
        // Now half as long: ten seconds for ten.
        forecast.passed(6.0, Duration::from_secs(2));
        assert_eq!(forecast.left(), Some(Duration::from_secs(30)));
        // More than was planned takes nothing from the entries after it.
        forecast.passed(10.0, Duration::from_secs(10));
        assert_eq!(forecast.left(), Some(Duration::from_secs(30)));
        assert_eq!(progress.scaled(3.0), Some(Duration::from_secs(3)));
        progress.replan(5.0);
        assert_eq!(progress.left(), Some(Duration::from_secs(35)));
    }

    #[test]
    fn an_entry_that_ended_leaves_the_ones_after_it() {
        let entries = catalogue(true);
        let mut progress = Progress::new(&[1e4, 0.0]);
        progress.begin(&entries[0], 1e4);
        progress.passed(1.0);
        progress.end();
        progress.begin(&entries[1], 0.0);
        assert_eq!(progress.left(), Some(Duration::ZERO));
    }

    #[test]
    fn durations_are_short() {
        let texts = [0.04, 9.4, 42.3, 150.0, 1500.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(texts, ["0.0 s", "9.4 s", "42 s", "2.5 min", "25 min"]);
    }
}
