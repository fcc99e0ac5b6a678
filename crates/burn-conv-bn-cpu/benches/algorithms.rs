//! Every algorithm that applies to layers of real networks, and the regret of the rule that chooses one.
//!
//! Forward and backward of convolution, batch norm and ReLU in milliseconds, single precision, on as many threads as
//! rayon takes: the least of some rounds in which the algorithms take turns. An algorithm that needs more scratch
//! than the limits allow stands in brackets, and the rule cannot choose it. The last column has the choice's operations per
//! second, counted as those of direct convolutions and divided by those of large matrix products.
//!
//! ```text
//! cargo bench -p burn-conv-bn-cpu --bench algorithms [-- [--quick] [PART OF A LAYER'S NAME]...]
//! ```

mod products;

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Geometry, Gradients, InputGradCoefficients, Method,
    OutputGrad, backward, conv_moments, grad_sums, normalize,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::products::Products;

const BATCHES: [usize; 4] = [1, 8, 32, 128];

/// Most bytes of input and output, and operations of a step, of a batch.
const MOST_BYTES: usize = 64 << 20;
const MOST_OPERATIONS: f64 = 40e9;

/// Time of an algorithm's rounds, and their least and largest number.
const TIME: Duration = Duration::from_millis(150);
const ROUNDS: [usize; 2] = [2, 12];

/// A layer of a network: two channels, extents, kernel, and what differs from stride 1, half a kernel of padding,
/// dilation 1 and one group.
struct Layer {
    network: &'static str,
    channels: [usize; 2],
    input: [usize; 3],
    kernel: usize,
    stride: usize,
    dilation: usize,
    groups: usize,
}

impl Layer {
    fn new(network: &'static str, channels: [usize; 2], size: usize, kernel: usize) -> Self {
        Self {
            network,
            channels,
            input: [1, size, size],
            kernel,
            stride: 1,
            dilation: 1,
            groups: 1,
        }
    }

    fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    fn dilation(self, dilation: usize) -> Self {
        Self { dilation, ..self }
    }

    fn groups(self, groups: usize) -> Self {
        Self { groups, ..self }
    }

    /// Over three dimensions, or one.
    fn over(self, input: [usize; 3]) -> Self {
        Self { input, ..self }
    }

    fn name(&self) -> String {
        let Self {
            kernel,
            stride,
            dilation,
            groups,
            ..
        } = *self;
        let size: Vec<String> = self
            .input
            .iter()
            .filter(|len| **len > 1)
            .map(usize::to_string)
            .collect();
        let mut name = format!(
            "{} {}x{}-{} k{kernel}",
            self.network,
            self.channels[0],
            size.join("x"),
            self.channels[1]
        );
        for (letter, value) in [('s', stride), ('d', dilation), ('g', groups)] {
            if value > 1 {
                name += &format!(" {letter}{value}");
            }
        }
        name
    }

    fn geometry(&self, batch: usize) -> Geometry {
        let spread =
            |value: usize, other: usize| self.input.map(|len| if len > 1 { value } else { other });
        let padding = self.dilation * (self.kernel - 1) / 2;
        Geometry::new(
            batch,
            self.channels,
            self.groups,
            self.input,
            spread(self.kernel, 1),
            spread(self.stride, 1),
            spread(padding, 0).map(|padding| (padding, padding)),
            spread(self.dilation, 1),
        )
        .expect("the layers exist")
    }
}

