//! `--largest-batch`: the largest batch that trains within a number of bytes, found by running.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, Error, Result, ensure};
use burn_conv_bn_bench::catalogue::Entry;
use burn_conv_bn_bench::device::FLEX;
use burn_conv_bn_bench::linux;
use burn_conv_bn_bench::protocol::{Contender, Request, StepTime, Training};

use super::args::MOST_IMAGES;
use super::contender::{done, reply};
use super::report::{ContenderReport, Largest, Problem, ProblemKind};
use super::run::{Lab, scratch};

/// Training steps of each batch. The first pays the one-time costs and is not timed; from the second
/// on there is an optimizer state.
const STEPS: usize = 3;

/// Largest gap between a batch that fits and one that does not, in percent; at least one image.
const GAP: usize = 3;

/// Bytes at which a process is killed. Loading may take more than training.
fn limit(bytes: u64) -> u64 {
    bytes + bytes / 4
}

/// Checks that the machine has room for a process that is about to be killed.
pub fn check_room(bytes: u64) -> Result<()> {
    let available = linux::bytes(Path::new("/proc/meminfo"), "MemAvailable").context(
        "--largest-batch reads the memory of processes from Linux's /proc, not found here",
    )?;
    let limit = limit(bytes);
    ensure!(
        limit <= available,
        "--largest-batch: a process of {bytes} bytes is killed at {limit}, but only {available} are \
         available; give less"
    );
    Ok(())
}

/// Doubles the batch until it does not fit, then bisects. Returns the largest that fits, up to `most`,
/// with what `run` measured; `run` returns `None` for one that does not fit.
fn search<T, E>(
    most: usize,
    mut run: impl FnMut(usize) -> Result<Option<T>, E>,
) -> Result<Option<(usize, T)>, E> {
    let mut best: Option<(usize, T)> = None;
    let mut beyond = None;
    loop {
        let fits = best.as_ref().map_or(0, |(batch, _)| *batch);
        let batch = match beyond {
            None => (2 * fits).clamp(1, most),
            Some(beyond) => fits.midpoint(beyond),
        };
        let gap = (fits * GAP / 100).max(1);
        if fits == most || beyond.is_some_and(|beyond| beyond - fits <= gap) {
            return Ok(best);
        }
        match run(batch)? {
            Some(measured) => best = Some((batch, measured)),
            None => beyond = Some(batch),
        }
    }
}

impl Lab<'_> {
    /// Looks for the largest batch of each contender.
    pub fn largest_batches(
        &self,
        entry: &Entry,
        bytes: u64,
        say: &dyn Fn(&str),
    ) -> Result<Vec<ContenderReport>> {
        let folder = scratch()?;
        let find = |&contender: &Contender| {
            let mut report = ContenderReport::new(contender);
            let found = search(MOST_IMAGES, |batch| {
                say(&format!("{contender}, batch {batch}"));
                self.try_batch(entry, contender, batch, bytes, folder.path())
            });
            match found {
                Ok(Some((_, largest))) => report.largest = Some(largest),
                Ok(None) => {
                    let reason = format!("one image takes more than {bytes} bytes");
                    report.fail(Problem::new(ProblemKind::Unavailable, reason));
                }
                Err(problem) => report.fail(problem),
            }
            report
        };
        Ok(self.contenders.iter().map(find).collect())
    }

    /// Trains a batch in a fresh process. `None` if it does not fit.
    fn try_batch(
        &self,
        entry: &Entry,
        contender: Contender,
        batch: usize,
        bytes: u64,
        data: &Path,
    ) -> Result<Option<Largest>, Problem> {
        let failed = |error: Error| Problem::new(ProblemKind::Failed, format!("{error:#}"));
        let entry = Entry {
            id: entry.id.clone(),
            work: entry.work.clone().with_batch(batch),
        };
        self.draw(&entry, data).map_err(failed)?;
        let mut process = self.start(contender.engine()).map_err(failed)?;
        let is_host = self.device() == FLEX;
        let killed = process.kill_when(move |id| {
            let status = PathBuf::from(format!("/proc/{id}/status"));
            let resident = linux::bytes(&status, "VmRSS");
            is_host && resident.is_some_and(|resident| resident > limit(bytes))
        });
        let load = self.load_request(&entry, contender, data);
        let train = Request::Train { steps: STEPS };
        let trained = process.ask(&load, done);
        let trained = trained.and_then(|()| process.ask(&train, reply!(Trained)));
        match trained {
            Ok(training) => Largest::new(batch, &training)
                .map(|largest| (largest.peak_bytes <= bytes).then_some(largest)),
            Err(_) if killed.load(Ordering::SeqCst) => Ok(None),
            // A device's pool runs out by an error or the process's death.
            Err(problem) if !is_host && batch > 1 && problem.kind == ProblemKind::Failed => {
                Ok(None)
            }
            Err(problem) => {
                let reason = format!("batch {batch}: {}", problem.reason);
                Err(Problem::new(problem.kind, reason))
            }
        }
    }
}

