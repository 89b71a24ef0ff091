//! The report's pictures, as SVG that reads well on light and on dark.
//!
//! Text, grid and axis are drawn in marker colours that a style sheet inside the SVG maps to the reader's scheme;
//! series colours are chosen to stand on both. The background stays transparent.

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Mapped to the reader's text colour.
const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2F);
/// Mapped to the reader's grid colour.
const GRID: RGBColor = RGBColor(0xDD, 0xE1, 0xE6);

const STYLE: &str = "<style>text{font-family:system-ui,sans-serif}\
@media (prefers-color-scheme:dark){[fill=\"#24292F\"]{fill:#D0D7DE}[stroke=\"#24292F\"]{stroke:#8B949E}\
[stroke=\"#DDE1E6\"]{stroke:#30363D}}</style>";

const WIDTH: u32 = 1000;
const HEIGHT: u32 = 520;
const LEGEND_WIDTH: i32 = 340;
/// Plotters draws these a fifth smaller.
const LABEL: u32 = 16;
const CAPTION: u32 = 21;

/// Whose numbers a series shows; decides how it is drawn.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// Ours: thick, filled points.
    Ours,
    /// A floor of this machine: dashed.
    Floor,
    /// Published, another machine: thin, hollow points.
    Published,
}

#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) label: String,
    pub(crate) kind: Kind,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What stands on the vertical axis.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) enum Vertical {
    Time,
    Ratio,
    Share,
    /// Calls per second.
    Rate,
}

/// What stands on the horizontal axis.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum Horizontal {
    Size,
    /// Calls per second.
    Rate,
    InFlight,
}

const OURS: [RGBColor; 9] = [
    RGBColor(0x1F, 0x6F, 0xEB),
    RGBColor(0xD2, 0x56, 0x1C),
    RGBColor(0x1A, 0x9B, 0x5B),
    RGBColor(0x9A, 0x4F, 0xD8),
    RGBColor(0xC9, 0x2C, 0x6D),
    RGBColor(0x11, 0x96, 0xA8),
    RGBColor(0xA3, 0x8A, 0x00),
    RGBColor(0x5B, 0x5B, 0xC9),
    RGBColor(0x8C, 0x56, 0x4B),
];
const FLOORS: [RGBColor; 9] = [
    RGBColor(0x6E, 0x9F, 0xE8),
    RGBColor(0xE0, 0x9B, 0x76),
    RGBColor(0x6F, 0xBF, 0x95),
    RGBColor(0xB9, 0x8F, 0xDE),
    RGBColor(0xD6, 0x83, 0xA6),
    RGBColor(0x74, 0xB8, 0xC2),
    RGBColor(0xB8, 0xA1, 0x4A),
    RGBColor(0x8F, 0x98, 0xA3),
    RGBColor(0xA8, 0x7B, 0x5D),
];
const PUBLISHED: [RGBColor; 5] = [
    RGBColor(0x8A, 0x8F, 0x98),
    RGBColor(0xB0, 0x8D, 0x57),
    RGBColor(0x7A, 0x9E, 0x7E),
    RGBColor(0xA8, 0x82, 0xA8),
    RGBColor(0x7F, 0x93, 0xB2),
];

/// A logarithmic axis: ticks at powers of ten, and between them where there are fewer than two decades.
#[derive(Clone)]
struct Decades(RangedCoordf64, f64, f64);

impl Decades {
    /// Covers the values with a little air; all must be positive.
    fn covering(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| *value > 0.0 && value.is_finite()) {
            low = low.min(value.log10());
            high = high.max(value.log10());
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let air = ((high - low) * 0.05).max(0.1);
        Self((low - air..high + air).into(), low - air, high + air)
    }
}

impl Ranged for Decades {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.0.map(&value.log10(), limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        #[expect(clippy::cast_possible_truncation, reason = "exponents of microseconds and bytes")]
        let (first, last) = (self.1.ceil() as i32, self.2.floor() as i32);
        if self.2 - self.1 >= 2.0 {
            return (first..=last).map(|exponent| 10f64.powi(exponent)).collect();
        }
        let fine =
            (first - 1..=last).flat_map(|exponent| [1.0, 1.5, 2.0, 3.0, 5.0].map(|step| step * 10f64.powi(exponent)));
        fine.filter(|value| (self.1..=self.2).contains(&value.log10())).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        10f64.powf(self.1)..10f64.powf(self.2)
    }
}

