//! Folders of drawn images, with a folder for each class.

use std::f32::consts::TAU;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use image::{Rgb, RgbImage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Name of a class, and its pattern: brightness from 0 to 1 by the place, in periods from the middle.
pub type Texture = (&'static str, fn(f32, f32) -> f32);

/// The task of the pretraining. As those of [`TARGET`], its classes survive a flip.
pub const SOURCE: [Texture; 5] = [
    ("columns", |x, _| wave(x)),
    ("diamonds", |x, y| wave(x + y) * wave(x - y)),
    ("rings", |x, y| wave(x.hypot(y))),
    ("rows", |_, y| wave(y)),
    ("spots", |x, y| wave(x) * wave(y)),
];

/// The task to fine-tune on.
pub const TARGET: [Texture; 4] = [
    ("checks", |x, y| {
        f32::from(u8::from((wave(x) > 0.5) == (wave(y) > 0.5)))
    }),
    ("grid", |x, y| wave(x).max(wave(y)).powi(4)),
    ("rays", |x, y| wave(8.0 * y.atan2(x) / TAU)),
    ("zigzag", |x, y| wave(y + (x.rem_euclid(1.0) - 0.5).abs())),
];

fn wave(periods: f32) -> f32 {
    0.5 + 0.5 * (periods * TAU).sin()
}

/// Draws so many images of each class, of `size` pixels either way, into `folder/train` and `folder/val`.
///
/// # Errors
///
/// The file that cannot be written.
pub fn folders(
    folder: &Path,
    classes: &[Texture],
    counts: [usize; 2],
    size: u32,
    seed: u64,
) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for (split, count) in ["train", "val"].into_iter().zip(counts) {
        for (class, pattern) in classes {
            let class = folder.join(split).join(class);
            let cannot_write = || format!("cannot write images to {}", class.display());
            fs::create_dir_all(&class).with_context(cannot_write)?;
            for index in 0..count {
                let image = textured(*pattern, size, &mut rng);
                let file = class.join(format!("{index:03}.png"));
                image.save(file).with_context(cannot_write)?;
            }
        }
    }
    Ok(())
}

/// A pattern between two random colors, one darker than the other, under noise.
fn textured(pattern: fn(f32, f32) -> f32, size: u32, rng: &mut ChaCha8Rng) -> RgbImage {
    let period: f32 = rng.random_range(6.0..10.0);
    let middle = [(); 2].map(|()| size as f32 * rng.random_range(0.3f32..0.7));
    let mut colors =
        [0.0f32, 0.6].map(|least| [(); 3].map(|()| rng.random_range(least..least + 0.4)));
    if rng.random() {
        colors.reverse();
    }
    let [from, to] = colors;
    RgbImage::from_fn(size, size, |column, row| {
        let [x, y] = [column, row].map(|pixel| pixel as f32 + 0.5);
        let mixed = pattern((x - middle[0]) / period, (y - middle[1]) / period);
        Rgb([0, 1, 2].map(|channel| {
            let noise: f32 = rng.random_range(-0.15..0.15);
            let value: f32 = from[channel] + (to[channel] - from[channel]) * mixed + noise;
            // Saturates.
            (255.0 * value) as u8
        }))
    })
}
