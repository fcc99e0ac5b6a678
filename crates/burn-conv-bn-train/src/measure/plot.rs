//! Pictures of a comparison, as SVG.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::measure::report::{Report, VariantReport};
use crate::measure::timeline::Timeline;

/// Width of a picture, in pixels.
const WIDTH: u32 = 900;

/// Height of the curve of memory.
const MEMORY_HEIGHT: u32 = 440;

/// Height of the curve of losses.
const LOSS_HEIGHT: u32 = 300;

/// Room left and right of every chart, so that they stand one below the other.
const LEFT: u32 = 70;
const RIGHT: u32 = 30;

/// Colours of the variants, in their order; distinct also for the colour-blind.
const COLOURS: [RGBColor; 3] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

const FONT: &str = "sans-serif";

/// Losses that fit a curve.
const LOSS_POINTS: usize = 500;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type DrawResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Memory over one training step where it was recorded, and below it the losses, with a gap where one is not
/// finite.
///
/// # Errors
///
/// If the drawing library cannot draw it.
pub(crate) fn picture(report: &Report) -> anyhow::Result<String> {
    let timelines: Vec<(usize, &VariantReport, &Timeline)> = report
        .variants
        .iter()
        .enumerate()
        .filter_map(|(index, variant)| Some((index, variant, variant.timeline.as_ref()?)))
        .collect();
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, MEMORY_HEIGHT + LOSS_HEIGHT))
            .into_drawing_area();
        let drawn = || -> DrawResult {
            area.fill(&WHITE)?;
            let (memory, losses) = area.split_vertically(MEMORY_HEIGHT);
            draw_memory(&memory, report, &timelines)?;
            draw_losses(&losses, report)?;
            area.present()?;
            Ok(())
        };
        drawn().map_err(anyhow::Error::from_boxed)?;
    }
    Ok(svg)
}

fn colour(variant: usize) -> RGBColor {
    COLOURS[variant % COLOURS.len()]
}

fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 20) as f64
}

fn style<'a>(size: u32, colour: &'a RGBColor, pos: Pos) -> TextStyle<'a> {
    TextStyle::from((FONT, size).into_font())
        .color(colour)
        .pos(pos)
}

fn draw_memory(
    area: &Area<'_>,
    report: &Report,
    timelines: &[(usize, &VariantReport, &Timeline)],
) -> DrawResult {
    let title = format!(
        "Memory over one training step of {} digits ({}, {} on {})",
        report.batch_size, report.model, report.dtype, report.device
    );
    let end = timelines.iter().map(|(_, _, t)| t.optimizer_end);
    let end = end.fold(f64::MIN_POSITIVE, f64::max);
    let peak = timelines.iter().map(|(_, _, t)| t.peak()).max();
    let peak = mebibytes(peak.unwrap_or_default()).max(1.0);
    // The phases' bars stand below zero, so that no curve crosses them.
    let row = 0.075 * peak;
    let bottom = -row * (timelines.len() as f64 + 0.4);
    let mut chart = chart(
        area,
        &title,
        // To the right there is room for the last phase's label.
        (0.0..1.1 * end, "seconds from the start of the forward pass"),
        (bottom..1.12 * peak, "MiB above the level before it"),
    )?;
    for (place, (index, variant, timeline)) in timelines.iter().enumerate() {
        let colour = colour(*index);
        let points: Vec<(f64, f64)> = timeline
            .points
            .iter()
            .map(|point| (point.seconds, mebibytes(point.bytes)))
            .collect();
        chart.draw_series(AreaSeries::new(points, 0.0, colour.mix(0.15)).border_style(colour))?;
        let top = -row * (place as f64 + 0.4);
        draw_phases(&mut chart, timeline, colour, top..top - 0.8 * row, end)?;
        draw_peak(&mut chart, &variant.name, timeline, colour, end)?;
    }
    Ok(())
}

