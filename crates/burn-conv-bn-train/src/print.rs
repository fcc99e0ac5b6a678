//! Lines for people.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};

/// Standard output cannot be written: a full disk or a closed pipe.
#[derive(Debug, thiserror::Error)]
#[error("cannot print: {0}")]
pub(crate) struct PrintError(#[from] io::Error);

impl PrintError {
    /// Whether the pipe is closed, as in `mnist | head -1`.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.kind() == ErrorKind::BrokenPipe
    }
}

/// Prints a line, with control characters of names escaped.
pub(crate) fn line(text: Arguments<'_>) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", escaped(&text.to_string(), &['\n', '\t']))?;
    Ok(out.flush()?)
}

/// `println!` with an error instead of a panic.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::print::line(format_args!($($text)*))
    };
}
pub(crate) use say;

/// Prints a line on standard error. A failure is ignored.
pub(crate) fn warn(text: Arguments<'_>) {
    let text = escaped(&text.to_string(), &['\n', '\t']);
    let _ = writeln!(io::stderr(), "{text}");
}

/// A loss in the few letters of a table, also where it has diverged.
pub(crate) fn loss(value: f64) -> String {
    number(value, 11, 4).trim_start().to_string()
}

/// A text with its control characters, except the allowed ones, escaped as in Rust.
pub(crate) fn escaped(text: &str, allowed: &[char]) -> String {
    text.chars().fold(String::new(), |mut text, char| {
        if char.is_control() && !allowed.contains(&char) {
            text.extend(char.escape_default());
        } else {
            text.push(char);
        }
        text
    })
}

/// A number for a column: with decimals, or with an exponent where it would not fit.
pub(crate) fn number(value: f64, width: usize, decimals: usize) -> String {
    let fixed = format!("{value:>width$.decimals$}");
    if fixed.len() <= width {
        return fixed;
    }
    // `-1.`, then the digits, then `e-308`.
    let digits = width.saturating_sub(8);
    format!("{value:>width$.digits$e}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        let text = "a\u{1b}[31mb\u{9b}2J\r\n\té";
        assert_eq!(
            escaped(text, &['\n', '\t']),
            "a\\u{1b}[31mb\\u{9b}2J\\r\n\té"
        );
        assert_eq!(escaped("a\n\t", &[]), "a\\n\\t");
    }

    #[test]
    fn a_number_keeps_its_column() {
        for (value, text) in [
            (2.25, "   2.2500"),
            (-2.25, "  -2.2500"),
            (1234.5678, "1234.5678"),
            (12345.678, "    1.2e4"),
            (1e30, "   1.0e30"),
            (-f64::MAX, "-1.8e308"),
            (f64::NAN, "      NaN"),
            (f64::NEG_INFINITY, "     -inf"),
        ] {
            assert_eq!(number(value, 9, 4).trim_start(), text.trim_start());
            assert_eq!(number(value, 9, 4).len(), 9, "{value}");
        }
    }
}
