//! The picture that `--plot` draws: times of steps and peaks of memory, as ratios to Burn's unfused
//! layers.

use std::fmt::Write as _;

use anyhow::Result;
use burn_conv_bn_bench::protocol::{Contender, Engine};

use super::report::{ContenderReport, Report};
use super::table;

/// Pixels; characters are as wide as a wide font's.
const WIDTH: usize = 900;
const LINE: usize = 16;
const LEFT: usize = 14;
const CHARACTER: usize = 8;
/// Where bars begin, of times and of peaks, and the longest.
const BARS: [usize; 2] = [180, 540];
const LONGEST: f64 = 290.0;

/// A line for each contender of each entry, with a bar for its time, with a whisker between the quartiles,
/// and one for its peak. A contender with a problem has no bar.
pub fn svg(report: &Report) -> Result<Vec<u8>> {
    let mut body = String::new();
    let mut y = 0;
    let mut line = |body: &mut String, x: usize, text: &str, is_new: bool| {
        y += if is_new { LINE } else { 0 };
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(body, "<text x=\"{x}\" y=\"{y}\">{text}</text>");
        y
    };
    let notes = [vec![table::setting(report)], table::missing(report)].concat();
    for note in notes.iter().flat_map(|note| wrapped(note)) {
        line(&mut body, LEFT, &note, true);
    }
    line(&mut body, LEFT, "Ratios to Burn's unfused layers", true);
    for (x, title) in BARS.into_iter().zip(["time of a step", "peak of memory"]) {
        line(&mut body, x, title, false);
    }
    let all = report.entries.iter().flat_map(|entry| &entry.contenders);
    let ends = all.flat_map(bars).flatten().flatten();
    let scale = LONGEST / ends.fold(1.0, f64::max);
    for entry in &report.entries {
        let title = format!("{}, batch {}", entry.entry.id, entry.batch);
        line(&mut body, LEFT, &title, true);
        for contender in &entry.contenders {
            let name = contender.contender.to_string();
            let y = line(&mut body, 2 * LEFT, &name, true);
            for (x, bar) in BARS.into_iter().zip(bars(contender)) {
                let Some([lower, ratio, upper]) = bar else {
                    continue;
                };
                let colour = colour(contender.contender);
                let (width, top, middle) = (ratio * scale, y - 11, y - 5);
                let [from, to] = [lower, upper].map(|end| x as f64 + end * scale);
                let _ = writeln!(
                    body,
                    "<rect x=\"{x}\" y=\"{top}\" width=\"{width:.1}\" height=\"12\" fill=\"{colour}\"/>\
                     <path d=\"M{from:.1} {middle}H{to:.1}\" stroke=\"black\"/>"
                );
                line(&mut body, to as usize + 4, &format!("{ratio:.2}"), false);
            }
        }
    }
    let height = line(&mut body, LEFT, "", true);
    let svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n{body}</svg>\n"
    );
    Ok(svg.into_bytes())
}

/// Lower quartile, median and upper quartile of a contender's time, and its peak.
fn bars(report: &ContenderReport) -> [Option<[f64; 3]>; 2] {
    let time = report.timing.and_then(|timing| timing.to_unfused);
    let time = time.map(|time| [time.quartiles[0], time.median, time.quartiles[1]]);
    let peak = report.peak_to_unfused.map(|ratio| [ratio; 3]);
    [time, peak].map(|bar| bar.filter(|_| report.problem.is_none()))
}

fn colour(contender: Contender) -> &'static str {
    match (contender, contender.engine()) {
        (Contender::Unfused, _) => "#9aa5ad",
        (_, Engine::Burn) => "#0072b2",
        (_, Engine::PyTorch) => "#e07a20",
    }
}

/// Text in lines that fit the picture, unless a word is longer.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if (line.len() + word.len() + 1) * CHARACTER <= WIDTH - 2 * LEFT => {
                *line += " ";
                *line += word;
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::{Problem, ProblemKind};
    use crate::bench::testing;

    fn draw(report: &Report) -> String {
        String::from_utf8(svg(report).unwrap()).unwrap()
    }

    #[test]
    fn a_picture_names_what_it_shows_and_what_is_missing() {
        let mut report = testing::half();
        let svg = draw(&report);
        for text in [
            ">fused<",
            ">unfused<",
            "time of a step",
            "peak of memory",
            ">0.50<",
            ">0.75<",
            "2026-01-02T03:04:05Z",
            "quick run",
            ">tutorial-k3, batch 32<",
        ] {
            assert!(svg.contains(text), "no {text:?} in {svg}");
        }
        let failed = Problem::new(ProblemKind::Mismatch, "a < b");
        report.entries[0].contenders[0].fail(failed);
        let svg = draw(&report);
        assert!(!svg.contains(">0.50<") && svg.contains(">1.00<"), "{svg}");
        let missing = "missing: fused of tutorial-k3 (FAILED ITS CHECK: a &lt; b)";
        assert!(svg.contains(missing), "{svg}");
        report.entries.clear();
        assert!(draw(&report).ends_with("</svg>\n"));
    }

    #[test]
    fn no_text_reaches_over_the_edge() {
        let mut report = testing::half();
        report.entries[0].problem = Some("a word and ".repeat(50));
        let slow = testing::contender(Contender::Never, &[9.0], 30);
        report.entries[0].contenders.push(slow);
        report.entries[0].summarize();
        for text in draw(&report).split("<text x=\"").skip(1) {
            let (x, rest) = text.split_once('"').unwrap();
            let (_, rest) = rest.split_once('>').unwrap();
            let (body, _) = rest.split_once('<').unwrap();
            let right = x.parse::<usize>().unwrap() + body.len() * CHARACTER;
            assert!(right <= WIDTH, "{body:?} ends at {right}");
        }
    }
}
