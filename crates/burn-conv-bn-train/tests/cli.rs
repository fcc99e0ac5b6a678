//! The `mnist` binary, run as its users run it, offline and on few digits.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use burn_conv_bn_train::data::{OFFLINE, PIXELS, SIDE, generate};
use burn_conv_bn_train::report::{BURN_VERSION, PredictionReport, Report, SCHEMA, VariantReport};
use burn_pack::{DType, Reader};
use flate2::Compression;
use flate2::write::GzEncoder;
use image::{GrayImage, ImageFormat, Luma};
use serde::de::DeserializeOwned;
use tempfile::{TempDir, tempdir};

const SMALL: &str = "--dataset synthetic --train-limit 64 --test-limit 32 --batch-size 32";

/// As [`SMALL`], without a test.
const SMALL_PARITY: &str = "--dataset synthetic --train-limit 64 --batch-size 32";

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
    let arguments = format!("compare {SMALL} --json report.json");
    let stdout = mnist(&folder, &arguments).printed();
    assert!(!stdout.contains("GB"), "{stdout}");
    for part in [
        "Data: built-in synthetic digits",
        "Train Epoch: 1 [0/64 (0%)]",
        "fused: 0.0",
        " GiB, unfused: ",
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
    assert_eq!(entries(folder.path()), ["report.json"]);

    let json = fs::read_to_string(folder.path().join("report.json")).unwrap();
    let report: Report = serde_json::from_str(&json).unwrap();
    assert_eq!(report.dataset, "synthetic");
    assert_eq!(
        (report.train_digits, report.test_digits, report.batch_size),
        (64, 32, 32)
    );
    let [fused, unfused, measured] = report.variants.as_slice() else {
        panic!("three variants in {json}");
    };
    let names = [fused, unfused, measured].map(|variant| variant.name.as_str());
    assert_eq!(names, ["fused", "unfused", "norm-conv"]);
    assert_eq!(
        (measured.epochs.len(), measured.step_losses.len()),
        (0, 2),
        "{json}"
    );
    assert!(
        2 * measured.forward_end_bytes < unfused.forward_end_bytes,
        "{json}"
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

    // The second block's input, the pooled output and its places; and in both forms each channel's mean
    // and variance, and what the linear layers keep.
    let rest = CHANNELS_AND_HEAD;
    assert_eq!(fused.saved_bytes, 4 * (FIRST + POOLED) + POOLED + rest);
    assert_eq!(
        unfused.saved_bytes,
        4 * 3 * (FIRST + SECOND) + (4 + 4) * POOLED + rest
    );
}

/// Values of the outputs of the tutorial's two blocks and of its pool, of a batch of 32.
const FIRST: usize = 32 * 32 * 26 * 26;
const SECOND: usize = 32 * 64 * 24 * 24;
const POOLED: usize = SECOND / 4;

/// Bytes in f32: means and variances; dropout's draws, ReLU's input and output, and log-softmax's scores
/// and sums.
const CHANNELS_AND_HEAD: usize = 4 * (2 * (32 + 64) + 32 * (3 * 128 + 10 + 1));

#[test]
fn parity_in_double_and_single_precision() {
    let folder = tempdir().unwrap();
    for options in ["--precision f64 --steps 5", "--precision f32 --steps 3"] {
        let stdout = mnist(&folder, &format!("parity {SMALL_PARITY} {options}")).printed();
        assert!(stdout.contains("largest difference"), "{stdout}");
    }
}

/// Losses that are as wide as numbers can be.
#[test]
fn a_diverged_parity_keeps_its_columns() {
    let folder = tempdir().unwrap();
    let arguments =
        format!("parity {SMALL_PARITY} --precision f64 --steps 4 --optimizer sgd --lr 1e30");
    let outcome = mnist(&folder, &arguments);
    outcome.assert_exit(1);
    let lines = outcome.stdout.lines();
    let table: Vec<&str> = lines
        .skip_while(|line| !line.starts_with("step "))
        .take(1 + 4)
        .collect();
    assert_eq!(table.len(), 5, "{}", outcome.stdout);
    for (step, line) in table.iter().enumerate() {
        assert_eq!(line.len(), table[0].len(), "{}", outcome.stdout);
        let first = line.split_whitespace().next().unwrap();
        assert!(step == 0 || first == step.to_string(), "{line}");
    }
}

/// In mixed precision there is nothing that losses could be held against.
#[test]
fn parity_is_not_of_mixed_precision() {
    let folder = tempdir().unwrap();
    for precision in ["f16", "bf16"] {
        let arguments = format!("parity {SMALL_PARITY} --precision {precision}");
        mnist(&folder, &arguments).assert_refused(&[precision, "--precision f32 or f64"]);
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
    for refused in [used, absent] {
        assert_eq!(refused.stdout, "", "no digits were drawn");
    }
    let anew = train("--epochs 1 --artifacts whole --overwrite").printed();
    assert_eq!(test_line(&anew), test_line(&first));
}

/// Training computes in half and stores what it learns in f32.
#[test]
fn mixed_precision_trains_and_predicts() {
    let folder = tempdir().unwrap();
    let train = |precision: &str, epochs: usize| {
        let arguments = format!(
            "train --dataset synthetic --train-limit 128 --test-limit 64 --batch-size 32 --plain \
             --optimizer sgd --precision {precision} --epochs {epochs} --artifacts {precision} \
             --json {precision}.json"
        );
        mnist(&folder, &arguments).printed()
    };
    train("f32", 1);
    let single = trained(&folder, "f32.json");
    for precision in ["bf16", "f16"] {
        let words = format!("{precision} activations, f32 parameters");
        let printed = train(precision, 4);
        assert!(
            printed.contains(&format!("Precision: {words}")),
            "{printed}"
        );
        let report = trained(&folder, &format!("{precision}.json"));
        // From the same weights on the same digits, with the same values dropped.
        let difference = (report.step_losses[0] - single.step_losses[0]).abs();
        assert!(0.0 < difference && difference < 5e-2, "{difference}");
        let losses: Vec<f64> = report.epochs.iter().map(|e| e.train_loss).collect();
        assert!(losses[3] < 0.9 * losses[0], "{precision}: {losses:?}");

        for part in ["model", "optim"] {
            let path = format!("{precision}/checkpoint/{part}-4.bpk");
            let reader = Reader::from_file(folder.path().join(path)).unwrap();
            let tensors = reader.into_tensors().unwrap();
            assert!(tensors.len() > 5, "{part} of {} tensors", tensors.len());
            for tensor in tensors {
                assert_eq!(tensor.dtype, DType::F32, "{part}: {}", tensor.name);
            }
        }

        let predict = format!("predict --artifacts {precision} --test-set --json out.json");
        let predicted = mnist(&folder, &predict).printed();
        assert_eq!(test_line(&predicted), test_line(&printed));
        assert!(predicted.contains(&words), "{predicted}");
        let report: PredictionReport = json(&folder, "out.json");
        assert_eq!(report.dtype, precision.to_uppercase());

        let resume =
            format!("train --plain --artifacts {precision} --resume --epochs 5 --precision f32");
        let difference = format!("--precision {precision}, not f32");
        mnist(&folder, &resume).assert_refused(&[precision, difference.as_str()]);
    }
}

/// Every form of a network that keeps running statistics.
#[test]
fn other_networks_train_and_predict_in_mixed_precision() {
    let folder = tempdir().unwrap();
    for (model, variant) in [("mobilenet-v2", "fused"), ("resnet18", "unfused")] {
        let arguments = format!(
            "train --model {model} --variant {variant} --optimizer sgd --precision bf16 --dataset \
             synthetic --train-limit 16 --test-limit 8 --batch-size 8 --epochs 1 --plain \
             --artifacts {model}"
        );
        mnist(&folder, &arguments).printed();
        for form in ["fused", "folded", "unfused"] {
            let arguments =
                format!("predict --artifacts {model} --test-set --form {form} --json out.json");
            mnist(&folder, &arguments).printed();
            let report: PredictionReport = json(&folder, "out.json");
            let test = report.test.unwrap();
            assert!(test.average_loss.is_finite(), "{model}, {form}: {test:?}");
        }
    }
}

#[test]
fn mixed_precision_is_compared() {
    let folder = tempdir().unwrap();
    let [single, mixed] = ["f32", "bf16"].map(|precision| {
        let arguments = format!("compare {SMALL} --precision {precision} --json report.json");
        let stdout = mnist(&folder, &arguments).printed();
        let told = stdout.contains("Precision: bf16 activations, f32 parameters");
        assert_eq!(told, precision == "bf16", "{stdout}");
        let report: Report = json(&folder, "report.json");
        assert_eq!(report.dtype, precision.to_uppercase());
        report
    });
    let [fused, unfused, _] = mixed.variants.as_slice() else {
        panic!("three variants in {mixed:?}");
    };
    // The second block's input and the pooled output, in half; in Burn's own layers both norms' inputs in
    // f32, and what goes into and out of ReLU in half. The linear layer's input is a cast.
    let rest = 4 * POOLED + CHANNELS_AND_HEAD;
    assert_eq!(fused.saved_bytes, 2 * (FIRST + POOLED) + POOLED + rest);
    assert_eq!(
        unfused.saved_bytes,
        (4 + 2 + 2) * (FIRST + SECOND) + 4 * POOLED + rest
    );
    assert!(fused.forward_end_bytes < unfused.forward_end_bytes);
    // Fused, the pooled output is there twice: as the second block's handle, and cast for the linear layer.
    // Half a MiB that threads keep for themselves may be in any of the four figures.
    for (mixed, single, most) in [
        (fused, &single.variants[0], 0.97),
        (unfused, &single.variants[1], 0.8),
    ] {
        let ratio = mixed.forward_end_bytes as f64 / single.forward_end_bytes as f64;
        assert!(ratio < most, "{}: {ratio}", mixed.name);
    }
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
        ("train --threads 0", "--threads"),
        ("train --optimizer lbfgs", "--optimizer"),
        ("compare --model lenet", "--model"),
        ("compare --lr 0", "--lr"),
        ("predict --images a --test-set", "--test-set"),
        ("predict --test-set --form melted", "--form"),
        ("compare --lr nan", "--lr"),
        // What a command would ignore.
        ("parity --dropout 0.9", "--dropout"),
        ("parity --gamma 0.5", "--gamma"),
        ("parity --log-interval 1", "--log-interval"),
        ("parity --test-limit 9", "--test-limit"),
        // Without a command they are options of compare.
        ("--frobnicate", "compare"),
        ("--resume", "compare"),
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
fn counts_have_bounds() {
    let folder = tempdir().unwrap();
    for (arguments, option, bound) in [
        ("compare --batch-size 100000000", "--batch-size", "1000000"),
        ("train --epochs 18446744073709551615", "--epochs", "1000000"),
        ("parity --steps 100000000000", "--steps", "1000000"),
        ("train --threads 100000", "--threads", "1024"),
        (
            "train --early-stopping 1000001",
            "--early-stopping",
            "1000000",
        ),
        ("train --log-interval 1000001", "--log-interval", "1000000"),
        (
            "train --train-limit 18446744073709551615",
            "--train-limit",
            "1000000",
        ),
        ("train --test-limit 0", "--test-limit", "from 1"),
        (
            "predict --test-set --epoch 18446744073709551615",
            "--epoch",
            "1000000",
        ),
        (
            "predict --test-set --batch-size 100000000",
            "--batch-size",
            "1000000",
        ),
        ("--batch-size 100000000", "--batch-size", "1000000"),
    ] {
        let outcome = mnist(&folder, arguments);
        outcome.assert_exit(2);
        let value = arguments.rsplit(' ').next().unwrap();
        for part in [option, value, bound] {
            let error = &outcome.stderr;
            assert!(error.contains(part), "{arguments}: no {part:?} in {error}");
        }
    }
    // A file's are the same.
    fs::write(folder.path().join("job.toml"), "batch-size = 100000000\n").unwrap();
    mnist(&folder, "train --config job.toml").assert_refused(&[
        "job.toml",
        "batch-size",
        "100000000",
        "1000000",
    ]);
    // Any seed will do, and comes back.
    let seed = format!("seed = \"{}\"\n", u64::MAX);
    let printed = mnist(
        &folder,
        &format!("train --seed {} --print-config", u64::MAX),
    )
    .printed();
    assert!(printed.contains(&seed), "{printed}");
    fs::write(folder.path().join("seed.toml"), &printed).unwrap();
    let again = mnist(&folder, "train --config seed.toml --print-config").printed();
    assert_eq!(again, printed);
}

/// The options of `compare` need no command.
#[test]
fn options_alone_are_those_of_compare() {
    let folder = tempdir().unwrap();
    let bare = mnist(&folder, "--epochs 2 --print-config").printed();
    let named = mnist(&folder, "compare --epochs 2 --time-limit 8 --print-config").printed();
    assert_eq!(bare, named);
    assert!(bare.contains("epochs = 2\n"), "{bare}");
    let own = mnist(&folder, "--epochs 2 --time-limit 3 --print-config").printed();
    assert!(own.contains("time-limit = 3.0\n"), "{own}");

    mnist(&folder, &format!("{SMALL} --json report.json")).printed();
    let report: Report = json(&folder, "report.json");
    assert_eq!((report.train_digits, report.variants.len()), (64, 3));
    assert!(mnist(&folder, "--version").printed().starts_with("mnist "));
}

#[cfg(unix)]
#[test]
fn a_configuration_from_a_pipe_ends() {
    let folder = tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    make_pipe(&pipe);
    let writer = std::thread::spawn(move || fs::write(pipe, "epochs = 3\n"));
    let printed = mnist(&folder, "train --config pipe --print-config").printed();
    writer.join().unwrap().unwrap();
    assert!(printed.contains("epochs = 3\n"), "{printed}");
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
        ("--json absent/report.json", "absent"),
        ("--json file/report.json", "file"),
        ("--json folder", "folder"),
    ] {
        for job in ["compare", "train --epochs 1 --plain --artifacts run"] {
            mnist(&folder, &format!("{job} {SMALL} {options}")).assert_refused(&[name]);
        }
    }
    for (options, name) in [
        ("--artifacts file", "file"),
        ("--artifacts file/run --json old.json", "file/run"),
    ] {
        let arguments = format!("train --epochs 1 --plain {SMALL} {options}");
        mnist(&folder, &arguments).assert_refused(&[name]);
    }
    // Nothing was touched, and nothing is left behind.
    assert_eq!(fs::read_to_string(path("old.json")).unwrap(), "old");
    assert_eq!(entries(folder.path()), ["file", "folder", "old.json"]);
    assert!(entries(&path("folder")).is_empty());
}

/// The help of every command, which is what a stranger sees first.
#[test]
fn help_is_printed() {
    let folder = tempdir().unwrap();
    for (arguments, parts) in [
        (
            "--help",
            vec!["compare", "train", "parity", "predict", "Examples:"],
        ),
        (
            "train --help",
            vec![
                "Run:",
                "Network:",
                "Training:",
                "Data:",
                "Computation:",
                "--optimizer <OPTIMIZER>",
                "mobilenet-v2",
                "0.05",
                "--resume",
                "Examples:",
            ],
        ),
        (
            "predict --help",
            vec!["What to classify:", "--form <FORM>", "folded", "20 pixels"],
        ),
    ] {
        let help = mnist(&folder, arguments).printed();
        for part in parts {
            assert!(help.contains(part), "{arguments}: no {part:?} in {help}");
        }
        assert!(!help.contains("run-variant"), "{help}");
    }
}

#[test]
fn other_networks_are_compared() {
    let folder = tempdir().unwrap();
    for model in ["resnet18", "mobilenet-v2"] {
        let arguments = format!(
            "compare --dataset synthetic --train-limit 8 --test-limit 4 --batch-size 4 --threads 1 \
             --model {model} --optimizer sgd --json report.json --plot memory.svg"
        );
        let stdout = mnist(&folder, &arguments).printed();
        assert!(stdout.contains("optimizer sgd"), "{stdout}");
        let report: Report = json(&folder, "report.json");
        assert_eq!(
            (report.model.as_str(), report.optimizer.as_str()),
            (model, "sgd")
        );
        assert_eq!(report.threads, 1);
        let [fused, unfused, measured] = report.variants.as_slice() else {
            panic!("three variants in {report:?}");
        };
        for other in [fused, measured] {
            assert_eq!((other.step_losses.len(), unfused.step_losses.len()), (2, 2));
            // The first step is from the same weights, whatever becomes of rounding later.
            let difference = (other.step_losses[0] - unfused.step_losses[0]).abs();
            assert!(difference < 1e-2, "{other:?}, {unfused:?}");
        }
        assert!(fused.saved_bytes < unfused.saved_bytes, "{report:?}");
        let svg = fs::read_to_string(folder.path().join("memory.svg")).unwrap();
        assert!(svg.contains(model), "no {model} in {svg}");
    }
}

#[test]
fn other_networks_and_optimizers_have_parity() {
    let folder = tempdir().unwrap();
    for (model, optimizer) in [("resnet18", "sgd"), ("mobilenet-v2", "adamw")] {
        let arguments = format!(
            "parity --dataset synthetic --train-limit 16 --batch-size 8 --steps 2 --precision f64 \
             --model {model} --optimizer {optimizer}"
        );
        let stdout = mnist(&folder, &arguments).printed();
        assert!(stdout.contains("largest difference"), "{stdout}");
    }
}

#[test]
fn networks_that_there_are_not() {
    let folder = tempdir().unwrap();
    for (options, parts) in [
        (
            "--model resnet18 --norm tutorial",
            ["resnet18", "--norm burn"],
        ),
        ("--model resnet50 --dropout 0.1", ["resnet50", "0.1"]),
        (
            "--model mobilenet-v2 --batch-size 63",
            ["64 digits in batches of 63", "mobilenet-v2"],
        ),
    ] {
        for job in [
            "train --plain --test-limit 8",
            "compare --test-limit 8",
            "parity",
        ] {
            if job == "parity" && options.contains("--dropout") {
                continue;
            }
            let arguments = format!("{job} --dataset synthetic --train-limit 64 {options}");
            mnist(&folder, &arguments).assert_refused(&parts);
        }
    }
}

#[test]
fn options_of_fused_blocks_are_refused_without_any() {
    let folder = tempdir().unwrap();
    for (options, option) in [
        ("--recompute never", "--recompute"),
        ("--recompute conv", "--recompute"),
        ("--max-workspace 1000000", "--max-workspace"),
    ] {
        let arguments = format!("train {SMALL} --plain --variant unfused {options}");
        mnist(&folder, &arguments).assert_refused(&[option, "--variant unfused"]);
    }
    let arguments = format!("train {SMALL} --plain --variant norm-conv --recompute never");
    mnist(&folder, &arguments).assert_refused(&["--recompute", "--variant norm-conv"]);
    let file = "variant = \"unfused\"\nrecompute = \"never\"\n";
    fs::write(folder.path().join("job.toml"), file).unwrap();
    mnist(&folder, "train --config job.toml").assert_refused(&["--recompute", "--variant unfused"]);
    // Files have the default.
    let printed = mnist(&folder, "train --variant unfused --print-config").printed();
    assert!(printed.contains("recompute = \"conv\""), "{printed}");
    fs::write(folder.path().join("job.toml"), &printed).unwrap();
    let again = mnist(&folder, "train --config job.toml --print-config").printed();
    assert_eq!(again, printed);
}

/// Outputs in a run's own folder that are its files.
#[test]
fn outputs_overwrite_no_file_of_the_run() {
    let folder = tempdir().unwrap();
    let train = format!("train {SMALL} --plain --epochs 1 --artifacts run");
    mnist(&folder, &train).printed();
    let path = |name: &str| folder.path().join("run").join(name);
    let names = [
        "job.json",
        "checkpoint/epoch-1.json",
        "checkpoint/other.json",
    ];
    let job = fs::read(path("job.json")).unwrap();
    let list = fs::read(path("checkpoint/epoch-1.json")).unwrap();
    for command in [
        format!("{train} --overwrite"),
        format!("{train} --resume"),
        "predict --artifacts run --test-set".to_string(),
    ] {
        for name in names {
            let outcome = mnist(&folder, &format!("{command} --json run/{name}"));
            outcome.assert_refused(&["--json", name, "a file of the run in run"]);
        }
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("run/job.json", folder.path().join("link")).unwrap();
        mnist(&folder, &format!("{train} --resume --json link")).assert_refused(&["link", "run"]);
    }
    assert_eq!(fs::read(path("job.json")).unwrap(), job);
    assert_eq!(fs::read(path("checkpoint/epoch-1.json")).unwrap(), list);
    // Beside them there is room.
    mnist(&folder, &format!("{train} --resume --json run/report.json")).printed();
    assert_eq!(trained(&folder, "run/report.json").epochs.len(), 1);
}

#[test]
fn a_configuration_goes_round() {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let job = format!("train {SMALL} --optimizer adam --lr 2e-3 --norm tutorial --no-download");
    let printed = mnist(&folder, &format!("{job} --print-config")).printed();
    assert!(entries(folder.path()).is_empty(), "it only prints");
    let options: toml::Table = printed.parse().unwrap();
    for (option, value) in [
        ("optimizer", "\"adam\""),
        ("lr", "0.002"),
        ("norm", "\"tutorial\""),
        ("batch-size", "32"),
        ("no-download", "true"),
        ("resume", "false"),
        // What was not asked for has the value that it would have.
        ("model", "\"tutorial\""),
        ("dropout", "0.5"),
        ("gamma", "0.7"),
    ] {
        assert_eq!(options[option].to_string(), value, "{option} in {printed}");
    }
    assert!(!options.contains_key("config"), "{printed}");

    write("job.toml", &printed);
    write("job.json", &serde_json::to_string(&options).unwrap());
    for config in ["job.toml", "job.json"] {
        let again = mnist(&folder, &format!("train --config {config} --print-config"));
        assert_eq!(again.printed(), printed, "{config}");
    }
    // The command line wins.
    let changed = "train --config job.toml --lr 0.5 --seed 9 --print-config";
    let changed: toml::Table = mnist(&folder, changed).printed().parse().unwrap();
    assert_eq!(changed["lr"].as_float(), Some(0.5));
    assert_eq!(changed["seed"].as_integer(), Some(9));
    assert_eq!(changed["optimizer"], options["optimizer"]);

    let run = "--plain --epochs 1 --artifacts";
    let by_line = mnist(&folder, &format!("{job} {run} line")).printed();
    let by_file = mnist(&folder, &format!("train --config job.toml {run} file")).printed();
    assert_eq!(test_line(&by_file), test_line(&by_line));
}

#[test]
fn configurations_that_make_no_sense() {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("unknown.toml", "learning-rate = 1\nlr = 1\n");
    write("variant.toml", "variant = \"fused\"\n");
    write("value.toml", "batch-size = 0\n");
    write("kind.toml", "lr = [1, 2]\n");
    write("nan.toml", "lr = nan\n");
    write("both.toml", "resume = true\noverwrite = true\n");
    write("large.toml", &"#".repeat((1 << 20) + 1));
    write("syntax.toml", "lr = = 1\n");
    write("syntax.json", "{\"lr\": }");
    for (arguments, parts) in [
        (
            "train --config unknown.toml",
            ["learning-rate;", "artifacts, batch-size"],
        ),
        (
            "compare --config variant.toml",
            ["variant;", "mnist compare"],
        ),
        (
            "parity --config value.toml",
            ["value.toml sets batch-size to 0", "from 1 to"],
        ),
        (
            "train --config kind.toml",
            ["lr to [1, 2]", "a finite number"],
        ),
        (
            "train --config nan.toml",
            ["nan.toml sets lr to nan:", "a finite number"],
        ),
        ("train --config both.toml", ["--resume", "--overwrite"]),
        ("train --config large.toml", ["large.toml", "1 MiB"]),
        (
            "train --config .",
            ["cannot read .", "neither a regular file"],
        ),
        #[cfg(target_os = "linux")]
        (
            "train --config /dev/full",
            ["/dev/full", "neither a regular file"],
        ),
        (
            "train --dataset synthetic --data-dir .",
            ["synthetic", "--data-dir"],
        ),
        ("train --config syntax.toml", ["syntax.toml", "TOML"]),
        ("train --config syntax.json", ["syntax.json", "line 1"]),
        (
            "train --config absent.toml",
            ["absent.toml", "No such file"],
        ),
    ] {
        mnist(&folder, arguments).assert_refused(&parts);
    }
}

#[test]
fn a_run_is_resumed_with_its_own_options() {
    let folder = tempdir().unwrap();
    let job = format!("train {SMALL} --plain --optimizer sgd --lr 0.02 --seed 5");
    let whole = mnist(&folder, &format!("{job} --epochs 2 --artifacts whole")).printed();
    mnist(&folder, &format!("{job} --epochs 1 --artifacts parts")).printed();
    let resume = |options: &str| {
        let arguments = format!("train --plain --artifacts parts --resume {options}");
        mnist(&folder, &arguments)
    };

    write_mnist(folder.path());
    for (options, parts) in [
        ("--optimizer adam", ["parts", "--optimizer sgd, not adam"]),
        ("--lr 0.03", ["parts", "--lr 0.02, not 0.03"]),
        (
            "--seed 6 --gamma 1",
            ["--gamma 0.7, not 1.0", "--seed 5, not 6"],
        ),
        (
            "--variant unfused",
            ["parts", "--variant fused, not unfused"],
        ),
        (
            "--model resnet18",
            ["parts", "--model tutorial, not resnet18"],
        ),
        ("--norm tutorial", ["parts", "--norm burn, not tutorial"]),
        ("--precision f64", ["parts", "--precision f32, not f64"]),
        ("--precision bf16", ["parts", "--precision f32, not bf16"]),
        ("--batch-size 16", ["parts", "--batch-size 32, not 16"]),
        ("--train-limit 32", ["parts", "--train-limit 64, not 32"]),
        (
            "--dataset mnist --data-dir .",
            ["synthetic (64 training", "custom (20 training"],
        ),
    ] {
        resume(&format!("--epochs 2 {options}")).assert_refused(&parts);
    }

    // With what is the same, and what may be another.
    let resumed = resume("--epochs 2 --lr 2e-2 --optimizer sgd --log-interval 1");
    assert_eq!(test_line(&resumed.printed()), test_line(&whole));

    let stored = folder.path().join("parts/job.json");
    let text = fs::read_to_string(&stored).unwrap();
    // As every version before has written them.
    let options = serde_json::json!({
        "batch-size": 32, "dataset": "synthetic", "device": "flex", "dropout": 0.5, "epochs": 2,
        "gamma": 0.7, "log-interval": 1, "lr": 0.02, "model": "tutorial", "no-download": false,
        "norm": "burn", "optimizer": "sgd", "precision": "f32", "recompute": "conv", "seed": 5,
        "test-limit": 32, "train-limit": 64, "variant": "fused",
    });
    let job: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(job["options"], options);
    let unknown = text.replace("\"seed\"", "\"sead\"");
    fs::write(&stored, unknown).unwrap();
    resume("--epochs 3").assert_refused(&["parts/job.json has what", "sead;"]);
    fs::write(&stored, &text[..text.len() / 2]).unwrap();
    resume("--epochs 3").assert_refused(&["job.json is damaged"]);
    fs::remove_file(&stored).unwrap();
    resume("--epochs 3").assert_refused(&["parts has no job.json"]);
}

/// What training said of the test set, prediction says, too; and what it says adds up.
#[test]
fn the_test_set_is_predicted() {
    let folder = tempdir().unwrap();
    let trained = mnist(
        &folder,
        "train --dataset synthetic --train-limit 128 --test-limit 96 --batch-size 64 --plain \
         --epochs 2 --artifacts run",
    )
    .printed();
    let predict = |options: &str| {
        let arguments = format!("predict --artifacts run --test-set {options}");
        mnist(&folder, &arguments)
    };
    let stdout = predict("--json out.json --mistakes worst.svg").printed();
    assert_eq!(test_line(&stdout), test_line(&trained));
    let report: PredictionReport = json(&folder, "out.json");
    assert_eq!(
        (report.model.as_str(), report.form.as_str(), report.epoch),
        ("tutorial", "fused", 2)
    );
    assert_eq!(report.dataset.as_deref(), Some("synthetic"));
    let test = report.test.unwrap();
    let counted: usize = test.confusion.as_flattened().iter().sum();
    assert_eq!((test.digits, counted), (96, 96));
    let right: usize = (0..10).map(|digit| test.confusion[digit][digit]).sum();
    assert_eq!(right, test.correct);
    assert_eq!(test.mistakes.len(), 96 - test.correct);
    assert!(
        !test.mistakes.is_empty(),
        "two epochs of two steps are not enough"
    );
    for mistake in &test.mistakes {
        assert_ne!(mistake.label, mistake.prediction);
        assert!((0.099..1.001).contains(&mistake.probability), "{mistake:?}");
    }

    let svg = fs::read_to_string(folder.path().join("worst.svg")).unwrap();
    let worst = test.mistakes[0];
    let label = format!(">{} read as {}</text>", worst.label, worst.prediction);
    assert!(svg.contains(&label), "no {label} in {svg}");
    // The order is that of the losses, which are in the picture.
    let losses: Vec<f64> = test.mistakes.iter().map(|mistake| mistake.loss).collect();
    assert!(losses.is_sorted_by(|a, b| a >= b), "{losses:?}");
    let shown: Vec<f64> = svg
        .split(">loss ")
        .skip(1)
        .map(|text| text.split('<').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(shown.len(), losses.len().min(40));
    for (shown, loss) in shown.iter().zip(&losses) {
        assert!((shown - loss).abs() < 1e-3, "{shown} for {loss}");
    }
    assert_eq!(svg.matches("<g ").count(), test.mistakes.len().min(40));
    assert!(svg.contains("96 digits of synthetic"), "{svg}");

    // The other form computes the same, and the epoch before something else.
    predict("--form unfused --json unfused.json").printed();
    let unfused: PredictionReport = json(&folder, "unfused.json");
    let unfused = unfused.test.unwrap();
    assert!((unfused.average_loss - test.average_loss).abs() < 1e-3);
    let before = predict("--epoch 1 --json before.json").printed();
    assert!(before.contains("after epoch 1"), "{before}");
    let before: PredictionReport = json(&folder, "before.json");
    assert_eq!(before.epoch, 1);
    assert_ne!(before.test.unwrap().average_loss, test.average_loss);
    // Fewer digits, and others.
    predict("--test-limit 10 --json ten.json").printed();
    let ten: PredictionReport = json(&folder, "ten.json");
    assert_eq!(ten.test.unwrap().digits, 10);
    write_mnist(folder.path());
    let other = predict("--dataset mnist --data-dir .").printed();
    assert!(
        other.contains("Note: the model was trained on synthetic"),
        "{other}"
    );

    for (options, parts) in [
        (
            "--form folded",
            ["tutorial cannot be folded", "running statistics"],
        ),
        (
            "--epoch 7",
            ["of epoch 7", "the checkpoints of epochs 1 and 2"],
        ),
        ("--mistakes worst.png", ["ends in .svg", "worst.png"]),
        ("--mistakes absent/worst.svg", ["cannot write", "absent"]),
        (
            "--mistakes a.svg --json a.svg",
            ["--json and --mistakes", "the same file"],
        ),
    ] {
        predict(options).assert_refused(&parts);
    }
    mnist(&folder, "predict --test-set --artifacts absent").assert_refused(&["absent", "job.json"]);
    mnist(&folder, "predict --artifacts run").assert_refused(&["--images DIR or --test-set"]);
}

/// A drawn digit, enlarged, on paper of another colour.
fn drawing(index: usize, paper: u8, pen: u8) -> GrayImage {
    let digits = generate(index + 1, 77);
    let image = digits.image(index);
    GrayImage::from_fn(180, 150, |x, y| {
        let pixel = |at: u32, margin: u32| {
            let at = at.checked_sub(margin)? as usize / 4;
            (at < SIDE).then_some(at)
        };
        let ink = match (pixel(x, 50), pixel(y, 20)) {
            (Some(x), Some(y)) => image[y * SIDE + x] > 127,
            _ => false,
        };
        Luma([if ink { pen } else { paper }])
    })
}

#[test]
fn pictures_in_a_folder_are_predicted() {
    let folder = tempdir().unwrap();
    mnist(
        &folder,
        &format!("train {SMALL} --plain --epochs 1 --artifacts run"),
    )
    .printed();
    let (scans, one) = (folder.path().join("scans"), folder.path().join("one"));
    fs::create_dir(&scans).unwrap();
    fs::create_dir(&one).unwrap();
    for index in 0..4 {
        let black = drawing(index, 255, 0);
        let white = drawing(index, 0, 255);
        let name = |ink: &str| scans.join(format!("{ink}-{index}"));
        black
            .save_with_format(name("black").with_extension("png"), ImageFormat::Png)
            .unwrap();
        white
            .save_with_format(name("white").with_extension("pgm"), ImageFormat::Pnm)
            .unwrap();
    }
    fs::copy(scans.join("black-2.png"), one.join("alone.png")).unwrap();
    fs::write(scans.join("notes.txt"), "no picture").unwrap();

    let predict = |options: &str| mnist(&folder, &format!("predict --artifacts run {options}"));
    let stdout = predict("--images scans --json all.json").printed();
    assert!(stdout.contains("the first 32 test digits"), "{stdout}");
    let others = "No pictures by ending or content, and left out: notes.txt\n";
    assert!(stdout.contains(others), "{stdout}");
    let all: PredictionReport = json(&folder, "all.json");
    assert_eq!((all.images.len(), all.skipped.len()), (8, 0));
    assert_eq!(all.images[0].file, "black-0.png");
    for image in &all.images {
        assert!(
            stdout.contains(&image.file),
            "no {} in {stdout}",
            image.file
        );
        let sum: f64 = image.probabilities.iter().sum();
        assert!((sum - 1.0).abs() < 1e-5, "{image:?}");
        assert_eq!(
            image.probabilities[usize::from(image.prediction)],
            image.probability
        );
    }
    // The colours make no difference, nor does what else is there.
    let alike = |a: &[f64; 10], b: &[f64; 10]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    for (black, white) in all.images[..4].iter().zip(&all.images[4..]) {
        assert!(
            alike(&black.probabilities, &white.probabilities),
            "{black:?}, {white:?}"
        );
    }
    predict("--images one --json one.json").printed();
    let alone: PredictionReport = json(&folder, "one.json");
    let (alone, among) = (&alone.images[0], &all.images[2]);
    assert!(
        alike(&alone.probabilities, &among.probabilities),
        "{alone:?}, {among:?}"
    );
    // Burn's own layers take the same statistics.
    predict("--images one --form unfused --json unfused.json").printed();
    let unfused: PredictionReport = json(&folder, "unfused.json");
    let differences = alone
        .probabilities
        .iter()
        .zip(&unfused.images[0].probabilities);
    for (fused, unfused) in differences {
        assert!((fused - unfused).abs() < 1e-3, "{fused}, {unfused}");
    }

    // What cannot be read is named, and the rest is there all the same.
    fs::write(scans.join("broken.png"), "no picture").unwrap();
    GrayImage::from_pixel(30, 30, Luma([200]))
        .save_with_format(scans.join("empty.png"), ImageFormat::Png)
        .unwrap();
    let outcome = predict("--images scans --json rest.json");
    outcome.assert_exit(1);
    for part in [
        "skipped: broken.png cannot be decoded",
        "skipped: empty.png is empty",
        "error: 2 of 10 pictures could not be classified",
    ] {
        let error = &outcome.stderr;
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let rest: PredictionReport = json(&folder, "rest.json");
    let predictions = |report: &PredictionReport| -> Vec<(String, u8)> {
        let images = report.images.iter();
        images.map(|i| (i.file.clone(), i.prediction)).collect()
    };
    assert_eq!(predictions(&rest), predictions(&all));
    let skipped: Vec<&str> = rest.skipped.iter().map(|s| s.file.as_str()).collect();
    assert_eq!(skipped, ["broken.png", "empty.png"]);

    let odd = folder.path().join("odd");
    fs::create_dir(&odd).unwrap();
    fs::copy(scans.join("black-2.png"), odd.join("a.png")).unwrap();
    fs::write(odd.join("photo.jpg"), b"\xff\xd8\xff\xe0\0\x10JFIF\0").unwrap();
    fs::write(odd.join("notes.txt"), "no picture").unwrap();
    let mut skipped = vec!["photo.jpg is of a format that is not read here"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("absent", odd.join("link.png")).unwrap();
        make_pipe(&odd.join("pipe.png"));
        fs::copy(scans.join("black-2.png"), odd.join("\u{1b}[31mred.png")).unwrap();
        fs::write(odd.join("\u{1b}]0;x\n.png"), "no picture").unwrap();
        skipped.extend([
            "link.png cannot be read: No such file",
            "pipe.png is no regular file",
            "\\u{1b}]0;x\\n.png cannot be decoded",
        ]);
    }
    let outcome = predict("--images odd --json odd.json");
    outcome.assert_exit(1);
    let mut named: Vec<&str> = outcome.stderr.lines().collect();
    let count = named.pop().unwrap();
    assert_eq!(named.len(), skipped.len(), "{}", outcome.stderr);
    for part in &skipped {
        let has = |line: &&str| line.starts_with(&format!("skipped: {part}"));
        assert!(named.iter().any(has), "no {part:?} in {}", outcome.stderr);
    }
    assert!(
        count.starts_with(&format!("error: {} of ", skipped.len())),
        "{count}"
    );
    for output in [&outcome.stdout, &outcome.stderr] {
        assert!(!output.contains('\u{1b}'), "{output:?}");
    }
    #[cfg(unix)]
    assert!(
        outcome.stdout.contains("\\u{1b}[31mred.png"),
        "{}",
        outcome.stdout
    );
    let report: PredictionReport = json(&folder, "odd.json");
    assert_eq!(report.skipped.len(), skipped.len());

    fs::create_dir(folder.path().join("none")).unwrap();
    for (options, parts) in [
        ("--images none", ["none", "no pictures"]),
        ("--images absent", ["absent", "No such file"]),
        (
            "--images scans --mistakes a.svg",
            ["--mistakes", "--test-set"],
        ),
        (
            "--images scans --form folded",
            ["tutorial", "cannot be folded"],
        ),
    ] {
        predict(options).assert_refused(&parts);
    }
}

/// A network that keeps running statistics predicts the same in every form.
#[test]
fn a_network_with_statistics_is_folded() {
    let folder = tempdir().unwrap();
    mnist(
        &folder,
        "train --model mobilenet-v2 --optimizer sgd --dataset synthetic --train-limit 32 \
         --test-limit 16 --batch-size 16 --epochs 1 --plain --artifacts run",
    )
    .printed();
    let scans = folder.path().join("scans");
    fs::create_dir(&scans).unwrap();
    for index in 0..3 {
        drawing(index, 255, 0)
            .save_with_format(scans.join(format!("{index}.png")), ImageFormat::Png)
            .unwrap();
    }
    let reports = ["fused", "folded", "unfused"].map(|form| {
        let arguments =
            format!("predict --artifacts run --images scans --form {form} --json {form}.json");
        let stdout = mnist(&folder, &arguments).printed();
        assert!(
            stdout.contains(form) && !stdout.contains("Data:"),
            "{stdout}"
        );
        let report: PredictionReport = json(&folder, &format!("{form}.json"));
        assert_eq!((report.form.as_str(), report.dataset), (form, None));
        report.images
    });
    let [fused, folded, unfused] = reports;
    for other in [folded, unfused] {
        for (fused, other) in fused.iter().zip(&other) {
            let pairs = fused.probabilities.iter().zip(&other.probabilities);
            for (a, b) in pairs {
                assert!((a - b).abs() < 1e-3, "{fused:?}, {other:?}");
            }
        }
    }
    mnist(&folder, "predict --artifacts run --test-set --form folded").printed();
    for (options, option) in [
        ("--dataset synthetic", "--dataset"),
        ("--data-dir .", "--data-dir"),
        ("--test-limit 8", "--test-limit"),
    ] {
        let arguments = format!("predict --artifacts run --images scans {options}");
        mnist(&folder, &arguments).assert_refused(&[option, "mobilenet-v2 needs none"]);
    }
}

/// Makes a FIFO.
#[cfg(unix)]
fn make_pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success(), "{}", path.display());
}

/// Runs the binary in a process group of its own, as a terminal does, waits for a line that starts
/// so, and interrupts the group.
#[cfg(unix)]
fn interrupted(folder: &TempDir, arguments: &str, line: &str) -> Outcome {
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::process::CommandExt;

    let mut child = Command::new(env!("CARGO_BIN_EXE_mnist"))
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .env(OFFLINE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut stdout = String::new();
    loop {
        let start = stdout.len();
        let read = reader.read_line(&mut stdout).unwrap();
        assert!(read > 0, "{arguments}: no {line:?} in {stdout}");
        if stdout[start..].starts_with(line) {
            break;
        }
    }
    let kill = format!("kill -INT -{}", child.id());
    let killed = Command::new("sh").args(["-c", &kill]).status().unwrap();
    assert!(killed.success(), "{kill}");
    reader.read_to_string(&mut stdout).unwrap();
    let output = child.wait_with_output().unwrap();
    Outcome {
        arguments: arguments.to_string(),
        code: output.status.code(),
        stdout,
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_training_says_what_it_keeps() {
    let folder = tempdir().unwrap();
    let options = "--plain --artifacts run --json out.json";
    let outcome = interrupted(
        &folder,
        &format!("train {SMALL} {options} --epochs 9999"),
        "Epoch 3/9999",
    );
    outcome.assert_exit(1);
    let error = &outcome.stderr;
    assert_eq!(error.lines().count(), 1, "{error}");
    for part in [
        "error: interrupted in ",
        "kept in run: the checkpoints of epochs ",
        "out.json has the epochs that were finished",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let (_, next) = error.split_once("--resume goes on with epoch ").unwrap();
    let next: usize = next.split(';').next().unwrap().trim().parse().unwrap();
    let checkpoint = |epoch: usize| {
        let name = format!("run/checkpoint/epoch-{epoch}.json");
        folder.path().join(name).exists()
    };
    assert!(
        next > 2 && checkpoint(next - 1) && !checkpoint(next),
        "{error}"
    );

    let resumed = mnist(
        &folder,
        &format!("train --plain --artifacts run --resume --epochs {next}"),
    );
    let resumed = resumed.printed();
    let after = format!("Resuming after epoch {}.", next - 1);
    assert!(resumed.contains(&after), "no {after:?} in {resumed}");
    assert!(
        resumed.contains(&format!("Epoch {next}/{next}")),
        "{resumed}"
    );
}

#[cfg(unix)]
#[test]
fn an_interrupted_comparison_says_what_it_has() {
    let folder = tempdir().unwrap();
    let outcome = interrupted(
        &folder,
        &format!("compare {SMALL} --epochs 9999 --json out.json"),
        "Epoch 1/9999",
    );
    outcome.assert_exit(1);
    let error = &outcome.stderr;
    for part in [
        "error: interrupted: fused was stopped in epoch ",
        "unfused was not begun",
        "out.json has what was measured",
        "no weights are kept",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let report: Report = json(&folder, "out.json");
    let [fused] = report.variants.as_slice() else {
        panic!("one variant in {report:?}");
    };
    assert!(fused.interrupted && !fused.epochs.is_empty());
}

/// The same training, by either command, in one form.
#[test]
fn train_and_compare_report_in_one_form() {
    let folder = tempdir().unwrap();
    let job = format!("{SMALL} --seed 11 --optimizer sgd");
    mnist(
        &folder,
        &format!("train {job} --epochs 1 --plain --json train.json"),
    )
    .printed();
    mnist(&folder, &format!("compare {job} --json compare.json")).printed();
    let [train, compare] = ["train.json", "compare.json"].map(|name| {
        let value: serde_json::Value = json(&folder, name);
        assert_eq!(value["schema"], SCHEMA, "{value}");
        json::<Report>(&folder, name)
    });
    assert_eq!(train.burn_version, BURN_VERSION);
    assert_eq!(train.version, env!("CARGO_PKG_VERSION"));
    assert_eq!((train.seed, train.batch_size), (11, 32));
    let about = |report: &Report| Report {
        variants: Vec::new(),
        ..report.clone()
    };
    assert_eq!(about(&train), about(&compare));
    let [alone] = train.variants.as_slice() else {
        panic!("one variant in {train:?}");
    };
    let fused = &compare.variants[0];
    assert_eq!(alone.name, fused.name);
    assert_eq!(alone.step_losses, fused.step_losses);
    assert_eq!(alone.epochs, fused.epochs);
    assert_eq!(alone.saved_bytes, fused.saved_bytes);
}

/// The last batch is smaller, and its peak lower.
#[test]
fn an_epochs_line_and_the_report_have_the_same_peak() {
    let folder = tempdir().unwrap();
    let stdout = mnist(
        &folder,
        "train --dataset synthetic --train-limit 40 --test-limit 8 --batch-size 32 --epochs 1 --plain \
         --json out.json",
    )
    .printed();
    let (_, peak) = stdout.split_once("Memory peak ").expect(&stdout);
    let peak: f64 = peak.split_whitespace().next().unwrap().parse().unwrap();
    let reported = trained(&folder, "out.json").peak_bytes as f64 / f64::from(1 << 20);
    // To the digits of the line.
    assert!((peak - reported).abs() < 0.06, "{peak}, {reported}");
}

#[test]
fn a_report_is_of_the_whole_run() {
    let folder = tempdir().unwrap();
    let train = |options: &str| {
        let arguments = format!("train {SMALL} --plain --optimizer sgd {options}");
        mnist(&folder, &arguments).printed()
    };
    train("--epochs 3 --artifacts whole --json whole.json");
    train("--epochs 1 --artifacts parts");
    train("--epochs 3 --artifacts parts --resume --json parts.json");
    let [whole, parts] = ["whole.json", "parts.json"].map(|name| trained(&folder, name));
    assert_eq!(parts.step_losses.len(), 3 * 2);
    assert_eq!(parts.step_losses, whole.step_losses);
    assert_eq!(parts.epochs, whole.epochs);

    // There is nothing to do, and nothing new to report: the file is not written.
    let path = folder.path().join("parts.json");
    let before = fs::read_to_string(&path).unwrap();
    let marked = format!("{before}\n\n");
    fs::write(&path, &marked).unwrap();
    let resume = "--epochs 3 --artifacts parts --resume --json parts.json";
    let stdout = train(resume);
    assert!(stdout.contains("Nothing to do"), "{stdout}");
    assert!(!stdout.contains("Report:"), "{stdout}");
    assert_eq!(fs::read_to_string(&path).unwrap(), marked);
    // Unless it is not there, or of another run.
    for other in [
        None,
        Some(fs::read(folder.path().join("whole.json")).unwrap()),
    ] {
        fs::remove_file(&path).unwrap();
        if let Some(other) = other {
            let fewer = String::from_utf8(other)
                .unwrap()
                .replace("\"test_loss\"", "\"loss\"");
            fs::write(&path, fewer).unwrap();
        }
        train(resume);
        assert_eq!(trained(&folder, "parts.json").epochs, parts.epochs);
    }
}

#[test]
fn a_run_that_diverges_is_reported() {
    let folder = tempdir().unwrap();
    let job = format!("{SMALL} --optimizer sgd --lr 1e30");
    let assert_diverged = |report: &Report| {
        for variant in &report.variants {
            let diverged = variant.diverged.expect(&variant.name);
            assert_eq!(diverged.epoch, 1, "{variant:?}");
            let mut losses = variant.epochs.iter().map(|epoch| epoch.test_loss);
            assert!(losses.all(|loss| !loss.is_finite()), "{variant:?}");
        }
    };

    let outcome = mnist(
        &folder,
        &format!("compare {job} --json c.json --plot c.svg"),
    );
    outcome.assert_exit(1);
    let error = &outcome.stderr;
    for part in [
        "error: fused diverged in epoch 1",
        "unfused diverged in epoch 1",
        "--lr",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert!(
        outcome.stdout.contains("Peak memory allocated:"),
        "{}",
        outcome.stdout
    );
    let compared: Report = json(&folder, "c.json");
    assert_eq!(compared.variants.len(), 3);
    assert_diverged(&compared);
    let svg = fs::read_to_string(folder.path().join("c.svg")).unwrap();
    assert!(svg.contains("fused (diverged in epoch 1"), "{svg}");

    // The losses are read back from the checkpoint, too.
    let train = |options: &str| {
        let job = format!("{SMALL} --optimizer sgd --lr 1e300");
        let arguments = format!("train {job} --plain --artifacts run --json t.json {options}");
        let outcome = mnist(&folder, &arguments);
        outcome.assert_exit(1);
        let error = &outcome.stderr;
        assert!(
            error.starts_with("error: fused diverged in epoch 1"),
            "{error}"
        );
        let report: Report = json(&folder, "t.json");
        assert_diverged(&report);
        report.variants[0].epochs.len()
    };
    assert_eq!(train("--epochs 1"), 1);
    assert_eq!(train("--epochs 2 --resume"), 2);
}

/// What a FIFO was given.
#[cfg(target_os = "linux")]
struct Fifo(fs::File);

#[cfg(target_os = "linux")]
impl Fifo {
    fn new(path: &Path) -> Self {
        let made = Command::new("mkfifo").arg(path).status().unwrap();
        assert!(made.success());
        // Opened for both, so that neither side waits for the other.
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        Self(file.unwrap())
    }

    /// Reads what is in it, which may be nothing.
    fn read(&mut self) -> String {
        use std::io::Read;

        self.0.write_all(b"\0").unwrap();
        let mut bytes = Vec::new();
        while bytes.pop_if(|last| *last == 0).is_none() {
            let mut some = [0; 1 << 16];
            let count = self.0.read(&mut some).unwrap();
            bytes.extend_from_slice(&some[..count]);
        }
        String::from_utf8(bytes).unwrap()
    }
}

/// The JSON among the lines of standard output.
#[cfg(target_os = "linux")]
fn printed_json<T: DeserializeOwned>(stdout: &str) -> T {
    let start = stdout.find("{\n").expect(stdout);
    let end = stdout.find("\n}\n").expect(stdout);
    serde_json::from_str(&stdout[start..end + 2]).unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn outputs_that_are_no_regular_files() {
    use std::os::unix::fs::{FileTypeExt, symlink};

    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut fifo = Fifo::new(&path("fifo"));
    fs::create_dir(path("real")).unwrap();
    symlink("real/report.json", path("link")).unwrap();
    let mut check = |first: &str, command: &str, wanted: &[&str]| {
        let run = |command: &str, output: &str| {
            mnist(&folder, &format!("{command} --json {output}")).printed()
        };
        run(first, "fifo");
        let by_fifo = fifo.read();
        run(command, "link");
        let by_link = fs::read_to_string(path("real/report.json")).unwrap();
        let by_stdout: serde_json::Value = printed_json(&run(command, "/dev/stdout"));
        for json in [by_fifo, by_link, by_stdout.to_string()] {
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            for field in wanted {
                assert!(!json[field].is_null(), "{command}: no {field} in {json}");
            }
        }
        assert!(fs::metadata(path("fifo")).unwrap().file_type().is_fifo());
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        fs::remove_file(path("real/report.json")).unwrap();
    };
    let train = format!("train {SMALL} --epochs 1 --plain --artifacts run");
    // A run that is over needs no more training.
    check(
        &train,
        &format!("{train} --resume"),
        &["schema", "variants"],
    );
    let predict = "predict --artifacts run --test-set";
    check(predict, predict, &["test", "epoch"]);
    let compare = "compare --dataset synthetic --train-limit 16 --test-limit 8 --batch-size 8";
    check(compare, compare, &["schema", "variants"]);
}

#[test]
fn two_outputs_are_two_files() {
    let folder = tempdir().unwrap();
    for outputs in [
        "--plot s.svg --json s.svg",
        "--plot ./s.svg --json s.svg",
        "--json s.svg --plot folder/../s.svg",
    ] {
        fs::create_dir_all(folder.path().join("folder")).unwrap();
        mnist(&folder, &format!("compare {SMALL} {outputs}")).assert_refused(&[
            "--json",
            "--plot",
            "the same file",
            "s.svg",
        ]);
    }
    for name in ["x.png", "x", "x.svg.gz"] {
        mnist(&folder, &format!("compare {SMALL} --plot {name}"))
            .assert_refused(&["--plot", ".svg", name]);
    }
    assert_eq!(entries(folder.path()), ["folder"]);
}

/// What cannot be printed is an error, and what was asked for as a file is there all the same.
#[cfg(target_os = "linux")]
#[test]
fn output_that_nobody_takes() {
    let folder = tempdir().unwrap();
    mnist(
        &folder,
        &format!("train {SMALL} --epochs 1 --plain --artifacts run"),
    )
    .printed();
    let predict = "predict --artifacts run --test-set";
    let run = |arguments: &str, stdout: Stdio| {
        Command::new(env!("CARGO_BIN_EXE_mnist"))
            .args(arguments.split_whitespace())
            .current_dir(&folder)
            .env(OFFLINE, "1")
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .output()
            .unwrap()
    };
    for arguments in [predict, "train --print-config", "--help"] {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = run(arguments, full.into());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments}: {error}");
        assert_eq!(
            error,
            "error: cannot print: No space left on device (os error 28)\n"
        );

        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = run(arguments, writer.into());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), error.as_str()),
            (Some(1), ""),
            "{arguments}"
        );
    }
}

/// The one variant in the report of a training.
fn trained(folder: &TempDir, name: &str) -> VariantReport {
    let report: Report = json(folder, name);
    let [variant] = <[VariantReport; 1]>::try_from(report.variants).expect(name);
    variant
}

/// Reads a file that the binary wrote.
fn json<T: DeserializeOwned>(folder: &TempDir, name: &str) -> T {
    let text = fs::read_to_string(folder.path().join(name)).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error} in {text}"))
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
