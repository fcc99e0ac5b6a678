//! Predictions of a trained network: for the test set, and for pictures in a folder.

mod images;
mod mistakes;
mod predictor;

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use burn::train::Interrupter;
use burn_dataset::Dataset;

use crate::choice::Choice;
use crate::data::{CLASSES, DataRequest, DigitItem, MnistData, resolve};
use crate::measure::history::Evaluation;
use crate::measure::report::{
    ImageReport, MistakeReport, PredictionReport, SkippedReport, TestReport,
};
use crate::persist::output;
use crate::print::{escaped, message, say, warn};
use crate::run::job::{Job, Norm};
use images::{Picture, read_folder};
use mistakes::{SHOWN, draw};
pub(crate) use predictor::PredictForm;
use predictor::{Prediction, Predictor};

#[derive(Clone, Debug)]
pub(crate) struct PredictOptions {
    pub(crate) directory: PathBuf,
    /// The checkpoint's epoch; the newest one if not given.
    pub(crate) epoch: Option<usize>,
    pub(crate) form: PredictForm,
    /// The folder of the pictures; the test set if there is none.
    pub(crate) images: Option<PathBuf>,
    /// The digits that the model was trained on, `mnist`, `synthetic` or `custom`.
    pub(crate) trained_on: String,
    /// Where the predictions go.
    pub(crate) json: Option<PathBuf>,
    /// Where the picture of the mistakes goes, as SVG.
    pub(crate) mistakes: Option<PathBuf>,
}

/// Predicts with the model of a run of `job`, and prints the predictions for each picture or the results
/// on the test set.
///
/// # Errors
///
/// A message for people; among others if a picture could not be read, after the others have been
/// classified and everything is written.
pub(crate) fn predict(
    job: &Job,
    options: &PredictOptions,
    interrupter: &Interrupter,
) -> Result<()> {
    let testing = options.images.is_none();
    if !testing && options.mistakes.is_some() {
        bail!("nobody knows what the pictures of a folder are; --mistakes needs --test-set");
    }
    let (json, mistakes) = (options.json.as_deref(), options.mistakes.as_deref());
    output::check_svg("--mistakes", mistakes)?;
    let outputs = [("--json", json), ("--mistakes", mistakes)];
    output::check_beside(&options.directory, &outputs)?;
    let pictures = match &options.images {
        Some(folder) => read_folder(folder)?,
        None => Vec::new(),
    };
    // Folding is refused by the model itself, which says why.
    let needs_statistics =
        !testing && !job.setup.model.tracks_statistics() && options.form != PredictForm::Folded;
    let takes_none = options.form == PredictForm::Unfused && job.setup.norm == Norm::Tutorial;
    ensure!(
        !(needs_statistics && takes_none),
        "the unfused form of the tutorial's norm takes statistics of whole batches alone, so that it \
         cannot classify single pictures; use --form fused"
    );
    let data = if testing || needs_statistics {
        Some(test_digits(job, &options.trained_on)?)
    } else {
        None
    };
    let predictor = load(job, options, data.as_ref().filter(|_| needs_statistics))?;

    let mut report = PredictionReport {
        model: job.setup.model.name(),
        form: options.form.name(),
        dtype: job.setup.precision.dtype_name(),
        epoch: predictor.epoch,
        dataset: data.as_ref().map(|data| data.name.to_string()),
        test: None,
        images: Vec::new(),
        skipped: Vec::new(),
    };
    let mut files = Vec::new();
    let text = if let Some(data) = data.filter(|_| testing) {
        let (test, evaluation) = test_set(&predictor, job, &data, interrupter)?;
        if let Some(path) = mistakes {
            let picture = draw(&heading(&report, &test), &data.test, &test.mistakes);
            files.push(("Mistakes", path, Ok(picture.into_bytes())));
        }
        let matrix = confusion_matrix(&test.confusion);
        report.test = Some(test);
        format!("Test set ({}): {evaluation}\n\n{matrix}", data.name)
    } else {
        classify_pictures(&predictor, job, pictures, &mut report, interrupter)?;
        table(&report.images)
    };
    if let Some(path) = json {
        files.push(("Predictions", path, output::json(&report)));
    }
    output::finish(Some(text), files)?;
    let skipped = report.skipped.len();
    ensure!(
        skipped == 0,
        "{skipped} of {} pictures could not be classified",
        skipped + report.images.len()
    );
    Ok(())
}

/// Loads the model, with the statistics of the first digits of `data` if given.
fn load(job: &Job, options: &PredictOptions, data: Option<&MnistData>) -> Result<Predictor> {
    let reference = data.map(|data| {
        let mut digits = data.test.clone();
        digits.truncate(job.setup.batch_size);
        digits
    });
    let (directory, form) = (&options.directory, options.form);
    let predictor = Predictor::load(job, directory, options.epoch, form, reference.as_ref())?;
    say!(
        "Model: {} of {} after epoch {}, {}, {}",
        job.setup.model.name(),
        directory.display(),
        predictor.epoch,
        form.name(),
        job.setup.precision.describe()
    )?;
    if let Some(reference) = &reference {
        say!(
            "This model keeps no statistics for evaluation: each picture is normalized with those \
             of the first {} test digits, and not by its neighbours in the folder.",
            reference.len()
        )?;
    }
    Ok(predictor)
}

