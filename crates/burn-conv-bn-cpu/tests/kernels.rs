//! The kernels against naive loops in f64, which are themselves checked by hand.

use std::fmt::Debug;

use burn_conv_bn_cpu::{
    Activation, Affine, Backward, ConvOutput, Element, Geometry, GeometryError, GradSums,
    Gradients, InputGradCoefficients, Method, Moments, OutputGrad, Real, backward, conv,
    conv_moments, grad_sums, normalize,
};
use half::{bf16, f16};

use self::reference::{Case, PLAIN, random, rounded};

mod reference;

/// The cases with the algorithm of the rule, and with each that applies.
fn cases() -> impl Iterator<Item = Case> {
    let by_methods = |case: Case| {
        let geometry = case.geometry();
        let applies = move |method: &Method| geometry.fits::<f32>(*method).is_some();
        let methods = Method::ALL.into_iter().filter(applies).map(Some);
        let by_method = move |method| Case { method, ..case };
        [None].into_iter().chain(methods).map(by_method)
    };
    geometries().into_iter().chain(bands()).flat_map(by_methods)
}

/// Ugly on purpose: one channel, 65 of them, one pixel, odd strides, asymmetric padding, dilation,
/// groups, depthwise, pointwise, three dimensions, more images than blocks, more than one tile; then
/// channels enough for Winograd, and for a layout without gaps; then what only packed products treat apart, and
/// what slices do.
fn geometries() -> Vec<Case> {
    let padded = [(0, 0), (1, 1), (1, 1)];
    vec![
        PLAIN,
        Case {
            padding: padded,
            ..PLAIN
        },
        Case {
            stride: [1, 2, 3],
            padding: [(0, 0), (0, 2), (1, 0)],
            ..PLAIN
        },
        Case {
            dilation: [1, 2, 3],
            padding: [(0, 0), (2, 1), (0, 3)],
            ..PLAIN
        },
        Case {
            channels: [6, 9],
            groups: 3,
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [5, 5],
            groups: 5,
            padding: padded,
            stride: [1, 2, 2],
            ..PLAIN
        },
        Case {
            channels: [4, 8],
            groups: 4,
            ..PLAIN
        },
        Case {
            channels: [7, 65],
            kernel: [1; 3],
            ..PLAIN
        },
        Case {
            channels: [3, 2],
            kernel: [1; 3],
            stride: [1, 2, 2],
            ..PLAIN
        },
        Case {
            channels: [1, 1],
            kernel: [1, 6, 7],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [1, 7],
            input: [1, 1, 40],
            kernel: [1, 1, 5],
            padding: [(0, 0), (0, 0), (4, 4)],
            ..PLAIN
        },
        Case {
            input: [4, 5, 3],
            kernel: [2, 3, 2],
            stride: [2, 1, 1],
            padding: [(1, 0), (1, 1), (0, 1)],
            ..PLAIN
        },
        Case {
            batch: 70,
            channels: [2, 3],
            input: [1, 4, 4],
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [33, 5],
            input: [1, 30, 34],
            padding: padded,
            ..PLAIN
        },
        // Several tiles of each of several groups.
        Case {
            channels: [4, 4],
            groups: 2,
            input: [1, 40, 40],
            padding: padded,
            ..PLAIN
        },
        // Channels enough for the Winograd algorithm: every remainder of sizes, padding
        // on one side, several images in a tile, groups, several tiles in an image, and of each of
        // several groups.
        Case {
            channels: [17, 16],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [16, 19],
            padding: [(0, 0), (2, 0), (0, 3)],
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            input: [1, 3, 3],
            batch: 5,
            ..PLAIN
        },
        Case {
            channels: [32, 48],
            groups: 2,
            input: [1, 9, 20],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [16, 17],
            input: [1, 70, 67],
            padding: padded,
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [32, 32],
            groups: 2,
            input: [1, 70, 67],
            padding: padded,
            ..PLAIN
        },
        // Winograd with dilation: one that does not divide the size, nor is the padding, alike in rows and columns or
        // not, of one of them alone; beyond a chunk of columns; groups, an image smaller than two dilations, several tiles.
        Case {
            channels: [17, 16],
            input: [1, 13, 11],
            padding: [(0, 0), (2, 2), (2, 2)],
            dilation: [1, 2, 2],
            ..PLAIN
        },
        Case {
            channels: [16, 19],
            input: [1, 20, 23],
            padding: [(0, 0), (3, 0), (1, 7)],
            dilation: [1, 3, 5],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            input: [1, 9, 43],
            padding: [(0, 0), (0, 1), (0, 0)],
            dilation: [1, 1, 9],
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            input: [1, 25, 9],
            padding: [(0, 0), (9, 8), (1, 1)],
            dilation: [1, 8, 1],
            ..PLAIN
        },
        Case {
            channels: [32, 48],
            groups: 2,
            input: [1, 7, 9],
            padding: [(0, 0), (4, 4), (4, 4)],
            dilation: [1, 4, 4],
            batch: 5,
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [32, 32],
            groups: 2,
            input: [1, 70, 67],
            padding: [(0, 0), (2, 2), (2, 2)],
            dilation: [1, 2, 2],
            ..PLAIN
        },
        // Winograd in three dimensions: several slices in a tile and parts of one, padding on one side or more than the
        // kernel's reach, slices of padding alone; groups, dilation, several images; a kernel flat in depth.
        Case {
            channels: [17, 16],
            input: [5, 6, 7],
            kernel: [3; 3],
            padding: [(1, 1); 3],
            ..PLAIN
        },
        Case {
            channels: [16, 19],
            input: [4, 9, 12],
            kernel: [2, 3, 3],
            padding: [(3, 0), (0, 2), (3, 1)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [32, 36],
            groups: 2,
            input: [5, 7, 8],
            kernel: [3; 3],
            padding: [(2, 3), (2, 0), (1, 2)],
            dilation: [2, 1, 2],
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [16, 16],
            input: [3, 24, 25],
            kernel: [3; 3],
            padding: [(1, 1); 3],
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [32, 34],
            groups: 2,
            input: [3, 24, 25],
            kernel: [3; 3],
            padding: [(1, 1); 3],
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            input: [3, 9, 8],
            padding: [(0, 1), (1, 1), (1, 1)],
            ..PLAIN
        },
        // Kernels of more parts than one: five and seven taps, in rows, columns or both, odd sizes, padding on one side
        // and none; groups, dilation, several tiles, three dimensions.
        Case {
            channels: [17, 16],
            input: [1, 14, 15],
            kernel: [1, 5, 5],
            padding: [(0, 0), (2, 2), (2, 2)],
            ..PLAIN
        },
        Case {
            channels: [16, 19],
            input: [1, 17, 20],
            kernel: [1, 7, 7],
            padding: [(0, 0), (3, 0), (0, 3)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [32, 36],
            groups: 2,
            input: [1, 18, 21],
            kernel: [1, 3, 5],
            dilation: [1, 2, 3],
            padding: [(0, 0), (2, 2), (6, 5)],
            ..PLAIN
        },
        Case {
            channels: [32, 32],
            groups: 2,
            input: [1, 21, 25],
            kernel: [1, 7, 3],
            dilation: [1, 2, 1],
            padding: [(0, 0), (6, 6), (1, 0)],
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [16, 16],
            input: [1, 67, 66],
            kernel: [1, 5, 5],
            padding: [(0, 0), (2, 2), (2, 2)],
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [16, 17],
            input: [4, 11, 10],
            kernel: [3, 5, 5],
            padding: [(1, 1), (2, 2), (2, 2)],
            ..PLAIN
        },
        // More rows and columns of pairs than outputs are worth: shifted planes.
        Case {
            channels: [16, 17],
            input: [1, 4, 3],
            padding: [(0, 0), (3, 3), (3, 3)],
            dilation: [1, 3, 3],
            ..PLAIN
        },
        // As many channels with a stride, for which small images lie without gaps: odd and even sizes,
        // padding on one side, and an image too large for it, in several tiles.
        Case {
            channels: [17, 16],
            stride: [1, 2, 2],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 8, 9],
            ..PLAIN
        },
        Case {
            channels: [16, 18],
            stride: [1, 2, 2],
            input: [1, 10, 37],
            padding: [(0, 0), (2, 0), (0, 3)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 131, 67],
            padding: padded,
            ..PLAIN
        },
        // The same for the largest image that lies so, a last tile and a last block with fewer images,
        // groups, and dilation.
        Case {
            batch: 1,
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 64, 64],
            padding: padded,
            ..PLAIN
        },
        Case {
            batch: 37,
            channels: [32, 17],
            stride: [1, 2, 2],
            input: [1, 9, 9],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [32, 48],
            groups: 2,
            stride: [1, 2, 2],
            padding: padded,
            batch: 5,
            ..PLAIN
        },
        Case {
            channels: [16, 17],
            dilation: [1, 2, 3],
            padding: [(0, 0), (2, 1), (0, 3)],
            ..PLAIN
        },
        // Stride 3; taps that leave out some of the input, by dilation or a kernel smaller than the
        // stride; one and three dimensions.
        Case {
            channels: [16, 19],
            input: [1, 11, 13],
            kernel: [1, 5, 4],
            stride: [1, 3, 3],
            padding: [(0, 0), (2, 0), (0, 1)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [17, 16],
            input: [1, 12, 13],
            kernel: [1, 2, 2],
            stride: [1, 3, 3],
            padding: [(0, 0), (1, 2), (0, 3)],
            dilation: [1, 4, 4],
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            kernel: [1, 1, 3],
            stride: [1, 2, 1],
            ..PLAIN
        },
        Case {
            channels: [16, 18],
            input: [1, 1, 21],
            kernel: [1, 1, 5],
            padding: [(0, 0), (0, 0), (4, 0)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [16, 17],
            input: [4, 5, 3],
            kernel: [2, 3, 2],
            stride: [2, 1, 1],
            padding: [(1, 0), (1, 1), (0, 1)],
            batch: 3,
            ..PLAIN
        },
        Case {
            channels: [18, 16],
            input: [5, 4, 6],
            kernel: [3; 3],
            stride: [2; 3],
            padding: [(1, 1); 3],
            ..PLAIN
        },
        // Taps of one remainder meet nothing but padding: in both dimensions, in rows, in columns.
        Case {
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 1, 1],
            padding: padded,
            batch: 5,
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 1, 4],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [16, 16],
            stride: [1, 2, 2],
            input: [1, 4, 1],
            padding: padded,
            ..PLAIN
        },
        // More positions than a chunk, of several images, in parts of one, and with channels in several parts; more
        // output channels than a block of the weight's rows; no tap that meets the input at all.
        Case {
            batch: 5,
            channels: [70, 31],
            input: [1, 9, 5],
            padding: padded,
            ..PLAIN
        },
        Case {
            channels: [40, 150],
            input: [1, 13, 12],
            kernel: [1, 5, 5],
            padding: [(0, 0), (2, 2), (2, 2)],
            ..PLAIN
        },
        Case {
            input: [1, 1, 1],
            kernel: [1; 3],
            stride: [1, 2, 2],
            padding: padded,
            ..PLAIN
        },
        // Winograd by slices: several panels and slices of each group; parts of an image, and of the channels.
        Case {
            batch: 5,
            channels: [140, 142],
            groups: 2,
            padding: [(0, 0), (1, 0), (2, 1)],
            bound: Some(2 << 20),
            ..PLAIN
        },
        Case {
            channels: [300, 33],
            input: [1, 17, 18],
            padding: padded,
            bound: Some(3 << 19),
            ..PLAIN
        },
        // The same with dilation.
        Case {
            batch: 5,
            channels: [140, 142],
            groups: 2,
            input: [1, 7, 10],
            padding: [(0, 0), (3, 2), (1, 4)],
            dilation: [1, 2, 3],
            bound: Some(2 << 20),
            ..PLAIN
        },
        Case {
            batch: 1,
            channels: [300, 17],
            input: [1, 27, 18],
            padding: [(0, 0), (2, 2), (2, 2)],
            dilation: [1, 2, 2],
            bound: Some(3 << 19),
            ..PLAIN
        },
    ]
}

