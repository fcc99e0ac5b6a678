use super::*;

#[test]
fn a_matrix_has_rows_of_what_is_and_columns_of_what_was_read() {
    let mut confusion = [[0; CLASSES]; CLASSES];
    confusion[4][9] = 3;
    confusion[4][4] = 9;
    let table = confusion_matrix(&confusion);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 12);
    let four: Vec<&str> = lines[6].split_whitespace().collect();
    assert_eq!(four[0], "4");
    assert_eq!((four[5], four[10]), ("9", "3"));
    assert!(lines[6].ends_with("75.0 %"), "{table}");
    assert!(lines[5].ends_with(" -"), "{table}");
    let widths: Vec<usize> = lines[1..].iter().map(|line| line.len()).collect();
    assert!(widths.iter().all(|&width| width == widths[0]), "{table}");
}

#[test]
fn a_heading_counts() {
    let report = |count: usize| {
        let mistake = MistakeReport {
            index: 0,
            label: 4,
            prediction: 9,
            probability: 0.5,
            loss: 0.7,
        };
        let test = TestReport {
            digits: 100,
            correct: 100 - count,
            accuracy: 1.0 - count as f64 / 100.0,
            average_loss: 0.1,
            confusion: [[0; CLASSES]; CLASSES],
            mistakes: vec![mistake; count],
        };
        let report = PredictionReport {
            model: "mobilenet-v2".to_string(),
            form: "unfused".to_string(),
            dtype: "F32".to_string(),
            epoch: 12,
            dataset: Some("synthetic".to_string()),
            test: None,
            images: Vec::new(),
            skipped: Vec::new(),
        };
        let [what, of] = heading(&report, &test);
        assert!(of.starts_with("mobilenet-v2, unfused, epoch 12"), "{of}");
        for line in [&what, &of] {
            assert!(line.chars().count() <= mistakes::LETTERS, "{line}");
        }
        what
    };
    assert!(report(0).starts_with("0 of 0 mistakes on 100 digits of synthetic"));
    assert!(report(SHOWN).starts_with("40 of 40 mistakes on"));
    assert!(report(41).starts_with("40 of 41 mistakes on"));
}