impl Largest {
    fn new(batch: usize, training: &Training) -> Result<Self, Problem> {
        let unknown = || Problem::new(ProblemKind::Unavailable, "its memory is unknown here");
        let timed = training.steps.iter().skip(1).map(StepTime::total_ms);
        let (steps, ms) = timed.fold((0, 0.0), |(steps, sum), ms| (steps + 1, sum + ms));
        Ok(Self {
            batch,
            peak_bytes: training.peak_bytes.ok_or_else(unknown)?,
            image_ms: ms / (steps * batch) as f64,
            to_unfused: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result where batches up to `limit` fit, and the batches that ran.
    fn found(limit: usize, most: usize) -> (Option<usize>, Vec<usize>) {
        let mut ran = Vec::new();
        let found = search(most, |batch| {
            ran.push(batch);
            Ok::<_, ()>((batch <= limit).then_some(2 * batch))
        });
        let found = found.unwrap().map(|(batch, measured)| {
            assert_eq!(measured, 2 * batch);
            batch
        });
        (found, ran)
    }

    #[test]
    fn small_batches_are_found_exactly_and_large_ones_to_a_few_percent() {
        for limit in 1..=66 {
            assert_eq!(found(limit, 1000).0, Some(limit));
        }
        for limit in 67..3000 {
            let (batch, ran) = found(limit, 1 << 16);
            let batch = batch.unwrap();
            assert!(
                batch <= limit && limit - batch < limit * GAP / 100,
                "{batch} for {limit}"
            );
            assert!(ran.len() <= 19, "{ran:?}");
        }
        assert_eq!(found(10, 1000).1, [1, 2, 4, 8, 16, 12, 10, 11]);
    }

    #[test]
    fn the_search_ends_at_one_image_and_at_the_most() {
        assert_eq!(found(0, 1000), (None, vec![1]));
        assert_eq!(found(1000, 40), (Some(40), vec![1, 2, 4, 8, 16, 32, 40]));
        assert_eq!(found(1, 1), (Some(1), vec![1]));
    }

    #[test]
    fn a_failure_ends_the_search() {
        let run = |batch: usize| if batch < 4 { Ok(Some(())) } else { Err(batch) };
        assert_eq!(search(100, run), Err(4));
    }

    #[test]
    fn a_step_is_timed_after_the_first() {
        let step = |ms| StepTime {
            forward_ms: ms,
            backward_ms: 0.0,
            optimizer_ms: Some(ms),
        };
        let mut training = Training {
            steps: [100.0, 2.0, 4.0].map(step).to_vec(),
            peak_bytes: Some(7),
        };
        let largest = Largest::new(3, &training).unwrap();
        assert_eq!((largest.peak_bytes, largest.image_ms), (7, 2.0));
        training.peak_bytes = None;
        let problem = Largest::new(3, &training).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Unavailable);
    }
}
