use std::io;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::super::idx::{IdxError, IdxProblem};
use super::super::testing::{gzip, idx_files, real_mnist, refusing_mirror, serve, write_idx};
use super::*;

/// A machine without network whose cache is `dir`.
fn offline(dir: &TempDir) -> Machine<'static> {
    Machine {
        cache: Some(dir.path().into()),
        offline: true,
        mirrors: &[],
    }
}

fn small() -> (Digits, Digits) {
    (generate(30, 1), generate(20, 2))
}

fn in_folder(dir: &Path) -> Result<MnistData> {
    let request = DataRequest {
        data_dir: Some(dir.into()),
        ..DataRequest::default()
    };
    // Nothing but the folder may be used.
    let machine = Machine {
        cache: None,
        offline: true,
        mirrors: &[],
    };
    resolve_on(&machine, &request, None)
}

/// A request that is quick to fulfil by drawing.
fn auto() -> DataRequest {
    DataRequest {
        train_limit: Some(12),
        ..DataRequest::default()
    }
}

/// Puts the real files where Burn keeps its copy.
fn fill_burn_cache(cache: &Path, real: &Path) {
    for file in &FILES {
        let dir = cache.join("burn-dataset/mnist").join(file.part);
        fs::create_dir_all(&dir).unwrap();
        let packed = fs::File::open(file.find(real).unwrap()).unwrap();
        let mut plain = fs::File::create(dir.join(file.name)).unwrap();
        io::copy(&mut flate2::read::GzDecoder::new(packed), &mut plain).unwrap();
    }
}

#[test]
fn reads_a_folder_of_custom_digits() {
    let (train, test) = small();
    let dir = TempDir::new().unwrap();
    write_idx(dir.path(), &train, &test);
    let data = in_folder(dir.path()).unwrap();
    assert_eq!((data.train, data.test), (train, test));
    assert_eq!(data.name, "custom");
    assert_eq!(
        data.origin,
        format!(
            "custom digits from {} (not MNIST by their checksums)",
            dir.path().display()
        )
    );
}

#[test]
fn reads_the_folder_below_that_torchvision_fills() {
    let (train, test) = small();
    let dir = TempDir::new().unwrap();
    let raw = dir.path().join("MNIST/raw");
    write_idx(&raw, &train, &test);
    let data = in_folder(dir.path()).unwrap();
    assert_eq!(data.train, train);
    assert!(
        data.origin.contains(raw.to_str().unwrap()),
        "{}",
        data.origin
    );
}

#[test]
fn reads_gzip_files_with_dotted_names() {
    let (train, test) = small();
    let dir = TempDir::new().unwrap();
    for (file, bytes) in FILES.iter().zip(idx_files(&train, &test)) {
        let name = file.name.replace("-idx", ".idx") + ".gz";
        fs::write(dir.path().join(name), gzip(&bytes)).unwrap();
    }
    assert_eq!(in_folder(dir.path()).unwrap().test, test);
}

#[test]
fn names_a_missing_file_and_draws_nothing() {
    let (train, test) = small();
    for file in &FILES {
        let dir = TempDir::new().unwrap();
        write_idx(dir.path(), &train, &test);
        fs::remove_file(dir.path().join(file.name)).unwrap();
        let error = in_folder(dir.path()).unwrap_err().to_string();
        let wanted = format!("{} has no {}", dir.path().display(), file.name);
        assert!(error.starts_with(&wanted), "{error}");
    }
}

#[test]
fn names_a_damaged_file_and_draws_nothing() {
    let (train, test) = small();
    for (damaged, sound) in FILES.iter().zip(idx_files(&train, &test)) {
        let dir = TempDir::new().unwrap();
        write_idx(dir.path(), &train, &test);
        let plain = dir.path().join(damaged.name);
        let packed = plain.with_extension("gz");
        fs::remove_file(&plain).unwrap();
        let bytes = gzip(&sound);
        fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
        let error = in_folder(dir.path()).unwrap_err();
        let error = error.downcast::<IdxError>().unwrap();
        assert_eq!(error.path, packed);
        assert!(matches!(error.problem, IdxProblem::Gzip(_)), "{error}");
    }
}

#[test]
fn names_a_folder_that_is_none() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for none in [file, dir.path().join("absent")] {
        let error = in_folder(&none).unwrap_err().to_string();
        assert_eq!(error, format!("cannot look at {}", none.display()));
    }
}

#[test]
fn reads_the_real_mnist() {
    let Some(real) = real_mnist() else { return };
    let data = in_folder(&real).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (60_000, 10_000));
    assert_eq!(data.train.labels()[..5], [5, 0, 4, 1, 9]);
    assert_eq!(data.test.labels()[..5], [7, 2, 1, 0, 4]);
    assert_eq!(data.name, "mnist");
    assert_eq!(data.origin, format!("MNIST from {}", real.display()));
}

#[test]
fn limits_keep_the_first_digits() {
    let (train, test) = small();
    let dir = TempDir::new().unwrap();
    write_idx(dir.path(), &train, &test);
    let request = DataRequest {
        data_dir: Some(dir.path().into()),
        train_limit: Some(7),
        no_download: true,
        ..DataRequest::default()
    };
    let data = resolve_on(&offline(&dir), &request, Some(1_000)).unwrap();
    assert_eq!(data.train.labels(), &train.labels()[..7]);
    assert_eq!(data.test, test);
}