impl plotters::coord::ranged1d::ValueFormatter<f64> for Decades {
    fn format(value: &f64) -> String {
        value.to_string()
    }
}

/// Series over payload size, both axes logarithmic.
pub(crate) fn over_size(title: &str, vertical: Vertical, series: &[Series]) -> Result<String> {
    let label = if vertical == Vertical::Ratio { "p50 ÷ p50 of its floor" } else { "round trip, p50" };
    curves(title, (Horizontal::Size, "payload"), (vertical, label), series)
}

/// A percentile of the times over the calls per second that were answered, both axes logarithmic.
pub(crate) fn over_rate(title: &str, percentile: &str, series: &[Series]) -> Result<String> {
    let label = format!("from due to answered, {percentile}");
    curves(title, (Horizontal::Rate, "calls per second"), (Vertical::Time, &label), series)
}

/// Calls per second over calls in flight, both axes logarithmic.
pub(crate) fn over_in_flight(title: &str, series: &[Series]) -> Result<String> {
    curves(title, (Horizontal::InFlight, "calls in flight"), (Vertical::Rate, "calls per second"), series)
}

fn curves(
    title: &str,
    (horizontal, x_label): (Horizontal, &str),
    (vertical, y_label): (Vertical, &str),
    series: &[Series],
) -> Result<String> {
    let xs = Decades::covering(series.iter().flat_map(|one| &one.points).map(|point| point.0));
    let ys = Decades::covering(series.iter().flat_map(|one| &one.points).map(|point| point.1));
    draw(title, series, |area| {
        let mut chart = frame(area, title).build_cartesian_2d(xs, ys).map_err(plotted)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(TEXT)
            .label_style(("sans-serif", LABEL).into_font().color(&TEXT))
            .x_desc(x_label)
            .y_desc(y_label)
            .x_label_formatter(&|value| match horizontal {
                Horizontal::Size => decimal_size(*value),
                Horizontal::Rate | Horizontal::InFlight => count(*value),
            })
            .y_label_formatter(&|value| axis_label(*value, vertical))
            .draw()
            .map_err(plotted)?;
        for (one, color) in with_colors(series) {
            let mut points = one.points.clone();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            draw_series(&mut chart, one.kind, color, &points)?;
        }
        Ok(())
    })
}

/// Share of calls that took at most so long.
pub(crate) fn distribution(title: &str, series: &[Series]) -> Result<String> {
    let xs = Decades::covering(series.iter().flat_map(|one| &one.points).map(|point| point.0));
    draw(title, series, |area| {
        let mut chart = frame(area, title).build_cartesian_2d(xs, 0f64..1.02f64).map_err(plotted)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(TEXT)
            .label_style(("sans-serif", LABEL).into_font().color(&TEXT))
            .x_desc("round trip")
            .y_desc("share of calls at or below")
            .x_label_formatter(&|value| axis_label(*value, Vertical::Time))
            .y_label_formatter(&|value| axis_label(*value, Vertical::Share))
            .draw()
            .map_err(plotted)?;
        for (one, color) in with_colors(series) {
            let width = if one.kind == Kind::Ours { 3 } else { 1 };
            let line = LineSeries::new(one.points.iter().copied(), color.stroke_width(width));
            chart.draw_series(line).map_err(plotted)?;
        }
        Ok(())
    })
}

