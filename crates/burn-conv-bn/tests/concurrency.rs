//! Threads, pools of threads, and graphs of unusual shapes: the same bits each time, and nothing
//! written to that is not the op's own.
//!
//! Burn 0.22.1 keeps what backward passes need in graphs, each under a lock. Graphs that share a leaf
//! through which no backward pass has gone yet are merged, under another lock; two threads that
//! merge and finish at the same moment can wait for each other. So threads here share either no
//! leaves, as Burn's own strategies for several devices do by `fork`, or such that have been through
//! a backward pass.

mod drawn;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::thread;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::PaddingConfig2d;
use burn::optim::{GradientsAccumulator, GradientsParams, SgdConfig};
use burn::tensor::{Gradients, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig, Recompute};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use drawn::{device, random};

const BATCH: usize = 9;
const SIZE: usize = 12;

/// Steps that run at the same time.
const TASKS: u64 = 4;

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let data = tensor.into_data();
    data.iter::<f32>().map(f32::to_bits).collect()
}

/// A layer whose parameters follow from the seed alone.
fn init(config: &ConvBn2dConfig, seed: u64) -> ConvBn2d {
    let mut layer = config.init(&device());
    let shape = layer.conv.weight.lazy_shape().dims::<4>();
    layer.conv.weight = Param::from_tensor(random(shape, seed));
    layer.norm.gamma = Param::from_tensor(random([shape[0]], seed + 1));
    layer.norm.beta = Param::from_tensor(random([shape[0]], seed + 2));
    layer
}

fn same(channels: [usize; 2]) -> ConvBn2dConfig {
    ConvBn2dConfig::new(channels, [3, 3])
        .with_padding(PaddingConfig2d::Same)
        .with_activation(Activation::Relu)
}

/// One for each way through the kernels: sums of planes, fewer products, depthwise, pointwise; with
/// the convolution recomputed, recomputed piece by piece, and kept.
fn layers() -> Vec<ConvBn2d> {
    let configs = [
        same([5, 6]),
        same([16, 17]).with_max_workspace(Some(1)),
        same([8, 8]).with_groups(8).with_recompute(Recompute::Never),
        ConvBn2dConfig::new([7, 20], [1, 1]).with_activation(Activation::Silu),
    ];
    (0..)
        .zip(&configs)
        .map(|(index, config)| init(config, 100 * index))
        .collect()
}

