//! Conv-bn-relu layers, forward and backward, on a CubeCL device: what they launch, keep and hold at most, and
//! how their results lie in memory.

mod gpu;
mod step;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::backend::DispatchDevice;
use burn::backend::ops::FloatTensorOps;
use burn::module::Module;
use burn::nn::{Relu, pool};
use burn::tensor::{Device, Shape, Tensor, TensorData};
use burn_conv_bn::backend::{
    ConvBnBackend, ConvBnBackwardOptions, ConvBnGrads, ConvBnInputs, ConvBnSaved, OptionalTensor,
    Parents, RunningStatistics, Statistics, StatisticsKind,
};
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, MaxPool2dConfig, Recompute};
use burn_conv_bn_cubecl::with_last_cube;
use burn_conv_bn_memory::PoolMeter;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};

use step::{ACTIVATION, OVERHEAD, STEPS, Step, config};

type Launches = BTreeMap<&'static str, usize>;

/// In `partial_sums_kernel`, and in `sums_kernel` where the last cube finishes the sums.
const SUMS: &str = "sums_kernel";

/// No other test allocates or launches at the same time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Launches of kernels whose names have this in them.
fn count(launches: &Launches, name: &str) -> usize {
    let found = launches.iter().filter(|(kernel, _)| kernel.contains(name));
    found.map(|(_, count)| count).sum()
}

fn print(launches: &Launches) {
    for (kernel, count) in launches {
        println!("    {count} x {kernel}");
    }
}

#[derive(Debug)]
struct Measure {
    launches: usize,
    /// Launches that sum over an output's gradient: one for each chunk of the batch that z is recomputed for.
    sums: usize,
    forward_end: usize,
    peak: usize,
}

/// A step of the layer as `forward` runs it, after those that set things up.
fn measure(device: &Device, name: &str, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Measure {
    measure_step(&Step::new(device, 1), name, forward)
}

fn measure_step(step: &Step, name: &str, forward: impl Fn(Tensor<4>) -> Tensor<4>) -> Measure {
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
                sums: count(&launches, SUMS),
                forward_end,
                peak,
            },
            launches,
            meter.peak_kernel().expect("a launch had the most"),
        ));
    }
    let (measure, launches, kernel) = result.expect("steps were made");
    println!(
        "{name}: {} launches, {:.2} activations at the end of forward, {:.2} at most, at {kernel}",
        measure.launches,
        measure.forward_end as f64 / ACTIVATION as f64,
        measure.peak as f64 / ACTIVATION as f64,
    );
    print(&launches);
    measure
}

