//! The plot: ticks a round for each style and caller, as bars.

use super::measure::Ticks;
use std::fmt::Write as _;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 460.0;
const BAR: f64 = 11.0;
const COLOURS: [(&str, &str); 3] =
    [("one op", "#4c72b0"), ("typical caller", "#55a868"), ("12 live values", "#c44e52")];

/// An SVG document.
pub(crate) fn bars(rows: &[(&str, [Ticks; 3])]) -> String {
    let most = rows.iter().flat_map(|(_, t)| t).map(|t| t.best).fold(1.0, f64::max);
    let height = rows.len() as f64 * 48.0 + 60.0;
    let total = LEFT + WIDTH + 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{total}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"white\"/>\n<text x=\"10\" y=\"20\" font-weight=\"bold\">Ticks a round, best run\
         </text>\n"
    );
    for (i, (name, colour)) in COLOURS.iter().enumerate() {
        let x = LEFT + i as f64 * 150.0;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"11\" width=\"10\" height=\"10\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"20\">{name}</text>",
            x + 14.0
        );
    }
    for (i, (name, ticks)) in rows.iter().enumerate() {
        let y = 40.0 + i as f64 * 48.0;
        let _ = writeln!(svg, "<text x=\"10\" y=\"{}\">{name}</text>", y + 22.0);
        for (j, (t, (_, colour))) in ticks.iter().zip(COLOURS).enumerate() {
            let (y, width) = (y + j as f64 * (BAR + 2.0), t.best / most * WIDTH);
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" \
                 fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\" font-size=\"10\">{:.1}</text>",
                LEFT + width + 4.0,
                y + 9.0,
                t.best
            );
        }
    }
    svg + "</svg>\n"
}