#[test]
fn draws_on_request_without_looking_around() {
    let dir = TempDir::new().unwrap();
    let request = DataRequest {
        dataset: DatasetChoice::Synthetic,
        seed: 4,
        ..auto()
    };
    let data = resolve_on(&offline(&dir), &request, Some(8)).unwrap();
    assert_eq!(data.train, generate(12, 4));
    assert_ne!(data.test, generate(8, 4), "the test digits must be new");
    assert_eq!(data.name, "synthetic");
    assert_eq!(
        data.origin,
        "built-in synthetic digits (seed 4), as requested"
    );
}

#[test]
fn auto_draws_and_gives_the_reasons() {
    let dir = TempDir::new().unwrap();
    let data = resolve_on(&offline(&dir), &auto(), Some(8)).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (12, 8));
    let line = data.origin;
    let cache = dir.path().display();
    assert_eq!(
        line,
        format!(
            "built-in synthetic digits (seed 0), because no MNIST was found: \
             nothing in {cache}/burn-dataset/mnist; nothing in {cache}/burn-conv-bn/mnist; \
             the download is forbidden by BURN_CONV_BN_OFFLINE"
        )
    );
}

#[test]
fn mnist_on_demand_is_mnist_or_an_error() {
    let dir = TempDir::new().unwrap();
    let request = DataRequest {
        dataset: DatasetChoice::Mnist,
        no_download: true,
        ..auto()
    };
    let error = resolve_on(&offline(&dir), &request, Some(8)).unwrap_err();
    assert!(
        error.to_string().contains("the download is not allowed"),
        "{error}"
    );
}

#[test]
fn fails_fast_without_a_network() {
    let dir = TempDir::new().unwrap();
    let mirrors = [refusing_mirror(), refusing_mirror()];
    let mirrors = mirrors.each_ref().map(String::as_str);
    let machine = Machine {
        offline: false,
        mirrors: &mirrors,
        ..offline(&dir)
    };
    let start = Instant::now();
    let data = resolve_on(&machine, &auto(), Some(8)).unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
    let line = data.origin;
    assert!(line.contains("the download failed"), "{line}");
    assert!(mirrors.iter().all(|mirror| line.contains(mirror)), "{line}");
}

#[test]
fn a_system_without_a_cache_folder_draws() {
    let machine = Machine {
        cache: None,
        offline: false,
        mirrors: &[],
    };
    let line = resolve_on(&machine, &auto(), Some(8)).unwrap().origin;
    assert!(
        line.ends_with("this system names no cache folder"),
        "{line}"
    );
}

#[test]
fn passes_over_unsound_or_foreign_files_in_the_caches() {
    let (train, test) = small();
    let dir = TempDir::new().unwrap();
    let (burn, own) = ("burn-dataset/mnist", "burn-conv-bn/mnist");
    write_idx(&dir.path().join(burn).join("train"), &train, &test);
    for (file, bytes) in FILES.iter().zip(idx_files(&train, &test)) {
        let path = download::stored(&dir.path().join(own), file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, gzip(&bytes)).unwrap();
    }
    let line = resolve_on(&offline(&dir), &auto(), Some(8)).unwrap().origin;
    // Burn's copy lacks the test part; the earlier download holds other digits.
    assert!(line.contains("test/t10k-images-idx3-ubyte"), "{line}");
    assert!(
        line.contains("burn-conv-bn/mnist do not have the checksums of MNIST"),
        "{line}"
    );
}

#[test]
fn uses_the_copy_that_burn_keeps() {
    let Some(real) = real_mnist() else { return };
    let dir = TempDir::new().unwrap();
    fill_burn_cache(dir.path(), &real);
    let data = resolve_on(&offline(&dir), &auto(), Some(8)).unwrap();
    assert_eq!(data.train.labels()[..3], [5, 0, 4]);
    let path = dir.path().join("burn-dataset/mnist");
    let line = format!("MNIST from Burn's cache at {}", path.display());
    assert_eq!(data.origin, line);
}

#[test]
fn downloads_once_and_tells_what_it_passed_over() {
    let Some(real) = real_mnist() else { return };
    let dir = TempDir::new().unwrap();
    let (train, test) = small();
    for part in ["train", "test"] {
        write_idx(
            &dir.path().join("burn-dataset/mnist").join(part),
            &train,
            &test,
        );
    }
    let mirror = serve(move |name| fs::read(real.join(name)).ok());
    let online = Machine {
        offline: false,
        mirrors: &[&mirror],
        ..offline(&dir)
    };

    let line = resolve_on(&online, &auto(), Some(8)).unwrap().origin;
    assert!(line.starts_with("MNIST downloaded to "), "{line}");
    assert!(line.contains("(passed over: the files in "), "{line}");

    let line = resolve_on(&offline(&dir), &auto(), Some(8)).unwrap().origin;
    assert!(
        line.starts_with("MNIST from an earlier download at "),
        "{line}"
    );
    assert!(line.starts_with("MNIST"), "{line}");
}

#[test]
fn the_variable_counts_unless_empty_or_zero() {
    let set = |value: &str| is_set(Some(OsStr::new(value)));
    assert!(set("1") && set("true"));
    assert!(!set("0") && !set("") && !is_set(None));
}
