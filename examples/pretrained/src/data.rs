//! Images in folders: loaders of them, and their augmentation.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_dataset::vision::{Annotation, ImageDatasetItem, ImageFolderDataset, PixelData};
use image::imageops::FilterType;
use image::{DynamicImage, Rgb32FImage};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Mean and standard deviation of ImageNet's channels: what torchvision's weights were trained on.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Images of a step, `[batch, 3, size, size]`, and their classes, `[batch]`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Normalized as torchvision does.
    pub images: Tensor<4>,
    /// Places of the classes' names in [`Images::classes`].
    pub classes: Tensor<1, Int>,
}

/// The images of a folder `train` and a folder `val`, each with a folder for every class.
pub struct Images {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Flipped and shifted at random, in random order.
    pub train: Arc<dyn DataLoader<Batch>>,
    /// As they are.
    pub valid: Arc<dyn DataLoader<Batch>>,
}

impl Images {
    /// Finds the images of a folder. They are read when they are needed, and brought to `size` pixels either
    /// way.
    ///
    /// # Errors
    ///
    /// A folder that is not there, or whose classes differ between `train` and `val`.
    pub fn open(folder: &Path, size: u32, batch_size: usize) -> Result<Self> {
        let [train, valid] = ["train", "val"].map(|split| files(&folder.join(split)));
        let (train, valid) = (train?, valid?);
        let [classes, of_valid] = [&train, &valid].map(|files| {
            let names = files.iter().map(|(_, class)| class.clone());
            names.collect::<BTreeSet<_>>()
        });
        ensure!(
            classes.len() > 1 && classes == of_valid,
            "{}: train and val need a folder of images for each of the same classes, two or more; train has \
             {classes:?}, and val {of_valid:?}",
            folder.display()
        );
        let classes = Vec::from_iter(classes);
        let loader = |files: Vec<(PathBuf, String)>, augmentation| {
            let images = ImageFolderDataset::new_classification_with_items(files, &classes)?;
            let loader = DataLoaderBuilder::new(ImageBatcher { size, augmentation });
            anyhow::Ok(loader.batch_size(batch_size).shuffle(1).build(images))
        };
        Ok(Self {
            train: loader(train, Some(Mutex::new(ChaCha8Rng::seed_from_u64(1))))?,
            valid: loader(valid, None)?,
            classes,
        })
    }
}

/// The images in the folders of a folder, each with the name of the folder that it is in.
fn files(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let entries = |folder: &Path| {
        let entries = fs::read_dir(folder).and_then(|entries| {
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            paths.collect::<io::Result<Vec<_>>>()
        });
        entries.with_context(|| format!("cannot read the folder {}", folder.display()))
    };
    let mut files = Vec::new();
    for class in entries(folder)? {
        let Some(name) = class.file_name().filter(|_| class.is_dir()) else {
            continue;
        };
        let name = name.to_string_lossy();
        let images = entries(&class)?.into_iter().filter(|file| is_image(file));
        files.extend(images.map(|file| (file, name.clone().into_owned())));
    }
    // The order that the file system gives is not the same everywhere.
    files.sort();
    Ok(files)
}

/// Whether `ImageFolderDataset` reads files of that name.
fn is_image(file: &Path) -> bool {
    let extension = file.extension().unwrap_or_default().to_ascii_lowercase();
    ["bmp", "jpeg", "jpg", "png"]
        .iter()
        .any(|known| extension == *known)
}

struct ImageBatcher {
    size: u32,
    /// Draws flips and shifts; `None` where images stay as they are.
    augmentation: Option<Mutex<ChaCha8Rng>>,
}

impl Batcher<ImageDatasetItem, Batch> for ImageBatcher {
    fn batch(&self, items: Vec<ImageDatasetItem>, device: &Device) -> Batch {
        let (count, size) = (items.len(), self.size as usize);
        let mut pixels = Vec::with_capacity(count * 3 * size * size);
        let mut classes = Vec::with_capacity(count);
        for item in &items {
            let view = match &self.augmentation {
                Some(rng) => View::draw(
                    &mut rng.lock().unwrap_or_else(PoisonError::into_inner),
                    size,
                ),
                None => View::default(),
            };
            view.append(&resized(item, self.size), &mut pixels);
            let Annotation::Label(class) = item.annotation else {
                unreachable!("a folder of classes has labels alone");
            };
            classes.push(class as i64);
        }
        Batch {
            images: Tensor::from_data(TensorData::new(pixels, [count, 3, size, size]), device),
            classes: Tensor::from_data(TensorData::new(classes, [count]), device),
        }
    }
}

