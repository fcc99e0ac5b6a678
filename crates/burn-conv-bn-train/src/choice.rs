//! Choices by the names that they have on the command line and in files.

use clap::ValueEnum;

/// The name of an option's value.
pub(crate) trait Choice: ValueEnum {
    /// As on the command line.
    fn name(&self) -> String {
        let value = self.to_possible_value().expect("no choice is hidden");
        value.get_name().to_string()
    }
}

impl<T: ValueEnum> Choice for T {}
