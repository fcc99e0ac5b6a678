use super::*;

use std::fs;
use std::path::PathBuf;

use burn::train::Interrupter;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("burn-conv-bn-fit-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }

    fn file(&self, path: &str) -> PathBuf {
        let path = self.0.join(path);
        let parent = path.parent().expect("it is in the directory");
        fs::create_dir_all(parent).expect("the temporary directory is writable");
        fs::write(&path, "x").expect("the temporary directory is writable");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn options(scratch: &Scratch, resume: bool) -> RunOptions {
    RunOptions {
        directory: scratch.0.clone(),
        overwrite: false,
        checkpoints: false,
        resume,
        patience: None,
        dashboard: false,
        run_file: None,
        interrupter: Interrupter::new(),
    }
}

#[test]
fn a_run_is_not_overwritten_unasked() {
    for name in ["train/epoch-1/Loss.log", "checkpoint/epoch-0.json"] {
        let scratch = Scratch::new("overwrite");
        let file = scratch.file(name);
        let other = scratch.file("checkpoint/notes.txt");
        let mut options = options(&scratch, false);

        let refused = prepare_directory(&options, None, None);
        assert!(matches!(refused, Err(FitError::DirectoryInUse { .. })));
        assert!(file.exists());

        options.overwrite = true;
        prepare_directory(&options, None, None).expect("asked to");
        assert!(!file.exists());
        assert!(other.exists());
    }
}

#[test]
fn a_resumed_run_keeps_what_it_has() {
    let scratch = Scratch::new("latest");
    let files = [
        scratch.file("valid/epoch-2/Loss.log"),
        scratch.file("valid/epoch-3/Loss.log"),
        scratch.file("checkpoint/optim-2.bpk"),
        scratch.file("checkpoint/optim-3.bpk"),
    ];
    let unfinished = [
        scratch.file(".partial-0"),
        scratch.file("valid/epoch-2/.partial-0"),
        scratch.file("checkpoint/.partial-0"),
    ];
    prepare_directory(&options(&scratch, true), Some(2), None).expect("writable");
    assert!(files.iter().all(|path| path.exists()));
    assert!(!unfinished.iter().any(|path| path.exists()));
    let left = fs::read_dir(&scratch.0).expect("readable").count();
    assert_eq!(left, 2, "nothing is left of the check for room");
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let scratch = Scratch::new("file");
    let file = scratch.file("file");
    let mut options = options(&scratch, false);
    options.directory = file.join("run");
    assert!(matches!(lock(&options), Err(FitError::Directory { .. })));
}

#[test]
fn a_folder_without_checkpoints_cannot_be_resumed() {
    let scratch = Scratch::new("absent");
    let refused = resumed_set(&options(&scratch, true));
    assert!(matches!(refused, Err(FitError::NoCheckpoint { .. })));
    let (newest, _) = checkpoint::newest(&scratch.0).expect("readable");
    assert!(newest.is_none());
}

#[test]
fn a_panic_is_an_error_that_tells_its_message() {
    let state = "full";
    let error = guarded::<()>(|| panic!("the disk is {state}"));
    assert!(matches!(error, Err(FitError::Panicked(text)) if text == "the disk is full"));
}
