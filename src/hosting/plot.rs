//! Plots as SVG.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;

use super::report::{compact, escape};
use crate::{Error, Result};

#[derive(Debug, Clone)]
pub struct Plot {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

#[derive(Debug, Clone)]
pub struct Axis {
    pub label: String,
    /// Numbers of 0 and less cannot be shown then.
    pub log: bool,
}

#[derive(Debug, Clone)]
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
    /// Fitted or extrapolated, not measured.
    pub dashed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// The ends of the error bar.
    pub low: Option<f64>,
    pub high: Option<f64>,
}

const SIZE: (u32, u32) = (760, 400);

/// Okabe and Ito's colours, told apart by most eyes, but for those that are too pale on white or too dark on black.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

fn colour(series: usize) -> RGBColor {
    COLOURS[series % COLOURS.len()]
}

/// Numbers beyond this are no measurements, and sums of them may have no value.
const LARGEST: f64 = 1e100;

impl Axis {
    fn shows(&self, number: f64) -> bool {
        number.is_finite() && number.abs() < LARGEST && (!self.log || number > 1.0 / LARGEST)
    }
}

impl Plot {
    fn shows(&self, point: &Point) -> bool {
        self.x.shows(point.x) && self.y.shows(point.y)
    }

    /// The points that the axes have a place for, by x.
    fn shown(&self, series: &Series) -> Vec<Point> {
        let mut points: Vec<Point> = series.points.iter().copied().filter(|p| self.shows(p)).collect();
        for p in &mut points {
            p.low = p.low.filter(|&low| self.y.shows(low));
            p.high = p.high.filter(|&high| self.y.shows(high));
        }
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        points
    }
}

/// The plot with its title and legend, as HTML.
pub fn figure(plot: &Plot) -> Result<String> {
    let mut drawn = String::new();
    draw(plot, &mut drawn)
        .map_err(|e| Error::internal(format!("the plot {:?} could not be drawn: {e}", plot.title)))?;
    let (title, x, y) = (escape(&plot.title), escape(&plot.x.label), escape(&plot.y.label));
    let named = format!("><title>{title}: {y} over {x}</title>");
    let svg = drawn.replacen("<svg ", "<svg role=\"img\" ", 1).replacen('>', &named, 1);
    let mut legend = String::new();
    for (i, series) in plot.series.iter().enumerate() {
        let RGBColor(r, g, b) = colour(i);
        let dashes = if series.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        legend += &format!(
            "<li><svg viewBox=\"0 0 34 12\" aria-hidden=\"true\"><path d=\"M0 6H34\" stroke=\"#{r:02X}{g:02X}{b:02X}\" \
             stroke-width=\"3\"{dashes}/></svg> {}</li>\n",
            escape(&series.name)
        );
    }
    let left_out: usize =
        plot.series.iter().map(|series| series.points.iter().filter(|p| !plot.shows(p)).count()).sum();
    let note = match left_out {
        0 => String::new(),
        n => format!("<p>{n} points have no place on these axes and are not shown.</p>\n"),
    };
    Ok(format!(
        "<figure>\n<figcaption>{title}</figcaption>\n{svg}<ul class=\"legend\">\n{legend}</ul>\n{note}</figure>\n"
    ))
}

fn draw(plot: &Plot, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let series: Vec<Vec<Point>> = plot.series.iter().map(|s| plot.shown(s)).collect();
    let all = || series.iter().flatten();
    let x = Scale::over(all().map(|p| p.x), plot.x.log);
    let y = Scale::over(all().flat_map(|p| [Some(p.y), p.low, p.high]).flatten(), plot.y.log);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .margin_right(28)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(&plot.x.label)
        .y_desc(&plot.y.label)
        .x_labels(10)
        .y_labels(8)
        .max_light_lines(0)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.6))
        .x_label_formatter(&|v| compact(*v))
        .y_label_formatter(&|v| compact(*v))
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    for (i, points) in series.iter().enumerate() {
        let line = points.iter().map(|p| (p.x, p.y)).collect::<Vec<_>>();
        let style = colour(i).stroke_width(2);
        // A dot for each point would hide a dense line.
        let dots = if points.len() <= 60 { 3 } else { 0 };
        if plot.series[i].dashed {
            chart.draw_series(DashedLineSeries::new(line.iter().copied(), 7, 5, style))?;
            chart.draw_series(line.iter().filter(|_| dots > 0).map(|&at| Circle::new(at, dots, colour(i))))?;
        } else {
            chart.draw_series(LineSeries::new(line.iter().copied(), style))?;
            chart.draw_series(line.iter().filter(|_| dots > 0).map(|&at| Circle::new(at, dots, colour(i).filled())))?;
        }
        let spread = points.iter().filter(|p| p.low.is_some() || p.high.is_some());
        chart.draw_series(spread.map(|p| {
            ErrorBar::new_vertical(p.x, p.low.unwrap_or(p.y), p.y, p.high.unwrap_or(p.y), colour(i).filled(), 8)
        }))?;
    }
    if all().next().is_none() {
        let style = ("sans-serif", 18).into_font().color(&BLACK.mix(0.6));
        root.draw_text("no points", &style, (SIZE.0 as i32 / 2 - 30, SIZE.1 as i32 / 2))?;
    }
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