/// Names and bits.
type Step = Vec<(&'static str, Vec<u32>)>;

/// A training step without an optimizer: the output and every gradient.
fn step(layer: &ConvBn2d, batch: u64) -> Step {
    let weight = layer.conv.weight.val();
    let channels = weight.dims()[1] * layer.conv.groups;
    let input = random([BATCH, channels, SIZE, SIZE], 1000 + batch).require_grad();
    let output = layer.forward(input.clone());
    let upstream = random(output.dims(), 2000 + batch);
    let grads = (output.clone() * upstream).sum().backward();
    let (gamma, beta) = (layer.norm.gamma.val(), layer.norm.beta.val());
    vec![
        ("output", bits(output)),
        ("input's gradient", gradient(&input, &grads)),
        ("weight's gradient", gradient(&weight, &grads)),
        ("gamma's gradient", gradient(&gamma, &grads)),
        ("beta's gradient", gradient(&beta, &grads)),
    ]
}

fn gradient<const D: usize>(tensor: &Tensor<D>, grads: &Gradients) -> Vec<u32> {
    bits(tensor.grad(grads).expect("the tensor is tracked"))
}

#[track_caller]
fn assert_same(context: &str, got: &Step, wanted: &Step) {
    assert_eq!(got.len(), wanted.len(), "{context}");
    for ((name, got), (_, wanted)) in got.iter().zip(wanted) {
        assert!(got == wanted, "{context}: other bits in {name}");
    }
}

/// Runs tasks at the same time, on a thread each.
fn at_once<T: Send, F: FnOnce() -> T + Send>(tasks: Vec<F>) -> Vec<T> {
    let start = Barrier::new(tasks.len());
    thread::scope(|scope| {
        let threads: Vec<_> = tasks
            .into_iter()
            .map(|task| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    task()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no task panics"))
            .collect()
    })
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("threads can be had")
}

#[test]
fn one_layer_in_several_threads() {
    for (index, layer) in layers().into_iter().enumerate() {
        // Its leaves go through a backward pass here.
        let alone: Vec<Step> = (0..TASKS).map(|batch| step(&layer, batch)).collect();
        for forks in [false, true] {
            let tasks = (0..TASKS).map(|batch| {
                let layer = if forks {
                    layer.clone().fork(&device())
                } else {
                    layer.clone()
                };
                move || {
                    let steps = (0..5).map(|_| step(&layer, batch));
                    steps.collect::<Vec<_>>()
                }
            });
            for (got, wanted) in at_once(tasks.collect()).iter().zip(&alone) {
                for got in got {
                    assert_same(&format!("layer {index}, forks {forks}"), got, wanted);
                }
            }
        }
    }
}

/// Each forward pass is one update of the running statistics, which clones have in common: those of
/// threads come one after the other, and none is lost.
#[test]
fn running_statistics_take_every_threads_update() {
    let config = same([5, 6]);
    let statistics = |layer: &ConvBn2d| {
        let norm = &layer.norm;
        [&norm.running_mean, &norm.running_var].map(|running| bits(running.value()))
    };
    let in_order = |batches: [u64; 2]| {
        let layer = init(&config, 1);
        for batch in batches {
            step(&layer, batch);
        }
        statistics(&layer)
    };
    let orders = [in_order([0, 1]), in_order([1, 0])];
    assert!(orders[0] != orders[1]);
    for _ in 0..20 {
        let layer = init(&config, 1);
        let tasks = (0..2).map(|batch| {
            let layer = layer.clone().fork(&device());
            move || step(&layer, batch)
        });
        at_once(tasks.collect());
        assert!(orders.contains(&statistics(&layer)));
    }
}

/// Pools of one thread and of several; steps that are themselves tasks of a pool, so that a thread
/// that waits for a kernel takes up another step; and pools within pools.
#[test]
fn pools_of_any_size_and_within_each_other() {
    for (index, layer) in layers().into_iter().enumerate() {
        let alone: Vec<Step> = (0..TASKS).map(|batch| step(&layer, batch)).collect();
        let forks = || -> Vec<(u64, ConvBn2d)> {
            let fork = |batch| (batch, layer.clone().fork(&device()));
            (0..TASKS).map(fork).collect()
        };
        let check = |context: &str, got: Vec<Step>| {
            assert_eq!(got.len(), alone.len());
            for (got, wanted) in got.iter().zip(&alone) {
                assert_same(&format!("layer {index}, {context}"), got, wanted);
            }
        };
        let inner = [pool(1), pool(3)];
        for threads in [1, 2, 5] {
            let outer = pool(threads);
            let tasks = forks();
            let got = outer.install(move || {
                let steps = tasks.iter().map(|(batch, layer)| step(layer, *batch));
                steps.collect::<Vec<_>>()
            });
            check(&format!("a pool of {threads}"), got);

            let tasks = forks();
            let got = outer.install(move || {
                let steps = tasks.into_par_iter();
                steps
                    .map(|(batch, layer)| step(&layer, batch))
                    .collect::<Vec<_>>()
            });
            check(&format!("tasks of a pool of {threads}"), got);

            for inner in &inner {
                let tasks = forks();
                let got = outer.install(move || {
                    let steps = tasks.into_par_iter();
                    steps
                        .map(|(batch, layer)| inner.install(move || step(&layer, batch)))
                        .collect::<Vec<_>>()
                });
                let within = inner.current_num_threads();
                check(&format!("a pool of {within} in one of {threads}"), got);
            }
        }
    }
}

/// A network of every kind of layer.
#[derive(Module, Debug)]
struct Model {
    stem: ConvBn2d,
    body: Vec<ConvBn2d>,
    depthwise: ConvBn2d,
    head: ConvBn2d,
}

impl Model {
    fn new(seed: u64) -> Self {
        let head = ConvBn2dConfig::new([16, 5], [1, 1]);
        Self {
            stem: init(&same([3, 16]), seed),
            body: (1..3)
                .map(|block| init(&same([16, 16]), seed + 10 * block))
                .collect(),
            depthwise: init(&same([16, 16]).with_groups(16), seed + 50),
            head: init(&head, seed + 60),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        let mut x = self.stem.forward(images);
        for block in &self.body {
            x = block.forward_residual(x.clone(), x);
        }
        self.head.forward(self.depthwise.forward(x))
    }

    /// All parameters and running statistics after some steps.
    fn trained(mut self, seed: u64) -> Vec<u32> {
        let mut optimizer = SgdConfig::new().init();
        for batch in 0..6 {
            let images = random([BATCH, 3, SIZE, SIZE], seed + 100 * batch);
            let targets = random([BATCH, 5, SIZE, SIZE], seed + 100 * batch + 50);
            let error = self.forward(images) - targets;
            let grads = (error.clone() * error).mean().backward();
            let grads = GradientsParams::from_grads(grads, &self);
            self = optimizer.step(0.1, self, grads);
        }
        let mut all = Bits(Vec::new());
        self.valid().visit(&mut all);
        all.0
    }
}

struct Bits(Vec<u32>);

impl ModuleVisitor for Bits {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.extend(bits(param.val()));
    }
}

#[test]
fn several_models_at_once() {
    let seeds = [0, 10_000, 20_000];
    let alone = seeds.map(|seed| Model::new(seed).trained(seed));
    assert!(alone[0] != alone[1]);
    let untrained = {
        let mut all = Bits(Vec::new());
        Model::new(0).valid().visit(&mut all);
        all.0
    };
    assert!(alone[0] != untrained);

    let tasks = seeds.map(|seed| move || Model::new(seed).trained(seed));
    assert!(at_once(tasks.into()) == alone);
    for threads in [1, 3] {
        let got = pool(threads).install(|| Model::new(0).trained(0));
        assert!(got == alone[0], "a pool of {threads}");
        let tasks = seeds.to_vec();
        let got: Vec<_> = pool(threads).install(|| {
            let tasks = tasks.into_par_iter();
            tasks.map(|seed| Model::new(seed).trained(seed)).collect()
        });
        assert!(got == alone, "tasks of a pool of {threads}");
    }
}

/// Two backward passes added are one through both losses.
#[test]
fn gradients_accumulate() {
    for layer in layers() {
        let weight = layer.conv.weight.val();
        let channels = weight.dims()[1] * layer.conv.groups;
        let loss = |batch: u64| {
            let output = layer.forward(random([BATCH, channels, SIZE, SIZE], batch));
            let upstream = random(output.dims(), batch + 1);
            (output * upstream).sum()
        };
        let mut accumulator = GradientsAccumulator::new();
        for batch in [1, 11] {
            let grads = GradientsParams::from_grads(loss(batch).backward(), &layer);
            accumulator.accumulate(&layer, grads);
        }
        let accumulated = accumulator.grads();
        let together = (loss(1) + loss(11)).backward();
        let added = |grads: [Gradients; 2]| {
            let [first, second] = grads.map(|grads| weight.grad(&grads).expect("tracked"));
            bits(first + second)
        };
        let added = added([1, 11].map(|batch| loss(batch).backward()));
        let of_accumulator = accumulated
            .get::<4>(layer.conv.weight.id)
            .expect("the weight has a gradient");
        assert!(bits(of_accumulator) == added);
        assert!(gradient(&weight, &together) == added);
        let gamma = layer.norm.gamma.val();
        let of_accumulator = accumulated
            .get::<1>(layer.norm.gamma.id)
            .expect("gamma has a gradient");
        assert!(bits(of_accumulator) == gradient(&gamma, &together));
    }
}

/// A layer twice in one graph: its gradients are those of two layers with the same parameters, added.
#[test]
fn a_layer_used_twice() {
    for config in [same([6, 6]), same([16, 16])] {
        let channels = config.channels[0];
        let input = || random([BATCH, channels, SIZE, SIZE], 1).require_grad();
        let upstream = random([BATCH, channels, SIZE, SIZE], 2);
        let run = |first: &ConvBn2d, second: &ConvBn2d| {
            let input = input();
            let middle = first.forward(input.clone());
            let output = second.forward(middle.clone());
            let grads = (output.clone() * upstream.clone()).sum().backward();
            (gradient(&input, &grads), bits(output), middle, grads)
        };
        let shared = init(&config, 5);
        let (input_grad, output, middle, grads) = run(&shared, &shared);
        let (first, second) = (init(&config, 5), init(&config, 5));
        let (wanted_input_grad, wanted_output, _, wanted) = run(&first, &second);
        assert!(output == wanted_output);
        assert!(input_grad == wanted_input_grad);
        let weights = [&first, &second].map(|layer| layer.conv.weight.val());
        let [a, b] = weights.map(|weight| weight.grad(&wanted).expect("tracked"));
        assert!(gradient(&shared.conv.weight.val(), &grads) == bits(a + b));
        let betas = [&first, &second].map(|layer| layer.norm.beta.val());
        let [a, b] = betas.map(|beta| beta.grad(&wanted).expect("tracked"));
        assert!(gradient(&shared.norm.beta.val(), &grads) == bits(a + b));

        // Its running statistics have been through both batches, in order.
        let in_order = init(&config, 5);
        in_order.forward(input());
        in_order.forward(middle.detach());
        let mean = |layer: &ConvBn2d| bits(layer.valid().norm.running_mean.value_sync());
        assert!(mean(&shared) == mean(&in_order));
    }
}

/// No gradient passes a detached input, and none is asked for where nothing is tracked.
#[test]
fn detached_inputs() {
    let layer = init(&same([6, 6]), 1);
    let source = random([BATCH, 6, SIZE, SIZE], 2).require_grad();
    let hidden = || source.clone() * 2.0;
    let upstream = random([BATCH, 6, SIZE, SIZE], 3);
    let run = |layer: &ConvBn2d, input: Tensor<4>| layer.forward(input) * upstream.clone();

    let through = run(&layer, hidden()).sum().backward();
    assert!(source.grad(&through).is_some());
    let detached = run(&layer, hidden().detach()).sum().backward();
    assert!(source.grad(&detached).is_none());
    let weight = layer.conv.weight.val();
    assert!(gradient(&weight, &detached) == gradient(&weight, &through));

    // Parameters that want no gradient: it passes through to the source all the same.
    let fixed = init(&same([6, 6]), 1).no_grad();
    let grads = run(&fixed, hidden()).sum().backward();
    assert!(gradient(&source, &grads) == gradient(&source, &through));
    assert!(fixed.conv.weight.val().grad(&grads).is_none());

    let untracked = run(&fixed, hidden().detach());
    assert!(!untracked.is_tracked());
    let message = panic_of(|| drop(untracked.sum().backward()));
    assert!(
        message.contains("requires a tracked autodiff tensor"),
        "{message}"
    );
}

/// A second backward pass through a graph is Burn's error, and leaves the layer as it was.
#[test]
fn backward_twice() {
    for layer in layers() {
        let wanted = step(&layer, 0);
        let weight = layer.conv.weight.val();
        let channels = weight.dims()[1] * layer.conv.groups;
        let input = random([BATCH, channels, SIZE, SIZE], 1).require_grad();
        let output = layer.forward(input);
        let (loss, other) = (output.clone().sum(), (output * 2.0).sum());
        assert!(weight.grad(&loss.backward()).is_some());
        // The same loss, and another one of the same block.
        for loss in [loss, other] {
            let message = panic_of(|| drop(loss.backward()));
            assert!(
                message.contains("graph tape has already been consumed"),
                "{message}"
            );
        }
        assert_same("afterwards", &step(&layer, 0), &wanted);
    }
}

/// The message of the panic that the call ends in.
fn panic_of(call: impl FnOnce()) -> String {
    let panic: Box<dyn Any + Send> =
        catch_unwind(AssertUnwindSafe(call)).expect_err("the call panics");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic
            .downcast::<&str>()
            .map_or_else(|_| String::new(), |message| message.to_string()),
    }
}

/// Layers that take every way that a gradient goes: passed on as it is, masked, and made of the
/// value; recomputed, kept, and with given statistics.
fn every_way() -> Vec<(String, ConvBn2d)> {
    let mut layers = Vec::new();
    for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
        for recompute in [Recompute::Conv, Recompute::Never] {
            for fixed in [false, true] {
                let config = same([6, 6])
                    .with_activation(activation)
                    .with_recompute(recompute);
                let mut layer = init(&config, 1);
                if fixed {
                    // Parameters still learn: only the statistics are given.
                    layer.norm.training = Param::from_bool(false);
                }
                let name = format!("{activation:?}, {recompute:?}, fixed {fixed}");
                layers.push((name, layer));
            }
        }
    }
    layers
}