/// A large image of few channels, in bands: stride 1 and 2, taps that leave out some of the input, a stride in rows
/// alone, groups, one and three dimensions, padding of more than a band's reach; then by Winograd's algorithm with
/// odd sizes, and with padding on one side; the same with dilation that does not divide the bands; in three dimensions,
/// and with kernels of more than three taps.
fn bands() -> Vec<Case> {
    let padded = [(0, 0), (1, 1), (1, 1)];
    let large = Case {
        batch: 1,
        input: [1, 40, 41],
        ..PLAIN
    };
    vec![
        Case {
            padding: padded,
            ..large
        },
        Case {
            input: [1, 83, 70],
            stride: [1, 2, 2],
            padding: [(0, 0), (0, 2), (1, 0)],
            ..large
        },
        Case {
            input: [1, 131, 130],
            kernel: [1, 2, 2],
            stride: [1, 3, 3],
            ..large
        },
        Case {
            input: [1, 95, 40],
            kernel: [1, 5, 3],
            stride: [1, 3, 1],
            padding: [(0, 0), (30, 31), (0, 4)],
            dilation: [1, 2, 1],
            ..large
        },
        Case {
            channels: [6, 9],
            groups: 3,
            padding: padded,
            ..large
        },
        Case {
            input: [1, 1, 3001],
            kernel: [1, 1, 5],
            stride: [1, 1, 2],
            padding: [(0, 0), (0, 0), (2, 2)],
            ..large
        },
        Case {
            input: [41, 9, 10],
            kernel: [3, 3, 2],
            stride: [2, 1, 1],
            padding: [(1, 1), (1, 1), (0, 1)],
            ..large
        },
        Case {
            channels: [16, 17],
            input: [1, 47, 45],
            padding: padded,
            ..large
        },
        Case {
            channels: [32, 34],
            groups: 2,
            input: [1, 50, 41],
            padding: [(0, 0), (2, 0), (0, 3)],
            ..large
        },
        Case {
            channels: [16, 17],
            input: [1, 67, 45],
            padding: [(0, 0), (2, 2), (3, 3)],
            dilation: [1, 2, 3],
            ..large
        },
        Case {
            channels: [32, 34],
            groups: 2,
            input: [1, 63, 41],
            padding: [(0, 0), (5, 0), (0, 3)],
            dilation: [1, 3, 2],
            ..large
        },
        Case {
            channels: [16, 17],
            input: [19, 11, 10],
            kernel: [3; 3],
            padding: [(1, 1); 3],
            ..large
        },
        Case {
            channels: [16, 17],
            input: [12, 22, 30],
            kernel: [2, 3, 5],
            padding: [(0, 3), (1, 1), (2, 2)],
            dilation: [2, 1, 1],
            ..large
        },
        Case {
            channels: [16, 17],
            input: [1, 71, 45],
            kernel: [1, 5, 5],
            padding: [(0, 0), (2, 2), (2, 2)],
            ..large
        },
        Case {
            channels: [16, 16],
            input: [1, 83, 46],
            kernel: [1, 7, 3],
            padding: [(0, 0), (0, 5), (1, 0)],
            ..large
        },
    ]
}

