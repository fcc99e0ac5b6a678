//! The picture that `--plot` draws.

use anyhow::{Error, Result};
use burn_conv_bn_bench::protocol::Contender;
use burn_conv_bn_bench::report::{ContenderReport, EntryReport, Report};
use burn_conv_bn_bench::table;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Entries side by side; the next ones stand below them, so that a picture as wide as a page stays
/// legible.
const ROW: usize = 6;

/// Pixels.
const LEAST_WIDTH: u32 = 800;
const LEAST_GROUP_WIDTH: u32 = 120;
const BAR_WIDTH: u32 = 19;
const CHART_HEIGHT: u32 = 300;
const LINE_HEIGHT: u32 = 16;
const LEGEND_HEIGHT: u32 = 40;
const LEFT: u32 = 60;
const MARGIN: u32 = 14;
const LABELS_HEIGHT: u32 = 56;

/// Most that a character takes of a line of text, in pixels.
const CHARACTER_WIDTH: u32 = 7;

/// Share of an entry's width that its bars take.
const BARS: f64 = 0.84;

/// Share of its place that a bar takes.
const BAR: f64 = 0.92;

const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What the bars of a chart show.
struct Quantity {
    title: &'static str,
    /// Of a contender of an entry, over Burn's unfused layers.
    bar: fn(&EntryReport, &ContenderReport) -> Option<Bar>,
    /// Of Burn's unfused layers, in its unit.
    base: fn(&ContenderReport) -> Option<String>,
}

#[derive(Clone, Copy)]
struct Bar {
    ratio: f64,
    /// Of the rounds, where there are rounds.
    quartiles: Option<[f64; 2]>,
}

impl Bar {
    /// The highest that is drawn.
    fn top(self) -> f64 {
        self.quartiles
            .map_or(self.ratio, |[_, upper]| upper.max(self.ratio))
    }
}

const QUANTITIES: [Quantity; 2] = [
    Quantity {
        title: "Time of a step / Burn unfused, whose median is below",
        bar: |_, report| {
            let ratio = report.timing?.to_unfused?;
            Some(Bar {
                ratio: ratio.median,
                quartiles: Some(ratio.quartiles),
            })
        },
        base: |unfused| Some(milliseconds(unfused.timing?.step_ms.median)),
    },
    Quantity {
        title: "Peak memory of forward and backward / Burn unfused, whose peak is below",
        bar: |entry, report| {
            let unfused = entry.contender(Contender::Unfused)?;
            Some(Bar {
                ratio: table::peak_ratio(report.memory?, unfused.memory?)?,
                quartiles: None,
            })
        },
        base: |unfused| {
            let memory = unfused.memory?;
            Some(mebibytes(memory.resident_peak.or(memory.heap_peak)?))
        },
    },
];

/// Steps' times and peaks of memory, as ratios to Burn's unfused layers.
pub fn svg(report: &Report) -> Result<Vec<u8>> {
    let bars = BAR_WIDTH * contenders(report).count() as u32;
    let columns = report.entries.len().clamp(1, ROW) as u32;
    let width = LEFT + 2 * MARGIN + columns * LEAST_GROUP_WIDTH.max(bars);
    let width = width.max(LEAST_WIDTH);
    let columns = ((width - 2 * MARGIN) / CHARACTER_WIDTH) as usize;
    let lines = [vec![table::setting(report)], table::missing(report)].concat();
    let setting: Vec<String> = lines
        .iter()
        .flat_map(|line| wrapped(line, columns))
        .collect();
    let mut rows: Vec<&[EntryReport]> = report.entries.chunks(ROW).collect();
    if rows.is_empty() {
        // Charts without bars.
        rows.push(&[]);
    }
    let charts = QUANTITIES.len() * rows.len();
    let header_height = MARGIN + setting.len() as u32 * LINE_HEIGHT + LEGEND_HEIGHT;

    let mut svg = String::new();
    {
        let size = (width, header_height + charts as u32 * CHART_HEIGHT);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let draw = || -> Drawn {
            area.fill(&WHITE)?;
            let (top, below) = area.split_vertically(header_height);
            header(&top, report, &setting)?;
            let mut areas = below.split_evenly((charts, 1)).into_iter();
            for quantity in &QUANTITIES {
                let highest = highest(report, quantity);
                for (row, area) in rows.iter().zip(areas.by_ref()) {
                    chart(&area, report, row, quantity, highest)?;
                }
            }
            area.present()?;
            Ok(())
        };
        draw().map_err(Error::from_boxed)?;
    }
    Ok(svg.into_bytes())
}

/// Burn's in blue, PyTorch's in orange; ours the darkest.
fn colour(contender: Contender) -> RGBColor {
    match contender {
        Contender::Fused => RGBColor(0, 72, 130),
        Contender::Never => RGBColor(0, 114, 178),
        Contender::NormConv => RGBColor(0, 90, 156),
        Contender::NormNever => RGBColor(44, 138, 196),
        Contender::Unfused => RGBColor(86, 160, 214),
        Contender::UnfusedCheckpointed => RGBColor(168, 208, 238),
        Contender::Eager => RGBColor(190, 76, 0),
        Contender::Compile => RGBColor(224, 122, 32),
        Contender::Tutorial => RGBColor(240, 166, 84),
        Contender::Checkpoint => RGBColor(248, 208, 150),
    }
}