#[test]
fn fewer_launches_less_kept_and_a_lower_peak() {
    let _alone = alone();
    let device = gpu::device();
    let tracked = device.clone().autodiff();
    let fused = config().init(&tracked);
    let bounded = |bytes| config().with_max_workspace(Some(bytes)).init(&tracked);
    let (conv, norm) = fused.clone().into_parts();
    let relu = Relu::new();
    println!("{} parameters", fused.num_params());

    let own = measure(&device, "Burn's own layers", |x| {
        relu.forward(norm.forward(conv.forward(x)))
    });
    let ours = measure(&device, "fused", |x| fused.forward(x));
    let (some, little) = (bounded(2 * ACTIVATION), bounded(ACTIVATION));
    let gradients = measure(&device, "fused, gradients in chunks", |x| some.forward(x));
    let chunked = measure(&device, "fused, all in chunks", |x| little.forward(x));
    let keeping = config().with_recompute(Recompute::Norm).init(&tracked);
    let rebuilt = measure(&device, "fused, Recompute::Norm", |x| keeping.forward(x));

    assert!(ours.launches < own.launches);
    // The output, and nothing else: the input is there in any case.
    assert!(ours.forward_end <= ACTIVATION + OVERHEAD, "{ours:?}");
    assert!(own.forward_end >= 3 * ACTIVATION, "{own:?}");
    assert!(10 * ours.forward_end <= 4 * own.forward_end);
    assert!(ours.peak < own.peak, "{ours:?} {own:?}");
    assert!(gradients.peak <= ours.peak, "{gradients:?} {ours:?}");
    assert!(chunked.peak <= gradients.peak, "{chunked:?} {gradients:?}");
    // z is recomputed once, unless it does not fit.
    assert_eq!([ours.sums, gradients.sums], [1, 1]);
    assert!(chunked.sums > 1, "{chunked:?}");
    // The convolution's output beside the op's, which nothing keeps, and one convolution less.
    assert!(
        rebuilt.forward_end <= 2 * ACTIVATION + OVERHEAD,
        "{rebuilt:?}"
    );
    assert!(rebuilt.launches < ours.launches, "{rebuilt:?} {ours:?}");
    assert_eq!(rebuilt.sums, 1, "{rebuilt:?}");

    // Under either name the sums are taken once; the last cube saves the launch that finishes them.
    let [last, second] = [true, false].map(|last_cube| {
        let name = format!("fused, last cube {last_cube}");
        with_last_cube(last_cube, || measure(&device, &name, |x| fused.forward(x)))
    });
    assert_eq!([last.sums, second.sums], [1, 1], "{last:?} {second:?}");
    assert!(last.launches < second.launches, "{last:?} {second:?}");
}

/// A max pool behind the layer keeps a byte for each output, alone or as one op with the layer; then neither the
/// tensor between the two nor its gradient is ever there.
#[test]
fn a_max_pool_keeps_a_byte() {
    let _alone = alone();
    let device = gpu::device();
    // Without the copies of a convolution's gradients, which take as much as the gradient of the tensor between.
    let bounded = config().with_max_workspace(Some(2 * ACTIVATION));
    let fused = bounded.init(&device.clone().autodiff());
    let pool = MaxPool2dConfig::new([2, 2]).init();
    let burns = pool::MaxPool2dConfig::new([2, 2])
        .with_strides([2, 2])
        .init();
    let step = Step::new(&device, 2);
    let own = measure_step(&step, "Burn's pool", |x| burns.forward(fused.forward(x)));
    let alone = measure_step(&step, "a pool", |x| pool.forward(fused.forward(x)));
    let joined = measure_step(&step, "joined", |x| fused.forward_max_pool(x, &pool));
    let output = ACTIVATION / 4;
    // The input and an index of 32 bits.
    assert!(own.forward_end >= ACTIVATION + 2 * output, "{own:?}");
    for ours in [&alone, &joined] {
        let bound = output + output / 4 + OVERHEAD;
        assert!(ours.forward_end <= bound, "{ours:?} of {bound}");
    }
    assert!(joined.launches < alone.launches, "{joined:?} {alone:?}");
    // A quarter at least of the gradient between the two, which is no tensor when they are joined.
    assert!(
        4 * joined.peak + ACTIVATION <= 4 * alone.peak,
        "{joined:?} {alone:?}"
    );
    assert_eq!(joined.sums, 1, "{joined:?}");
}

/// The device, and a meter of its pool.
fn cube() -> (CubeDevice, PoolMeter) {
    match gpu::device().as_dispatch() {
        DispatchDevice::Cube(device) => (device.clone(), PoolMeter::new(device.client())),
        other => panic!("expected a CubeCL device, got {other:?}"),
    }
}

/// `[batch, channels, spatial..]` with channels innermost in memory.
fn channels_last(shape: &[usize], device: &CubeDevice) -> CubeTensor {
    let rank = shape.len();
    let mut sizes = vec![shape[0]];
    sizes.extend(&shape[2..]);
    sizes.push(shape[1]);
    let mut order = vec![0, rank - 1];
    order.extend(1..rank - 1);
    CubeBackend::float_permute(tensor(&sizes, device), &order)
}