/// Channels and stride for each algorithm.
fn algorithms() -> [([usize; 2], [usize; 3], Method); 5] {
    [
        ([5, 6], [1; 3], Method::Planes),
        ([16, 17], [1; 3], Method::Winograd),
        ([70, 61], [1; 3], Method::Slices),
        ([16, 17], [1, 2, 2], Method::WithoutGaps),
        ([50, 61], [1, 2, 2], Method::Packed),
    ]
}

#[track_caller]
fn assert_close<T: Real>(what: &str, got: &[T], wanted: &[f64], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let scale = wanted
        .iter()
        .fold(1.0f64, |max, value| max.max(value.abs()));
    let worst = got
        .iter()
        .zip(wanted)
        .map(|(got, wanted)| (got.to_f64() - wanted).abs())
        .fold(0.0, f64::max);
    assert!(
        worst <= tolerance * scale,
        "{what}: {worst:e} apart of {scale:e}"
    );
}

/// The reference itself, on numbers that can be followed.
#[test]
fn the_naive_loops_are_right() {
    let case = Case {
        batch: 1,
        channels: [1, 1],
        input: [1, 3, 3],
        kernel: [1, 2, 2],
        ..PLAIN
    };
    let input = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
    let weight = [1.0, 10.0, 100.0, 1000.0];
    // 1*1 + 2*10 + 4*100 + 5*1000, and so on.
    assert_eq!(case.conv(&input, &weight), [5421.0, 6532.0, 8754.0, 9865.0]);

    let strided = Case {
        stride: [1, 2, 2],
        padding: [(0, 0), (1, 0), (0, 1)],
        ..case
    };
    // Rows -1, 1; columns 0, 2 with the fourth column padding.
    assert_eq!(
        strided.conv(&input, &weight),
        [2100.0, 300.0, 8754.0, 906.0]
    );
}

#[test]
fn forward_and_backward_in_f64() {
    for case in cases() {
        compare::<f64>(&case, 1e-12);
    }
}

#[test]
fn forward_and_backward_in_f32() {
    for case in cases() {
        compare::<f32>(&case, 2e-5);
    }
}

