//! On plain threads the kernels compute what they do on rayon, to the bit.

mod on_threads {
    use burn_conv_bn_races as kernels;

    include!("../src/pass.rs");
}

mod on_rayon {
    use burn_conv_bn_cpu as kernels;

    include!("../src/pass.rs");
}

use std::collections::BTreeSet;
use std::thread::{self, ThreadId};

use burn_conv_bn_races::prelude::{IntoParallelIterator, THREADS};
use half::bf16;

#[test]
fn the_kernels_are_those_of_their_package() {
    let pairs = on_threads::cases().into_iter().zip(on_rayon::cases());
    for (threads, rayon) in pairs {
        let context = format!("{threads:?}");
        assert_same(
            &context,
            &on_threads::run::<f32>(&threads),
            &on_rayon::run::<f32>(&rayon),
        );
        assert_same(
            &context,
            &on_threads::run::<f64>(&threads),
            &on_rayon::run::<f64>(&rayon),
        );
        assert_same(
            &context,
            &on_threads::run::<bf16>(&threads),
            &on_rayon::run::<bf16>(&rayon),
        );
    }
    assert_eq!(on_threads::pools(), on_rayon::pools());
    assert_same(
        "max pools in f32",
        &on_threads::run_pools::<f32>(),
        &on_rayon::run_pools::<f32>(),
    );
    assert_same(
        "max pools in f64",
        &on_threads::run_pools::<f64>(),
        &on_rayon::run_pools::<f64>(),
    );
    assert_same(
        "max pools in bf16",
        &on_threads::run_pools::<bf16>(),
        &on_rayon::run_pools::<bf16>(),
    );
}

fn assert_same(context: &str, threads: &on_threads::Written, rayon: &on_rayon::Written) {
    assert!(!threads.values().is_empty(), "{context}");
    assert!(threads.values() == rayon.values(), "{context}");
}

#[test]
fn neighbours_run_on_different_threads() {
    let items: Vec<usize> = (0..3 * THREADS + 1).collect();
    let ran: Vec<(usize, ThreadId)> = items
        .clone()
        .into_par_iter()
        .map(|item| (item, thread::current().id()))
        .collect();
    assert!(ran.iter().map(|(item, _)| *item).eq(items));
    let threads: BTreeSet<String> = ran.iter().map(|(_, id)| format!("{id:?}")).collect();
    assert_eq!(threads.len(), THREADS);
    assert!(ran.windows(2).all(|pair| pair[0].1 != pair[1].1));
}

#[test]
#[should_panic(expected = "item 4")]
fn a_panic_comes_back() {
    let items: Vec<usize> = (0..5).collect();
    items
        .into_par_iter()
        .for_each(|item| assert!(item < 4, "item {item}"));
}