/// An axis's numbers, from `low` to the larger `high`.
#[derive(Debug, Clone, PartialEq)]
struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    /// Room for all numbers and a margin. What is not far from 0 begins there.
    fn over(numbers: impl Iterator<Item = f64>, log: bool) -> Self {
        let (low, high) = numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), n| (l.min(n), h.max(n)));
        match (low <= high, log) {
            (false, _) => Scale { low: if log { 1.0 } else { 0.0 }, high: if log { 10.0 } else { 1.0 }, log },
            (true, true) => {
                let margin = (high / low).powf(0.05).max(1.1);
                Scale { low: low / margin, high: high * margin, log }
            }
            (true, false) if low >= 0.0 && low < 0.5 * high => Scale { low: 0.0, high: high * 1.05, log },
            (true, false) => {
                let margin = match high - low {
                    0.0 => (0.05 * high.abs()).max(1e-3),
                    width => 0.08 * width,
                };
                Scale { low: low - margin, high: high + margin, log }
            }
        }
    }

    /// From 0 at `low` to 1 at `high`.
    fn share(&self, number: f64) -> f64 {
        let place = |n: f64| if self.log { n.max(f64::MIN_POSITIVE).log10() } else { n };
        (place(number) - place(self.low)) / (place(self.high) - place(self.low))
    }

    /// At most `most` round numbers within.
    fn ticks(&self, most: usize) -> Vec<f64> {
        let most = most.max(2) as f64;
        let (low, high) = if self.log { (self.low.log10(), self.high.log10()) } else { (self.low, self.high) };
        if self.log && high - low < most {
            // The finest of these rows that is not too many.
            let rows: [&[f64]; 4] = [&[1., 2., 3., 5., 7.], &[1., 2., 5.], &[1., 3.], &[1.]];
            let row = |digits: &[f64]| -> Vec<f64> {
                let decades = low.floor() as i32..=high.ceil() as i32;
                let all = decades.flat_map(|e| digits.iter().map(move |d| d * 10f64.powi(e)).collect::<Vec<_>>());
                all.filter(|t| (self.low..=self.high).contains(t)).collect()
            };
            let found = rows.iter().map(|digits| row(digits)).find(|ticks| ticks.len() <= most as usize);
            // Of less than a few tenths of a decade no such row has two.
            if let Some(ticks) = found.filter(|ticks| ticks.len() > 1) {
                return ticks;
            }
            return Scale { log: false, ..self.clone() }.ticks(most as usize);
        }
        let rough = (high - low) / most;
        let power = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|s| s * power);
        let step = steps.into_iter().find(|&s| s >= rough * 0.999).unwrap_or(10.0 * power);
        let step = if self.log { step.max(1.0).round() } else { step };
        let (first, last) = ((low / step).ceil(), (high / step).floor());
        let count = (last - first).clamp(0.0, most) as usize;
        let ticks = (0..=count).map(|i| (first + i as f64) * step);
        ticks.map(|t| if self.log { 10f64.powf(t) } else { t }).collect()
    }
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + ((limit.1 - limit.0) as f64 * self.share(*value)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() && hint.bold_points() != hint.max_num_points() {
            return vec![];
        }
        self.ticks(hint.bold_points())
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(log: bool, series: &[&[(f64, f64)]]) -> Plot {
        let axis = |label: &str| Axis { label: label.into(), log };
        let point = |&(x, y): &(f64, f64)| Point { x, y, low: Some(y * 0.9), high: Some(y * 1.1) };
        let one = |points: &&[(f64, f64)]| Series {
            name: "a".into(),
            points: points.iter().map(point).collect(),
            dashed: points.len() % 2 == 1,
        };
        Plot { title: "t".into(), x: axis("x"), y: axis("y"), series: series.iter().map(one).collect() }
    }

    #[test]
    fn whatever_was_measured_is_drawn() {
        let nan = f64::NAN;
        let cases: [&[&[(f64, f64)]]; 9] = [
            &[],
            &[&[]],
            &[&[(1.0, 1.0)]],
            &[&[(0.0, 0.0)]],
            &[&[(-1.0, 5.0), (0.0, -3.0), (2.0, 0.0)]],
            &[&[(nan, 1.0), (1.0, nan), (f64::INFINITY, 2.0)], &[(1.0, 1.0), (2.0, 2.0)]],
            &[&[(5e-324, 1e-300), (1.0, 1e300), (f64::MAX, f64::MIN)]],
            &[&[(1e9, 1e9), (1e9 + 1.0, 1e9 + 1.0)]],
            &[&[(1e-9, 1e-3), (1e18, 1e21), (3.0, 4.0)]],
        ];
        for series in cases {
            for log in [false, true] {
                let html = figure(&plot(log, series)).unwrap();
                assert!(html.contains("<title>t: y over x</title>") && !html.contains("NaN"), "{html}");
            }
        }
        assert!(figure(&plot(false, &[])).unwrap().contains("no points"));
    }

    #[test]
    fn points_without_a_place_are_counted() {
        let series: &[(f64, f64)] = &[(0.0, 1.0), (10.0, 0.0), (100.0, 2.0), (f64::NAN, 2.0)];
        assert!(figure(&plot(true, &[series])).unwrap().contains("3 points have no place"));
        assert!(figure(&plot(false, &[series])).unwrap().contains("1 points have no place"));
        assert!(!figure(&plot(false, &[&series[1..3]])).unwrap().contains("no place"));
    }

    /// A point lies where its axis's scale has it, and its error bar over and under it.
    #[test]
    fn a_point_lies_in_its_place() {
        let scale = Scale { low: 1.0, high: 100.0, log: true };
        assert_eq!(scale.map(&10.0, (0, 200)), 100);
        assert_eq!(Scale { log: false, ..scale }.map(&50.5, (300, 100)), 200);
        let html = figure(&plot(true, &[&[(10.0, 20.0), (1000.0, 40.0)]])).unwrap();
        let circle = |tag: &str| -> (f64, f64) {
            let number = |name: &str| tag.split_once(&format!("{name}=\"")).unwrap().1.split('"').next().unwrap();
            (number("cx").parse().unwrap(), number("cy").parse().unwrap())
        };
        let dots: Vec<(f64, f64)> = html.split("<circle").skip(1).map(circle).collect();
        assert!(dots[0].0 < dots[1].0 && dots[0].1 > dots[1].1, "{dots:?}");
    }

    #[test]
    fn ticks_are_round_and_few() {
        let scale = |low: f64, high: f64, log: bool| Scale { low, high, log };
        let near = |found: Vec<f64>, expected: &[f64]| {
            let same = found.len() == expected.len()
                && found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= 1e-9 * e.abs().max(1.0));
            assert!(same, "{found:?} is not {expected:?}");
        };
        near(scale(0.0, 1.05, false).ticks(8), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        near(scale(45.0, 8000.0, true).ticks(10), &[50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3]);
        near(scale(40.0, 250.0, true).ticks(10), &[50.0, 70.0, 100.0, 200.0]);
        near(scale(1.0, 1e12, true).ticks(5), &[1.0, 1e5, 1e10]);
        near(scale(100.0, 115.0, true).ticks(5), &[100.0, 105.0, 110.0, 115.0]);
        for (low, high) in [(1e-90, 1e90), (-5.0, 5.0), (0.61, 0.62), (1e9, 1e9 + 1.0)] {
            for log in [false, true] {
                let count = scale(low, high, log && low > 0.0).ticks(8).len();
                assert!((2..=9).contains(&count), "{count} between {low} and {high}");
            }
        }
    }
}