fn compare<T: Element<Real = T> + Real>(case: &Case, tolerance: f64) {
    let geometry = case.geometry();
    let channels = geometry.channels_out();
    let positions = geometry.positions();
    let name = |what: &str| format!("{what} of {case:?}");
    let input = random(case.batch * geometry.input_len(), 1);
    let weight = random(geometry.weight_len(), 2);
    let output_grad = random(case.batch * geometry.output_len(), 3);
    let residual = random(output_grad.len(), 4);
    let [scale, shift, slope, offset] = [5, 6, 7, 8].map(|seed| random(channels, seed));
    let channel_of = case.channel_of();

    // Forward.
    let z = case.conv(&input, &weight);
    let mean = case.means(&z);
    let mut squares = vec![0.0; channels];
    for (index, z) in z.iter().enumerate() {
        squares[channel_of(index)] += (z - mean[channel_of(index)]).powi(2);
    }
    let value = |index: usize| {
        let channel = channel_of(index);
        (z[index] - mean[channel]) * scale[channel] + shift[channel]
    };
    let (t_input, t_weight) = (rounded::<T>(&input), rounded::<T>(&weight));
    let mut t_z = vec![T::ZERO; z.len()];
    conv(&geometry, &t_input, &t_weight, &mut t_z);
    assert_close(&name("conv"), &t_z, &z, tolerance);
    let mut t_output = vec![T::ZERO; z.len()];
    let moments = conv_moments(&geometry, &t_input, &t_weight, &mut t_output);
    assert_eq!(t_output, t_z, "{}", name("the same convolution"));
    assert!(
        moments
            .count
            .iter()
            .all(|count| *count == case.batch * positions)
    );
    assert_close(&name("mean"), &moments.mean, &mean, tolerance);
    assert_close(&name("squares"), &moments.squares, &squares, tolerance);

    let [t_mean, t_scale, t_shift] = [&mean, &scale, &shift].map(|values| rounded::<T>(values));
    let affine = Affine {
        mean: &t_mean,
        scale: &t_scale,
        shift: &t_shift,
    };
    let t_residual = rounded::<T>(&residual);
    normalize(
        &geometry,
        &mut t_output,
        affine,
        Some(&t_residual),
        Activation::Relu,
    );
    let output: Vec<f64> = (0..z.len())
        .map(|index| (value(index) + residual[index]).max(0.0))
        .collect();
    assert_close(&name("output"), &t_output, &output, tolerance);

    // Backward, by the pre-activation and by the output.
    for by_output in [false, true] {
        let passes = |index: usize| {
            if by_output {
                t_output[index] > T::ZERO
            } else {
                (t_z[index] - t_mean[channel_of(index)]) * t_scale[channel_of(index)]
                    + t_shift[channel_of(index)]
                    > T::ZERO
            }
        };
        let g: Vec<f64> = (0..z.len())
            .map(|index| {
                if passes(index) {
                    output_grad[index]
                } else {
                    0.0
                }
            })
            .collect();
        let [sum, deviation_sum] = case.sums(&g, &z, &mean);
        let [input_grad, weight_grad] = case.gradients(
            [&input, &weight],
            [&g, &z],
            [&mean, &scale, &slope, &offset],
        );

        let t_output_grad = rounded::<T>(&output_grad);
        let [t_slope, t_offset] = [&slope, &offset].map(|values| rounded::<T>(values));
        let pass = Backward {
            geometry: &geometry,
            input: Some(&t_input),
            weight: Some(&t_weight),
            output_grad: OutputGrad::Whole(&t_output_grad),
            affine,
            activation: Activation::Relu,
            residual: None,
            output: by_output.then_some(&t_output),
        };
        let mut results = Vec::new();
        for stores in [false, true] {
            let mut stored = vec![T::ZERO; z.len()];
            let sums = if stores {
                grad_sums(&pass, ConvOutput::Store(&mut stored))
            } else {
                grad_sums(&pass, ConvOutput::Recompute)
            };
            if stores {
                assert_eq!(stored, t_z, "{}", name("recomputed bits"));
                // Kept, the sums run over a channel's whole row rather than over tiles of it.
                let from_kept = grad_sums(&pass, ConvOutput::Kept(&stored));
                assert_close(&name("sum g"), &from_kept.grad, &sum, tolerance);
                assert_close(
                    &name("sum g*d"),
                    &from_kept.grad_deviation,
                    &deviation_sum,
                    tolerance,
                );
            }
            let mut t_input_grad = vec![T::ONE; input.len()];
            let mut t_weight_grad = vec![T::ONE; weight.len()];
            let mut t_residual_grad = vec![T::ONE; z.len()];
            backward(
                &pass,
                match stores {
                    true => ConvOutput::Store(&mut stored),
                    false => ConvOutput::Recompute,
                },
                Some(InputGradCoefficients {
                    scale: &t_scale,
                    slope: &t_slope,
                    offset: &t_offset,
                }),
                Gradients {
                    input: Some((&mut t_input_grad, &t_weight)),
                    weight: Some(&mut t_weight_grad),
                    residual: Some(&mut t_residual_grad),
                },
            );
            assert_close(&name("sum g"), &sums.grad, &sum, tolerance);
            assert_close(
                &name("sum g*d"),
                &sums.grad_deviation,
                &deviation_sum,
                tolerance,
            );
            assert_close(&name("input grad"), &t_input_grad, &input_grad, tolerance);
            assert_close(
                &name("weight grad"),
                &t_weight_grad,
                &weight_grad,
                tolerance,
            );
            assert_close(&name("residual grad"), &t_residual_grad, &g, tolerance);
            results.push((sums, t_input_grad, t_weight_grad, t_residual_grad));
        }
        assert!(
            results[0] == results[1],
            "{}",
            name("stored or recomputed: the same bits")
        );
    }
}

/// f16 and bf16 against the same in f32, on what the half types can hold: they differ by the
/// rounding of the convolution's output and of the results alone.
#[test]
fn half_types_pass_through_f32() {
    for case in cases() {
        compare_half::<f16>(&case, 2e-3);
        compare_half::<bf16>(&case, 2e-2);
    }
}

