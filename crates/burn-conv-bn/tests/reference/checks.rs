//! The reference itself: cases that can be followed with pencil and paper, central differences, and
//! its error bounds against f32.

use burn::tensor::DType;
use burn_conv_bn::{Activation, ConvBnOptions, ConvSpec, NormSpec, NormVariant};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::reference::ball::{Ball, unit};
use crate::reference::{Number, Op, Tensors, activate, kinks, rounded, slope};
use crate::strategy::activations;

fn options(spec: ConvSpec, norm: NormSpec, activation: Activation) -> ConvBnOptions {
    ConvBnOptions::new(spec)
        .with_norm(norm)
        .with_activation(activation)
}

/// The convolution alone.
fn conv(spec: ConvSpec, input: &[usize], weight: &[usize], x: &[f64], w: &[f64]) -> Vec<f64> {
    let options = options(spec, NormSpec::default(), Activation::Identity);
    Op::new(input, weight, &options, DType::F64).conv(x, w)
}

fn counted(len: usize) -> Vec<f64> {
    (1..=len).map(|value| value as f64).collect()
}

#[test]
fn convolutions_by_hand() {
    // One dimension, dilation 3: 1*1 + 10*4 and 1*2 + 10*5.
    let spec = ConvSpec {
        dilation: vec![3],
        ..ConvSpec::unit(1)
    };
    let got = conv(spec, &[1, 1, 5], &[1, 1, 2], &counted(5), &[1.0, 10.0]);
    assert_eq!(got, [41.0, 52.0]);

    // Two dimensions: 1*1 + 10*2 + 100*4 + 1000*5 first.
    let powers = [1.0, 10.0, 100.0, 1000.0];
    let spec = ConvSpec::unit(2);
    let got = conv(spec, &[1, 1, 3, 3], &[1, 1, 2, 2], &counted(9), &powers);
    assert_eq!(got, [5421.0, 6532.0, 8754.0, 9865.0]);

    // Stride 2, a row of zeros above and a column of zeros on the right: rows -1 and 1, columns 0
    // and 2. 100*1 + 1000*2, 100*3, then 1*4 + 10*5 + 100*7 + 1000*8, and 1*6 + 100*9.
    let spec = ConvSpec {
        stride: vec![2, 2],
        padding: vec![(1, 0), (0, 1)],
        ..ConvSpec::unit(2)
    };
    let got = conv(spec, &[1, 1, 3, 3], &[1, 1, 2, 2], &counted(9), &powers);
    assert_eq!(got, [2100.0, 300.0, 8754.0, 906.0]);

    // Three dimensions: the whole of 1 to 8, each with its own power of two.
    let weight: Vec<f64> = (0..8).map(|power| f64::from(1 << power)).collect();
    let spec = ConvSpec::unit(3);
    let got = conv(
        spec,
        &[1, 1, 2, 2, 2],
        &[1, 1, 2, 2, 2],
        &counted(8),
        &weight,
    );
    // 1 + 4 + 12 + 32 + 80 + 192 + 448 + 1024.
    assert_eq!(got, [1793.0]);

    // Two images of two channels into two outputs: [1, 2] and [3, 4], then [5, 6] and [7, 8]. In one
    // group output 0 is 1*a + 10*b and output 1 is 100*a + 1000*b.
    let spec = ConvSpec::unit(1);
    let got = conv(spec, &[2, 2, 2], &[2, 2, 1], &counted(8), &powers);
    assert_eq!(
        got,
        [
            31.0, 42.0, 3100.0, 4200.0, // image 0
            75.0, 86.0, 7500.0, 8600.0, // image 1
        ]
    );
    // In two groups each output has its own input: 1*a and 10*b.
    let spec = ConvSpec {
        groups: 2,
        ..ConvSpec::unit(1)
    };
    let got = conv(spec, &[2, 2, 2], &[2, 1, 1], &counted(8), &powers[..2]);
    assert_eq!(got, [1.0, 2.0, 30.0, 40.0, 5.0, 6.0, 70.0, 80.0]);
}

