//! The plot: ticks a round for each style and caller, as bars.

use bar_chart::{Chart, Scale};

use super::measure::Ticks;

const CALLERS: [(&str, &str); 3] =
    [("one op", "#4c72b0"), ("typical caller", "#55a868"), ("12 live values", "#c44e52")];

/// An SVG document.
pub(crate) fn bars(rows: &[(&str, [Ticks; 3])]) -> String {
    let groups: Vec<_> =
        rows.iter().map(|(name, ticks)| (*name, ticks.iter().map(|t| t.best).collect())).collect();
    let title = "Ticks a round, best run";
    Chart { title, series: &CALLERS, groups: &groups, scale: Scale::Linear }.svg()
}