/// One horizontal bar per entry on a logarithmic time axis, longest last.
pub(crate) fn bars(title: &str, entries: &[Series]) -> Result<String> {
    let mut entries: Vec<&Series> = entries.iter().filter(|entry| !entry.points.is_empty()).collect();
    entries.sort_by(|a, b| a.points[0].1.total_cmp(&b.points[0].1));
    let height = 70 + 26 * u32::try_from(entries.len())?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let font = ("sans-serif", LABEL).into_font().color(&TEXT);
        let bold = ("sans-serif", CAPTION).into_font().color(&TEXT);
        area.draw(&Text::new(title.to_owned(), (12, 10), bold)).map_err(plotted)?;
        let low = entries.iter().map(|entry| entry.points[0].1).fold(f64::INFINITY, f64::min).max(1e-6) / 2.0;
        let high = entries.iter().map(|entry| entry.points[0].1).fold(low * 10.0, f64::max);
        let (left, right) = (430.0, f64::from(WIDTH) - 110.0);
        for (line, entry) in (0i32..).zip(&entries) {
            let value = entry.points[0].1;
            let share = (value / low).log10() / (high / low).log10();
            let (top, baseline) = (48 + 26 * line, 61 + 26 * line);
            #[expect(clippy::cast_possible_truncation, reason = "a position on a picture of a thousand pixels")]
            let (start, end) = (left as i32, (left + (right - left) * share) as i32);
            let color = match entry.kind {
                Kind::Ours => OURS[0],
                Kind::Floor => FLOORS[0].mix(0.55).to_rgb_over_nothing(),
                Kind::Published => PUBLISHED[0],
            };
            area.draw(&Rectangle::new([(start, top + 4), (end, top + 20)], color.filled())).map_err(plotted)?;
            let middle = font.clone().pos(Pos::new(HPos::Right, VPos::Center));
            area.draw(&Text::new(entry.label.clone(), (start - 8, baseline), middle)).map_err(plotted)?;
            let after = font.clone().pos(Pos::new(HPos::Left, VPos::Center));
            area.draw(&Text::new(time(value), (end + 6, baseline), after)).map_err(plotted)?;
        }
        area.present().map_err(plotted)?;
    }
    Ok(dressed(&svg, title))
}

/// `mix` yields a colour with alpha; the SVG wants a plain one for the style sheet to leave alone.
trait OverNothing {
    fn to_rgb_over_nothing(&self) -> RGBColor;
}

impl OverNothing for RGBAColor {
    fn to_rgb_over_nothing(&self) -> RGBColor {
        RGBColor(self.0, self.1, self.2)
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw(title: &str, series: &[Series], chart: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let whole = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let (picture, legend) = whole.split_horizontally(WIDTH.cast_signed() - LEGEND_WIDTH);
        chart(&picture)?;
        let font = ("sans-serif", LABEL).into_font().color(&TEXT).pos(Pos::new(HPos::Left, VPos::Center));
        let step = (HEIGHT.cast_signed() - 80) / i32::try_from(series.len().max(1))?;
        for (line, (one, color)) in (0i32..).zip(with_colors(series)) {
            let y = 52 + step.min(24) * line;
            let sample = vec![(6, y), (34, y)];
            match one.kind {
                Kind::Floor => {
                    for dash in 0..3 {
                        let stroke = vec![(6 + dash * 10, y), (12 + dash * 10, y)];
                        legend.draw(&PathElement::new(stroke, color.stroke_width(2))).map_err(plotted)?;
                    }
                }
                Kind::Ours => {
                    legend.draw(&PathElement::new(sample, color.stroke_width(3))).map_err(plotted)?;
                    legend.draw(&Circle::new((20, y), 4, color.filled())).map_err(plotted)?;
                }
                Kind::Published => {
                    legend.draw(&PathElement::new(sample, color.stroke_width(1))).map_err(plotted)?;
                    legend.draw(&Circle::new((20, y), 3, color.stroke_width(1))).map_err(plotted)?;
                }
            }
            legend.draw(&Text::new(one.label.clone(), (42, y), font.clone())).map_err(plotted)?;
        }
        whole.present().map_err(plotted)?;
    }
    Ok(dressed(&svg, title))
}

fn frame<'a, 'b>(area: &'a Area<'b>, title: &str) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(title, ("sans-serif", CAPTION).into_font().color(&TEXT))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(72);
    builder
}

fn draw_series<X, Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    kind: Kind,
    color: RGBColor,
    points: &[(f64, f64)],
) -> Result<()>
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    let line = points.iter().copied();
    match kind {
        Kind::Floor => {
            chart.draw_series(DashedLineSeries::new(line, 6, 4, color.stroke_width(2))).map_err(plotted)?;
        }
        Kind::Ours => {
            chart.draw_series(LineSeries::new(line.clone(), color.stroke_width(3))).map_err(plotted)?;
            chart.draw_series(line.map(|point| Circle::new(point, 4, color.filled()))).map_err(plotted)?;
        }
        Kind::Published => {
            chart.draw_series(LineSeries::new(line.clone(), color.stroke_width(1))).map_err(plotted)?;
            chart.draw_series(line.map(|point| Circle::new(point, 3, color.stroke_width(1)))).map_err(plotted)?;
        }
    }
    Ok(())
}

