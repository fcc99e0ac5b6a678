//! What whole networks keep, counted by the allocator, against their lists.
//!
//! One test, so that no other allocates at the same time.

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::nn::PaddingConfig2d;
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{MaxPool2dConfig, SavedTensor};
use burn_conv_bn_memory::CountingAllocator;
use burn_conv_bn_models::{Form, MobileNetV2Config, ResNet, ResNetBlockKind, ResNetConfig};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// Images more in the second run than in the first. What does not depend on their number, graph nodes
/// and what belongs to channels, comes out of the difference, which is some 20 MiB of activations.
const MORE: usize = 8;

/// What tables may grow by meanwhile.
const OVERHEAD: usize = 48 << 10;

fn shape(batch: usize) -> [usize; 4] {
    [batch, 3, 64, 64]
}

/// Asserts that what is kept for `MORE` images more is what is listed for them.
#[track_caller]
fn assert_bytes(what: &str, got: impl Fn(usize) -> usize, listed: impl Fn(usize) -> usize) {
    let [got, listed] = [&got as &dyn Fn(usize) -> usize, &listed]
        .map(|bytes| bytes(2 * MORE).saturating_sub(bytes(MORE)));
    println!("{what}: {got} bytes for {MORE} images more, {listed} listed");
    assert!(
        got.abs_diff(listed) < OVERHEAD,
        "{what}: got {got} bytes, {listed} are listed"
    );
}

/// Bytes that are left of a forward pass while its loss is held.
fn kept(forward: impl Fn() -> Tensor<2>) -> usize {
    // The first run pays for running statistics, and any may for what a thread keeps from then on:
    // the least is without.
    let runs = (0..3).map(|_| {
        let start = ALLOCATOR.current();
        let loss = forward().sum();
        let kept = ALLOCATOR.current().saturating_sub(start);
        loss.backward();
        kept
    });
    runs.min().unwrap_or_default()
}

/// Turns norms to their running statistics; gamma and beta go on being trained.
struct FixStatistics;

impl ModuleMapper for FixStatistics {
    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        flag.with_value(false)
    }
}

#[test]
fn networks_keep_what_they_list() {
    let device = Device::flex().autodiff();
    a_chain_of_fused_blocks(&device);
    let resnet = |kind| {
        ResNetConfig::new(Form::Fused, kind, [1; 4])
            .with_classes(10)
            .init(&device)
    };
    let batch = resnet(ResNetBlockKind::Bottleneck);
    forms_differ_by_what_is_their_own("statistics of the batch", &batch, &device);
    let running = resnet(ResNetBlockKind::Basic).map(&mut FixStatistics);
    forms_differ_by_what_is_their_own("running statistics", &running, &device);
}

fn images(batch: usize, device: &Device) -> Tensor<4> {
    Tensor::random(shape(batch), Distribution::Default, device)
}

/// MobileNetV2 has nothing between its blocks: each keeps its input, which is its alone, shortcuts
/// or not.
fn a_chain_of_fused_blocks(device: &Device) {
    const LAST: usize = 1280;
    let network = MobileNetV2Config::new(Form::Fused)
        .with_classes(10)
        .with_dropout(0.0)
        .init(device);
    let listed = |batch: usize| {
        let saved = network.saved_for_backward(shape(batch));
        let inputs = saved.iter().filter(|(_, tensor)| tensor.name == "input");
        // The images are there before. After the blocks, the pool keeps the last one's output of 2x2
        // positions, and the linear layer what the pool makes of it.
        let blocks: usize = inputs.skip(1).map(|(_, tensor)| tensor.bytes()).sum();
        blocks + 4 * batch * LAST * (2 * 2 + 1)
    };
    let got = |batch| {
        let images = images(batch, device);
        kept(|| network.forward(images.clone()))
    };
    assert_bytes("fused MobileNetV2", got, listed);
}

/// What is listed as shared both forms of a ResNet hold: as a block's input, or as the handle of a block
/// that adds its shortcut. The rest is each form's own, and so is what the pool after the first block
/// keeps.
fn forms_differ_by_what_is_their_own(what: &str, network: &ResNet, device: &Device) {
    let forms = [Form::Unfused, Form::Fused].map(|form| network.clone().with_form(form));
    let got = |batch| {
        let images = images(batch, device);
        let [unfused, fused] = [0, 1].map(|form| kept(|| forms[form].forward(images.clone())));
        unfused - fused
    };
    let listed = |batch| {
        let [unfused, fused] = [0, 1].map(|form| forms[form].saved_for_backward(shape(batch)));
        let own = |saved: &[(String, SavedTensor)]| -> usize {
            let own = saved.iter().filter(|(_, tensor)| !tensor.shared);
            own.map(|(_, tensor)| tensor.bytes()).sum()
        };
        let (of_burns_pool, of_ours) = kept_by_the_pool(batch, &fused);
        own(&unfused) + of_burns_pool - own(&fused) - of_ours
    };
    assert_bytes(
        &format!("ResNet with {what}, unfused above fused"),
        got,
        listed,
    );
}

/// Bytes that Burn's pool after the first block keeps and ours does not, and the other way round.
///
/// Burn's keeps an index of 32 bits for each output, where ours keeps a place of 8, and the output of the
/// block. Fused, nothing else does, unless the block itself holds it, as one with running statistics.
fn kept_by_the_pool(batch: usize, fused: &[(String, SavedTensor)]) -> (usize, usize) {
    let [_, _, height, width] = shape(batch);
    let output = [batch, 64, height / 2, width / 2];
    let pool = MaxPool2dConfig::new([3, 3])
        .with_strides([2, 2])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .init();
    let places: usize = pool
        .saved_for_backward(output)
        .iter()
        .map(SavedTensor::bytes)
        .sum();
    let is_held = fused
        .iter()
        .any(|(block, tensor)| block == "conv1" && tensor.name == "output");
    let of_block = match is_held {
        true => 0,
        false => size_of::<f32>() * output.iter().product::<usize>(),
    };
    (size_of::<i32>() * places + of_block, places)
}
