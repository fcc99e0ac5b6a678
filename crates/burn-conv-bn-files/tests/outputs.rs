//! Outputs of every kind that a path can name.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use burn_conv_bn_files::{
    Lock, OutputError, Survives, check, check_all, check_room, replaced, sweep, write,
};
use tempfile::TempDir;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_regular_file_is_replaced_as_a_whole() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("file");
    for survives in [Survives::Kill, Survives::PowerLoss] {
        for text in ["a long text", "short"] {
            check(&path).unwrap();
            write(&path, text.as_bytes(), survives).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn a_check_changes_nothing() {
    let folder = TempDir::new().unwrap();
    check(&folder.path().join("absent")).unwrap();
    assert!(names(folder.path()).is_empty());
    let path = folder.path().join("file");
    fs::write(&path, "old").unwrap();
    check(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
#[cfg(unix)]
fn files_are_replaced_and_devices_are_not() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("file");
    let file = fs::canonicalize(folder.path()).unwrap().join("file");
    assert_eq!(replaced(&path).unwrap(), Some(file.clone()));
    fs::write(&path, "old").unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for path in [&path, &link] {
        assert_eq!(replaced(path).unwrap(), Some(file.clone()));
    }
    assert_eq!(replaced(Path::new("/dev/null")).unwrap(), None);
    assert!(replaced(folder.path()).is_err());
}

#[test]
fn a_folder_is_refused_and_left_alone() {
    let folder = TempDir::new().unwrap();
    let taken = folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("inside"), "kept").unwrap();
    for path in [taken.clone(), folder.path().join("new/")] {
        let checked = check(&path).unwrap_err();
        assert!(matches!(checked, OutputError::Folder { .. }), "{checked}");
        let written = write(&path, b"new", Survives::PowerLoss).unwrap_err();
        assert!(matches!(written, OutputError::Folder { .. }), "{written}");
    }
    assert_eq!(fs::read_to_string(taken.join("inside")).unwrap(), "kept");
    assert_eq!(names(folder.path()), ["taken"]);
}

#[test]
fn an_absent_folder_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("none").join("report.json");
    let error = check(&path).unwrap_err();
    assert!(error.to_string().contains("report.json"), "{error}");
    write(&path, b"x", Survives::Kill).unwrap_err();
}

#[test]
fn outputs_that_are_one_file_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("report");
    let roundabout = folder.path().join(".").join("report");
    let error = check_all(&[("--json", &path), ("--plot", &roundabout)]).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("--json and --plot name the same file"),
        "{error}"
    );
    check_all(&[("--json", &path), ("--plot", &folder.path().join("plot"))]).unwrap();
}

#[cfg(unix)]
#[test]
fn a_folder_has_one_owner_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let open = || File::open(folder.path()).unwrap();
    let lock = Lock::of(open()).unwrap();
    assert!(matches!(Lock::of(open()), Err(TryLockError::WouldBlock)));
    drop(lock);
    Lock::of(open()).unwrap();
}

#[test]
fn only_unfinished_files_are_swept() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(".partial-abc"), "half").unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    sweep(folder.path()).unwrap();
    assert_eq!(names(folder.path()), ["file"]);
    sweep(&folder.path().join("absent")).unwrap();
}

#[test]
fn a_check_for_room_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    check_room(folder.path(), (3 << 20) + 1).unwrap();
    assert!(names(folder.path()).is_empty());
    check_room(&folder.path().join("absent"), 1).unwrap_err();
}

#[cfg(unix)]
mod unix {
    use super::*;

    use std::io::Read;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    use std::process::{Command, Stdio};

    #[test]
    fn links_are_followed() {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/file"), "old").unwrap();
        symlink("sub/file", path("link")).unwrap();
        symlink("link", path("again")).unwrap();
        symlink("sub/new", path("dangling")).unwrap();
        for (name, file) in [("again", "sub/file"), ("dangling", "sub/new")] {
            check(&path(name)).unwrap();
            write(&path(name), b"new", Survives::Kill).unwrap();
            assert!(fs::symlink_metadata(path(name)).unwrap().is_symlink());
            assert_eq!(fs::read_to_string(path(file)).unwrap(), "new");
        }
        symlink("round", path("round")).unwrap();
        write(&path("round"), b"x", Survives::Kill).unwrap_err();
        let outputs = [("--json", &*path("again")), ("--csv", &*path("sub/file"))];
        check_all(&outputs).unwrap_err();
    }

    #[test]
    fn permissions_are_kept_and_read_only_files_too() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "old").unwrap();
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o600);
        write(&path, b"new", Survives::Kill).unwrap();
        let permissions = fs::metadata(&path).unwrap().permissions();
        assert_eq!(permissions.mode() & 0o777, 0o600);
        mode(0o400);
        let error = check(&path).unwrap_err();
        assert!(matches!(error, OutputError::ReadOnly { .. }), "{error}");
        write(&path, b"newer", Survives::Kill).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn a_fifo_is_written_through() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("fifo");
        assert!(
            Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        check(&path).unwrap();
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let mut text = String::new();
                fs::File::open(path)
                    .unwrap()
                    .read_to_string(&mut text)
                    .unwrap();
                text
            }
        });
        write(&path, b"report", Survives::PowerLoss).unwrap();
        assert_eq!(reader.join().unwrap(), "report");
        assert!(fs::metadata(&path).unwrap().file_type().is_fifo());
        assert_eq!(names(folder.path()), ["fifo"]);
    }

    #[test]
    fn devices_stay_devices() {
        for (device, works) in [("/dev/null", true), ("/dev/full", false)] {
            let device = Path::new(device);
            if !device.exists() {
                println!("skipped: this system has no {}", device.display());
                continue;
            }
            check(device).unwrap();
            assert_eq!(write(device, b"x", Survives::Kill).is_ok(), works);
            assert!(fs::metadata(device).unwrap().file_type().is_char_device());
        }
        // Two outputs may be thrown away.
        let null = Path::new("/dev/null");
        check_all(&[("--json", null), ("--csv", null)]).unwrap();
    }

    /// Runs `standard_output_is_written_to` in a process whose standard output is a file.
    #[test]
    fn standard_output_is_no_file_to_replace() {
        if !Path::new("/proc/self/fd").exists() {
            println!("skipped: this system has no /proc/self/fd");
            return;
        }
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("out");
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "unix::standard_output_is_written_to",
                "--nocapture",
            ])
            .env("WRITE_TO_STANDARD_OUTPUT", "1")
            .stdout(Stdio::from(fs::File::create(&path).unwrap()))
            .status()
            .unwrap();
        assert!(status.success());
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("the report"), "{text}");
        assert!(text.contains("1 passed"), "{text}");
    }

    #[test]
    fn standard_output_is_written_to() {
        if std::env::var_os("WRITE_TO_STANDARD_OUTPUT").is_some() {
            check(Path::new("/dev/stdout")).unwrap();
            write(Path::new("/dev/stdout"), b"the report\n", Survives::Kill).unwrap();
        }
    }
}