fn tensor(shape: &[usize], device: &CubeDevice) -> CubeTensor {
    let values = (0..shape.iter().product::<usize>()).map(|i| ((i * 7 + 3) as f32).sin());
    let data = TensorData::new(values.collect::<Vec<_>>(), shape.to_vec());
    CubeBackend::float_from_data(data, device)
}

fn ones(channels: usize, device: &CubeDevice) -> CubeTensor {
    CubeBackend::float_from_data(TensorData::new(vec![1f32; channels], [channels]), device)
}

fn host(tensor: CubeTensor) -> Vec<f32> {
    let data = burn_cubecl::ops::into_data_sync(tensor);
    data.iter::<f32>().collect()
}

/// A conv-bn-relu layer, and the tensors of its backward pass.
struct Layer {
    input: Vec<usize>,
    channels_out: usize,
    /// Size and padding, the same in all dimensions.
    kernel: usize,
    padding: (usize, usize),
    statistics: StatisticsKind,
    max_workspace: Option<usize>,
}

impl Layer {
    fn output(&self) -> Vec<usize> {
        let (before, after) = self.padding;
        let output = |&size: &usize| size + before + after + 1 - self.kernel;
        let sizes = self.input[2..].iter().map(output);
        [self.input[0], self.channels_out]
            .into_iter()
            .chain(sizes)
            .collect()
    }

    fn weight(&self) -> Vec<usize> {
        let mut weight = vec![self.kernel; self.input.len()];
        weight[0] = self.channels_out;
        weight[1] = self.input[1];
        weight
    }

    fn options(&self) -> ConvBnOptions {
        let rank = self.input.len() - 2;
        let spec = ConvSpec {
            padding: vec![self.padding; rank],
            ..ConvSpec::unit(rank)
        };
        ConvBnOptions::new(spec)
            .with_activation(Activation::Relu)
            .with_max_workspace(self.max_workspace)
    }

    /// The gradients of input and weight, bytes above what was saved, and the launches.
    fn backward(
        &self,
        wanted: Parents,
        device: &CubeDevice,
        meter: &PoolMeter,
    ) -> (ConvBnGrads<CubeBackend>, usize, Launches) {
        let is_of_batch = self.statistics == StatisticsKind::Batch;
        let present = OptionalTensor::<CubeBackend>::Present;
        let options = ConvBnBackwardOptions {
            options: self.options(),
            statistics: self.statistics,
            input_shape: Shape::from(self.input.clone()),
            weight_shape: Shape::from(self.weight()),
            norm_dtype: burn::tensor::DType::F32,
            wanted,
        };
        let mut result = None;
        // The first time sets things up.
        for _ in 0..2 {
            let saved = ConvBnSaved::<CubeBackend> {
                output_grad: channels_last(&self.output(), device),
                input: is_of_batch
                    .then(|| channels_last(&self.input, device))
                    .into(),
                weight: present(tensor(&self.weight(), device)),
                bias: OptionalTensor::Absent,
                gamma: OptionalTensor::Absent,
                beta: OptionalTensor::Absent,
                mean: present(ones(self.channels_out, device)),
                variance: present(ones(self.channels_out, device)),
                conv_output: OptionalTensor::Absent,
                output: (!is_of_batch)
                    .then(|| channels_last(&self.output(), device))
                    .into(),
                residual: OptionalTensor::Absent,
            };
            let level = meter.reset_peak();
            let grads = CubeBackend::conv_bn_backward(saved, options.clone());
            let peak = meter.peak() - level;
            result = Some((grads, peak, meter.launches()));
        }
        result.expect("it ran")
    }
}

fn input_and_weight() -> Parents {
    Parents {
        input: true,
        weight: true,
        ..Parents::default()
    }
}

