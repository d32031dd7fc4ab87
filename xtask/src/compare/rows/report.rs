//! What was measured as a table with verdicts, and as a plot.

use bar_chart::{Chart, Scale};

use super::super::measured::Measured;
use super::super::{median, verdict};
use super::list::{Bar, Needs, QEMU, QEMU_MEAN, Row};
use super::peers::Peer;

/// A row's medians, by peer in [`Peer::ALL`]'s order; not a number where there is none.
struct Line {
    row: Row,
    unit: String,
    values: [f64; 4],
}

impl Line {
    fn value(&self, peer: Peer) -> f64 {
        self.values[peer as usize]
    }

    /// How many times as long as lguest QEMU takes, and lguest as long as the host; of rows
    /// that take time.
    fn ratios(&self) -> Option<(f64, f64)> {
        let ours = self.value(Peer::Lguest);
        let ratios = (self.value(Peer::Qemu) / ours, ours / self.value(Peer::Host));
        (self.row.needs != Needs::TwoCpus).then_some(ratios)
    }

    /// The row's own bar in words, with the verdict.
    fn verdict(&self) -> String {
        let ours = self.value(Peer::Lguest);
        let (words, met) = match self.row.bar {
            Bar::None => return String::new(),
            Bar::Host(most) => (
                format!("at most {most} times the host's"),
                self.ratios().is_some_and(|r| r.1 <= most),
            ),
            Bar::Most(most) => (format!("at most {most:.0} {}", self.unit), ours <= most),
            Bar::Least(least) => (format!("at least {least} {}", self.unit), ours >= least),
        };
        format!("{words}: {}", verdict(met))
    }
}

/// All that was measured, in a few numbers.
pub(super) struct Table {
    lines: Vec<Line>,
    /// Which way each peer went in a row, where they had a choice.
    chosen: Vec<String>,
}

impl Table {
    /// Sums up each peer's runs.
    pub(super) fn of(rows: &[Row], runs: &[Vec<Measured>; 4]) -> Self {
        let line = |row: &Row| {
            let values = runs.each_ref().map(|runs| {
                let values = runs.iter().filter_map(|run| run.value(row.name));
                median(&mut values.collect::<Vec<_>>())
            });
            let mut units = runs.iter().flatten().flat_map(|run| &run.values);
            let unit = units.find(|value| value.name == row.name)?.unit.clone();
            Some(Line { row: *row, unit, values })
        };
        let chosen = rows.iter().filter_map(|row| choices(row.name, runs));
        Self { lines: rows.iter().filter_map(line).collect(), chosen: chosen.collect() }
    }

