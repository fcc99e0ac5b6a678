//! One conv-bn-relu layer, forward and backward, on a CubeCL device: what it launches, keeps and
//! holds at most, against Burn's own layers.
//!
//! One test, so that no other allocates or launches at the same time.

mod gpu;
mod step;

use burn::module::Module;
use burn::nn::Relu;
use burn::tensor::{Device, Tensor};

use step::{ACTIVATION, OVERHEAD, STEPS, Step, config};

#[derive(Debug)]
struct Measure {
    launches: usize,
    forward_end: usize,
    peak: usize,
}

/// A step of `forward`, after those that set things up.
fn measure(device: &Device, name: &str, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Measure {
    let step = Step::new(device);
    let meter = step.meter();
    let mut result = None;
    for _ in 0..STEPS {
        step.sync();
        let level = meter.reset_peak();
        let output = step.forward(&forward);
        let forward_end = meter.current() - level;
        step.backward(output);
        let peak = meter.peak() - level;
        let launches = meter.launches();
        result = Some((
            Measure {
                launches: launches.values().sum(),
                forward_end,
                peak,
            },
            launches,
        ));
    }
    let (measure, launches) = result.expect("steps were made");
    println!(
        "{name}: {} launches, {:.2} activations at the end of forward, {:.2} at most",
        measure.launches,
        measure.forward_end as f64 / ACTIVATION as f64,
        measure.peak as f64 / ACTIVATION as f64,
    );
    for (kernel, count) in launches {
        println!("    {count} x {kernel}");
    }
    measure
}

#[test]
fn fewer_launches_less_kept_and_a_lower_peak() {
    let device = gpu::device();
    let tracked = device.clone().autodiff();
    let fused = config().init(&tracked);
    let bounded = config().with_max_workspace(Some(ACTIVATION)).init(&tracked);
    let (conv, norm) = fused.clone().into_parts();
    let relu = Relu::new();
    println!("{} parameters", fused.num_params());

    let own = measure(&device, "Burn's own layers", |x| {
        relu.forward(norm.forward(conv.forward(x)))
    });
    let ours = measure(&device, "fused", |x| fused.forward(x));
    let chunked = measure(&device, "fused, bounded workspace", |x| bounded.forward(x));

    assert!(ours.launches < own.launches);
    // The output, and nothing else: the input is there in any case.
    assert!(ours.forward_end <= ACTIVATION + OVERHEAD, "{ours:?}");
    assert!(own.forward_end >= 3 * ACTIVATION, "{own:?}");
    assert!(10 * ours.forward_end <= 4 * own.forward_end);
    assert!(ours.peak < own.peak, "{ours:?} {own:?}");
    assert!(chunked.peak <= ours.peak, "{chunked:?} {ours:?}");
}
