//! Options of the command line: their values by name, and the headings that they stand under.

use clap::ValueEnum;

pub(crate) const ON_RUN: &str = "Run";
pub(crate) const ON_NETWORK: &str = "Network";
pub(crate) const ON_TRAINING: &str = "Training";
pub(crate) const ON_DATA: &str = "Data";
pub(crate) const ON_COMPUTATION: &str = "Computation";
pub(crate) const ON_OUTPUT: &str = "Output";

/// The name of an option's value.
pub(crate) trait Choice: ValueEnum {
    /// As on the command line.
    fn name(&self) -> String {
        let value = self.to_possible_value().expect("no choice is hidden");
        value.get_name().to_string()
    }
}

impl<T: ValueEnum> Choice for T {}

/// A number that JSON has.
pub(crate) fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        Ok(_) => Err("must be finite".to_string()),
        Err(error) => Err(error.to_string()),
    }
}
