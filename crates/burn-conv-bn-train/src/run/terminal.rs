//! The terminal that a dashboard has taken.

use std::io::{self, StdoutLock};

use crossterm::cursor::Show;
use crossterm::event::DisableMouseCapture;
use crossterm::execute;
use crossterm::terminal::{
    Clear, ClearType, LeaveAlternateScreen, disable_raw_mode, is_raw_mode_enabled,
};

/// Whether a dashboard has the terminal.
pub(crate) fn is_shown() -> bool {
    is_raw_mode_enabled().unwrap_or(false)
}

/// Takes the terminal back from a dashboard, which cannot draw while the result is held.
pub(crate) fn restore_terminal() -> StdoutLock<'static> {
    let mut out = io::stdout().lock();
    let _ = disable_raw_mode();
    let _ = execute!(
        out,
        DisableMouseCapture,
        LeaveAlternateScreen,
        // Leaving twice puts the cursor back above what a killed dashboard said.
        Clear(ClearType::FromCursorDown),
        Show
    );
    out
}
