//! One of Burn's contenders of `cargo xtask bench`, driven over standard input and output by the
//! [protocol](burn_conv_bn_bench::protocol). Not for people.

mod device;
#[cfg(feature = "cubecl")]
mod kernels;
mod layer;
mod meter;
mod network;
mod precision;
mod session;
mod tensors;
mod upstream;
mod workload;

use std::io::{BufRead, stdin};

use anyhow::{Context, Result};
use burn_conv_bn_memory::CountingAllocator;

use crate::session::{Session, explain, send};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

fn main() -> Result<()> {
    let mut session = Session::new(&ALLOCATOR);
    for line in stdin().lock().lines() {
        let request = serde_json::from_str(&line.context("cannot read requests")?)
            .context("bench-worker is started by cargo xtask bench, which sends its requests")?;
        send(&session.answer(request).unwrap_or_else(explain))?;
    }
    Ok(())
}