fn layers() -> Vec<Layer> {
    let layer = Layer::new;
    vec![
        layer("ResNet", [3, 64], 224, 7).stride(2),
        layer("ResNet", [64, 64], 56, 3),
        layer("ResNet", [64, 256], 56, 1),
        layer("ResNet", [256, 64], 56, 1),
        layer("ResNet", [256, 512], 56, 1).stride(2),
        layer("ResNet", [128, 128], 56, 3).stride(2),
        layer("ResNet", [128, 128], 28, 3),
        layer("ResNet", [256, 256], 28, 3).stride(2),
        layer("ResNet", [256, 256], 14, 3),
        layer("ResNet", [1024, 256], 14, 1),
        layer("ResNet", [512, 512], 14, 3).stride(2),
        layer("ResNet", [512, 512], 7, 3),
        layer("ResNet", [512, 2048], 7, 1),
        layer("ResNeXt", [128, 128], 56, 3).groups(32),
        layer("ResNeXt", [256, 256], 28, 3).groups(32),
        layer("ResNeXt", [512, 512], 14, 3).groups(32),
        layer("ResNet-32px", [3, 64], 32, 3),
        layer("ResNet-32px", [16, 16], 32, 3),
        layer("ResNet-32px", [32, 32], 16, 3),
        layer("ResNet-32px", [64, 64], 8, 3),
        layer("ResNet-32px", [64, 64], 32, 3),
        layer("ResNet-32px", [64, 128], 32, 3).stride(2),
        layer("ResNet-32px", [128, 128], 16, 3),
        layer("ResNet-32px", [256, 256], 8, 3),
        layer("ResNet-32px", [256, 512], 8, 3).stride(2),
        layer("ResNet-32px", [512, 512], 4, 3),
        layer("ResNet-32px", [1024, 2048], 2, 1),
        layer("VGG", [64, 64], 224, 3),
        layer("VGG", [128, 128], 112, 3),
        layer("VGG", [256, 256], 56, 3),
        layer("VGG-112px", [256, 256], 28, 3),
        layer("VGG", [512, 512], 28, 3),
        layer("MobileNet", [32, 32], 112, 3).groups(32),
        layer("MobileNet", [96, 96], 112, 3).groups(96).stride(2),
        layer("MobileNet", [24, 144], 56, 1),
        layer("MobileNet", [576, 576], 14, 3).groups(576),
        layer("MobileNet", [960, 160], 7, 1),
        layer("EfficientNet", [240, 240], 28, 5).groups(240),
        layer("EfficientNet", [672, 672], 14, 5)
            .groups(672)
            .stride(2),
        layer("EfficientNet", [112, 672], 14, 1),
        layer("DeepLab", [256, 256], 33, 3).dilation(2),
        layer("DeepLab", [512, 512], 33, 3).dilation(4),
        layer("DeepLab", [2048, 256], 33, 3).dilation(12),
        layer("DeepLab", [128, 128], 28, 3).dilation(2),
        layer("U-Net", [3, 64], 256, 3),
        layer("U-Net", [64, 64], 256, 3),
        layer("U-Net", [128, 64], 128, 3),
        layer("U-Net", [512, 512], 32, 3),
        layer("U-Net", [1024, 1024], 16, 3),
        layer("U-Net-3D", [1, 32], 0, 3).over([64, 64, 64]),
        layer("U-Net-3D", [32, 32], 0, 3).over([32, 64, 64]),
        layer("U-Net-3D", [64, 64], 0, 3).over([32, 32, 32]),
        layer("U-Net-3D", [128, 256], 0, 3).over([8, 8, 8]),
        layer("audio", [1, 64], 0, 80).over([1, 1, 16000]).stride(4),
        layer("audio", [64, 64], 0, 3).over([1, 1, 16000]),
        layer("audio", [128, 128], 0, 3).over([1, 1, 1000]),
        layer("audio", [512, 512], 0, 3).over([1, 1, 400]).stride(2),
        layer("audio", [64, 128], 0, 2)
            .over([1, 1, 8000])
            .dilation(8),
    ]
}

/// Values for any tensor of the layers.
struct Data {
    values: Vec<f32>,
    /// The output, its copy and the input's gradient, and the weight's.
    output: Vec<f32>,
    stored: Vec<f32>,
    input_grad: Vec<f32>,
    weight_grad: Vec<f32>,
}

/// Forward and backward.
fn step(geometry: &Geometry, data: &mut Data) {
    let [input, weight, output, channels] = [
        geometry.batch() * geometry.input_len(),
        geometry.weight_len(),
        geometry.batch() * geometry.output_len(),
        geometry.channels_out(),
    ]
    .map(|len| &data.values[..len]);
    conv_moments(geometry, input, weight, &mut data.output);
    let affine = Affine {
        mean: channels,
        scale: channels,
        shift: channels,
    };
    normalize(geometry, &mut data.output, affine, None, Activation::Relu);
    let pass = Backward {
        geometry,
        input: Some(input),
        weight: Some(weight),
        output_grad: OutputGrad::Whole(output),
        affine,
        activation: Activation::Relu,
        residual: None,
        output: None,
    };
    let stores = geometry.is_worth_storing(size_of_val(output));
    let mut conv_output = if stores {
        ConvOutput::Store(&mut data.stored)
    } else {
        ConvOutput::Recompute
    };
    black_box(grad_sums(&pass, conv_output.reborrow()));
    let coefficients = InputGradCoefficients {
        scale: channels,
        slope: channels,
        offset: channels,
    };
    let gradients = Gradients {
        input: Some((&mut data.input_grad, weight)),
        weight: Some(&mut data.weight_grad),
        residual: None,
    };
    backward(&pass, conv_output, Some(coefficients), gradients);
    black_box((&data.output, &data.input_grad, &data.weight_grad));
}

