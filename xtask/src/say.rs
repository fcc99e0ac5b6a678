//! Lines on standard output and standard error, which may be closed pipes or full devices.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

use anyhow::{Context, Error, Result};

/// A line on standard output. Fails where `println!` panics.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}

/// A line on standard error. A failure is ignored: there is nowhere left to report it.
macro_rules! note {
    ($($text:tt)*) => { $crate::say::aside(format_args!($($text)*)) };
}

pub(crate) use {note, say};

pub fn line(text: Arguments<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

pub fn aside(text: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether the reader of standard output is gone, as after `| head -1`.
pub fn is_closed_pipe(error: &Error) -> bool {
    let source = error.downcast_ref::<io::Error>();
    source.is_some_and(|source| source.kind() == ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_told_from_a_full_device() {
        let error = |kind: ErrorKind| {
            let failed: io::Result<()> = Err(kind.into());
            failed.context("cannot write").unwrap_err()
        };
        assert!(is_closed_pipe(&error(ErrorKind::BrokenPipe)));
        assert!(!is_closed_pipe(&error(ErrorKind::StorageFull)));
        assert!(!is_closed_pipe(&Error::msg("Broken pipe")));
    }
}