fn compare_half<E: Element<Real = f32> + PartialEq>(case: &Case, tolerance: f64) {
    let geometry = case.geometry();
    let channels = geometry.channels_out();
    let output_len = case.batch * geometry.output_len();
    let rounded_pair = |len: usize, seed: u64| {
        let mut halves = vec![E::default(); len];
        let mut singles = rounded::<f32>(&random(len, seed));
        E::store(&singles, &mut halves);
        E::load(&halves, &mut singles);
        (halves, singles)
    };
    let (input, input32) = rounded_pair(case.batch * geometry.input_len(), 1);
    let (output_grad, output_grad32) = rounded_pair(output_len, 2);
    let weight = rounded::<f32>(&random(geometry.weight_len(), 3));
    let [mean, scale, shift, slope, offset] =
        [4, 5, 6, 7, 8].map(|seed| rounded::<f32>(&random(channels, seed)));
    let (residual, residual32) = rounded_pair(output_len, 9);
    let (gate, gate32) = rounded_pair(output_len, 10);
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let coefficients = InputGradCoefficients {
        scale: &scale,
        slope: &slope,
        offset: &offset,
    };

    /// Means; sums; output and gradients of input and residual; the weight's gradient.
    fn run<E: Element<Real = f32> + PartialEq>(
        pass: Backward<'_, E>,
        residual: &[E],
        coefficients: InputGradCoefficients<'_, f32>,
    ) -> (Vec<f64>, GradSums, [Vec<E>; 3], Vec<f32>) {
        let (input, weight) = (pass.input.unwrap(), pass.weight.unwrap());
        let mut z = vec![E::default(); residual.len()];
        let moments = conv_moments(pass.geometry, input, weight, &mut z);
        let mut output = z.clone();
        normalize(
            pass.geometry,
            &mut output,
            pass.affine,
            Some(residual),
            pass.activation,
        );

        let mut stored = vec![E::default(); residual.len()];
        let sums = grad_sums(&pass, ConvOutput::Store(&mut stored));
        assert!(stored == z, "recomputed bits");
        let recomputed = grad_sums(&pass, ConvOutput::Recompute);
        assert_eq!(sums, recomputed, "stored or recomputed: the same bits");
        let kept = grad_sums(&pass, ConvOutput::Kept(&stored));
        // Kept, the sums run over a channel's whole row rather than over tiles of it.
        assert_close("kept sum g", &kept.grad, &sums.grad, 1e-4);
        assert_close(
            "kept sum g*d",
            &kept.grad_deviation,
            &sums.grad_deviation,
            1e-4,
        );

        let grads = |conv_output: ConvOutput<'_, E>| {
            let mut input_grad = vec![E::default(); input.len()];
            let mut weight_grad = vec![0.0; weight.len()];
            let mut residual_grad = vec![E::default(); residual.len()];
            backward(
                &pass,
                conv_output,
                Some(coefficients),
                Gradients {
                    input: Some((&mut input_grad, weight)),
                    weight: Some(&mut weight_grad),
                    residual: Some(&mut residual_grad),
                },
            );
            (input_grad, weight_grad, residual_grad)
        };
        let all = grads(ConvOutput::Recompute);
        assert!(
            grads(ConvOutput::Kept(&stored)) == all,
            "kept or recomputed: the same bits"
        );
        assert!(
            grads(ConvOutput::Store(&mut stored)) == all,
            "stored or recomputed: the same bits"
        );
        let (input_grad, weight_grad, residual_grad) = all;
        let values = [output, input_grad, residual_grad];
        (moments.mean, sums, values, weight_grad)
    }
    let doubles = |values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v)).collect() };
    for activation in [Activation::Identity, Activation::Relu] {
        let name = |what: &str| format!("{what} of {case:?}, {activation:?}");
        let pass = Backward {
            geometry: &geometry,
            input: Some(&input),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(&output_grad),
            affine,
            activation,
            // The same signs for both: a rounded value near zero may be on its other side.
            residual: None,
            output: Some(&gate),
        };
        let pass32 = Backward {
            geometry: &geometry,
            input: Some(&input32),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(&output_grad32),
            affine,
            activation,
            residual: None,
            output: Some(&gate32),
        };
        let (mean, sums, values, weight_grad) = run(pass, &residual, coefficients);
        let wanted = run(pass32, &residual32, coefficients);
        assert_close(&name("mean"), &mean, &wanted.0, tolerance);
        assert_close(&name("sum g"), &sums.grad, &wanted.1.grad, tolerance);
        for (index, what) in ["output", "input grad", "residual grad"]
            .into_iter()
            .enumerate()
        {
            let mut singles = vec![0.0f32; values[index].len()];
            E::load(&values[index], &mut singles);
            let wanted = doubles(&wanted.2[index]);
            assert_close(&name(what), &singles, &wanted, tolerance);
        }
        let wanted = doubles(&wanted.3);
        assert_close(&name("weight grad"), &weight_grad, &wanted, tolerance);
    }
}

/// What a closed activation gets is not passed on, infinite or NaN, under batch statistics or given ones:
/// every result has the bits that it has where the output's gradient is 0 there.
#[test]
fn closed_activations_pass_nothing() {
    fn check_all<E: Element<Real: Debug> + PartialEq + Debug>() {
        let shapes = algorithms().map(|(channels, stride, method)| (channels, stride, method, 1));
        let grouped = ([4, 4], [1; 3], Method::Planes, 4);
        for (channels, stride, method, groups) in shapes.into_iter().chain([grouped]) {
            let case = Case {
                method: Some(method),
                channels,
                stride,
                groups,
                padding: [(0, 0), (1, 1), (1, 1)],
                ..PLAIN
            };
            for activation in [
                Activation::Relu,
                Activation::Relu6,
                Activation::LeakyRelu {
                    negative_slope: 0.0,
                },
                Activation::HardSwish,
            ] {
                for by_output in [false, true] {
                    if !by_output || activation != Activation::HardSwish {
                        check_closed::<E>(&case, activation, by_output);
                    }
                }
            }
        }
    }
    check_all::<f64>();
    check_all::<f32>();
    check_all::<f16>();
    check_all::<bf16>();
}

