//! The `mnist` binary, run as its users run it, offline and on few digits.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use burn_conv_bn_train::data::{OFFLINE, PIXELS};
use burn_conv_bn_train::report::Report;
use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::{TempDir, tempdir};

const SMALL: &str = "--dataset synthetic --train-limit 64 --test-limit 32 --batch-size 32";

struct Outcome {
    arguments: String,
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the binary in `folder`, to which relative paths refer.
fn mnist(folder: &TempDir, arguments: &str) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_mnist"))
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env(OFFLINE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Outcome {
        arguments: arguments.to_string(),
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Outcome {
    #[track_caller]
    fn assert_exit(&self, code: i32) {
        let Self {
            arguments,
            stdout,
            stderr,
            ..
        } = self;
        assert_eq!(self.code, Some(code), "{arguments}\n{stdout}\n{stderr}");
    }

    /// What a run printed that went well.
    #[track_caller]
    fn printed(self) -> String {
        self.assert_exit(0);
        assert_eq!(self.stderr, "", "{}", self.arguments);
        self.stdout
    }

    /// Asserts that a run ended with one line that has all of `parts`, before any training.
    #[track_caller]
    fn assert_refused(&self, parts: &[&str]) {
        self.assert_exit(1);
        let (arguments, error) = (&self.arguments, &self.stderr);
        assert!(error.starts_with("error: "), "{arguments}: {error}");
        assert_eq!(error.lines().count(), 1, "{arguments}: {error}");
        for part in parts {
            assert!(error.contains(part), "{arguments}: no {part:?} in {error}");
        }
        // Every error in the chain that shows its cause by itself would say it again.
        let cause = error.trim_end().rsplit(": ").next().unwrap();
        assert_eq!(error.matches(cause).count(), 1, "{arguments}: {error}");
        for started in ["== fused ==", "Train Epoch"] {
            assert!(
                !self.stdout.contains(started),
                "{arguments}: {}",
                self.stdout
            );
        }
    }
}

/// The line with the result of the last test.
fn test_line(stdout: &str) -> &str {
    let mut lines = stdout.lines().rev();
    lines
        .find(|line| line.starts_with("Test set (synthetic): "))
        .expect(stdout)
}

#[test]
fn compare_draws_the_memory_that_it_reports() {
    let folder = tempdir().unwrap();
    let arguments = format!("compare {SMALL} --json report.json --plot memory.svg");
    let stdout = mnist(&folder, &arguments).printed();
    assert!(stdout.contains("Picture: memory.svg"), "{stdout}");
    let svg = fs::read_to_string(folder.path().join("memory.svg")).unwrap();

    let json = fs::read_to_string(folder.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_str(&json).unwrap();
    for variant in &report.variants {
        let timeline = variant.timeline.as_ref().unwrap();
        let ends = [
            0.0,
            timeline.forward_end,
            timeline.backward_end,
            timeline.optimizer_end,
        ];
        assert!(ends.is_sorted_by(|a, b| a < b), "{ends:?}");
        // The step that trains keeps the loss of each digit for the metrics besides.
        let ratio = timeline.peak() as f64 / variant.peak_bytes as f64;
        assert!((ratio - 1.0).abs() < 0.05, "{}: {ratio}", variant.name);
        let label = format!("{}: peak", variant.name);
        assert!(svg.contains(&label), "no {label:?} in {svg}");
    }
}

#[test]
fn compare_tells_and_reports() {
    let folder = tempdir().unwrap();
    let arguments = format!("compare {SMALL} --json report.json --artifacts logs");
    let stdout = mnist(&folder, &arguments).printed();
    for part in [
        "Data: built-in synthetic digits",
        "Estimate",
        "== fused ==",
        "== unfused ==",
        "Peak memory allocated:",
    ] {
        assert!(stdout.contains(part), "no {part:?} in {stdout}");
    }
    assert_eq!(
        stdout.matches("Test set (synthetic): ").count(),
        2,
        "{stdout}"
    );
    assert_eq!(entries(&folder.path().join("logs")), ["fused", "unfused"]);

    let json = fs::read_to_string(folder.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_str(&json).unwrap();
    assert_eq!(report.dataset, "synthetic");
    assert_eq!(
        (report.train_digits, report.test_digits, report.batch_size),
        (64, 32, 32)
    );
    let [fused, unfused] = report.variants.as_slice() else {
        panic!("two variants in {json}");
    };
    assert_eq!(
        (fused.name.as_str(), unfused.name.as_str()),
        ("fused", "unfused")
    );
    for variant in [fused, unfused] {
        assert_eq!(
            (variant.epochs.len(), variant.step_losses.len()),
            (1, 2),
            "{json}"
        );
        assert!(!variant.interrupted);
        assert!(variant.step_seconds_median > 0.0);
    }
    assert!(
        2 * fused.forward_end_bytes < unfused.forward_end_bytes,
        "{json}"
    );
    assert!(fused.peak_bytes < unfused.peak_bytes, "{json}");

    // The second block's input, and in both forms each channel's mean and variance.
    let first = 32 * 32 * 26 * 26 * 4;
    let second = 32 * 64 * 24 * 24 * 4;
    let statistics = 2 * (32 + 64) * 4;
    assert_eq!(fused.saved_bytes, first + statistics);
    assert_eq!(unfused.saved_bytes, 3 * first + 2 * second + statistics);
}

#[test]
fn parity_in_double_and_single_precision() {
    let folder = tempdir().unwrap();
    for options in ["--precision f64 --steps 5", "--precision f32 --steps 3"] {
        let stdout = mnist(&folder, &format!("parity {SMALL} {options}")).printed();
        assert!(stdout.contains("largest difference"), "{stdout}");
    }
}

/// A batch that is smaller than asked for has other orders, too, whose spread is the limit.
#[test]
fn parity_with_fewer_digits_than_a_batch() {
    let folder = tempdir().unwrap();
    mnist(
        &folder,
        "parity --dataset synthetic --train-limit 64 --steps 3",
    )
    .printed();
}

#[test]
fn a_resumed_training_is_an_uninterrupted_one() {
    let folder = tempdir().unwrap();
    let train = |options: &str| {
        mnist(
            &folder,
            &format!("train {SMALL} --variant fused --plain {options}"),
        )
    };
    let whole = train("--epochs 2 --artifacts whole").printed();
    let first = train("--epochs 1 --artifacts parts").printed();
    let second = train("--epochs 2 --artifacts parts --resume").printed();
    assert_eq!(test_line(&second), test_line(&whole));
    assert_ne!(test_line(&first), test_line(&whole));
    assert!(!second.contains("Epoch 1/2"), "{second}");

    let used = train("--epochs 1 --artifacts whole");
    used.assert_refused(&["whole", "already holds a run"]);
    let absent = train("--epochs 2 --artifacts absent --resume");
    absent.assert_refused(&["absent", "no complete checkpoint"]);
    let anew = train("--epochs 1 --artifacts whole --overwrite").printed();
    assert_eq!(test_line(&anew), test_line(&first));
}

#[test]
fn options_that_make_no_sense() {
    let folder = tempdir().unwrap();
    for (arguments, name) in [
        ("train --frobnicate", "--frobnicate"),
        ("frobnicate", "frobnicate"),
        ("train --batch-size 0", "--batch-size"),
        ("compare --batch-size 0", "--batch-size"),
        ("train --dropout 1.5", "--dropout"),
        ("parity --steps 0", "--steps"),
        ("train --resume --overwrite", "--overwrite"),
    ] {
        let outcome = mnist(&folder, arguments);
        outcome.assert_exit(2);
        assert!(
            outcome.stderr.contains(name),
            "{arguments}: {}",
            outcome.stderr
        );
        assert_eq!(outcome.stdout, "", "{arguments}");
    }
    assert!(entries(folder.path()).is_empty());
}

#[test]
fn data_that_are_missing_or_damaged() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["empty", "sound", "gzip", "idx"] {
        fs::create_dir(path(name)).unwrap();
    }
    for name in ["sound", "gzip", "idx"] {
        write_mnist(&path(name));
    }
    let images = fs::read(path("sound/train-images-idx3-ubyte")).unwrap();
    fs::remove_file(path("gzip/train-images-idx3-ubyte")).unwrap();
    let packed = gzip(&images);
    let cut = &packed[..packed.len() / 2];
    fs::write(path("gzip/train-images-idx3-ubyte.gz"), cut).unwrap();
    let labels = fs::read(path("sound/t10k-labels-idx1-ubyte")).unwrap();
    let cut = &labels[..labels.len() - 1];
    fs::write(path("idx/t10k-labels-idx1-ubyte"), cut).unwrap();

    for (data, parts) in [
        ("empty", ["empty", "train-images-idx3-ubyte"]),
        ("absent", ["absent", "No such file"]),
        ("gzip", ["gzip/train-images-idx3-ubyte.gz", "damaged"]),
        ("idx", ["idx/t10k-labels-idx1-ubyte", "truncated"]),
    ] {
        for job in ["train --plain --epochs 1", "compare", "parity --steps 1"] {
            let outcome = mnist(&folder, &format!("{job} --dataset mnist --data-dir {data}"));
            outcome.assert_refused(&parts);
        }
    }

    // It is the damage that is refused, not the folder.
    let sound = mnist(
        &folder,
        "parity --steps 1 --precision f64 --dataset mnist --data-dir sound",
    );
    assert!(sound.printed().contains("Data: custom digits from sound"));
}

#[test]
fn outputs_that_cannot_be_written() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("folder")).unwrap();
    fs::write(path("file"), "").unwrap();
    fs::write(path("old.json"), "old").unwrap();

    // Root may write anywhere, but not below a file.
    for (options, name) in [
        ("--json absent/report.json --artifacts logs", "absent"),
        ("--json file/report.json --artifacts logs", "file"),
        ("--json folder --artifacts logs", "folder"),
        ("--artifacts file", "file"),
        ("--artifacts file/logs --json old.json", "file/logs"),
    ] {
        for job in ["compare", "train --epochs 1 --plain"] {
            mnist(&folder, &format!("{job} {SMALL} {options}")).assert_refused(&[name]);
        }
    }
    // Nothing was touched, and nothing is left behind.
    assert_eq!(fs::read_to_string(path("old.json")).unwrap(), "old");
    assert_eq!(entries(folder.path()), ["file", "folder", "old.json"]);
    assert!(entries(&path("folder")).is_empty());
}

/// The names in a folder, sorted.
fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The four files of a data set of a few digits that are not MNIST's.
fn write_mnist(folder: &Path) {
    for (part, count) in [("train", 20), ("t10k", 10)] {
        let header = [0x0803, count, 28, 28].map(u32::to_be_bytes).concat();
        // Not all alike, or gzip would leave nothing to cut.
        let pixels = (0..count as usize * PIXELS).map(|i| (i * i % 251) as u8);
        let images: Vec<u8> = header.into_iter().chain(pixels).collect();
        fs::write(folder.join(format!("{part}-images-idx3-ubyte")), images).unwrap();

        let header = [0x0801, count].map(u32::to_be_bytes).concat();
        let labels: Vec<u8> = header
            .into_iter()
            .chain((0..count).map(|i| (i % 10) as u8))
            .collect();
        fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), labels).unwrap();
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
