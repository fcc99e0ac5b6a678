use super::*;

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

fn options(scratch: &Scratch, resume: Resume) -> FitOptions {
    let mut options = FitOptions::new(&scratch.0);
    options.resume = resume;
    options
}

#[test]
fn a_run_is_not_overwritten_unasked() {
    for name in ["train/epoch-1/Loss.log", "checkpoint/epoch-0.json"] {
        let scratch = Scratch::new("overwrite");
        let file = scratch.file(name);
        let other = scratch.file("checkpoint/notes.txt");
        let mut options = options(&scratch, Resume::No);

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
    prepare_directory(&options(&scratch, Resume::Latest), Some(2), None).expect("writable");
    assert!(files.iter().all(|path| path.exists()));
    assert!(!unfinished.iter().any(|path| path.exists()));
}

#[test]
fn a_run_from_an_earlier_epoch_keeps_its_past_and_loses_its_future() {
    let scratch = Scratch::new("resume");
    let past = [
        scratch.file("valid/epoch-2/Loss.log"),
        scratch.file("checkpoint/optim-2.bpk"),
        scratch.file("checkpoint/notes.txt"),
    ];
    let future = [
        scratch.file("valid/epoch-3/Loss.log"),
        scratch.file("checkpoint/optim-3.bpk"),
    ];

    prepare_directory(&options(&scratch, Resume::Epoch(2)), Some(2), None).expect("writable");

    assert!(past.iter().all(|path| path.exists()));
    assert!(!future.iter().any(|path| path.exists()));
    let left = fs::read_dir(&scratch.0).expect("readable").count();
    assert_eq!(left, 2, "nothing is left of the check for room");
}

#[test]
fn a_directory_that_cannot_be_made_is_an_error() {
    let scratch = Scratch::new("file");
    let file = scratch.file("file");
    let mut options = options(&scratch, Resume::No);
    options.directory = file.join("run");
    assert!(matches!(lock(&options), Err(FitError::Directory { .. })));
}

#[test]
fn a_folder_without_checkpoints_cannot_be_resumed() {
    let scratch = Scratch::new("absent");
    for resume in [Resume::Latest, Resume::Epoch(3)] {
        let refused = resumed_set(&options(&scratch, resume));
        assert!(matches!(refused, Err(FitError::NoCheckpoint { .. })));
    }
    assert_eq!(latest_checkpoint(&scratch.0).expect("readable"), None);
}

#[test]
fn a_panic_is_an_error_that_tells_its_message() {
    let state = "full";
    let error = guarded::<()>(|| panic!("the disk is {state}"));
    assert!(matches!(error, Err(FitError::Panicked(text)) if text == "the disk is full"));
}
