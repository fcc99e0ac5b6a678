//! One conv-bn-relu layer, forward and backward: the bytes that its kernels are bound to, against
//! Burn's own layers.
//!
//! On WebGPU alone, whose devices can write down what they are asked to do. One test, so that no other
//! launches at the same time.

mod step;

use std::collections::BTreeMap;

use burn::nn::Relu;
use burn::tensor::{Device, Tensor};
use burn_conv_bn_memory::{BindingMeter, Launch};

use step::{ACTIVATION, OVERHEAD, STEPS, Step, config};

/// The launches of a step of `forward`, after those that set things up.
fn launches(
    device: &Device,
    bindings: &mut BindingMeter,
    forward: impl Fn(Tensor<4>) -> Tensor<4>,
) -> Vec<Launch> {
    let step = Step::new(device, 1);
    let pool = step.meter();
    let mut launches = Vec::new();
    for _ in 0..STEPS {
        step.sync();
        bindings.launches().expect("the trace is readable");
        pool.reset_peak();
        step.backward(step.forward(&forward));
        pool.peak();
        launches = bindings.launches().expect("the trace is readable");
        let observed: usize = pool.launches().values().sum();
        assert_eq!(launches.len(), observed, "what wgpu wrote, and CubeCL said");
    }
    launches
}

fn bytes(launches: &[Launch]) -> u64 {
    launches.iter().map(|launch| launch.bytes).sum()
}

fn activations(bytes: u64) -> f64 {
    bytes as f64 / ACTIVATION as f64
}

fn print(name: &str, launches: &[Launch]) {
    println!(
        "{name}: {} launches, bound to {:.2} activations",
        launches.len(),
        activations(bytes(launches))
    );
    let mut kernels: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for launch in launches {
        kernels
            .entry(&launch.kernel)
            .or_default()
            .push(launch.bytes);
    }
    for (kernel, bytes) in kernels {
        let each: Vec<_> = bytes
            .into_iter()
            .map(|bytes| format!("{:.2}", activations(bytes)))
            .collect();
        println!("    {kernel}: {}", each.join(" + "));
    }
}

#[test]
fn fewer_bytes_in_fewer_launches() {
    let mut bindings = BindingMeter::new().expect("there is a wgpu device");
    let device = Device::wgpu_options().setup(bindings.setup()).init();
    let device = device.expect("the device can be registered");
    let fused = config().init(&device.clone().autodiff());
    let (conv, norm) = fused.clone().into_parts();
    let relu = Relu::new();

    let own = launches(&device, &mut bindings, |x| {
        relu.forward(norm.forward(conv.forward(x)))
    });
    print("Burn's own layers", &own);
    let ours = launches(&device, &mut bindings, |x| fused.forward(x));
    print("fused", &ours);

    // What these are bound to is known: one activation, which one reads and the other overwrites; then
    // the gradient and the recomputed output, which become a sum and the output's gradient.
    for (kernel, count) in [
        ("partial_moments_kernel", 1),
        ("normalize_kernel", 1),
        ("partial_sums_kernel", 2),
        ("norm_input_grad_kernel", 2),
    ] {
        let found: Vec<_> = ours
            .iter()
            .filter(|launch| launch.kernel.starts_with(kernel))
            .collect();
        assert_eq!(found.len(), 1, "{kernel}");
        let wanted = (count * ACTIVATION) as u64;
        let range = wanted..=wanted + OVERHEAD as u64;
        assert!(range.contains(&found[0].bytes), "{found:?}");
    }
    assert!(ours.len() < own.len());
    assert!(bytes(&ours) < bytes(&own));
}