fn test_digits(job: &Job, trained_on: &str) -> Result<MnistData> {
    let request = DataRequest {
        train_limit: Some(1),
        ..job.setup.data.clone()
    };
    let data = resolve(&request, job.learning.test_limit)?;
    say!("Data: {}", data.origin)?;
    if data.name != trained_on {
        say!(
            "Note: the model was trained on {trained_on} digits, and these are {}.",
            data.name
        )?;
    }
    Ok(data)
}

/// Classifies digits in batches as large as those of the training: a network without statistics of its own
/// sees then of the test set what it saw in the tests between its epochs.
fn classify(
    predictor: &Predictor,
    job: &Job,
    items: &[DigitItem],
    interrupter: &Interrupter,
) -> Result<Vec<Prediction>> {
    let mut predictions = Vec::with_capacity(items.len());
    for batch in items.chunks(job.setup.batch_size) {
        if interrupter.should_stop() {
            bail!("interrupted: no prediction was printed, and no file was written");
        }
        predictions.extend(predictor.predict(batch.to_vec(), predictions.len())?);
    }
    Ok(predictions)
}

fn test_set(
    predictor: &Predictor,
    job: &Job,
    data: &MnistData,
    interrupter: &Interrupter,
) -> Result<(TestReport, Evaluation)> {
    let digits = &data.test;
    let mut confusion = [[0; CLASSES]; CLASSES];
    let mut evaluation = Evaluation::default();
    let mut mistakes: Vec<MistakeReport> = Vec::new();
    let items = digits.get_many((0..digits.len()).collect())?;
    let predictions = classify(predictor, job, &items, interrupter)?;
    for (index, prediction) in predictions.into_iter().enumerate() {
        let label = digits.label(index);
        let loss = -prediction.log_probabilities[usize::from(label)];
        confusion[usize::from(label)][usize::from(prediction.digit)] += 1;
        evaluation += Evaluation {
            loss_sum: loss,
            correct: usize::from(prediction.digit == label),
            total: 1,
        };
        if prediction.digit != label {
            mistakes.push(MistakeReport {
                index,
                label,
                prediction: prediction.digit,
                probability: prediction.probability(),
                loss,
            });
        }
    }
    mistakes.sort_by(|a, b| b.loss.total_cmp(&a.loss));
    let report = TestReport {
        digits: evaluation.total,
        correct: evaluation.correct,
        accuracy: evaluation.accuracy(),
        average_loss: evaluation.average_loss(),
        confusion,
        mistakes,
    };
    Ok((report, evaluation))
}

/// A table with a row for each class and a column for each prediction.
fn confusion_matrix(confusion: &[[usize; CLASSES]; CLASSES]) -> String {
    let columns: String = (0..CLASSES).map(|digit| format!("{digit:>6}")).collect();
    let mut lines = vec![
        format!("{:>5} taken for", ""),
        format!("digit{columns}{:>9}", "right"),
    ];
    for (digit, row) in confusion.iter().enumerate() {
        let counts: String = row.iter().map(|count| format!("{count:>6}")).collect();
        let total: usize = row.iter().sum();
        let right = match total {
            0 => "-".to_string(),
            _ => format!("{:.1} %", 100.0 * row[digit] as f64 / total as f64),
        };
        lines.push(format!("{digit:>5}{counts}{right:>9}"));
    }
    lines.join("\n")
}

/// What stands above the picture of the mistakes.
fn heading(report: &PredictionReport, test: &TestReport) -> [String; 2] {
    let digits = format!(
        "{} digits of {}",
        test.digits,
        report.dataset.as_deref().unwrap_or_default()
    );
    let all = test.mistakes.len();
    let shown = all.min(SHOWN);
    let what = format!("{shown} of {all} mistakes on {digits}, highest loss first");
    let of = format!(
        "{}, {}, epoch {} (below: probability of the class read, loss of the digit)",
        report.model, report.form, report.epoch
    );
    [what, of]
}

fn classify_pictures(
    predictor: &Predictor,
    job: &Job,
    pictures: Vec<Picture>,
    report: &mut PredictionReport,
    interrupter: &Interrupter,
) -> Result<()> {
    let (mut names, mut items, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for Picture { name, digit } in pictures {
        match digit {
            Ok(Some(image)) => {
                names.push(name);
                items.push(DigitItem { image, label: 0 });
            }
            Ok(None) => others.push(escaped(&name, &[])),
            Err(error) => {
                let reason = message(&error);
                warn(format_args!("skipped: {} {reason}", escaped(&name, &[])));
                report.skipped.push(SkippedReport { file: name, reason });
            }
        }
    }
    if !others.is_empty() {
        say!(
            "No pictures by ending or content, and left out: {}",
            others.join(", ")
        )?;
    }
    let predictions = classify(predictor, job, &items, interrupter)?;
    let predicted = names.into_iter().zip(predictions);
    report.images = predicted
        .map(|(file, prediction)| ImageReport {
            file,
            prediction: prediction.digit,
            probability: prediction.probability(),
            probabilities: prediction.probabilities(),
        })
        .collect();
    Ok(())
}

fn table(images: &[ImageReport]) -> String {
    let mut lines = vec![format!("\n{:>5} {:>12}  file", "digit", "probability")];
    for image in images {
        let percent = 100.0 * image.probability;
        lines.push(format!(
            "{:>5} {percent:>10.2} %  {}",
            image.prediction,
            escaped(&image.file, &[])
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests;
