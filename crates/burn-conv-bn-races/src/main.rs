//! Runs every kernel on plain threads, for Helgrind to look for data races. With `--canary` it does
//! nothing but what Helgrind must report.

use std::env;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn_conv_bn_races::prelude::{IntoParallelIterator, THREADS};
use half::bf16;
use pulp::Arch;

mod pass {
    use burn_conv_bn_races as kernels;

    include!("pass.rs");
}

fn main() {
    // What the processor can do is found out once and written down without a lock. Here it is before
    // any thread.
    black_box(Arch::new());
    if env::args().any(|argument| argument == "--canary") {
        canary();
        return;
    }
    let cases = pass::cases();
    let mut values = 0;
    for case in &cases {
        for written in [
            pass::run::<f32>(case),
            pass::run::<f64>(case),
            pass::run::<bf16>(case),
        ] {
            values += written.values().len();
        }
    }
    for written in [
        pass::run_pools::<f32>(),
        pass::run_pools::<f64>(),
        pass::run_pools::<bf16>(),
    ] {
        values += written.values().len();
    }
    println!(
        "every kernel over {} geometries in f32, f64 and bf16, on {THREADS} threads: {values} values \
         written",
        cases.len() + pass::pools()
    );
}

/// Threads that write to one place. It is an atomic one, which Helgrind takes for any other.
fn canary() {
    let place = AtomicUsize::new(THREADS);
    let threads: Vec<usize> = (0..THREADS).collect();
    threads
        .into_par_iter()
        .for_each(|thread| place.store(thread, Ordering::Relaxed));
    println!("written last by thread {}", place.into_inner());
}
