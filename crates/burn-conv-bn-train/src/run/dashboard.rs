//! Burn's dashboard, which leaves the terminal as it found it however a training ends.

use std::env;
use std::error::Error;
use std::io::{self, IsTerminal};
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use burn::train::logger::TrainingProgressLogger;
use burn::train::metric::MetricDefinition;
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{MetricState, MetricsRenderer, MetricsRendererTraining};
use burn::train::{Interrupter, LearnerSummary};
use crossterm::terminal::enable_raw_mode;

use crate::run::terminal::{is_shown, restore_terminal};

/// Burn's dashboard. Clones share it, so that it can be closed from outside of Burn.
///
/// Burn's own renderer panics in the training's threads when the user kills the training from it,
/// leaves the terminal to its thread when a training panics, and resets the interrupter at the end,
/// before Burn reads from it why the training ended.
#[derive(Clone)]
pub(crate) struct Dashboard {
    tui: Arc<Mutex<Option<TuiMetricsRendererWrapper>>>,
    interrupter: Interrupter,
}

impl Dashboard {
    /// Shows the dashboard of a training that goes on after `finished` epochs. None where there is
    /// no terminal that can show it and has its keys.
    pub(crate) fn open(interrupter: &Interrupter, finished: usize) -> Option<Self> {
        let dumb = env::var_os("TERM").is_some_and(|name| name == "dumb");
        if dumb || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return None;
        }
        // Before the dashboard's thread does, which then leaves the mode as it is.
        enable_raw_mode().ok()?;
        keep_ctrl_c();
        hang_up_with_terminal();
        let checkpoint = Some(finished).filter(|&epoch| epoch > 0);
        let tui = TuiMetricsRendererWrapper::new(interrupter.clone(), checkpoint);
        Some(Self {
            tui: Arc::new(Mutex::new(Some(tui))),
            interrupter: interrupter.clone(),
        })
    }

    /// Ends the dashboard, if it is still shown.
    pub(crate) fn close(&self) {
        let Some(tui) = self.lock().take() else {
            return;
        };
        // On a thread of its own: after the user's kill this panics.
        let killed = thread::spawn(move || drop(tui)).join().is_err();
        if killed {
            // The dashboard's hook, which is silent about every panic from now on.
            drop(panic::take_hook());
        }
        if killed || is_shown() {
            drop(restore_terminal());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<TuiMetricsRendererWrapper>> {
        self.tui.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes an event on. The dashboard panics here if the user has killed the training from it,
    /// which then ends as if stopped: the batch that is running cannot be cut short.
    fn show(&self, event: impl FnOnce(&mut TuiMetricsRendererWrapper)) {
        let shown = |tui: &mut TuiMetricsRendererWrapper| {
            catch_unwind(AssertUnwindSafe(|| event(tui))).is_ok()
        };
        if !self.lock().as_mut().is_none_or(shown) {
            self.interrupter.stop(Some("killed from the dashboard"));
            self.close();
        }
    }
}

/// Lets Ctrl-C raise SIGINT in raw mode. The other keys that raise signals stay keys: they would
/// leave the terminal as it is.
#[cfg(unix)]
fn keep_ctrl_c() {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};

    /// POSIX's `_POSIX_VDISABLE`.
    const DISABLED: u8 = if cfg!(any(target_os = "linux", target_os = "android")) {
        0
    } else {
        0xff
    };

    let terminal = io::stdin();
    if let Ok(mut modes) = tcgetattr(&terminal) {
        modes.local_modes |= LocalModes::ISIG;
        modes.special_codes[SpecialCodeIndex::VQUIT] = DISABLED;
        modes.special_codes[SpecialCodeIndex::VSUSP] = DISABLED;
        // Without it Ctrl-C is a key that the dashboard ignores; its own keys stop as well.
        let _ = tcsetattr(&terminal, OptionalActions::Now, &modes);
    }
}

/// Elsewhere Ctrl-C stays a key, which the dashboard ignores.
#[cfg(not(unix))]
fn keep_ctrl_c() {}

/// Ends the process as by its terminal's SIGHUP if a panic finds the terminal gone before that signal arrives. Otherwise the
/// dashboard's terminal prints an error while the panic unwinds, which is a second panic, and the process aborts.
#[cfg(unix)]
fn hang_up_with_terminal() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Signal, getpid, kill_process};
    use rustix::termios::tcgetattr;

    // A terminal that is closing fails to be read, and is polled as hung up, before its attributes are refused. macOS polls
    // no devices.
    let is_gone = || {
        let stdin = io::stdin();
        let mut states = [PollFd::new(&stdin, PollFlags::empty())];
        let is_polled = poll(&mut states, Some(&Timespec::default())).is_ok();
        (is_polled && states[0].revents().contains(PollFlags::HUP)) || tcgetattr(&stdin).is_err()
    };
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if is_gone() {
            let _ = kill_process(getpid(), Signal::HUP);
        }
        hook(info);
    }));
}

/// Elsewhere a terminal sends no signal.
#[cfg(not(unix))]
fn hang_up_with_terminal() {}

/// Methods that pass an event on.
macro_rules! shown {
    ($($event:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            fn $event(&mut self, $($argument: $type),*) {
                self.show(|tui| tui.$event($($argument),*));
            }
        )*
    };
}

impl MetricsRendererTraining for Dashboard {
    shown! {
        update_train(state: MetricState);
        update_valid(state: MetricState);
    }

    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn Error>> {
        self.close();
        Ok(())
    }
}

impl TrainingProgressLogger for Dashboard {
    shown! {
        start(epochs: usize, first: usize, items: Option<usize>, label: Option<&str>);
        update_epoch(epoch: usize);
        start_split(split: &str, items: usize);
        update_split(items: usize);
        end_split();
        end();
        log_event_training(event: String);
    }
}

impl MetricsRenderer for Dashboard {
    fn manual_close(&mut self) {
        self.close();
    }

    shown! {
        register_metric(definition: MetricDefinition);
    }
}