/// The op never writes to what its caller holds: not to a larger tensor that the input is a view of,
/// not to a residual or an upstream gradient that another block takes too, not to its own output.
#[test]
fn what_the_caller_holds_stays_as_it_is() {
    for (name, layer) in every_way() {
        let larger = random([2 * BATCH, 6, SIZE, SIZE], 10);
        let shortcut = random([BATCH, 6, SIZE, SIZE], 11).require_grad();
        let upstream = random([BATCH, 6, SIZE, SIZE], 12);
        let view = || larger.clone().narrow(0, BATCH / 2, BATCH).detach();
        let before = [&larger, &shortcut, &upstream].map(|tensor| bits(tensor.clone()));
        let unchanged = || {
            let now = [&larger, &shortcut, &upstream].map(|tensor| bits(tensor.clone()));
            assert!(now == before, "{name}");
        };

        // Alone.
        let input = view().require_grad();
        let output = layer.forward_residual(input.clone(), shortcut.clone());
        let kept = bits(output.clone());
        let grads = (output.clone() * upstream.clone()).sum().backward();
        unchanged();
        assert!(bits(output) == kept, "{name}");
        let input_grad = input.grad(&grads).expect("tracked");
        let shortcut_grad = shortcut.grad(&grads).expect("tracked");

        // Two blocks that share input, residual and the gradient of their sum.
        let input = view().require_grad();
        let [a, b] = [(); 2].map(|()| layer.forward_residual(input.clone(), shortcut.clone()));
        let grads = ((a.clone() + b.clone()) * upstream.clone())
            .sum()
            .backward();
        unchanged();
        assert!(bits(a) == kept && bits(b) == kept, "{name}");
        let twice = |grad: &Tensor<4>| bits(grad.clone() + grad.clone());
        assert!(gradient(&input, &grads) == twice(&input_grad), "{name}");
        assert!(
            gradient(&shortcut, &grads) == twice(&shortcut_grad),
            "{name}"
        );

        // An input that something else takes too, and a residual that is the input itself.
        let input = view().require_grad();
        let output = layer.forward_residual(input.clone(), shortcut.clone());
        let elsewhere = random([BATCH, 6, SIZE, SIZE], 13);
        let sum = output * upstream.clone() + input.clone() * elsewhere.clone();
        let grads = sum.sum().backward();
        unchanged();
        assert!(
            gradient(&input, &grads) == bits(input_grad.clone() + elsewhere.inner()),
            "{name}"
        );
        let input = view().require_grad();
        let (copy, other) = (view().require_grad(), view().require_grad());
        let both = layer.forward_residual(input.clone(), input.clone());
        let grads = (both * upstream.clone()).sum().backward();
        let apart = layer.forward_residual(copy.clone(), other.clone());
        let wanted = (apart * upstream.clone()).sum().backward();
        unchanged();
        let [a, b] = [&copy, &other].map(|tensor| tensor.grad(&wanted).expect("tracked"));
        assert!(gradient(&input, &grads) == bits(a + b), "{name}");

        // A gradient that is one value, seen everywhere.
        let input = view().require_grad();
        let output = layer.forward_residual(input.clone(), shortcut.clone());
        let grads = output.sum().backward();
        let copy = view().require_grad();
        let output = layer.forward_residual(copy.clone(), shortcut.clone());
        let wanted = (output * upstream.ones_like()).sum().backward();
        unchanged();
        assert!(
            gradient(&input, &grads) == gradient(&copy, &wanted),
            "{name}"
        );
    }
}
