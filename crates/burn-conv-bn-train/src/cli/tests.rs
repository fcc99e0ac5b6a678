use std::any::TypeId;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use clap::{CommandFactory, Parser, ValueEnum};

use super::args::{
    COMPARE_EXAMPLES, Cli, EXAMPLES, PARITY_EXAMPLES, PREDICT_EXAMPLES, TRAIN_EXAMPLES,
};
use super::commands::interruption;
use super::config::{self, Layers};
use super::invocation::is_bare;
use crate::choice::Choice;
use crate::measure::history::{Epoch, Evaluation, SplitRecord, StepRecord};
use crate::measure::memory::{StepMeasure, StepMemory};
use crate::model::ModelChoice;
use crate::optim::OptimizerChoice;
use crate::run::fit::FitOutcome;

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

/// Also that no option hides among those without a heading.
#[test]
fn help_has_every_option_under_a_heading_and_fits_the_terminal() {
    let mut command = Cli::command();
    command.build();
    let own = |command: &&clap::Command| command.get_name() != "help";
    for subcommand in command.get_subcommands().filter(own) {
        for arg in subcommand.get_arguments() {
            let own = ["help", "version"].contains(&arg.get_id().as_str());
            let headed = arg.get_help_heading().is_some();
            assert!(own || headed, "{} {arg}", subcommand.get_name());
            let helped = arg.get_help().is_some();
            assert!(helped, "{} {arg}", subcommand.get_name());
        }
        let help = subcommand.clone().term_width(100).render_long_help();
        for line in help.to_string().lines() {
            let width = line.chars().count();
            assert!(width <= 102, "{}: {line}", subcommand.get_name());
        }
    }
}

#[test]
fn examples_are_command_lines() {
    let all = [
        EXAMPLES,
        COMPARE_EXAMPLES,
        TRAIN_EXAMPLES,
        PARITY_EXAMPLES,
        PREDICT_EXAMPLES,
    ];
    let mut count = 0;
    for line in all.into_iter().flat_map(str::lines) {
        let Some(example) = line.strip_prefix("  ") else {
            continue;
        };
        let mut arguments: Vec<OsString> = example.split_whitespace().map(Into::into).collect();
        if is_bare(&arguments) {
            arguments.insert(1, "compare".into());
        }
        Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{example}: {error}"));
        count += 1;
    }
    assert!(count > 10, "{count}");
}

/// Files have the options and values of the command line, and every number has bounds.
#[test]
fn files_and_the_command_line_agree() {
    let options = |arguments: &[&str]| {
        let cli = Cli::try_parse_from(["mnist"].iter().chain(arguments)).unwrap();
        Layers::new(&cli.command, None).unwrap().options
    };
    let command = Cli::command();
    for name in ["compare", "train", "parity", "predict"] {
        let args = command.find_subcommand(name).unwrap().get_arguments();
        let mut names = Vec::new();
        for arg in args {
            let long = arg.get_long().unwrap();
            if ["config", "print-config"].contains(&long) {
                continue;
            }
            names.push(long);
            for value in arg.get_possible_values() {
                let value = value.get_name();
                // A switch has true and false.
                if arg.get_action().takes_values() {
                    let set = options(&[name, &format!("--{long}={value}")]);
                    assert_eq!(set[long], value, "{name} --{long}");
                }
            }
            let kind = arg.get_value_parser().type_id();
            let number = kind == TypeId::of::<usize>() || kind == TypeId::of::<f64>();
            let bounded = config::check(long, &(-1.0).into()).is_err();
            assert_eq!(bounded, number, "{name} --{long}");
        }
        names.sort_unstable();
        let keys: Vec<String> = options(&[name]).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, names, "{name}");
    }
}

/// What help says of defaults that depend on other options.
#[test]
fn help_names_the_defaults() {
    let command = Cli::command();
    let train = command.find_subcommand("train").unwrap();
    let help = |option: &str| {
        let mut arguments = train.get_arguments();
        let arg = arguments.find(|arg| arg.get_long() == Some(option));
        arg.unwrap().get_help().unwrap().to_string()
    };
    for choice in OptimizerChoice::value_variants() {
        let text = help("lr");
        let rate = choice.default_learning_rate().to_string();
        let part = text
            .split([':', ','])
            .find(|part| part.contains(&choice.name()));
        let part = part.unwrap_or_else(|| panic!("no {} in {text}", choice.name()));
        assert!(part.contains(&rate), "{rate} for {choice:?} in {text}");
    }
    for choice in ModelChoice::value_variants() {
        let dropout = choice.default_dropout();
        let text = help("dropout");
        let part = text
            .split([':', ',', ';'])
            .find(|part| part.contains(&choice.name()));
        match part {
            Some(part) => assert!(part.contains(&dropout.to_string()), "{text}"),
            None => assert_eq!(dropout, 0.0, "{choice:?} in {text}"),
        }
    }
}

/// A run with that many epochs, the last of them with so many steps, resumed after some.
fn outcome(resumed: usize, epochs: usize, steps: usize) -> FitOutcome {
    let step = StepRecord {
        evaluation: Evaluation::default(),
        measure: StepMeasure {
            memory: StepMemory::default(),
            duration: Duration::ZERO,
        },
    };
    let epoch = Epoch {
        train: SplitRecord {
            evaluation: Evaluation::default(),
            steps: vec![step; steps],
        },
        test: None,
    };
    FitOutcome {
        epochs: vec![epoch; epochs],
        resumed,
        stopped_early: false,
        interrupted: None,
    }
}

#[test]
fn an_interruption_says_what_is_kept_and_what_is_not() {
    let directory = Path::new("runs/a");
    let report = Some(Path::new("out.json"));
    for (outcome, kept, report, parts) in [
        (
            outcome(0, 1, 3),
            &[][..],
            None,
            [
                "interrupted in epoch 1 after 3 of its 30 training steps, which are lost",
                "no epoch was finished",
                "no checkpoint in runs/a",
                "--resume starts the run anew",
            ],
        ),
        (
            outcome(2, 4, 12),
            &[1, 2, 3][..],
            report,
            [
                "interrupted in epoch 4 after 12 of its 30 training steps",
                "kept in runs/a: the checkpoints of epochs 1, 2 and 3;",
                "--resume goes on with epoch 4",
                "out.json has the epochs that were finished",
            ],
        ),
        (
            outcome(1, 2, 30),
            &[1][..],
            None,
            [
                "interrupted in the test after epoch 2, which is lost",
                "the checkpoint of epoch 1;",
                "--resume goes on with epoch 2",
                "kept",
            ],
        ),
        (
            outcome(5, 5, 30),
            &[4, 5][..],
            None,
            [
                "interrupted before the first training step",
                "the checkpoints of epochs 4 and 5",
                "--resume goes on with epoch 6",
                "kept",
            ],
        ),
    ] {
        let text = interruption(&outcome, 30, kept, directory, report);
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
    }
}