/// Gradients in chunks: as of the whole batch, within the bound, the input's with its channels innermost, and
/// without a copy of a slice that changes the layout.
#[test]
fn gradients_in_chunks() {
    let _alone = alone();
    let (device, meter) = cube();
    // Images of 300 and 500 bytes begin where a device reads no buffer, unless many are taken at once.
    for (size, [channels_in, channels_out], aligned) in [(16, [16, 32], true), (5, [3, 5], false)] {
        let mut layer = Layer {
            input: vec![8, channels_in, size, size],
            channels_out,
            kernel: 3,
            padding: (1, 1),
            statistics: StatisticsKind::Batch,
            max_workspace: None,
        };
        let (whole, _, launches) = layer.backward(input_and_weight(), &device, &meter);
        println!("{size}x{size}, whole");
        print(&launches);
        // Three convolutions, the weight and both operands of its gradient in another layout, three kernels.
        assert!(launches.values().sum::<usize>() <= 9);
        let positions = size * size * 4;
        let (input, output) = (channels_in * positions, channels_out * positions);
        let columns = 9 * input;
        let copies = if aligned { 0 } else { input + output };
        // Two images of the gradients beside the whole z. Columns count twice, with a copy of z's gradient, as products
        // are tuned.
        let bound = 8 * output + 2 * (2 * columns + output + input + copies);
        layer.max_workspace = Some(bound);
        let (parts, peak, launches) = layer.backward(input_and_weight(), &device, &meter);
        println!("{size}x{size}, two images at a time: {peak} bytes of {bound}");
        print(&launches);
        assert_eq!(count(&launches, SUMS), 1);
        assert_eq!(count(&launches, "slice_assign_kernel"), 4);
        // Of the input and twice of z's gradient, for each of four chunks.
        let sliced = if aligned { 0 } else { 3 * 4 };
        assert_eq!(count(&launches, "slice_kernel"), sliced);
        // Those of the weight's gradient, and the weight once.
        assert_eq!(count(&launches, "copy_kernel"), 2 * 4 + 1);
        assert!(peak <= bound + 8 * input + OVERHEAD, "{peak} of {bound}");
        let grads = [(whole.input, parts.input), (whole.weight, parts.weight)];
        for (whole, parts) in grads {
            let [whole, parts] = [whole, parts].map(|grad| grad.into_option().expect("requested"));
            assert_eq!(parts.meta.shape(), whole.meta.shape());
            let (whole, parts) = (host(whole), host(parts));
            let largest = whole.iter().fold(0f32, |max, value| max.max(value.abs()));
            for (whole, part) in whole.iter().zip(&parts) {
                assert!(
                    (whole - part).abs() <= 1e-5 * largest,
                    "{part}, not {whole}"
                );
            }
        }
        let (parts, ..) = layer.backward(input_and_weight(), &device, &meter);
        let grad = parts.input.into_option().expect("requested");
        assert_eq!(grad.meta.strides()[1], 1, "channels are innermost");
    }
}

/// Without `max_workspace` gradients go in chunks where columns may take more than 64 MiB: 8 channels take 210 MB with
/// all that tuning allocates, 2 channels 54 MB. The batch's gradient is not filled before it is written.
#[test]
fn columns_are_bounded_by_default() {
    let _alone = alone();
    let (device, meter) = cube();
    for (channels_in, chunks) in [(8, 4), (2, 0)] {
        let layer = Layer {
            input: vec![8, channels_in, 68, 68],
            channels_out: 4,
            kernel: 11,
            padding: (0, 0),
            statistics: StatisticsKind::Batch,
            max_workspace: None,
        };
        let (grads, _, launches) = layer.backward(input_and_weight(), &device, &meter);
        println!("{channels_in} channels");
        print(&launches);
        assert_eq!(count(&launches, "slice_assign_kernel"), chunks);
        assert_eq!(count(&launches, "full_kernel"), 0);
        let grad = grads.input.into_option().expect("requested");
        assert_eq!(grad.meta.strides()[1], 1, "channels are innermost");
    }
}

