//! Requests to stop a run before its end.
//!
//! Each is made through Burn's [`Interrupter`], with a reason, and ends the run after the batch that
//! is running: by the signals here, by the keys of the dashboard, or by a log that cannot be
//! written.

use std::io;
use std::process::exit;

use burn::train::Interrupter;

use crate::run::terminal;

/// Listens for Ctrl-C and, if `trains`, for SIGTERM, at which other commands have nothing to save.
///
/// SIGHUP is left alone: `nohup` ignores it, and who has lost the terminal reads no message.
pub(crate) fn listen(trains: bool) -> io::Result<Interrupter> {
    let interrupter = Interrupter::new();
    on_signals(interrupter.clone(), trains)?;
    Ok(interrupter)
}

#[cfg(unix)]
fn on_signals(interrupter: Interrupter, trains: bool) -> io::Result<()> {
    use std::thread;

    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;

    let mut signals = Signals::new([SIGINT])?;
    if trains {
        signals.add_signal(SIGTERM)?;
    }
    let listen = move || {
        for signal in signals.forever() {
            let reason = if signal == SIGINT {
                "Ctrl-C"
            } else {
                "SIGTERM"
            };
            stop_or_exit(&interrupter, reason, 128 + signal);
        }
    };
    thread::Builder::new()
        .name("signals".to_string())
        .spawn(listen)?;
    Ok(())
}

#[cfg(not(unix))]
fn on_signals(interrupter: Interrupter, _trains: bool) -> io::Result<()> {
    ctrlc::set_handler(move || stop_or_exit(&interrupter, "Ctrl-C", 130)).map_err(io::Error::other)
}

/// Stops the run; ends the process if that was asked before, by somebody who does not want to wait
/// for the batch.
fn stop_or_exit(interrupter: &Interrupter, reason: &str, status: i32) {
    if interrupter.should_stop() {
        // Held until the end, so that the dashboard draws no more.
        let _screen = terminal::is_shown().then(terminal::restore_terminal);
        exit(status);
    }
    interrupter.stop(Some(reason));
}
