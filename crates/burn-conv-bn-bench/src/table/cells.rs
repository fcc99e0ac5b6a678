//! Cells, and how they are laid out.

use std::fmt::Write as _;
use std::iter;

pub fn cell<T>(value: Option<T>, format: impl FnOnce(T) -> String) -> String {
    value.map(format).unwrap_or_default()
}

/// Three digits at least, and no more decimals than mean anything.
pub fn milliseconds(ms: f64) -> String {
    let decimals = match ms {
        _ if ms < 9.995 => 2,
        _ if ms < 99.95 => 1,
        _ => 0,
    };
    format!("{ms:.decimals$}")
}

pub fn three_decimals(ratio: f64) -> String {
    format!("{ratio:.3}")
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / (1u64 << 20) as f64)
}

/// A header over rows, without the columns that are empty below it.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let header = header.iter().map(|title| title.to_string()).collect();
    let mut text = String::new();
    for row in padded(&without_empty(header, rows)) {
        let line = format!("  {}", row.join("  "));
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The same in Markdown. The first row is the header.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (index, row) in padded(rows).iter().enumerate() {
        let _ = writeln!(text, "| {} |", row.join(" | "));
        if index == 0 {
            let widths = row.iter().map(|cell| cell.chars().count());
            let rules = widths.enumerate().map(|(column, width)| match column {
                0 => "-".repeat(width + 2),
                _ => "-".repeat(width + 1) + ":",
            });
            let _ = writeln!(text, "|{}|", rules.collect::<Vec<_>>().join("|"));
        }
    }
    text
}

/// A header and rows, without the columns that are empty in all rows.
pub fn without_empty(header: Vec<String>, rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    let kept: Vec<usize> = (0..header.len())
        .filter(|&column| rows.iter().any(|row| !row[column].is_empty()))
        .collect();
    let keep = |row: Vec<String>| -> Vec<String> {
        kept.iter().map(|&column| row[column].clone()).collect()
    };
    iter::once(header).chain(rows).map(keep).collect()
}

/// Rows of columns of one width: the first filled up to the right, all others to the left; an empty
/// cell is a dash.
fn padded(rows: &[Vec<String>]) -> Vec<Vec<String>> {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default().max(1)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let pad = |(column, cell): (usize, &String)| {
        let cell = if cell.is_empty() { "-" } else { cell.as_str() };
        let width = widths[column];
        match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        }
    };
    let rows = rows.iter();
    rows.map(|row| row.iter().enumerate().map(pad).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_keep_three_digits() {
        let texts = [0.1234, 9.99, 9.996, 99.94, 99.96, 1234.6].map(milliseconds);
        assert_eq!(texts, ["0.12", "9.99", "10.0", "99.9", "100", "1235"]);
    }
}