/// Asymmetric padding: the input is not padded, and its gradient is cropped as it lies in memory.
#[test]
fn asymmetric_padding_keeps_the_layout() {
    let _alone = alone();
    let (device, meter) = cube();
    let layer = Layer {
        // The crop ends where no view does.
        input: vec![8, 5, 15, 15],
        channels_out: 32,
        kernel: 2,
        padding: (0, 1),
        statistics: StatisticsKind::Batch,
        max_workspace: None,
    };
    let (grads, _, launches) = layer.backward(input_and_weight(), &device, &meter);
    print(&launches);
    let grad = grads.input.into_option().expect("requested");
    assert_eq!(grad.meta.shape().to_vec(), layer.input);
    assert_eq!(grad.meta.strides()[1], 1, "channels are innermost");
    assert_eq!(count(&launches, "slice_kernel"), 1);
    // The weight, and both operands of its gradient.
    assert_eq!(count(&launches, "copy_kernel"), 3);
    for padding in ["full_kernel", "slice_assign_kernel"] {
        assert_eq!(count(&launches, padding), 0);
    }
}

/// A frozen norm's gradient takes the place of the output's.
#[test]
fn frozen_norms_work_in_place() {
    let _alone = alone();
    let (device, meter) = cube();
    let layer = Layer {
        input: vec![8, 16, 32, 32],
        channels_out: 32,
        kernel: 3,
        padding: (1, 1),
        statistics: StatisticsKind::Fixed,
        max_workspace: None,
    };
    let wanted = Parents {
        input: true,
        ..Parents::default()
    };
    let (grads, peak, launches) = layer.backward(wanted, &device, &meter);
    print(&launches);
    assert!(grads.input.is_present());
    let input = 8 * 16 * 32 * 32 * 4;
    assert!(peak <= input + OVERHEAD, "{peak}, an input is {input}");
}

/// One dimension: no copy of an output or a gradient between three axes and four.
#[test]
fn one_dimension_copies_nothing() {
    let _alone = alone();
    let (device, meter) = cube();
    let layer = Layer {
        input: vec![8, 16, 512],
        channels_out: 32,
        kernel: 3,
        padding: (1, 1),
        statistics: StatisticsKind::Batch,
        max_workspace: None,
    };
    let output_bytes = 8 * 32 * 512 * 4;
    let mut forward = None;
    for _ in 0..2 {
        let inputs = ConvBnInputs::<CubeBackend> {
            input: channels_last(&layer.input, &device),
            weight: tensor(&layer.weight(), &device),
            bias: OptionalTensor::Absent,
            gamma: OptionalTensor::Absent,
            beta: OptionalTensor::Absent,
            residual: OptionalTensor::Absent,
            statistics: Statistics::Batch,
            running: RunningStatistics::Absent,
        };
        let level = meter.reset_peak();
        let result = CubeBackend::conv_bn_forward(inputs, layer.options(), false);
        forward = Some((result.output, meter.peak() - level));
        let launches = meter.launches();
        print(&launches);
        // A convolution, its weight in another layout, three kernels.
        assert!(launches.values().sum::<usize>() <= 5);
    }
    let (output, peak) = forward.expect("it ran");
    assert_eq!(output.meta.shape().to_vec(), layer.output());
    assert_eq!(output.meta.strides()[1], 1, "channels are innermost");
    assert!(peak <= output_bytes + OVERHEAD, "{peak} of {output_bytes}");

    let wanted = Parents {
        input: true,
        ..Parents::default()
    };
    let (grads, peak, launches) = layer.backward(wanted, &device, &meter);
    print(&launches);
    let grad = grads.input.into_option().expect("requested");
    assert_eq!(grad.meta.strides()[1], 1, "channels are innermost");
    // z, which its gradient replaces, and the result.
    let bound = output_bytes + output_bytes / 2 + OVERHEAD;
    assert!(peak <= bound, "{peak} of {bound}");
}
