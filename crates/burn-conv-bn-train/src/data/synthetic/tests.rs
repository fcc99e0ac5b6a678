use super::*;

use crate::data::{MEAN, STD};

#[test]
fn threads_do_not_change_the_digits() {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| generate(203, 5))
    };
    assert_eq!(on(1), on(4));
}

#[test]
fn a_larger_set_starts_with_the_smaller() {
    let mut large = generate(150, 1);
    large.truncate(40);
    assert_eq!(large, generate(40, 1));
}

#[test]
fn seeds_differ() {
    assert_ne!(generate(10, 0), generate(10, 1));
}

/// The bytes are part of the reproducibility of a training run.
#[test]
fn bytes_stay_the_same() {
    let digits = generate(100, 0);
    let sum = md5::compute(digits.images());
    assert_eq!(format!("{sum:x}"), "03ec846f0cbe4570c23ede9f58e9e9ea");
}

#[test]
fn nothing_is_drawn_for_a_count_of_zero() {
    assert!(generate(0, 0).is_empty());
}

#[test]
fn classes_are_balanced() {
    let digits = generate(5_000, 3);
    let mut counts = [0; CLASSES];
    for &label in digits.labels() {
        counts[usize::from(label)] += 1;
    }
    // 500 expected, with a standard deviation of 21.
    assert!(
        counts.iter().all(|count| (400..600).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn digits_are_centred_ink_on_black() {
    let digits = generate(500, 9);
    for i in 0..digits.len() {
        let image = digits.image(i);
        let mut mass = 0.0;
        let mut moment = [0.0; 2];
        for (at, &pixel) in image.iter().enumerate() {
            let pixel = f32::from(pixel);
            mass += pixel;
            moment[0] += pixel * (at / SIDE) as f32;
            moment[1] += pixel * (at % SIDE) as f32;
        }
        let share = mass / (255 * PIXELS) as f32;
        assert!(
            (0.02..0.35).contains(&share),
            "digit {i}: {share} of the image is ink"
        );
        for moment in moment {
            let offset = moment / mass - 14.0;
            assert!(
                offset.abs() < 1.5,
                "digit {i}: {offset} pixels off MNIST's centre"
            );
        }
        let black = image.iter().filter(|&&pixel| pixel == 0).count();
        assert!(black > PIXELS / 3, "digit {i}: {black} black pixels");
        assert!(image.iter().any(|&pixel| pixel > 150), "digit {i} is faint");
    }
}

/// The networks' input is normalized with MNIST's statistics.
#[test]
fn pixels_are_distributed_as_in_mnist() {
    let digits = generate(5_000, 4);
    let pixels = || {
        digits
            .images()
            .iter()
            .map(|&pixel| f64::from(pixel) / 255.0)
    };
    let count = digits.images().len() as f64;
    let mean = pixels().sum::<f64>() / count;
    let variance = pixels().map(|pixel| (pixel - mean).powi(2)).sum::<f64>() / count;
    assert!((mean - MEAN).abs() < 0.005, "mean {mean}");
    assert!(
        (variance.sqrt() - STD).abs() < 0.005,
        "deviation {}",
        variance.sqrt()
    );
}

/// Nearest class means read 79 % of digits from which 30 steps of Adadelta learn little, and 82 %
/// of MNIST's. More than this would be no task for a network.
#[test]
fn classes_are_as_far_apart_as_a_short_training_needs() {
    let (train, test) = (generate(5_000, 5), generate(2_000, 6));
    let mut means = vec![[0.0; PIXELS]; CLASSES];
    let mut counts = [0.0; CLASSES];
    for i in 0..train.len() {
        let class = usize::from(train.label(i));
        counts[class] += 1.0;
        for (sum, &pixel) in means[class].iter_mut().zip(train.image(i)) {
            *sum += f64::from(pixel);
        }
    }
    for (mean, count) in means.iter_mut().zip(counts) {
        mean.iter_mut().for_each(|sum| *sum /= count);
    }
    let distance = |image: &[u8; PIXELS], class: usize| -> f64 {
        let pixels = image.iter().zip(&means[class]);
        pixels
            .map(|(&pixel, mean)| (f64::from(pixel) - mean).powi(2))
            .sum()
    };
    let read =
        |image| (0..CLASSES).min_by(|&a, &b| distance(image, a).total_cmp(&distance(image, b)));
    let right =
        (0..test.len()).filter(|&i| read(test.image(i)) == Some(usize::from(test.label(i))));
    let share = right.count() as f64 / test.len() as f64;
    assert!((0.87..0.93).contains(&share), "{share}");
}
