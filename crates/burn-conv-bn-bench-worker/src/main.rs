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

use std::io::{BufRead, Write, stdin, stdout};

use anyhow::{Context, Result};
use burn_conv_bn_bench::protocol::Reply;
use burn_conv_bn_memory::CountingAllocator;

use crate::session::{Session, explain};

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

/// Writes a reply, whole whatever other threads write.
fn send(reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut output = stdout().lock();
    output.write_all(&line).context("cannot reply")?;
    output.flush().context("cannot reply")
}