/// Kernel [2, 1] over [1, -1, 5]: z = [2*1 - 1, 2*(-1) + 5] = [1, 3], mean 2, deviations [-1, 1],
/// variance 1. With epsilon 3 that is s = 1/sqrt(4) = 1/2; with gamma 4, beta 1 and the residual
/// [-1/2, 0] the norm's output is [-1, 3] and the pre-activation [-3/2, 3].
#[test]
fn batch_norm_by_hand() {
    let norm = NormSpec::new(NormVariant::BatchNorm, 3.0);
    let options = options(ConvSpec::unit(1), norm, Activation::Relu);
    let op = Op::new(&[1, 1, 3], &[1, 1, 2], &options, DType::F64);
    let tensors = Tensors {
        input: vec![1.0, -1.0, 5.0],
        weight: vec![2.0, 1.0],
        bias: vec![0.0],
        gamma: vec![4.0],
        beta: vec![1.0],
        residual: vec![-0.5, 0.0],
        statistics: None,
    };
    let forward = op.forward(&tensors);
    assert_eq!(forward.mean, [2.0]);
    assert_eq!(forward.variance, [1.0]);
    assert_eq!(forward.inv_std, [0.5]);
    assert_eq!(forward.pre_activation, [-1.5, 3.0]);
    assert_eq!(forward.output, [0.0, 3.0]);

    // dy = [5, 7], of which the ReLU passes g = [0, 7]. sum g = 7, sum g*d = 7, dgamma = s*7.
    // Directly dz is gamma*s*g = [0, 14]. ds = gamma * 7 = 28, s' = -1/2 * s^3 = -1/16, so
    // dvar = -7/4, which is dvar * 2d/m = [7/4, -7/4] more: [7/4, 49/4]. Less their mean, 7, that is
    // [-21/4, 21/4].
    // dx = [2*a, a + 2*b, b] and dW = [1*a - 1*b, -1*a + 5*b] of dz = [a, b].
    let grads = op.backward(&tensors, &forward, &[5.0, 7.0]);
    assert_eq!(grads.residual, [0.0, 7.0]);
    assert_eq!(grads.beta, [7.0]);
    assert_eq!(grads.gamma, [3.5]);
    assert_eq!(grads.bias, [0.0]);
    assert_eq!(grads.input, [-10.5, 5.25, 5.25]);
    assert_eq!(grads.weight, [-10.5, 31.5]);

    // A bias moves the mean and nothing else.
    let moved = Tensors {
        bias: vec![8.0],
        ..tensors.clone()
    };
    let moved_forward = op.forward(&moved);
    assert_eq!(moved_forward.mean, [10.0]);
    assert_eq!(moved_forward.output, forward.output);
}

/// Weight 2 and bias 1 on [0, 1, 2]: z = [1, 3, 5], mean 3, deviations [-2, 0, 2], M2 = 8. Over
/// m - 1 = 2 the variance is 4, and with epsilon 2 s = 1/(2 + 2) = 1/4. gamma = 8 makes
/// [-4, 0, 4].
#[test]
fn the_tutorials_norm_by_hand() {
    let norm = NormSpec::new(NormVariant::Tutorial, 2.0);
    let options = options(ConvSpec::unit(1), norm, Activation::Identity);
    let op = Op::new(&[1, 1, 3], &[1, 1, 1], &options, DType::F64);
    let tensors = Tensors {
        input: vec![0.0, 1.0, 2.0],
        weight: vec![2.0],
        bias: vec![1.0],
        gamma: vec![8.0],
        beta: vec![0.0],
        residual: vec![0.0; 3],
        statistics: None,
    };
    let forward = op.forward(&tensors);
    assert_eq!(forward.mean, [3.0]);
    // Biased, as both variants return it.
    assert_eq!(forward.variance, [8.0 / 3.0]);
    assert_eq!(forward.inv_std, [0.25]);
    assert_eq!(forward.output, [-4.0, 0.0, 4.0]);

    // g = [1, 2, 3]: sum g = 6, sum g*d = 4, dgamma = s*4 = 1. Directly dz is gamma*s*g = [2, 4, 6].
    // ds = 8 * 4 = 32, s' = -s^2 / (2*2) = -1/64, dvar = -1/2, and dvar * 2d/(m - 1) = [1, 0, -1]
    // more: [3, 4, 5], less their mean [-1, 0, 1]. dx = 2 dz, dW = sum x*dz = 2.
    let grads = op.backward(&tensors, &forward, &[1.0, 2.0, 3.0]);
    assert_eq!(grads.beta, [6.0]);
    assert_eq!(grads.gamma, [1.0]);
    assert_eq!(grads.bias, [0.0]);
    assert_eq!(grads.input, [-2.0, 0.0, 2.0]);
    assert_eq!(grads.weight, [2.0]);
}