fn check_closed<E: Element<Real: Debug> + PartialEq + Debug>(
    case: &Case,
    activation: Activation,
    by_output: bool,
) {
    fn stored<E: Element>(values: &[f64]) -> Vec<E> {
        let mut stored = vec![E::default(); values.len()];
        E::store(&rounded(values), &mut stored);
        stored
    }
    let geometry = case.geometry();
    let channels = geometry.channels_out();
    let len = case.batch * geometry.output_len();
    let input = stored::<E>(&random(case.batch * geometry.input_len(), 1));
    let weight = rounded::<E::Real>(&random(geometry.weight_len(), 2));
    let [mean, scale, slope] = [3, 4, 5].map(|seed| rounded::<E::Real>(&random(channels, seed)));
    // Some values on each side of all kinks.
    let shift: Vec<f64> = (0..channels).map(|i| i as f64 * 3.0 - 4.0).collect();
    let shift = rounded::<E::Real>(&shift);
    let residual = stored::<E>(&random(len, 6));
    let affine = Affine {
        mean: &mean,
        scale: &scale,
        shift: &shift,
    };
    let mut z = Vec::new();
    conv(&geometry, &input, &weight, &mut z);
    let mut output = z.clone();
    normalize(&geometry, &mut output, affine, Some(&residual), activation);

    let run = |output_grad: &[E], kept: Option<&[E]>, is_of_batch: bool| {
        let pass = Backward {
            geometry: &geometry,
            input: Some(&input),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(output_grad),
            affine,
            activation,
            residual: Some(&residual).filter(|_| !by_output).map(Vec::as_slice),
            output: by_output.then_some(output.as_slice()),
        };
        let sums = grad_sums(&pass, kept.map_or(ConvOutput::Recompute, ConvOutput::Kept));
        let coefficients = InputGradCoefficients {
            scale: &scale,
            slope: &slope,
            offset: &mean,
        };
        let (mut input_grad, mut weight_grad, mut g) = (Vec::new(), Vec::new(), Vec::new());
        let gradients = Gradients {
            input: Some((&mut input_grad, &weight)),
            weight: Some(&mut weight_grad),
            residual: Some(&mut g),
        };
        let kept = kept.map_or(ConvOutput::Recompute, ConvOutput::Kept);
        backward(&pass, kept, is_of_batch.then_some(coefficients), gradients);
        (sums, (input_grad, weight_grad, g))
    };
    let (_, (.., slopes)) = run(&stored(&vec![1.0; len]), Some(&z), false);
    let closed: Vec<bool> = slopes.iter().map(|slope| *slope == E::default()).collect();
    let count = closed.iter().filter(|is_closed| **is_closed).count();
    assert!(0 < count && count < len, "{count} of {len} are closed");
    let output_grad = |at_closed: f64| {
        let mut values = random(len, 7);
        for (value, is_closed) in values.iter_mut().zip(&closed) {
            if *is_closed {
                *value = at_closed;
            }
        }
        stored::<E>(&values)
    };
    let zero = output_grad(0.0);
    for at_closed in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
        let what = format!("{at_closed} to {activation:?} of {case:?}, by output {by_output}");
        let damaged = output_grad(at_closed);
        for kept in [None, Some(z.as_slice())] {
            for is_of_batch in [false, true] {
                let got = run(&damaged, kept, is_of_batch);
                assert_eq!(got, run(&zero, kept, is_of_batch), "{what}");
            }
        }
        if by_output {
            // With given statistics the convolution's output is not looked at.
            let (got, wanted) = (
                run(&damaged, Some(&damaged), false),
                run(&zero, Some(&z), false),
            );
            assert_eq!((got.0.grad, got.1), (wanted.0.grad, wanted.1), "{what}");
        }
    }
}

/// What a kept output makes superfluous may be left out, and changes nothing.
#[test]
fn a_kept_output_takes_neither_weight_nor_input() {
    for (channels, stride, method) in algorithms() {
        let case = Case {
            method: Some(method),
            channels,
            stride,
            padding: [(0, 0), (1, 1), (1, 1)],
            ..PLAIN
        };
        let geometry = case.geometry();
        let input = rounded::<f32>(&random(case.batch * geometry.input_len(), 1));
        let weight = rounded::<f32>(&random(geometry.weight_len(), 2));
        let mut z = vec![0.0; case.batch * geometry.output_len()];
        conv(&geometry, &input, &weight, &mut z);
        let output_grad = rounded::<f32>(&random(z.len(), 3));
        let [mean, scale, shift] = [4, 5, 6].map(|seed| rounded::<f32>(&random(channels[1], seed)));
        let pass = Backward {
            geometry: &geometry,
            input: Some(&input),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(&output_grad),
            affine: Affine {
                mean: &mean,
                scale: &scale,
                shift: &shift,
            },
            activation: Activation::Relu,
            residual: None,
            output: None,
        };
        let grads = |pass: &Backward<'_, f32>, wants_weight: bool| {
            let mut input_grad = vec![0.0f32; input.len()];
            let mut weight_grad = vec![0.0f32; weight.len()];
            let mut residual_grad = vec![0.0f32; z.len()];
            let coefficients = InputGradCoefficients {
                scale: &scale,
                slope: &shift,
                offset: &mean,
            };
            let gradients = Gradients {
                input: Some((&mut input_grad, &weight)),
                weight: wants_weight.then_some(&mut weight_grad),
                residual: Some(&mut residual_grad),
            };
            backward(pass, ConvOutput::Kept(&z), Some(coefficients), gradients);
            (input_grad, residual_grad, weight_grad)
        };
        let (input_grad, residual_grad, weight_grad) = grads(&pass, true);
        let without_weight = Backward {
            weight: None,
            ..pass
        };
        let without_both = Backward {
            input: None,
            ..without_weight
        };
        assert_eq!(
            grad_sums(&without_both, ConvOutput::Kept(&z)),
            grad_sums(&pass, ConvOutput::Kept(&z))
        );
        let got = grads(&without_weight, true);
        assert!(got.0 == input_grad && got.1 == residual_grad && got.2 == weight_grad);
        let got = grads(&without_both, false);
        assert!(got.0 == input_grad && got.1 == residual_grad);
    }
}

