//! How far a run is, on standard error.

use std::fmt::Display;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use burn_conv_bn_bench::catalogue::Entry;

use crate::say::note;

/// Timed rounds of an entry, unless `--rounds` says otherwise: as many as fit the budget.
const LEAST_ROUNDS: usize = 3;
const MOST_ROUNDS: usize = 7;
const BUDGET: Duration = Duration::from_secs(120);
const QUICK_BUDGET: Duration = Duration::from_secs(8);

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
        let budget = if self.quick { QUICK_BUDGET } else { BUDGET };
        let fit = budget.as_secs_f64() / round.as_secs_f64();
        (fit as usize).clamp(LEAST_ROUNDS, MOST_ROUNDS)
    }
}

/// Says on standard error what is being done.
#[derive(Debug)]
pub struct Progress {
    entries: usize,
    begun: usize,
    id: String,
    started: Instant,
}

impl Progress {
    /// Before that many entries.
    pub fn new(entries: usize) -> Self {
        Self {
            entries,
            begun: 0,
            id: String::new(),
            started: Instant::now(),
        }
    }

    /// Starts an entry.
    pub fn begin(&mut self, entry: &Entry) {
        self.begun += 1;
        self.id.clone_from(&entry.id);
    }

    /// Time since the start of the run.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Says what is done next.
    pub fn say(&self, what: impl Display) {
        note!("{}", self.line(what, self.elapsed()));
    }

    fn line(&self, what: impl Display, elapsed: Duration) -> String {
        let Self {
            entries, begun, id, ..
        } = self;
        format!(
            "bench: [{begun}/{entries}] {id}: {what} ({} elapsed)",
            duration(elapsed)
        )
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
    fn a_line_says_which_entry_of_how_many_and_the_time_since_the_start() {
        let mut progress = Progress::new(12);
        let entries = catalogue(true);
        progress.begin(&entries[0]);
        progress.begin(&entries[1]);
        let line = progress.line("fused, round 2 of 7", Duration::from_secs(150));
        assert_eq!(
            line,
            "bench: [2/12] k3: fused, round 2 of 7 (2.5 min elapsed)"
        );
    }

    #[test]
    fn durations_are_short() {
        let texts = [0.04, 9.4, 42.3, 150.0, 1500.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(texts, ["0.0 s", "9.4 s", "42 s", "2.5 min", "25 min"]);
    }
}