/// The same z with a mean of 2 and a variance of 3 that are given: with epsilon 1 s = 1/2, with
/// gamma 4 and beta -1 the output is [-3, 1, 5] before a leaky ReLU of slope 1/4.
#[test]
fn given_statistics_by_hand() {
    let norm = NormSpec::new(NormVariant::BatchNorm, 1.0);
    let activation = Activation::LeakyRelu {
        negative_slope: 0.25,
    };
    let options = options(ConvSpec::unit(1), norm, activation);
    let op = Op::new(&[1, 1, 3], &[1, 1, 1], &options, DType::F64);
    let tensors = Tensors {
        input: vec![0.0, 1.0, 2.0],
        weight: vec![2.0],
        bias: vec![1.0],
        gamma: vec![4.0],
        beta: vec![-1.0],
        residual: vec![0.0; 3],
        statistics: Some((vec![2.0], vec![3.0])),
    };
    let forward = op.forward(&tensors);
    assert_eq!(forward.mean, [2.0]);
    assert_eq!(forward.variance, [3.0]);
    assert_eq!(forward.output, [-0.75, 1.0, 5.0]);

    // dy = [4, 1, 2] makes g = [1, 1, 2]; d = [-1, 1, 3]. sum g = 4, dgamma = s * (-1 + 1 + 6) = 3.
    // dz = gamma*s*g = [2, 2, 4]: db = 8, dx = 2 dz, dW = 0*2 + 1*2 + 2*4 = 10.
    let grads = op.backward(&tensors, &forward, &[4.0, 1.0, 2.0]);
    assert_eq!(grads.residual, [1.0, 1.0, 2.0]);
    assert_eq!(grads.beta, [4.0]);
    assert_eq!(grads.gamma, [3.0]);
    assert_eq!(grads.bias, [8.0]);
    assert_eq!(grads.input, [4.0, 4.0, 8.0]);
    assert_eq!(grads.weight, [10.0]);
}

/// Where all values are the same the output is beta, and the variance passes nothing back: dz is
/// gamma*s*(g - mean g), in the tutorial's variant too, whose s' is infinite.
#[test]
fn a_constant_channel_by_hand() {
    for (variant, s) in [(NormVariant::BatchNorm, 2.0), (NormVariant::Tutorial, 4.0)] {
        let norm = NormSpec::new(variant, 0.25);
        let options = options(ConvSpec::unit(1), norm, Activation::Identity);
        let op = Op::new(&[2, 1, 2], &[1, 1, 1], &options, DType::F64);
        let tensors = Tensors {
            input: vec![3.0; 4],
            weight: vec![2.0],
            bias: vec![0.0],
            gamma: vec![-1.0],
            beta: vec![0.5],
            residual: vec![0.0; 4],
            statistics: None,
        };
        let forward = op.forward(&tensors);
        assert_eq!(forward.variance, [0.0]);
        assert_eq!(forward.output, [0.5; 4]);
        // g - mean g = [-3, -1, 1, 3].
        let grads = op.backward(&tensors, &forward, &[0.0, 2.0, 4.0, 6.0]);
        assert_eq!(grads.gamma, [0.0]);
        assert_eq!(grads.beta, [12.0]);
        let wanted = [-3.0, -1.0, 1.0, 3.0].map(|value| -s * 2.0 * value);
        assert_eq!(grads.input, wanted);
    }
}

