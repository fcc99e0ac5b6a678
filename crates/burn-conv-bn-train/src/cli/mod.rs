//! The command line of the `mnist` binary.

mod args;
mod commands;
mod config;
mod invocation;

use std::process::ExitCode;

use burn_conv_bn_memory::CountingAllocator;

use crate::print::{PrintError, message, warn};
use commands::execute;
use invocation::Invocation;

/// Runs the command line of this process. `allocator` must be the global allocator.
///
/// ```no_run
/// use std::process::ExitCode;
///
/// use burn_conv_bn_memory::CountingAllocator;
///
/// #[global_allocator]
/// static ALLOCATOR: CountingAllocator = CountingAllocator::new();
///
/// fn main() -> ExitCode {
///     burn_conv_bn_train::cli::main(&ALLOCATOR)
/// }
/// ```
pub fn main(allocator: &'static CountingAllocator) -> ExitCode {
    let done = Invocation::read(std::env::args_os().collect())
        .and_then(|invocation| execute(invocation, allocator));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed pipe is no error to report.
            let mut printing = error
                .chain()
                .filter_map(|cause| cause.downcast_ref::<PrintError>());
            if !printing.any(PrintError::is_closed) {
                warn(format_args!("error: {}", message(&error)));
            }
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
