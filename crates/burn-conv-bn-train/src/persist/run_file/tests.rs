use serde_json::json;

use super::*;

fn options(value: Value) -> Options {
    serde_json::from_value(value).unwrap()
}

fn identity(name: &str) -> DataIdentity {
    DataIdentity {
        name: name.to_string(),
        train_digits: 10,
        train_md5: "0123456789abcdef".to_string(),
        test_digits: 5,
        test_md5: "fedcba9876543210".to_string(),
    }
}

#[test]
fn a_run_file_comes_back_and_is_compared() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    assert!(RunFile::find(at).unwrap().is_none());
    let missing = RunFile::read(at).unwrap_err().to_string();
    assert!(missing.contains("has no job.json"), "{missing}");

    let asked = options(json!({
        "lr": 0.5, "norm": "burn", "train-limit": 64, "epochs": 5, "json": "out.json",
        "resume": true, "data-dir": "digits",
    }));
    let file = RunFile::new(&asked, identity("mnist"));
    let target = at.join(RUN_FILE);
    fs::write(&target, file.to_json()).unwrap();
    let read = RunFile::read(at).unwrap();
    assert_eq!(read, file);
    assert!(!read.options.contains_key("json"));
    assert!(!read.options.contains_key("resume"));
    let folder_of_data = read.options["data-dir"].as_str().unwrap();
    assert!(Path::new(folder_of_data).is_absolute(), "{folder_of_data}");

    read.check_options(at, &asked).unwrap();
    read.check_data(at, &identity("mnist")).unwrap();
    // The number of epochs may be another one.
    let mut other = asked.clone();
    other.insert("epochs".to_string(), json!(9));
    read.check_options(at, &other).unwrap();

    other.insert("lr".to_string(), json!(1.0));
    other.insert("test-limit".to_string(), json!(7));
    other.remove("train-limit");
    let error = read.check_options(at, &other).unwrap_err().to_string();
    for part in [
        "--lr 0.5, not 1.0",
        "--train-limit 64, not none",
        "--test-limit none, not 7",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let error = read.check_data(at, &identity("synthetic")).unwrap_err();
    let error = error.to_string();
    for part in ["mnist (10 training", "synthetic (10 training", "01234567.."] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }

    fs::write(&target, "{}").unwrap();
    let damaged = RunFile::read(at).unwrap_err().to_string();
    assert!(damaged.ends_with("job.json is damaged"), "{damaged}");
}