/// f16 has 11 digits: 2049 becomes 2048 before the norm sees it.
#[test]
fn half_types_round_the_convolution() {
    let options = options(ConvSpec::unit(1), NormSpec::default(), Activation::Identity);
    let op = Op::new(&[1, 1, 2], &[1, 1, 1], &options, DType::F16);
    let tensors = Tensors {
        input: vec![683.0, 1.0],
        weight: vec![3.0],
        bias: vec![0.0],
        gamma: vec![1.0],
        beta: vec![0.0],
        residual: vec![0.0; 2],
        statistics: None,
    };
    // (2048 + 3) / 2.
    assert_eq!(op.forward(&tensors).mean, [1025.5]);
}

fn random(len: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Every gradient, one value of one tensor at a time, over variants, activations and where the
/// statistics come from, in a geometry with everything.
#[test]
fn gradients_by_central_differences() {
    let spec = ConvSpec {
        stride: vec![2, 1],
        padding: vec![(1, 0), (0, 2)],
        dilation: vec![1, 2],
        groups: 2,
    };
    let (input, weight) = ([2, 4, 4, 3], [6, 2, 3, 2]);
    for (number, activation) in activations().into_iter().enumerate() {
        for variant in [NormVariant::BatchNorm, NormVariant::Tutorial] {
            for given in [false, true] {
                let options = options(spec.clone(), NormSpec::new(variant, 1e-2), activation);
                let op = Op::new(&input, &weight, &options, DType::F64);
                let mut rng = ChaCha8Rng::seed_from_u64(number as u64);
                let tensors = Tensors {
                    input: random(op.input_len(), &mut rng),
                    weight: random(op.weight_len(), &mut rng),
                    bias: random(6, &mut rng),
                    gamma: random(6, &mut rng),
                    beta: random(6, &mut rng),
                    // Some beyond the kinks of Relu6 and HardSwish.
                    residual: random(op.output_len(), &mut rng)
                        .iter()
                        .map(|value| 8.0 * value)
                        .collect(),
                    statistics: given.then(|| {
                        let mean = random(6, &mut rng);
                        let variance = random(6, &mut rng).iter().map(|v| v + 1.5).collect();
                        (mean, variance)
                    }),
                };
                let context = format!("{activation:?}, {variant:?}, given {given}");
                check_gradients(&op, &tensors, &mut rng, &context);
            }
        }
    }
}

fn check_gradients(op: &Op, tensors: &Tensors<f64>, rng: &mut ChaCha8Rng, context: &str) {
    const STEP: f64 = 1e-5;
    let mut output_grad = random(op.output_len(), rng);
    let forward = op.forward(tensors);
    for (value, grad) in forward.pre_activation.iter().zip(&mut output_grad) {
        // A difference across a kink is no derivative.
        let is_near = |kink: &f64| (value - kink).abs() < 100.0 * STEP;
        if kinks(op.activation).iter().any(is_near) {
            *grad = 0.0;
        }
    }
    let grads = op.backward(tensors, &forward, &output_grad);
    let loss = |tensors: &Tensors<f64>| -> f64 {
        let output = op.forward(tensors).output;
        output.iter().zip(&output_grad).map(|(y, u)| y * u).sum()
    };
    let all = [
        ("input", &grads.input),
        ("weight", &grads.weight),
        ("bias", &grads.bias),
        ("gamma", &grads.gamma),
        ("beta", &grads.beta),
        ("residual", &grads.residual),
    ];
    for (name, analytic) in all {
        for (index, analytic) in analytic.iter().enumerate() {
            let moved = |step: f64| {
                let mut moved = tensors.clone();
                named(&mut moved, name)[index] += step;
                loss(&moved)
            };
            let numerical = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let error = (analytic - numerical).abs();
            assert!(
                error <= 1e-6 * (1.0 + numerical.abs()),
                "{context}: d / d {name}[{index}] is {numerical}, not {analytic}"
            );
        }
    }
}

fn named<'a>(tensors: &'a mut Tensors<f64>, name: &str) -> &'a mut Vec<f64> {
    match name {
        "input" => &mut tensors.input,
        "weight" => &mut tensors.weight,
        "bias" => &mut tensors.bias,
        "gamma" => &mut tensors.gamma,
        "beta" => &mut tensors.beta,
        "residual" => &mut tensors.residual,
        _ => panic!("no tensor is named {name}"),
    }
}