    /// Of the rows where QEMU and lguest both took time: how far lguest is ahead.
    fn mean(&self) -> f64 {
        let ahead = self.lines.iter().filter_map(|line| Some(line.ratios()?.0));
        let logarithms: Vec<f64> = ahead.filter(|r| r.is_finite()).map(f64::ln).collect();
        (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp()
    }

    /// The table in Markdown. `setting` says where it was measured.
    pub(super) fn report(&self, setting: &str) -> String {
        let names = Peer::ALL.map(Peer::name).join(" | ");
        let mut lines = vec![
            setting.to_owned(),
            String::new(),
            format!(
                "| | {names} | QEMU by lguest | at least {QEMU} | lguest by host | the row's own bar |"
            ),
            "|---|---|---|---|---|---|---|---|---|".to_owned(),
        ];
        for line in &self.lines {
            let values = line.values.map(number).join(" | ");
            let (ahead, verdict, behind) = match line.ratios() {
                Some((ahead, behind)) if ahead.is_finite() => {
                    (number(ahead), verdict(ahead >= QEMU), number(behind))
                }
                Some((_, behind)) => (String::new(), "", number(behind)),
                None => (String::new(), "", String::new()),
            };
            lines.push(format!(
                "| {}, {} | {values} | {ahead} | {verdict} | {behind} | {} |",
                line.row.name,
                line.unit,
                line.verdict()
            ));
        }
        let mean = self.mean();
        if mean.is_finite() {
            lines.push(format!(
                "| geometric mean | | | | | {mean:.2} | | | at least {QEMU_MEAN}: {} |",
                verdict(mean >= QEMU_MEAN)
            ));
        }
        if !self.chosen.is_empty() {
            lines.push(String::new());
            lines.push(format!("What did the work: {}.", self.chosen.join("; ")));
        }
        lines.join("\n")
    }

    /// The same as bars: how many times as long as the host each of the others takes.
    pub(super) fn plot(&self) -> String {
        let timed = self.lines.iter().filter(|line| line.ratios().is_some());
        let groups: Vec<_> = timed
            .map(|line| {
                let host = line.value(Peer::Host);
                let values =
                    [Peer::Lguest, Peer::Qemu, Peer::Uml].map(|peer| line.value(peer) / host);
                (line.row.name, values.to_vec())
            })
            .collect();
        Chart {
            title: "Times as long as on the host",
            series: &[
                ("lguest", "#4c72b0"),
                ("QEMU TCG", "#c44e52"),
                ("User-mode Linux", "#8c8c8c"),
            ],
            groups: &groups,
            scale: Scale::Logarithmic,
        }
        .svg()
    }
}

/// Three digits and a bit, or a dash for what was not measured.
fn number(value: f64) -> String {
    if value.is_finite() { format!("{value:.2}") } else { "–".to_owned() }
}

/// "NAME by WHAT (PEERS), WHAT (PEERS)", or without peers if all went the same way.
fn choices(name: &str, runs: &[Vec<Measured>; 4]) -> Option<String> {
    let mut ways: Vec<(&str, Vec<&str>)> = Vec::new();
    for (peer, runs) in Peer::ALL.into_iter().zip(runs) {
        let mut chosen = runs.iter().flat_map(|run| &run.chosen);
        let Some((_, what)) = chosen.find(|(row, _)| row == name) else { continue };
        match ways.iter_mut().find(|(way, _)| way == what) {
            Some((_, peers)) => peers.push(peer.name()),
            None => ways.push((what, vec![peer.name()])),
        }
    }
    match ways.as_slice() {
        [] => None,
        [(way, _)] => Some(format!("{name} by {way}")),
        ways => {
            let ways = ways.iter().map(|(way, peers)| format!("{way} ({})", peers.join(", ")));
            Some(format!("{name} by {}", ways.collect::<Vec<_>>().join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::measured::Value;
    use super::super::list::ROWS;
    use super::*;

    fn run(values: &[(&str, f64, &str)], chosen: &[(&str, &str)]) -> Measured {
        let values = values.iter().map(|(name, value, unit)| Value {
            name: (*name).into(),
            value: *value,
            unit: (*unit).into(),
        });
        let chosen = chosen.iter().map(|(name, what)| ((*name).into(), (*what).into()));
        Measured { values: values.collect(), chosen: chosen.collect() }
    }

    fn table() -> Table {
        let of = |fnv, getppid, loops: f64, way| {
            let values =
                [("fnv", fnv, "ms"), ("getppid", getppid, "ns"), ("two-loops", loops, "times")];
            vec![run(&values, &[("fnv", way)])]
        };
        let uml = vec![run(&[("fnv", 11.0, "ms")], &[])];
        let runs =
            [of(10.0, 100.0, 2.0, "a"), of(20.0, 500.0, 1.9, "a"), of(320.0, 500.0, 1.7, "b"), uml];
        Table::of(&ROWS, &runs)
    }

    #[test]
    fn every_bar_has_a_verdict() {
        let text = table().report("here");
        for line in [
            "| fnv, ms | 10.00 | 20.00 | 320.00 | 11.00 | 16.00 | met | 2.00 | at most 2 times the host's: met |",
            "| getppid, ns | 100.00 | 500.00 | 500.00 | – | 1.00 | missed | 5.00 | at most 400 ns: missed |",
            "| two-loops, times | 2.00 | 1.90 | 1.70 | – |  |  |  | at least 1.8 times: met |",
            "| geometric mean | | | | | 4.00 | | | at least 4: met |",
            "fnv by a (host, lguest), b (QEMU TCG)",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        // Rows that nobody has measured are left out.
        assert!(!text.contains("gcc"), "{text}");
    }

    #[test]
    fn the_plot_has_a_bar_for_each_ratio() {
        // fnv by three, getppid by two; what is no time is none of its.
        assert_eq!(table().plot().matches("height=\"11\"").count(), 5);
    }
}
