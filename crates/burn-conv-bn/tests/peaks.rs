//! Heap peaks of a layer beside Burn's own layers, over drawn geometries. One test, so that no other allocates at the
//! same time.

use std::fmt;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Tensor};
use burn_conv_bn::{Activation, ConvBn2d, ConvBn2dConfig};
use burn_conv_bn_memory::CountingAllocator;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const GEOMETRIES: usize = 300;

const SEED: u64 = 28;

/// Products of a convolution at most, for the test's time.
const MOST_PRODUCTS: usize = 150_000_000;

/// Runs of a step. The least peak counts: a run may also allocate what a thread keeps for later runs.
const RUNS: usize = 2;

/// Bytes by which a layer may exceed Burn's.
const EXCESS: usize = 2 << 20;

/// Smallest peak of Burn's in the mean of ratios.
const LEAST_PEAK: usize = 4 << 20;

/// Largest geometric mean of the peaks of training steps over Burn's.
const MOST_RATIO: f64 = 0.75;

/// Peaks that are printed, of those furthest above Burn's.
const WORST: usize = 20;

/// Threads whose scratch the limit counts.
const THREADS: usize = 2;

#[derive(Clone, Copy, Debug)]
struct Geometry {
    batch: usize,
    channels: [usize; 2],
    size: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Training,
    Frozen,
    Evaluation,
}

/// Peaks of one geometry in one state, in bytes.
struct Peaks {
    geometry: Geometry,
    state: State,
    own: usize,
    burn: usize,
}

impl fmt::Display for Peaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [own, burn] = [self.own, self.burn].map(|bytes| bytes as f64 / f64::from(1 << 20));
        let Geometry {
            batch,
            channels,
            size,
            kernel,
            stride,
            padding,
        } = self.geometry;
        write!(
            f,
            "{own:.2} MiB, Burn {burn:.2}: {:?}, {batch}x{}x{size} -> {}, k{kernel} s{stride} p{padding}",
            self.state, channels[0], channels[1]
        )
    }
}

impl Geometry {
    /// Sizes are as likely in each octave.
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        loop {
            let mut octaves = |least: f64, most: f64| {
                let exponent = rng.random_range(least.log2()..(most + 1.0).log2());
                exponent.exp2() as usize
            };
            let channels = [octaves(3.0, 1024.0), octaves(3.0, 1024.0)];
            let (size, batch) = (octaves(1.0, 56.0), octaves(1.0, 32.0));
            let (kernel, stride) = (rng.random_range(1..=7), rng.random_range(1..=2));
            let padding = rng.random_range(0..=kernel / 2);
            let drawn = Self {
                batch,
                channels,
                size,
                kernel,
                stride,
                padding,
            };
            // Batch statistics need more than one value a channel.
            let fits = size + 2 * padding >= kernel && drawn.values() > 1;
            if fits && drawn.products() <= MOST_PRODUCTS {
                return drawn;
            }
        }
    }

    /// Of a channel of the output.
    fn values(&self) -> usize {
        let extent = (self.size + 2 * self.padding - self.kernel) / self.stride + 1;
        self.batch * extent * extent
    }

    fn products(&self) -> usize {
        let weight = self.channels[0] * self.channels[1] * self.kernel * self.kernel;
        self.values() * weight
    }

    fn config(&self) -> ConvBn2dConfig {
        let [padding, stride] = [self.padding, self.stride];
        ConvBn2dConfig::new(self.channels, [self.kernel; 2])
            .with_stride([stride; 2])
            .with_padding(PaddingConfig2d::Explicit(
                padding, padding, padding, padding,
            ))
            .with_activation(Activation::Relu)
    }

    fn burns(&self, device: &Device) -> (Conv2d, BatchNorm) {
        let [padding, stride] = [self.padding, self.stride];
        let conv = Conv2dConfig::new(self.channels, [self.kernel; 2])
            .with_stride([stride; 2])
            .with_padding(PaddingConfig2d::Explicit(
                padding, padding, padding, padding,
            ))
            .with_bias(false)
            .init(device);
        (conv, BatchNormConfig::new(self.channels[1]).init(device))
    }

    fn peaks(self, state: State) -> Peaks {
        let device = match state {
            State::Evaluation => Device::flex(),
            State::Training | State::Frozen => Device::flex().autodiff(),
        };
        let trains = state != State::Evaluation;
        let shape = [self.batch, self.channels[0], self.size, self.size];
        let input = || {
            let input = Tensor::<4>::random(shape, Distribution::Default, &device);
            if trains { input.require_grad() } else { input }
        };
        let mut own: ConvBn2d = self.config().init(&device);
        let (conv, mut norm) = self.burns(&device);
        if state == State::Frozen {
            own.norm = own.norm.freeze();
            norm = norm.freeze();
        }
        let own = least_peak(input, |input| own.forward(input));
        let burn = least_peak(input, |input| relu(norm.forward(conv.forward(input))));
        Peaks {
            geometry: self,
            state,
            own,
            burn,
        }
    }
}

/// The least peak of several steps, beyond the input and the parameters.
fn least_peak(input: impl Fn() -> Tensor<4>, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> usize {
    let step = || {
        let input = input();
        let base = ALLOCATOR.reset_peak();
        let output = forward(input.clone());
        if output.is_tracked() {
            let grads = output.sum().backward();
            assert!(input.grad(&grads).is_some());
        }
        ALLOCATOR.peak() - base
    };
    // The first run draws the parameters.
    step();
    (0..RUNS).map(|_| step()).min().unwrap_or_default()
}

/// No layer needs more than Burn's own, beside a fixed number of bytes, and training takes less.
#[test]
fn no_layer_exceeds_burns() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build();
    let mut peaks = pool.expect("threads start").install(|| {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut peaks = Vec::new();
        for _ in 0..GEOMETRIES {
            let geometry = Geometry::draw(&mut rng);
            for state in [State::Training, State::Frozen, State::Evaluation] {
                peaks.push(geometry.peaks(state));
            }
        }
        peaks
    });
    let mean = |state: State| {
        let counted = |peaks: &&Peaks| peaks.state == state && peaks.burn >= LEAST_PEAK;
        let logs: Vec<f64> = peaks
            .iter()
            .filter(counted)
            .map(|peaks| (peaks.own as f64 / peaks.burn as f64).ln())
            .collect();
        let mean = (logs.iter().sum::<f64>() / logs.len() as f64).exp();
        println!(
            "{state:?}: {mean:.3} of Burn's peak, over {} layers",
            logs.len()
        );
        (mean, logs.len())
    };
    let [(training, layers), ..] = [State::Training, State::Frozen, State::Evaluation].map(mean);
    peaks.sort_by_key(|peaks| peaks.burn as isize - peaks.own as isize);
    for peaks in &peaks[..WORST] {
        println!("{peaks}");
    }
    let worst = &peaks[0];
    assert!(worst.own <= worst.burn + EXCESS, "{worst}");
    assert!(layers > GEOMETRIES / 10, "too few: {layers}");
    assert!(training <= MOST_RATIO, "{training}");
}