#[test]
#[should_panic(expected = "can only be recomputed with its weight")]
fn nothing_is_recomputed_without_the_weight() {
    let geometry = PLAIN.geometry();
    let input = vec![0.0f32; PLAIN.batch * geometry.input_len()];
    let output_grad = vec![0.0; PLAIN.batch * geometry.output_len()];
    let ones = vec![1.0; geometry.channels_out()];
    let pass = Backward {
        geometry: &geometry,
        input: Some(&input),
        weight: None,
        output_grad: OutputGrad::Whole(&output_grad),
        affine: Affine {
            mean: &ones,
            scale: &ones,
            shift: &ones,
        },
        activation: Activation::Identity,
        residual: None,
        output: None,
    };
    grad_sums(&pass, ConvOutput::Recompute);
}

/// The results of a training step.
#[derive(PartialEq)]
struct Results {
    moments: Moments,
    sums: GradSums,
    z: Vec<f32>,
    input_grad: Vec<f32>,
    weight_grad: Vec<f32>,
}

/// The step of a case with ReLU; the first images are the same for any batch.
fn step(case: &Case) -> Results {
    step_with(case, ConvOutput::Recompute)
}

/// As [`step`], with the convolution's output stored between the passes, or not.
fn step_with(case: &Case, mut conv_output: ConvOutput<'_, f32>) -> Results {
    let geometry = case.geometry();
    let input = rounded::<f32>(&random(case.batch * geometry.input_len(), 1));
    let weight = rounded::<f32>(&random(geometry.weight_len(), 2));
    let mut z = vec![0.0; case.batch * geometry.output_len()];
    let moments = conv_moments(&geometry, &input, &weight, &mut z);
    let output_grad = rounded::<f32>(&random(z.len(), 3));
    let ones = vec![1.0; geometry.channels_out()];
    let affine = Affine {
        mean: &ones,
        scale: &ones,
        shift: &ones,
    };
    let pass = Backward {
        geometry: &geometry,
        input: Some(&input),
        weight: Some(&weight),
        output_grad: OutputGrad::Whole(&output_grad),
        affine,
        activation: Activation::Relu,
        residual: None,
        output: None,
    };
    let sums = grad_sums(&pass, conv_output.reborrow());
    let (mut input_grad, mut weight_grad) = (Vec::new(), Vec::new());
    let coefficients = InputGradCoefficients {
        scale: &ones,
        slope: &ones,
        offset: &ones,
    };
    let gradients = Gradients {
        input: Some((&mut input_grad, &weight)),
        weight: Some(&mut weight_grad),
        residual: None,
    };
    backward(&pass, conv_output, Some(coefficients), gradients);
    Results {
        moments,
        sums,
        z,
        input_grad,
        weight_grad,
    }
}

/// Where the shapes are equal, the input's gradient replaces the output in its memory.
#[test]
fn the_input_gradient_takes_the_outputs_memory() {
    let mut cases = Vec::new();
    let square = |len| [1, len, len];
    // Blocks of many small images, whole larger ones in several tiles, groups, dilation, uneven padding.
    for (batch, input) in [(37, square(9)), (8, square(40)), (9, [5, 12, 11])] {
        for (method, channels) in [
            (Method::Planes, 12),
            (Method::WithoutGaps, 64),
            (Method::Winograd, 48),
            (Method::Slices, 64),
            (Method::Packed, 48),
        ] {
            for (groups, dilation, [before, after]) in [
                (1, 1, [1, 1]),
                (3, 1, [1, 1]),
                (1, 2, [2, 2]),
                (1, 1, [0, 2]),
                (1, 1, [2, 0]),
            ] {
                let deep = usize::from(input[0] > 1);
                let padding = (before, after);
                cases.push(Case {
                    method: Some(method),
                    batch,
                    channels: [channels / groups * groups; 2],
                    groups,
                    input,
                    kernel: [1 + 2 * deep, 3, 3],
                    padding: [(deep, deep), padding, padding],
                    dilation: [1, dilation, dilation],
                    ..PLAIN
                });
            }
        }
    }
    let is_possible = |case: &Case| {
        let method = case.method.expect("each case has one");
        case.unbounded().fits::<f32>(method).is_some()
    };
    let count = cases.len();
    cases.retain(is_possible);
    assert!(2 * cases.len() > count, "{} of {count}", cases.len());
    for case in &cases {
        let mut buffer = vec![0.0; case.batch * case.geometry().output_len()];
        let memory = buffer.as_ptr();
        let results = step_with(case, ConvOutput::Store(&mut buffer));
        assert_eq!(results.input_grad.as_ptr(), memory, "{case:?}");
        assert!(buffer.is_empty(), "{case:?}");
        assert!(results == step(case), "{case:?}");
    }
}

