//! The tutorial's training job; see [`burn_conv_bn_train::cli`].

use std::process::ExitCode;

use burn_conv_bn_memory::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

fn main() -> ExitCode {
    burn_conv_bn_train::cli::main(&ALLOCATOR)
}