/// The middle of an image, as large as fits a square, in that size. Gray becomes three equal channels, and
/// opacity is left out.
fn resized(item: &ImageDatasetItem, size: u32) -> Rgb32FImage {
    let values: Vec<f32> = match &item.image {
        PixelData::U8(values) => values.iter().map(|x| f32::from(*x) / 255.0).collect(),
        PixelData::U16(values) => values.iter().map(|x| f32::from(*x) / 65535.0).collect(),
        PixelData::F32(values) => values.clone(),
    };
    let (width, height) = (item.image_width, item.image_height);
    let channels = values.len() / (width * height);
    let colors: [usize; 3] = if channels < 3 { [0; 3] } else { [0, 1, 2] };
    let pixels = values.chunks_exact(channels);
    let rgb = pixels.flat_map(|pixel| colors.map(|channel| pixel[channel]));
    let image = Rgb32FImage::from_raw(width as u32, height as u32, rgb.collect());
    DynamicImage::ImageRgb32F(image.expect("three values a pixel"))
        .resize_to_fill(size, size, FilterType::Triangle)
        .into_rgb32f()
}

/// What of an image is seen.
#[derive(Default)]
struct View {
    flip: bool,
    /// Columns and rows.
    shift: [i32; 2],
}

impl View {
    /// A random one, shifted by up to a tenth.
    fn draw(rng: &mut ChaCha8Rng, size: usize) -> Self {
        let most = size as i32 / 10;
        Self {
            flip: rng.random(),
            shift: [(); 2].map(|()| rng.random_range(-most..=most)),
        }
    }

    /// Appends an image's three normalized planes. Zeros come in at the edges.
    fn append(&self, image: &Rgb32FImage, pixels: &mut Vec<f32>) {
        let (width, height) = image.dimensions();
        let shifted = |at: u32, axis: usize| at.checked_add_signed(self.shift[axis]);
        for channel in 0..3 {
            for row in 0..height {
                for column in 0..width {
                    let column = if self.flip {
                        width - 1 - column
                    } else {
                        column
                    };
                    let pixel = shifted(column, 0).zip(shifted(row, 1));
                    let pixel = pixel.and_then(|(x, y)| image.get_pixel_checked(x, y));
                    pixels.push(
                        pixel.map_or(0.0, |pixel| (pixel[channel] - MEAN[channel]) / STD[channel]),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use image::{Rgb, RgbImage};

    #[test]
    fn gray_is_three_channels_and_a_flip_mirrors_each_row() {
        let item = ImageDatasetItem {
            image: PixelData::U8(vec![0, 51, 102, 153]),
            image_width: 2,
            image_height: 2,
            annotation: Annotation::Label(0),
            image_path: String::new(),
        };
        let image = resized(&item, 2);
        let planes = |view: View| {
            let mut pixels = Vec::new();
            view.append(&image, &mut pixels);
            let value = |(index, pixel): (usize, &f32)| pixel * STD[index / 4] + MEAN[index / 4];
            let values = pixels.iter().enumerate().map(value);
            values
                .map(|value| (5.0 * value).round())
                .collect::<Vec<_>>()
        };
        assert_eq!(planes(View::default()), [0.0, 1.0, 2.0, 3.0].repeat(3));
        let flipped = View {
            flip: true,
            shift: [0, 0],
        };
        assert_eq!(planes(flipped), [1.0, 0.0, 3.0, 2.0].repeat(3));
    }

    #[test]
    fn what_is_shifted_in_is_zero() {
        let image = Rgb32FImage::from_pixel(3, 3, Rgb([1.0; 3]));
        let mut pixels = Vec::new();
        let view = View {
            flip: false,
            shift: [1, -1],
        };
        view.append(&image, &mut pixels);
        let seen = pixels.iter().map(|pixel| *pixel != 0.0);
        let plane = [
            [false, false, false],
            [true, true, false],
            [true, true, false],
        ];
        assert!(seen.eq(plane.concat().repeat(3)));
    }

    #[test]
    fn folders_of_other_classes_are_an_error_that_names_them() {
        let folder = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "val/cat"] {
            let class = folder.path().join(class);
            fs::create_dir_all(&class).unwrap();
            RgbImage::new(2, 2).save(class.join("0.png")).unwrap();
        }
        let error = |folder: &Path| match Images::open(folder, 40, 2) {
            Ok(images) => panic!("{:?}", images.classes),
            Err(error) => error.to_string(),
        };
        let text = error(folder.path());
        assert!(
            text.contains(r#"{"cat", "dog"}, and val {"cat"}"#),
            "{text}"
        );
        let text = error(&folder.path().join("train"));
        assert!(text.contains("cannot read the folder"), "{text}");
    }
}
