//! The data of the examples: small images of noisy stripes, to be told apart by their direction. And
//! the lines that they print.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::process;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `println!` for output that may be a closed pipe, as after `| head -1`: ends the program, without a
/// panic.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::line(format_args!($($text)*)) };
}

#[doc(hidden)]
pub fn line(text: Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{text}") {
        if error.kind() != ErrorKind::BrokenPipe {
            let _ = writeln!(
                io::stderr(),
                "error: cannot write to standard output: {error}"
            );
        }
        process::exit(1);
    }
}

/// Height and width of an image.
pub const SIZE: usize = 16;

/// Number of directions.
pub const CLASSES: usize = 4;

/// An image in rows, and the class that it is of.
pub type Example = (Vec<f32>, usize);

/// Draws so many images: stripes at `class * 45` degrees of random width and phase, with as much
/// noise as signal.
pub fn examples(count: usize, seed: u64) -> Vec<Example> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut example = || {
        let class = rng.random_range(0..CLASSES);
        let angle = class as f32 * core::f32::consts::FRAC_PI_4;
        let frequency = core::f32::consts::TAU / rng.random_range(4.0..8.0);
        let phase: f32 = rng.random_range(0.0..core::f32::consts::TAU);
        let mut image = Vec::with_capacity(SIZE * SIZE);
        for row in 0..SIZE {
            for column in 0..SIZE {
                let along = column as f32 * angle.cos() + row as f32 * angle.sin();
                let noise = rng.random_range(-1.0..1.0);
                image.push((along * frequency + phase).sin() + noise);
            }
        }
        (image, class)
    };
    (0..count).map(|_| example()).collect()
}

/// Puts examples on a device: `[count, 1, SIZE, SIZE]`, and `[count]` classes.
pub fn batch(examples: &[Example], device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let count = examples.len();
    let pixels: Vec<f32> = examples
        .iter()
        .flat_map(|(image, _)| image.clone())
        .collect();
    let classes: Vec<i64> = examples.iter().map(|(_, class)| *class as i64).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [count, 1, SIZE, SIZE]), device),
        Tensor::from_data(TensorData::new(classes, [count]), device),
    )
}

/// The share of images whose largest score is that of their class.
pub fn accuracy(scores: Tensor<2>, classes: Tensor<1, Int>) -> f64 {
    let count = classes.dims()[0] as f64;
    let right = scores.argmax(1).squeeze_dim::<1>(1).equal(classes);
    let right: Vec<f64> = right.int().into_data().iter::<f64>().collect();
    right.iter().sum::<f64>() / count
}
