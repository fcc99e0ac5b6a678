//! Segments drawn volumes with a small 3-D U-Net, a kind of network whose batch memory decides.
//!
//! Fused blocks keep their input, Burn's transposed convolution has a `BatchNormActivation` behind it,
//! whose output is rebuilt in the backward pass, and so is the concatenation with the encoder's level.
//! The same network runs by Burn's own layers, to compare the memory of a step.

mod net;
mod volumes;

use burn::module::Module;
use burn::nn::loss::{BinaryCrossEntropyLoss, BinaryCrossEntropyLossConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor};
use burn_conv_bn_memory::{CountingAllocator, StepMemory, measure_step};
use net::{Form, UNet};
use stripes::say;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Volumes of a step.
const BATCH: usize = 4;

fn cross_entropy(device: &Device) -> BinaryCrossEntropyLoss {
    BinaryCrossEntropyLossConfig::new()
        .with_logits(true)
        .init(device)
}

/// Loss and memory of a step from the first weights.
fn measure(form: Form) -> (f32, StepMemory) {
    let device = Device::flex().autodiff();
    device.seed(1);
    let network = UNet::new(&device);
    let loss = cross_entropy(&device);
    let (volumes, inside) = volumes::batch(BATCH, 0, &device);
    let forward = || loss.forward(network.forward(form, volumes.clone()), inside.clone());
    // The first step draws the parameters.
    let error = forward();
    let first = error.clone().into_scalar::<f32>();
    error.backward();
    let memory = measure_step(&device, &ALLOCATOR, forward, |error| error.backward());
    (first, memory)
}

/// Both forms.
fn compare() -> [(f32, StepMemory); 2] {
    let title = format!("A step of {BATCH} volumes");
    say!("{title:<22} kept by forward  peak of the step    loss");
    let forms = [("Burn's own layers", Form::Unfused), ("fused", Form::Fused)];
    forms.map(|(name, form)| {
        let (loss, memory) = measure(form);
        let [kept, peak] =
            [memory.forward_end_bytes, memory.peak_bytes].map(|bytes| bytes as f64 / 1024.0);
        say!("{name:<22} {kept:>11.0} KiB {peak:>13.0} KiB  {loss:.4}");
        (loss, memory)
    })
}

/// Dice coefficient of the voxels with a score above 0 and those within a body.
fn dice(scores: Tensor<5>, inside: Tensor<5, Int>) -> f32 {
    let sum = |voxels: Tensor<5>| voxels.sum().into_scalar::<f32>();
    let (found, inside) = (scores.greater_elem(0.0).float(), inside.float());
    2.0 * sum(found.clone() * inside.clone()) / (sum(found) + sum(inside))
}

/// Loss and Dice coefficient on volumes not trained on, before and after so many steps.
fn train(steps: u64) -> [(f32, f32); 2] {
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut network = UNet::new(&device);
    let loss = cross_entropy(&device);
    let evaluate = |network: &UNet| {
        let device = Device::flex();
        let (volumes, inside) = volumes::batch(16, u64::MAX, &device);
        let scores = network.valid().forward(Form::Fused, volumes);
        let error = cross_entropy(&device).forward(scores.clone(), inside.clone());
        (error.into_scalar::<f32>(), dice(scores, inside))
    };

    let before = evaluate(&network);
    let mut optimizer = AdamConfig::new().init();
    for step in 0..steps {
        let (volumes, inside) = volumes::batch(BATCH, step, &device);
        let error = loss.forward(network.forward(Form::Fused, volumes), inside);
        if step % 10 == 0 {
            say!(
                "step {step:>3}: loss {:.3}",
                error.clone().into_scalar::<f32>()
            );
        }
        let grads = GradientsParams::from_grads(error.backward(), &network);
        // Falls to 0, so that the running statistics are those of the last weights.
        let rate = 1e-2 * (1.0 - step as f64 / steps as f64);
        network = optimizer.step(rate, network, grads);
    }
    [before, evaluate(&network)]
}

fn main() {
    compare();
    let [before, after] = train(80);
    for (when, (loss, dice)) in [("before", before), ("after", after)] {
        say!("{when:>6} training, on other volumes: loss {loss:.3}, Dice {dice:.3}");
    }
}

#[cfg(test)]
mod tests {
    // One test: the allocator counts the whole process.
    #[test]
    fn both_forms_compute_the_same_and_the_fused_one_keeps_less_and_learns() {
        let [(unfused_loss, unfused), (fused_loss, fused)] = super::compare();
        assert!(
            (fused_loss - unfused_loss).abs() < 1e-4,
            "{fused_loss} and {unfused_loss}"
        );
        assert!(
            2 * fused.forward_end_bytes < unfused.forward_end_bytes
                && fused.peak_bytes < unfused.peak_bytes,
            "{fused:?} and {unfused:?}"
        );

        let [(first, before), (last, after)] = super::train(50);
        assert!(last < first / 2.0, "{first} then {last}");
        assert!(after > 0.6 && after > before + 0.2, "{before} then {after}");
    }
}
