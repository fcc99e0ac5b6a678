//! Lines for people.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Standard output took no line: its disk is full, or nobody reads the pipe any more.
#[derive(Debug, thiserror::Error)]
#[error("cannot print: {0}")]
pub struct PrintError(#[from] io::Error);

impl PrintError {
    /// Whether nobody reads any more, as in `mnist | head -1`.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.kind() == ErrorKind::BrokenPipe
    }
}

/// Prints a line.
pub(crate) fn line(text: Arguments<'_>) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// `println!` with an error instead of a panic.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::print::line(format_args!($($text)*))
    };
}
pub(crate) use say;

/// Prints a line on standard error. A failure has no place left to be told.
pub(crate) fn warn(text: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A loss in the few letters of a table, also where it has diverged.
pub(crate) fn loss(value: f64) -> String {
    if value.is_finite() && value.abs() >= 1e6 {
        format!("{value:.3e}")
    } else {
        format!("{value:.4}")
    }
}

/// An error and its causes on one line, without those that its text names already.
pub(crate) fn message(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
        text
    })
}