/// Who is in a report.
fn contenders(report: &Report) -> impl Iterator<Item = Contender> {
    let timed = |contender: &Contender| {
        let mut entries = report.entries.iter();
        entries.any(|entry| entry.contender(*contender).is_some())
    };
    Contender::ALL.into_iter().filter(timed)
}

/// The bar of a contender of an entry, unless something was wrong with it.
fn bar(quantity: &Quantity, entry: &EntryReport, contender: Contender) -> Option<Bar> {
    let sound = |contender| {
        let report = entry.contender(contender);
        report.filter(|report| report.problem.is_none())
    };
    sound(Contender::Unfused).and_then(|_| (quantity.bar)(entry, sound(contender)?))
}

/// The highest of all bars of a quantity, and no less than that of Burn's unfused layers.
fn highest(report: &Report, quantity: &Quantity) -> f64 {
    let bars = report.entries.iter().flat_map(|entry| {
        let all = Contender::ALL.into_iter();
        all.filter_map(move |contender| bar(quantity, entry, contender))
    });
    bars.map(Bar::top).fold(1.0, f64::max)
}

/// What it was measured on, what is missing, and whose colours these are.
fn header(area: &Area<'_>, report: &Report, setting: &[String]) -> Drawn {
    let left = MARGIN as i32;
    let mut y = MARGIN as i32;
    for line in setting {
        area.draw(&Text::new(line.clone(), (left, y), (FONT, 12).into_font()))?;
        y += LINE_HEIGHT as i32;
    }
    let mut x = left;
    y += 10;
    for contender in contenders(report) {
        let square = [(x, y + 1), (x + 12, y + 13)];
        area.draw(&Rectangle::new(square, colour(contender).filled()))?;
        let name = contender.name();
        area.draw(&Text::new(name, (x + 17, y), (FONT, 13).into_font()))?;
        x += 33 + CHARACTER_WIDTH as i32 * name.len() as i32;
    }
    Ok(())
}

/// A group of bars for each of some entries.
fn chart(
    area: &Area<'_>,
    report: &Report,
    entries: &[EntryReport],
    quantity: &Quantity,
    highest: f64,
) -> Drawn {
    let columns = report.entries.len().clamp(1, ROW) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(quantity.title, (FONT, 16))
        .margin(8)
        .margin_right(MARGIN)
        .y_label_area_size(LEFT)
        .x_label_area_size(LABELS_HEIGHT)
        .build_cartesian_2d(0.0..columns, 0.0..1.12 * highest)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_desc("ratio to Burn unfused")
        .label_style((FONT, 13))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .y_label_formatter(&|value| format!("{value:.1}"))
        .draw()?;
    let contenders: Vec<Contender> = contenders(report).collect();
    let width = BARS / contenders.len().max(1) as f64;
    for (index, entry) in entries.iter().enumerate() {
        let start = index as f64 + (1.0 - BARS) / 2.0;
        for (place, contender) in contenders.iter().enumerate() {
            let Some(bar) = bar(quantity, entry, *contender) else {
                continue;
            };
            let left = start + place as f64 * width;
            let corners = [(left, 0.0), (left + BAR * width, bar.ratio)];
            chart.draw_series([Rectangle::new(corners, colour(*contender).filled())])?;
            if let Some([lower, upper]) = bar.quartiles {
                let middle = left + BAR * width / 2.0;
                let whisker = [(middle, lower), (middle, upper)];
                chart.draw_series([PathElement::new(whisker, BLACK.mix(0.7))])?;
            }
        }
    }
    let one = [(0.0, 1.0), (columns, 1.0)];
    chart.draw_series([PathElement::new(one, BLACK.mix(0.5))])?;

    // Labels last, so that no bar covers them.
    let (base_x, base_y) = area.get_base_pixel();
    for (index, entry) in entries.iter().enumerate() {
        if let Some(bar) = bar(quantity, entry, Contender::Fused) {
            let place = contenders.iter().position(|c| *c == Contender::Fused);
            let place = place.unwrap_or_default() as f64 + BAR / 2.0;
            let at = (index as f64 + (1.0 - BARS) / 2.0 + place * width, bar.top());
            let style = style(12, VPos::Bottom);
            let text = format!("{:.2}", bar.ratio);
            let text = EmptyElement::at(at) + Text::new(text, (0, -2), style);
            chart.draw_series([text])?;
        }
        let (x, y) = chart.backend_coord(&(index as f64 + 0.5, 0.0));
        let (x, y) = (x - base_x, y - base_y);
        let id = entry.entry.id.clone();
        area.draw(&Text::new(id, (x, y + 5), style(13, VPos::Top)))?;
        let batch = format!("batch {}", entry.entry.work.batch());
        area.draw(&Text::new(batch, (x, y + 21), style(12, VPos::Top)))?;
        let unfused = entry.contender(Contender::Unfused);
        if let Some(base) = unfused.and_then(quantity.base) {
            area.draw(&Text::new(base, (x, y + 37), style(12, VPos::Top)))?;
        }
    }
    Ok(())
}