/// A bar for each phase.
fn draw_phases(
    chart: &mut Chart<'_, '_>,
    timeline: &Timeline,
    colour: RGBColor,
    height: Range<f64>,
    end: f64,
) -> DrawResult {
    let phases = [
        ("forward", timeline.forward_end, 0.35),
        ("backward", timeline.backward_end, 0.6),
        ("optimizer", timeline.optimizer_end, 1.0),
    ];
    let mut from = 0.0;
    for (name, to, shade) in phases {
        let corners = [(from, height.start), (to, height.end)];
        chart.draw_series([Rectangle::new(corners, colour.mix(shade).filled())])?;
        let middle = (height.start + height.end) / 2.0;
        let fits = to - from > 0.1 * end;
        let (at, pos, text) = if fits {
            ((from + to) / 2.0, HPos::Center, BLACK)
        } else {
            (to + 0.008 * end, HPos::Left, colour)
        };
        let style = style(13, &text, Pos::new(pos, VPos::Center));
        // A label that does not fit stands beside its bar, if nothing follows there.
        if fits || name == "optimizer" {
            chart.draw_series([Text::new(name, (at, middle), style)])?;
        }
        from = to;
    }
    Ok(())
}

/// The name and the peak, beside it.
fn draw_peak(
    chart: &mut Chart<'_, '_>,
    name: &str,
    timeline: &Timeline,
    colour: RGBColor,
    end: f64,
) -> DrawResult {
    let Some(point) = timeline.points.iter().max_by_key(|point| point.bytes) else {
        return Ok(());
    };
    let at = (point.seconds, mebibytes(point.bytes));
    chart.draw_series([Circle::new(at, 4, colour.filled())])?;
    let label = format!("{name}: peak {:.0} MiB", at.1);
    let (pos, shift) = if at.0 > 0.7 * end {
        (HPos::Right, -10)
    } else {
        (HPos::Left, 10)
    };
    let style = style(15, &colour, Pos::new(pos, VPos::Bottom));
    let text = EmptyElement::at(at) + Text::new(label, (shift, -4), style);
    chart.draw_series([text])?;
    Ok(())
}

fn draw_losses(area: &Area<'_>, report: &Report) -> DrawResult {
    let losses = || report.variants.iter().map(|v| v.step_losses.as_slice());
    let steps = losses().map(<[f64]>::len).max().unwrap_or_default();
    let finite = losses().flatten().copied().filter(|loss| loss.is_finite());
    // Room above it must be finite, too.
    let highest = finite.fold(f64::MIN_POSITIVE, f64::max).min(f64::MAX / 2.0);
    let title = format!(
        "Loss of every training step ({}, {})",
        report.dataset, report.optimizer
    );
    let mut chart = chart(
        area,
        &title,
        (0.0..steps.max(1) as f64, "training steps"),
        (0.0..1.05 * highest, "mean loss of a digit"),
    )?;
    // Each thinner than the one below it, so that both are seen where losses are the same.
    for (index, variant) in report.variants.iter().enumerate().rev() {
        let line = colour(index).stroke_width(2 + 3 * index as u32);
        let every = variant.step_losses.len().div_ceil(LOSS_POINTS).max(1);
        let points = variant.step_losses.iter().enumerate().step_by(every);
        let points: Vec<(f64, f64)> = points
            .map(|(step, loss)| (step as f64 + 1.0, *loss))
            .collect();
        // A gap where the loss is not finite.
        for curve in points.split(|(_, loss)| !loss.is_finite()) {
            match curve {
                [point] => chart.draw_series([Circle::new(*point, 3, line.filled())])?,
                _ => chart.draw_series(LineSeries::new(curve.iter().copied(), line))?,
            };
        }
        let label = match variant.diverged {
            Some(divergence) => format!("{} ({divergence})", variant.name),
            None => variant.name.clone(),
        };
        chart
            .draw_series(LineSeries::new([], line))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], line));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 14))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

/// An empty chart with its title and axes, of values from 0.
fn chart<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    (x, x_title): (Range<f64>, &str),
    (y, y_title): (Range<f64>, &str),
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error + Send + Sync>> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 17))
        .margin(12)
        .margin_right(RIGHT)
        .x_label_area_size(46)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_title)
        .y_desc(y_title)
        .label_style((FONT, 13))
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .y_label_formatter(&|value| {
            let rounded = (value * 1e3).round() / 1e3;
            if rounded < 0.0 {
                String::new()
            } else {
                rounded.to_string()
            }
        })
        .draw()?;
    Ok(chart)
}

#[cfg(test)]
mod tests;
