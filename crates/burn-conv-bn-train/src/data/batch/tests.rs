use super::*;

use crate::data::generate;

fn loader(finished_epochs: u64) -> EpochLoader {
    EpochLoader::new(
        Arc::new(generate(23, 7)),
        10,
        FloatDType::F32,
        Device::flex(),
        5,
        finished_epochs,
    )
}

/// The images of one epoch, in order, and the sizes of its batches.
fn epoch(loader: &dyn DataLoader<MnistBatch>) -> (Vec<f32>, Vec<usize>) {
    let mut images = Vec::new();
    let mut sizes = Vec::new();
    for batch in loader.iter() {
        let batch = batch.expect("the digits are in memory");
        sizes.push(batch.targets.dims()[0]);
        let values = batch.images.try_into_vec_as::<f32>();
        images.extend(values.expect("images are floats"));
    }
    (images, sizes)
}

#[test]
fn normalizes_in_the_chosen_type() {
    let items = vec![
        DigitItem {
            image: [0; PIXELS],
            label: 3,
        },
        DigitItem {
            image: [255; PIXELS],
            label: 9,
        },
    ];
    for (dtype, tolerance) in [
        (FloatDType::F64, 1e-15),
        (FloatDType::F32, 1e-6),
        (FloatDType::F16, 1e-3),
        (FloatDType::BF16, 1e-2),
    ] {
        let batch = MnistBatcher::new(dtype).batch(items.clone(), &Device::flex());
        assert_eq!(batch.images.dims(), [2, 1, SIDE, SIDE]);
        assert_eq!(batch.images.dtype(), DType::from(dtype));

        let images = batch.images.try_into_vec_as::<f64>();
        let images = images.expect("images are floats");
        assert!((images[0] - (0.0 - MEAN) / STD).abs() < tolerance);
        assert!((images[PIXELS] - (1.0 - MEAN) / STD).abs() < tolerance);

        let targets = batch.targets.try_into_vec_as::<i64>();
        assert_eq!(targets.expect("targets are integers"), [3, 9]);
    }
}

#[test]
fn every_epoch_has_its_own_order_of_the_same_digits() {
    let loader = loader(0);
    let (first, sizes) = epoch(&loader);
    let (second, _) = epoch(&loader);

    assert_eq!(sizes, [10, 10, 3]);
    assert_ne!(first, second);
    let sorted = |mut images: Vec<f32>| {
        images.sort_by(f32::total_cmp);
        images
    };
    assert_eq!(sorted(first), sorted(second));
}

#[test]
fn an_epoch_is_the_same_whether_resumed_or_reached() {
    let reached = loader(0);
    epoch(&reached);
    let (expected, _) = epoch(&reached);

    let resumed = loader(1).to_device(&Device::flex());
    let (actual, _) = epoch(resumed.as_ref());

    assert_eq!(actual, expected);
}

#[test]
fn loads_slices_and_whole_sets() {
    let (_, sizes) = epoch(loader(0).slice(4, 19).as_ref());
    assert_eq!(sizes, [10, 5]);

    let digits = Arc::new(generate(23, 7));
    let (_, sizes) = epoch(test_loader(digits, 20, FloatDType::F32).as_ref());
    assert_eq!(sizes, [20, 3]);
}

#[test]
fn neighbouring_seeds_are_far_apart() {
    let mut seeds: Vec<u64> = (0..8)
        .flat_map(|seed| (0..8).map(move |epoch| epoch_seed(seed, epoch)))
        .collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 64);
}
