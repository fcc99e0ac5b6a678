//! From raw digits to batches of tensors.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder, DataLoaderIterator, Progress};
use burn::tensor::{DType, Device, Element, FloatDType, Int, Tensor, TensorData};
use burn_dataset::transform::SelectionDataset;
use burn_dataset::{Dataset, DatasetError};

use crate::data::{Digits, PIXELS, SIDE};

/// Mean of MNIST's training pixels, scaled to `0..=1`; the tutorial's constant.
pub(crate) const MEAN: f64 = 0.1307;

/// Standard deviation of MNIST's training pixels, scaled to `0..=1`; the tutorial's constant.
pub(crate) const STD: f64 = 0.3081;

/// A source of batches, as Burn's training and evaluation take it.
pub(crate) type BatchLoader = Arc<dyn DataLoader<MnistBatch>>;

/// One digit, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigitItem {
    /// Pixels, row by row.
    pub image: [u8; PIXELS],
    /// Class.
    pub label: u8,
}

impl Dataset<DigitItem> for Digits {
    fn get(&self, index: usize) -> Result<DigitItem, DatasetError> {
        Ok(DigitItem {
            image: *self.image(index),
            label: self.label(index),
        })
    }

    fn len(&self) -> usize {
        Digits::len(self)
    }
}

/// Digits as the networks take them.
#[derive(Clone, Debug)]
pub struct MnistBatch {
    /// Normalized images, `[N, 1, 28, 28]`.
    pub images: Tensor<4>,
    /// Classes, `[N]`.
    pub targets: Tensor<1, Int>,
}

/// Turns digits into a batch, with images of a chosen type.
#[derive(Clone, Debug)]
pub struct MnistBatcher {
    dtype: FloatDType,
}

impl MnistBatcher {
    /// A batcher of images of type `dtype`, which must be that of the network's activations. In f16
    /// and bf16 they are rounded once, from f32.
    pub fn new(dtype: FloatDType) -> Self {
        Self { dtype }
    }
}

impl Batcher<DigitItem, MnistBatch> for MnistBatcher {
    fn batch(&self, items: Vec<DigitItem>, device: &Device) -> MnistBatch {
        // The single-precision arithmetic is torchvision's, operation by operation, so that
        // both frameworks start from the same bits.
        let images = match self.dtype {
            FloatDType::F64 => pixels(&items, |byte| (f64::from(byte) / 255.0 - MEAN) / STD),
            _ => pixels(&items, |byte| {
                (f32::from(byte) / 255.0 - MEAN as f32) / STD as f32
            }),
        };
        let targets: Vec<i64> = items.iter().map(|item| i64::from(item.label)).collect();
        let count = targets.len();

        MnistBatch {
            images: Tensor::from_data(images, (device, DType::from(self.dtype))),
            targets: Tensor::from_data(TensorData::new(targets, [count]), device),
        }
    }
}

fn pixels<E: Element>(items: &[DigitItem], normalize: impl Fn(u8) -> E) -> TensorData {
    let table: Vec<E> = (0..=u8::MAX).map(normalize).collect();
    let mut values = Vec::with_capacity(items.len() * PIXELS);
    for item in items {
        values.extend(item.image.iter().map(|&byte| table[usize::from(byte)]));
    }
    TensorData::new(values, [items.len(), 1, SIDE, SIDE])
}

/// A loader of all `digits` in their order, without worker threads: batches are made when they
/// are asked for, so that none is in memory that is not in use.
pub(crate) fn test_loader(
    digits: Arc<Digits>,
    batch_size: usize,
    dtype: FloatDType,
) -> BatchLoader {
    DataLoaderBuilder::<DigitItem, MnistBatch>::new(MnistBatcher::new(dtype))
        // Burn allocates a batch before it is filled.
        .batch_size(batch_size.min(digits.len().max(1)))
        .num_workers(0)
        .build(digits)
}

/// A loader for training, whose order of digits is a function of seed and epoch.
///
/// Burn's own loader draws all epochs from one generator, which a resumed run starts anew; this
/// one starts at any epoch. Starting an epoch also seeds the device, so that dropout masks
/// repeat too, and a resumed run is the run it resumes. Batches are made when they are asked
/// for, so that none is in memory that is not in use; the last of an epoch may be smaller.
pub(crate) struct EpochLoader {
    digits: Arc<Digits>,
    range: Range<usize>,
    batcher: MnistBatcher,
    batch_size: usize,
    device: Device,
    seed: u64,
    epoch: AtomicU64,
}

impl EpochLoader {
    /// A loader of all `digits` on `device` that begins with the epoch after `finished_epochs`.
    ///
    /// # Panics
    ///
    /// If `batch_size` is zero.
    pub(crate) fn new(
        digits: Arc<Digits>,
        batch_size: usize,
        dtype: FloatDType,
        device: Device,
        seed: u64,
        finished_epochs: u64,
    ) -> Self {
        assert!(batch_size > 0, "a batch holds at least one digit");
        Self {
            range: 0..Digits::len(&digits),
            digits,
            batcher: MnistBatcher::new(dtype),
            batch_size,
            device,
            seed,
            epoch: AtomicU64::new(finished_epochs),
        }
    }

    fn with(&self, range: Range<usize>, device: Device) -> Self {
        Self {
            digits: self.digits.clone(),
            range,
            batcher: self.batcher.clone(),
            batch_size: self.batch_size,
            device,
            seed: self.seed,
            epoch: AtomicU64::new(self.epoch.load(Ordering::Relaxed)),
        }
    }
}

impl DataLoader<MnistBatch> for EpochLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<MnistBatch> + 'a> {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        let seed = epoch_seed(self.seed, epoch);
        let mut digits = SelectionDataset::<Digits, DigitItem>::from_indices_unchecked(
            self.digits.clone(),
            self.range.clone().collect(),
        );
        digits.shuffle(seed);
        self.device.seed(seed);
        Box::new(EpochIterator {
            loader: self,
            digits,
            next: 0,
        })
    }

    fn num_items(&self) -> usize {
        self.range.len()
    }

    fn to_device(&self, device: &Device) -> BatchLoader {
        Arc::new(self.with(self.range.clone(), device.clone()))
    }

    fn slice(&self, start: usize, end: usize) -> BatchLoader {
        let range = self.range.start + start..self.range.start + end;
        Arc::new(self.with(range, self.device.clone()))
    }
}

/// The seed of one epoch: SplitMix64's output function, which sends neighbouring epochs and
/// neighbouring seeds far apart.
fn epoch_seed(seed: u64, epoch: u64) -> u64 {
    let mut bits = seed.wrapping_add(epoch.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

struct EpochIterator<'a> {
    loader: &'a EpochLoader,
    digits: SelectionDataset<Digits, DigitItem>,
    next: usize,
}

impl Iterator for EpochIterator<'_> {
    type Item = Result<MnistBatch, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.digits.len().min(self.next + self.loader.batch_size);
        if self.next == end {
            return None;
        }
        let items = self.digits.get_many((self.next..end).collect());
        self.next = end;
        Some(items.map(|items| self.loader.batcher.batch(items, &self.loader.device)))
    }
}

impl DataLoaderIterator<MnistBatch> for EpochIterator<'_> {
    fn progress(&self) -> Progress {
        Progress::new(self.next, self.digits.len(), Some("items".to_string()))
    }
}

#[cfg(test)]
mod tests;