/// Other shapes, and bands, whose outputs their neighbours read, leave the buffer to the output.
#[test]
fn other_gradients_have_memory_of_their_own() {
    let banded = Case {
        batch: 1,
        channels: [16, 16],
        input: [1, 90, 91],
        padding: [(0, 0), (1, 1), (1, 1)],
        ..PLAIN
    };
    let wider = Case {
        batch: 9,
        channels: [16, 17],
        ..banded
    };
    let larger = Case {
        batch: 9,
        padding: [(0, 0), (2, 2), (2, 2)],
        ..banded
    };
    for case in [banded, wider, larger] {
        let mut buffer = Vec::new();
        let results = step_with(&case, ConvOutput::Store(&mut buffer));
        assert!(buffer == results.z, "{case:?}");
        assert!(results == step(&case), "{case:?}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let dilated = algorithms().map(|algorithm| [(algorithm, 1), (algorithm, 2)]);
    // Many small images, and a larger one in bands.
    for (batch, input) in [(37, [1, 9, 9]), (1, [1, 90, 91])] {
        for ((channels, stride, method), dilation) in dilated.into_iter().flatten() {
            let padding = (dilation, dilation);
            let case = Case {
                method: Some(method),
                batch,
                channels,
                stride,
                input,
                padding: [(0, 0), padding, padding],
                dilation: [1, dilation, dilation],
                ..PLAIN
            };
            threads_change_no_bit(&case);
        }
    }
    // Kernels of parts of 3x3 by Winograd: in bands and not, large slices in courses.
    for (batch, input, kernel) in [
        (1, [1, 71, 45], [1, 5, 5]),
        (37, [1, 14, 15], [1, 7, 3]),
        (1, [17, 24, 25], [3, 3, 3]),
        (9, [4, 9, 9], [3, 3, 3]),
    ] {
        let case = Case {
            method: Some(Method::Winograd),
            batch,
            channels: [16, 17],
            input,
            kernel,
            padding: kernel.map(|len| (len / 2, len / 2)),
            ..PLAIN
        };
        assert!(case.geometry().fits::<f32>(Method::Winograd).is_some());
        threads_change_no_bit(&case);
    }
    // Packed products whose parts of the inputs depend on the number of threads.
    threads_change_no_bit(&Case {
        method: Some(Method::Packed),
        batch: 3,
        channels: [200, 48],
        input: [1, 9, 9],
        kernel: [1; 3],
        padding: [(0, 0); 3],
        ..PLAIN
    });
}

fn threads_change_no_bit(case: &Case) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| step(case))
    };
    let one = on(1);
    for threads in [2, 3, 8] {
        assert!(on(threads) == one, "{case:?}: {threads} threads");
    }
}

/// One image is divided into bands, one of twenty is not.
#[test]
fn bands_change_no_bit() {
    for case in bands() {
        let one = step(&Case { batch: 1, ..case });
        let many = step(&Case { batch: 20, ..case });
        let (z, grad) = (one.z.len(), one.input_grad.len());
        assert!(one.z == many.z[..z], "{case:?}");
        assert!(one.input_grad == many.input_grad[..grad], "{case:?}");
    }
}

/// Without coefficients the input's gradient is that of scaled outputs, the weight's is not.
#[test]
fn given_statistics_scale_the_input_gradient() {
    for case in cases() {
        let geometry = case.geometry();
        let channels = geometry.channels_out();
        let len = case.batch * geometry.output_len();
        let input = random(case.batch * geometry.input_len(), 1);
        let weight = random(geometry.weight_len(), 2);
        let output_grad = random(len, 3);
        let [mean, scale] = [4, 5].map(|seed| random(channels, seed));
        let pass = Backward {
            geometry: &geometry,
            input: Some(&input),
            weight: Some(&weight),
            output_grad: OutputGrad::Whole(&output_grad),
            affine: Affine {
                mean: &mean,
                scale: &scale,
                shift: &mean,
            },
            activation: Activation::Identity,
            residual: None,
            output: None,
        };
        let (mut input_grad, mut weight_grad) = (Vec::new(), Vec::new());
        let gradients = Gradients {
            input: Some((&mut input_grad, &weight)),
            weight: Some(&mut weight_grad),
            residual: None,
        };
        backward(&pass, ConvOutput::Kept(&output_grad), None, gradients);
        let mut wanted_input = vec![0.0; input.len()];
        let mut wanted_weight = vec![0.0; weight.len()];
        case.for_each_product(|x, w, y| {
            let channel = y / geometry.positions() % channels;
            wanted_input[x] += output_grad[y] * scale[channel] * weight[w];
            wanted_weight[w] += output_grad[y] * input[x];
        });
        assert_close(
            &format!("input grad of {case:?}"),
            &input_grad,
            &wanted_input,
            1e-12,
        );
        assert_close(
            &format!("weight grad of {case:?}"),
            &weight_grad,
            &wanted_weight,
            1e-12,
        );
    }
}

#[test]
fn a_large_mean_keeps_its_spread() {
    // Mean 1e3, standard deviation 1e-2, in f32.
    let case = Case {
        batch: 8,
        channels: [1, 1],
        input: [1, 64, 64],
        kernel: [1; 3],
        ..PLAIN
    };
    let geometry = case.geometry();
    let values: Vec<f32> = random(case.batch * geometry.input_len(), 1)
        .iter()
        .map(|value| (1e3 + 1.7e-2 * value) as f32)
        .collect();
    let mut output = vec![0.0; values.len()];
    let moments = conv_moments(&geometry, &values, &[1.0], &mut output);
    let count = values.len() as f64;
    let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
    let squares: f64 = values
        .iter()
        .map(|value| (f64::from(*value) - mean).powi(2))
        .sum();
    assert!(
        (moments.mean[0] - mean).abs() < 1e-6,
        "{} for {mean}",
        moments.mean[0]
    );
    let variance = moments.variance().next().unwrap();
    let ratio = variance / (squares / count);
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");
}

#[test]
fn impossible_geometries_are_refused() {
    let build = |change: fn(&mut Case)| {
        let mut case = PLAIN;
        change(&mut case);
        Geometry::new(
            case.batch,
            case.channels,
            case.groups,
            case.input,
            case.kernel,
            case.stride,
            case.padding,
            case.dilation,
        )
        .unwrap_err()
    };
    assert!(matches!(
        build(|case| case.batch = 0),
        GeometryError::Zero { what: "batch", .. }
    ));
    assert!(matches!(
        build(|case| case.stride[1] = 0),
        GeometryError::Zero { what: "stride", .. }
    ));
    assert!(matches!(
        build(|case| case.groups = 2),
        GeometryError::Groups { groups: 2, .. }
    ));
    let error = build(|case| case.dilation[2] = 4);
    let wanted = GeometryError::Kernel {
        dim: 2,
        kernel: 9,
        padded: 7,
    };
    assert_eq!(error, wanted);
}