/// Each series with a colour of its kind, in order.
fn with_colors(series: &[Series]) -> Vec<(&Series, RGBColor)> {
    let mut used = [0usize; 3];
    series
        .iter()
        .map(|one| {
            let (slot, palette) = match one.kind {
                Kind::Ours => (0, &OURS[..]),
                Kind::Floor => (1, &FLOORS[..]),
                Kind::Published => (2, &PUBLISHED[..]),
            };
            used[slot] += 1;
            (one, palette[(used[slot] - 1) % palette.len()])
        })
        .collect()
}

/// Adds the style sheet, a title for readers that do not see, and room to shrink.
fn dressed(svg: &str, title: &str) -> String {
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    let size = svg.find("width=\"").map_or(svg.len(), |at| at);
    let (head, rest) = svg.split_at(size);
    let rest = rest.replacen('>', &format!(" role=\"img\"><title>{title}</title>{STYLE}"), 1);
    format!("{head}{rest}")
}

fn plotted<E: std::fmt::Debug>(error: E) -> anyhow::Error {
    anyhow!("plot: {error:?}")
}

fn axis_label(value: f64, vertical: Vertical) -> String {
    match vertical {
        Vertical::Time => time(value),
        Vertical::Ratio => format!("{} ×", trimmed(value)),
        Vertical::Share => format!("{:.0} %", value * 100.0),
        Vertical::Rate => count(value),
    }
}

/// A number of things in the unit one would say.
fn count(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", trimmed(value / 1e6)),
        value if value >= 1e3 => format!("{} k", trimmed(value / 1e3)),
        value => trimmed(value),
    }
}

/// Microseconds in the unit one would say.
pub(crate) fn time(microseconds: f64) -> String {
    match microseconds {
        value if value >= 1e6 => format!("{} s", trimmed(value / 1e6)),
        value if value >= 1e3 => format!("{} ms", trimmed(value / 1e3)),
        value if value >= 1.0 => format!("{} µs", trimmed(value)),
        value => format!("{} ns", trimmed(value * 1e3)),
    }
}

/// Three significant figures, no trailing zeros.
fn trimmed(value: f64) -> String {
    let decimals = match value {
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Ticks stand at powers of ten, so sizes on the axis are decimal.
fn decimal_size(bytes: f64) -> String {
    match bytes {
        value if value >= 1e6 => format!("{} MB", trimmed(value / 1e6)),
        value if value >= 1e3 => format!("{} kB", trimmed(value / 1e3)),
        value => format!("{} B", trimmed(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_in_the_unit_one_would_say() {
        for (microseconds, text) in
            [(0.288, "288 ns"), (1.0, "1 µs"), (73.32, "73.3 µs"), (21_327.2, "21.3 ms"), (1e6, "1 s")]
        {
            assert_eq!(time(microseconds), text);
        }
        assert_eq!([64.0, 2_500.0, 1e6].map(count), ["64", "2.5 k", "1 M"]);
    }

    #[test]
    fn a_plot_is_one_svg_with_every_label_and_both_colour_schemes() {
        let series: Vec<Series> = [Kind::Ours, Kind::Floor, Kind::Published]
            .into_iter()
            .map(|kind| Series { label: format!("label {kind:?}"), kind, points: vec![(10.0, 0.3), (5e6, 2000.0)] })
            .collect();
        for svg in [
            over_size("a < b", Vertical::Time, &series).unwrap(),
            distribution("a < b", &series).unwrap(),
            over_rate("a < b", "p99", &series).unwrap(),
            over_in_flight("a < b", &series).unwrap(),
            bars("a < b", &series).unwrap(),
        ] {
            assert_eq!(svg.matches("<svg").count(), 1);
            assert!(svg.contains("prefers-color-scheme") && svg.contains("<title>a &lt; b</title>"));
            assert!(series.iter().all(|one| svg.contains(&one.label)), "{svg}");
        }
    }

    #[test]
    fn nothing_to_plot_is_an_empty_frame_and_no_panic() {
        over_size("empty", Vertical::Ratio, &[]).unwrap();
        bars("empty", &[]).unwrap();
    }
}