/// Slopes by differences, all over the functions' bends; and how steep function and slope are
/// said to be at most.
#[test]
fn activations_by_central_differences() {
    const STEP: f64 = 1e-5;
    for activation in activations() {
        let function = |value: f64| activate(activation, value);
        let derivative = |value: f64| slope(activation, value);
        // By how much an error of 1 may change the result.
        let steepest_of = |function: fn(Activation, Ball) -> Ball| {
            function(activation, Ball::exact(1.0).widened_by(1.0)).radius()
        };
        let (steepest, bend) = (steepest_of(activate), steepest_of(slope));
        for step in -4000..4000 {
            let value = f64::from(step) * 0.002 + 0.001;
            let numerical = (function(value + STEP) - function(value - STEP)) / (2.0 * STEP);
            let error = (numerical - derivative(value)).abs();
            assert!(error < 1e-8, "{activation:?}: {numerical} at {value}");
            assert!(
                numerical.abs() <= steepest + 1e-9,
                "{activation:?} at {value}"
            );
            let bent = (derivative(value + STEP) - derivative(value - STEP)) / (2.0 * STEP);
            assert!(
                bent.abs() <= bend + 1e-6,
                "{activation:?} at {value}: {bent}"
            );
        }
    }
}

/// What f32 makes of long formulas is within the bound, and the bound not far from it.
#[test]
fn error_bounds_hold_in_single_precision() {
    fn formula<T>(values: &[T], one: T, root: impl Fn(T) -> T) -> T
    where
        T: Copy
            + std::ops::Add<Output = T>
            + std::ops::Div<Output = T>
            + std::ops::Mul<Output = T>
            + std::ops::Sub<Output = T>,
    {
        let mut sum = values[0] * values[1];
        for pair in values.windows(2) {
            sum = sum + pair[0] * pair[1];
        }
        let deviation = sum - values[2];
        deviation / (one / root(deviation * deviation + one) + one)
    }
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut closest = f64::INFINITY;
    for _ in 0..2000 {
        let values: Vec<f32> = (0..40).map(|_| rng.random_range(-1.0f32..1.0)).collect();
        let balls: Vec<Ball> = values
            .iter()
            .map(|value| Ball::new(f64::from(*value), unit(DType::F32)))
            .collect();
        let single = formula(&values, 1.0, f32::sqrt);
        let ball = formula(&balls, Ball::exact(1.0), Ball::sqrt);
        let error = (f64::from(single) - ball.value()).abs();
        assert!(
            error <= ball.radius(),
            "{error:e} beyond {:e}",
            ball.radius()
        );
        assert!(ball.radius() < 1e-4, "{:e} says nothing", ball.radius());
        closest = closest.min(ball.radius() / error.max(1e-30));
    }
    assert!(closest < 20.0, "the bounds are {closest} times too wide");

    // A half type takes what is uncertain to one value, or to two.
    let ball = Ball::new(1.0 + 2f64.powi(-12), 0.0);
    assert_eq!(ball.stored(DType::F16).radius(), 0.0);
    let between = Ball::new(1.0 + 2f64.powi(-11), 0.0).widened_by(1e-6);
    assert_eq!(between.stored(DType::F16).radius(), 2f64.powi(-10));
    assert_eq!(rounded(1.0 + 2f64.powi(-12), DType::F16), 1.0);
}