/// An algorithm's least time, and whether it stays within the limits.
struct Time {
    method: Method,
    fits: bool,
    seconds: f64,
}

/// Times of all algorithms, and the rate of large matrix products in the same rounds, in operations per second.
fn measure(geometry: &Geometry, data: &mut Data, products: &mut Products) -> (Vec<Time>, f64) {
    let mut times = Vec::new();
    let mut products_seconds = f64::INFINITY;
    for method in Method::ALL {
        if let Some(fits) = geometry.fits::<f32>(method) {
            let geometry = geometry.clone().with_method(method);
            times.push((
                Time {
                    method,
                    fits,
                    seconds: f64::INFINITY,
                },
                geometry,
            ));
        }
    }
    let start = Instant::now();
    for round in 0..=ROUNDS[1] {
        // The first warms up.
        if round > ROUNDS[0] && start.elapsed() > TIME * times.len() as u32 {
            break;
        }
        let start_of_products = Instant::now();
        products.run();
        products_seconds = products_seconds.min(start_of_products.elapsed().as_secs_f64());
        for (time, geometry) in &mut times {
            let start = Instant::now();
            step(geometry, data);
            if round > 0 {
                time.seconds = time.seconds.min(start.elapsed().as_secs_f64());
            }
        }
    }
    let times = times.into_iter().map(|(time, _)| time).collect();
    (times, products.operations() as f64 / products_seconds)
}

/// Prints an entry's times, and returns the regret. `floor` is the time of its operations at the rate of products.
fn print_row(name: &str, batch: usize, times: &[Time], chosen: Method, floor: f64) -> f64 {
    let best = times
        .iter()
        .filter(|time| time.fits)
        .map(|time| time.seconds)
        .fold(f64::INFINITY, f64::min);
    let mut row = format!("| {name} | {batch} |");
    for method in Method::ALL {
        let cell = times.iter().find(|time| time.method == method).map(|time| {
            let milliseconds = format!("{:.2}", 1e3 * time.seconds);
            if time.fits {
                milliseconds
            } else {
                format!("({milliseconds})")
            }
        });
        row += &format!(" {} |", cell.unwrap_or_default());
    }
    let seconds = times
        .iter()
        .find(|time| time.method == chosen)
        .map_or(f64::NAN, |time| time.seconds);
    let regret = seconds / best;
    let rate = floor / seconds;
    println!("{row} {chosen:?} | {regret:.2} | {rate:.2} |");
    regret
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let (options, parts): (Vec<_>, Vec<_>) = arguments
        .into_iter()
        .partition(|argument| argument.starts_with("--"));
    let quick = options.iter().any(|option| option == "--quick");
    let batches = if quick { &BATCHES[1..2] } else { &BATCHES[..] };

    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let values = (0..MOST_BYTES / size_of::<f32>())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    let mut data = Data {
        values,
        output: Vec::new(),
        stored: Vec::new(),
        input_grad: Vec::new(),
        weight_grad: Vec::new(),
    };
    let mut products = Products::new();
    let mut regrets: Vec<(f64, String)> = Vec::new();
    println!(
        "| layer | batch | planes | without gaps | Winograd | slices | packed | chosen | regret | rate |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|---|--:|--:|");
    for layer in layers() {
        let name = layer.name();
        if !parts.is_empty() && !parts.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        for batch in batches {
            let geometry = layer.geometry(*batch);
            let bytes = size_of::<f32>() * batch * (geometry.input_len() + geometry.output_len());
            let operations = 8.0 * (batch * geometry.positions() * geometry.weight_len()) as f64;
            if bytes > MOST_BYTES || operations > MOST_OPERATIONS {
                continue;
            }
            let (times, rate) = measure(&geometry, &mut data, &mut products);
            let floor = operations / rate;
            let regret = print_row(&name, *batch, &times, geometry.method::<f32>(), floor);
            regrets.push((regret, format!("{name}, batch {batch}")));
        }
    }
    let mean = regrets.iter().map(|(regret, _)| regret.ln()).sum::<f64>() / regrets.len() as f64;
    if let Some((worst, name)) = regrets.iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
        println!(
            "\n{} rows, regret {:.3} as a geometric mean, {worst:.2} at worst: {name}",
            regrets.len(),
            mean.exp()
        );
    }
}
