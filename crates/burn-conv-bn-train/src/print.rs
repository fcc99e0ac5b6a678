//! Lines for people.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stdout};

/// Prints a line, and ends the process if nobody reads any more, as in `mnist | head -1`.
pub(crate) fn line(text: Arguments<'_>) {
    let mut out = stdout().lock();
    let written = writeln!(out, "{text}").and_then(|()| out.flush());
    if written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) {
        std::process::exit(0);
    }
}

/// `println!`, without its panic.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::print::line(format_args!($($text)*))
    };
}
pub(crate) use say;

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