/// Text that is centered left and right.
fn style(size: u32, vertical: VPos) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font()).pos(Pos::new(HPos::Center, vertical))
}

/// Text in lines of at most so many characters, unless a word is longer.
fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}

fn milliseconds(ms: f64) -> String {
    match ms {
        _ if ms < 9.95 => format!("{ms:.1} ms"),
        _ if ms < 999.5 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}

fn mebibytes(bytes: u64) -> String {
    let mebibytes = bytes as f64 / (1u64 << 20) as f64;
    match mebibytes {
        _ if mebibytes < 9.95 => format!("{mebibytes:.1} MiB"),
        _ => format!("{mebibytes:.0} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing;

    fn draw(report: &Report) -> String {
        String::from_utf8(svg(report).unwrap()).unwrap()
    }

    #[test]
    fn a_picture_names_what_it_shows() {
        let report = testing::report();
        let svg = draw(&report);
        for text in [
            "fused",
            "unfused",
            "Time of a step",
            "Peak memory",
            "ratio to Burn unfused",
            "0.50",
            "0.75",
            "12 ms",
            "4.0 MiB",
            "2026-01-02T03:04:05Z",
            "quick run",
            "batch 32",
            report.entries[0].entry.id.as_str(),
        ] {
            assert!(svg.contains(text), "no {text:?} in {svg}");
        }
        assert!(!svg.contains("eager"), "{svg}");
    }

    #[test]
    fn a_picture_says_what_is_missing_and_why() {
        let mut report = testing::whole();
        report.entries[11].contenders.clear();
        report.entries[11].problem = Some("not run: interrupted".to_string());
        assert!(draw(&report).contains("missing: mobilenet-v2 (not run: interrupted)"));
    }

    #[test]
    fn a_report_without_entries_can_be_drawn() {
        let mut report = testing::report();
        report.entries.clear();
        assert!(svg(&report).is_ok());
    }

    #[test]
    fn what_went_wrong_has_no_bar() {
        let mut report = testing::report();
        let entry = &report.entries[0];
        assert_eq!(
            bar(&QUANTITIES[0], entry, Contender::Fused).unwrap().ratio,
            0.5
        );
        let kind = burn_conv_bn_bench::report::ProblemKind::Mismatch;
        report.entries[0].contenders[0].fail(kind, "wrong");
        assert!(bar(&QUANTITIES[0], &report.entries[0], Contender::Fused).is_none());
    }

    /// The number that an attribute of an element starts with.
    fn attribute(element: &str, name: &str) -> f64 {
        let (_, value) = element.split_once(&format!(" {name}=\"")).unwrap();
        let (value, _) = value.split_once('"').unwrap();
        value.parse().unwrap()
    }

    #[test]
    fn no_text_reaches_over_the_edge() {
        for report in [testing::report(), testing::whole()] {
            let svg = draw(&report);
            let [width, height] = ["width", "height"].map(|name| attribute(&svg, name));
            let texts: Vec<&str> = svg.split("<text").skip(1).collect();
            assert!(texts.len() > 10, "{svg}");
            // Those that are turned stand in the middle of a chart's height.
            for text in texts.iter().filter(|text| !text.contains("rotate")) {
                let (tag, rest) = text.split_once('>').unwrap();
                let (body, _) = rest.split_once('<').unwrap();
                let characters = body.trim().chars().count() as f64;
                // As wide as wide fonts are.
                let length = 0.65 * attribute(tag, "font-size") * characters;
                let x = attribute(tag, "x");
                let (left, right) = match tag {
                    _ if tag.contains("\"middle\"") => (x - length / 2.0, x + length / 2.0),
                    _ if tag.contains("\"end\"") => (x - length, x),
                    _ => (x, x + length),
                };
                assert!(
                    left >= 0.0 && right <= width,
                    "{body:?} from {left} to {right}"
                );
                let y = attribute(tag, "y");
                assert!((0.0..=height).contains(&y), "{body:?} at {y}");
            }
        }
    }

    #[test]
    fn lines_are_no_longer_than_there_is_room() {
        let lines = wrapped("one two  three a-long-word four", 9);
        assert_eq!(lines, ["one two", "three", "a-long-word", "four"]);
        assert!(wrapped("", 9).is_empty());
    }

    #[test]
    fn values_have_their_units() {
        let times = [0.42, 42.4, 1234.0].map(milliseconds);
        assert_eq!(times, ["0.4 ms", "42 ms", "1.2 s"]);
        assert_eq!([3 << 19, 300 << 20].map(mebibytes), ["1.5 MiB", "300 MiB"]);
    }
}
