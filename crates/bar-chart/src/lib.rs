//! Bar charts of measurements, as SVG documents for `docs/`: groups of bars, one group for
//! each thing measured, one bar in it for each series.
//!
//! For `cargo xtask compare` and pvops' benchmarks, which print the numbers as tables, too.
//! Names are put into the document as they are: they are the callers' own words.

use std::fmt::Write as _;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 460.0;
/// Room right of the longest bar for its number.
const RIGHT: f64 = 60.0;
const TOP: f64 = 40.0;
const BAR: f64 = 11.0;
const PITCH: f64 = BAR + 2.0;
/// Between the groups.
const GAP: f64 = 9.0;
/// Of the legend's entries.
const ENTRY: f64 = 150.0;

/// How a value becomes a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Bars begin at 0.
    Linear,
    /// Bars begin at 1 and go right for more, left for less: for ratios.
    Logarithmic,
}

/// A chart, before it is drawn.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// What the numbers are.
    pub title: &'a str,
    /// Name and colour of each bar of a group.
    pub series: &'a [(&'a str, &'a str)],
    /// Name and values of each group, in the order of the series. A value that is not finite
    /// has not been measured and has no bar.
    pub groups: &'a [(&'a str, Vec<f64>)],
    /// How long bars are.
    pub scale: Scale,
}

impl Chart<'_> {
    /// The chart as an SVG document.
    pub fn svg(&self) -> String {
        let group = self.series.len() as f64 * PITCH + GAP;
        let bottom = TOP + self.groups.len() as f64 * group;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" \
             fill=\"white\"/>\n<text x=\"10\" y=\"20\" font-weight=\"bold\">{}</text>\n",
            LEFT + WIDTH + RIGHT,
            bottom + 20.0,
            self.title
        );
        for (i, (name, colour)) in self.series.iter().enumerate() {
            let x = LEFT + i as f64 * ENTRY;
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"11\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\
                 <text x=\"{}\" y=\"20\">{name}</text>",
                x + 14.0
            );
        }
        let axis = Axis::of(self);
        for line in axis.lines() {
            let (x, colour) = (axis.x(line), if line == 1.0 { "#000000" } else { "#dddddd" });
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {}V{bottom}\" stroke=\"{colour}\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" font-size=\"10\" text-anchor=\"middle\">{line}</text>",
                TOP - 4.0,
                bottom + 12.0
            );
        }
        for (i, (name, values)) in self.groups.iter().enumerate() {
            let y = TOP + i as f64 * group;
            let middle = y + self.series.len() as f64 * PITCH / 2.0 + 3.0;
            let _ = writeln!(svg, "<text x=\"10\" y=\"{middle}\">{name}</text>");
            for (j, (value, (_, colour))) in values.iter().zip(self.series).enumerate() {
                if !value.is_finite() {
                    continue;
                }
                let y = y + j as f64 * PITCH;
                let (begin, end) = (axis.begin(), axis.x(*value));
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" \
                     fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\" font-size=\"10\">{}</text>",
                    begin.min(end),
                    (end - begin).abs(),
                    begin.max(end) + 4.0,
                    y + 9.0,
                    number(*value)
                );
            }
        }
        svg + "</svg>\n"
    }
}

/// Three digits say enough.
fn number(value: f64) -> String {
    match value {
        ..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// From values to places.
struct Axis {
    scale: Scale,
    least: f64,
    most: f64,
}

impl Axis {
    fn of(chart: &Chart<'_>) -> Self {
        let values = || {
            let all = chart.groups.iter().flat_map(|(_, values)| values);
            all.copied().filter(|value| value.is_finite())
        };
        let most = values().fold(1.0, f64::max);
        let least = match chart.scale {
            Scale::Linear => 0.0,
            // Further left no bar would go on, were a value 0.
            Scale::Logarithmic => values().fold(1.0, f64::min).max(1e-3),
        };
        Self { scale: chart.scale, least, most: most.max(least + f64::EPSILON) }
    }

    fn x(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear => value / self.most,
            Scale::Logarithmic => {
                (value.max(self.least) / self.least).ln() / (self.most / self.least).ln()
            }
        };
        LEFT + part * WIDTH
    }

    /// Where bars begin.
    fn begin(&self) -> f64 {
        match self.scale {
            Scale::Linear => LEFT,
            Scale::Logarithmic => self.x(1.0),
        }
    }

    /// Values that get a line across: 1, 2, 5, 10 and so on, and below 1 the same.
    fn lines(&self) -> Vec<f64> {
        if self.scale == Scale::Linear {
            return Vec::new();
        }
        let decades = (-3..6).map(|exponent| 10_f64.powi(exponent));
        let lines = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|part| part * decade));
        lines.filter(|line| (self.least..=self.most).contains(line)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERIES: [(&str, &str); 2] = [("a", "#000001"), ("b", "#000002")];

    fn widths(scale: Scale, values: Vec<f64>) -> Vec<(f64, f64)> {
        let groups = [("group", values)];
        let chart = Chart { title: "title", series: &SERIES, groups: &groups, scale };
        let svg = chart.svg();
        let bars = svg.lines().filter(|line| line.contains("height=\"11\""));
        let attribute = |line: &str, name: &str| -> f64 {
            let (_, rest) = line.split_once(name).unwrap();
            rest.split('"').nth(1).unwrap().parse().unwrap()
        };
        bars.map(|line| (attribute(line, " x="), attribute(line, " width="))).collect()
    }

    #[test]
    fn the_longest_bar_fills_the_width() {
        let bars = widths(Scale::Linear, vec![10.0, 5.0]);
        assert_eq!(bars, [(LEFT, WIDTH), (LEFT, WIDTH / 2.0)]);
    }

    #[test]
    fn ratios_go_both_ways_from_one() {
        // Half of the way for a factor of ten, the other half for a tenth.
        let bars = widths(Scale::Logarithmic, vec![10.0, 0.1]);
        assert_eq!(bars, [(LEFT + WIDTH / 2.0, WIDTH / 2.0), (LEFT, WIDTH / 2.0)]);
    }

    #[test]
    fn what_was_not_measured_has_no_bar() {
        assert_eq!(widths(Scale::Logarithmic, vec![f64::NAN, 2.0]).len(), 1);
        assert!(widths(Scale::Linear, vec![f64::NAN, f64::INFINITY]).is_empty());
    }
}
