use super::*;

use std::fs;

use serde::Deserialize;

use crate::persist::run_file::MOST_BYTES;
use crate::print::message;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Command {
    Train(Train),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Train {
    batch_size: usize,
    lr: Option<f64>,
    norm: String,
    overwrite: bool,
    resume: bool,
    seed: u64,
}

fn defaults() -> Command {
    Command::Train(Train {
        batch_size: 2048,
        lr: None,
        norm: "burn".to_string(),
        overwrite: false,
        resume: false,
        seed: 1,
    })
}

fn layers(given: &[&str]) -> Layers {
    let mut layers = Layers::new(&defaults(), None).unwrap();
    layers.given = given.iter().map(ToString::to_string).collect();
    layers
}

fn options(value: Value) -> Options {
    serde_json::from_value(value).unwrap()
}

fn add(given: &[&str], added: Value) -> Result<Command> {
    layers(given).add(&options(added), "job.toml")
}

#[test]
fn what_is_written_reads_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let job = json!({"lr": 5e-1, "seed": u64::MAX, "resume": true});
    let command = add(&[], job).unwrap();
    let written = effective(&command).unwrap();
    let all = json!({
        "batch-size": 2048, "lr": 0.5, "norm": "burn", "overwrite": false, "resume": true,
        "seed": u64::MAX,
    });
    assert_eq!(written, options(all));
    let json = serde_json::to_string(&written).unwrap();
    for (name, text) in [("job.toml", to_toml(&written)), ("job.JSON", json)] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let again: Command = layers(&[]).add(&read(&path).unwrap(), name).unwrap();
        assert_eq!(again, command, "{name}");
    }
    assert_eq!(effective(&defaults()).unwrap().get("lr"), None);
}

#[test]
fn the_first_layer_wins() {
    let mut layers = layers(&["lr", "resume"]);
    let file = json!({"lr": 0.5, "norm": "tutorial", "overwrite": true});
    let _: Command = layers.add(&options(file), "job.toml").unwrap();
    let stored = json!({"norm": "burn", "seed": 7});
    let Command::Train(train) = layers.add(&options(stored), "job.json").unwrap();
    assert_eq!(
        (train.lr, train.norm.as_str(), train.seed),
        (None, "tutorial", 7)
    );
    assert!(!train.overwrite, "the line has resume");
    // Rivals in one file are the command's to refuse.
    let both = json!({"overwrite": false, "resume": true});
    let Command::Train(train) = add(&[], both).unwrap();
    assert!(train.resume);
}

#[test]
fn an_error_names_the_option() {
    for (file, parts) in [
        (
            json!({"learning-rate": 1, "lr": 1, "config": "x"}),
            vec![
                "mnist train",
                "config, learning-rate;",
                "batch-size, lr, norm",
            ],
        ),
        (json!({"resume": 1}), vec!["resume to 1:", "a boolean"]),
        (json!({"seed": 2, "lr": [1]}), vec!["lr to [1]:", "f64"]),
        (json!({"lr": true}), vec!["lr to true:", "f64"]),
        (json!({"batch-size": -1}), vec!["batch-size to -1:"]),
        (
            json!({"batch-size": 0}),
            vec!["batch-size to 0:", "from 1 to"],
        ),
        (json!({"batch-size": null}), vec!["batch-size to null:"]),
    ] {
        let error = add(&[], file).unwrap_err().to_string();
        for part in parts.into_iter().chain(["job.toml"]) {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}

#[test]
fn bounds_are_inclusive() {
    for (option, allowed, refused) in [
        (
            "batch-size",
            vec![json!(1), json!(1_000_000)],
            vec![json!(0), json!(1_000_001)],
        ),
        (
            "threads",
            vec![json!(1024)],
            vec![json!(0), json!(u64::MAX)],
        ),
        ("log-interval", vec![json!(0)], vec![json!(1_000_001)]),
        (
            "dropout",
            vec![json!(0.0), json!(0.99)],
            vec![json!(1.0), json!(-0.1)],
        ),
        ("lr", vec![json!(1e-30)], vec![json!(0), json!(-1)]),
        ("seed", vec![json!(0), json!(u64::MAX)], vec![]),
    ] {
        for value in allowed {
            assert_eq!(check(option, &value), Ok(()), "{option} {value}");
        }
        for value in refused {
            assert!(check(option, &value).is_err(), "{option} {value}");
        }
    }
}

#[test]
fn files_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let large = vec![b'#'; MOST_BYTES as usize + 1];
    let files: [(&str, &[u8], [&str; 2]); 8] = [
        (
            "a.toml",
            b"lr = 1\nnorm = tutorial\n",
            ["a.toml is not valid TOML", "(line 2)"],
        ),
        (
            "a.json",
            b"{\"lr\": }",
            ["a.json is not valid JSON", "line 1"],
        ),
        ("nan.toml", b"lr = nan\n", ["lr to nan:", "a finite number"]),
        (
            "inf.toml",
            b"lr = -inf\n",
            ["lr to -inf:", "a finite number"],
        ),
        (
            "list.toml",
            b"lr = [1, nan]\n",
            ["lr to [1, nan]:", "a finite number"],
        ),
        (
            "date.toml",
            b"lr = 1979-05-27\n",
            ["lr to 1979-05-27:", "a finite number"],
        ),
        ("text.toml", b"norm = \"\xff\"\n", ["cannot read", "UTF-8"]),
        ("large.toml", &large, ["cannot read", "1 MiB"]),
    ];
    for (name, bytes, _) in files {
        fs::write(path(name), bytes).unwrap();
    }
    let absent = [
        ("absent.toml", ["cannot read", "absent.toml"]),
        (".", ["cannot read", "neither a regular file nor a pipe"]),
    ];
    for (name, parts) in files
        .iter()
        .map(|(name, _, parts)| (*name, *parts))
        .chain(absent)
    {
        let error = message(&read(&path(name)).unwrap_err());
        for part in parts {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    // The largest file.
    fs::write(path("large.toml"), &large[1..]).unwrap();
    assert!(read(&path("large.toml")).unwrap().is_empty());
    if cfg!(target_os = "linux") {
        for device in ["/dev/null", "/dev/full", "/dev/zero"] {
            let error = message(&read(Path::new(device)).unwrap_err());
            assert!(
                error.contains(device) && error.contains("neither"),
                "{error}"
            );
        }
    }
}
