//! What the engine did, as a table: a column per vCPU and one for all.

use std::collections::BTreeMap;
use std::time::Duration;

use softcpu::Stats;
use softcpu::translate::Counters;

/// A table of more columns does not fit a terminal.
const MOST_COLUMNS: usize = 4;
/// How many instructions are named.
const NAMED: usize = 8;

/// One number of a vCPU; all vCPUs' are added up.
type Number = fn(&Stats) -> u64;
/// A part of a vCPU's time.
type Part = fn(&Stats) -> Duration;

/// Parts of the time, in the order in which they are shown.
const TIMES: [(&str, Part); 7] = [
    ("  in translated code", |stats| stats.time.detail.unwrap_or_default().translated),
    ("  interpreter, for it", |stats| stats.time.detail.unwrap_or_default().called_back),
    ("  interpreter, cold code", cold),
    ("  decoding", |stats| stats.time.decoding),
    ("  translating", |stats| stats.time.translating),
    ("  halted", |stats| stats.time.halted),
    ("  outside", |stats| stats.time.outside),
];

const BLOCKS: [(&str, Number); 10] = [
    ("blocks decoded", |stats| stats.engine.decoded),
    ("  run by the interpreter", |stats| stats.engine.blocks),
    ("  translated", |stats| stats.translator.translated),
    ("    beside the vCPU", |stats| stats.translator.beside),
    ("    taken back for that", |stats| stats.translator.taken_back),
    ("  found hot", |stats| stats.translator.hot),
    ("  moved elsewhere", |stats| stats.translator.moved),
    ("  another vCPU's, found", |stats| stats.translator.shared),
    ("  dropped: code changed", |stats| stats.translator.invalidated),
    ("  evicted: no room", |stats| stats.translator.evicted),
];

/// What vCPUs share: none of it is added up.
const SHARED: [(&str, Number); 2] = [
    ("code cache, KiB", |stats| stats.translator.capacity >> 10),
    ("  in use, KiB", |stats| stats.translator.used >> 10),
];

const CODE: [(&str, Number); 4] = [
    ("  made in all, KiB", |stats| stats.translator.bytes >> 10),
    ("  from guest's, KiB", |stats| stats.translator.guest_bytes >> 10),
    ("shared checks split", |stats| stats.translator.split),
    ("translated code entered", |stats| stats.translator.entered),
];

const MIRROR: [(&str, Number); 4] = [
    ("pages mirrored", |stats| stats.translator.mirrored),
    ("  faults for them", |stats| stats.translator.mirror_faults),
    ("  left to the interpreter", |stats| stats.translator.mirror_refused),
    ("  address spaces", |stats| stats.translator.mirror_owners),
];

/// What the guest has stood still for, in one go.
const PAUSES: [(&str, Part); 5] = [
    ("longest pause, ms", longest),
    ("  of translating", |stats| stats.time.longest.translating),
    ("  of evicting", |stats| stats.time.longest.evicting),
    ("  of dropping", |stats| stats.time.longest.dropping),
    ("  of sweeping", |stats| stats.time.longest.sweeping),
];

const LEFT: [(&str, Number); 2] = [
    ("  with an event waiting", |stats| stats.translator.for_events),
    ("  single ops interpreted", |stats| stats.translator.interpreted),
];

const REST: [(&str, Number); 7] = [
    ("TLB misses, loads/stores", |stats| misses(stats).saturating_sub(stats.engine.fetch_walks)),
    ("  fetches of code", |stats| stats.engine.fetch_walks),
    ("  page walks for all", |stats| stats.engine.walks.saturating_add(stats.engine.fetch_walks)),
    ("accesses not in line", |stats| stats.engine.slow_accesses),
    ("events looked after", |stats| stats.engine.events),
    ("  interrupts", |stats| stats.engine.interrupts),
    ("exceptions", |stats| stats.engine.exceptions),
];

/// What is left when the rest is known: without detail, translated code is in it.
fn cold(stats: &Stats) -> Duration {
    let time = &stats.time;
    let detail = time.detail.unwrap_or_default();
    let known = [detail.translated, detail.called_back, time.decoding, time.translating];
    let known = known.into_iter().chain([time.halted, time.outside]);
    known.fold(stats.elapsed, Duration::saturating_sub)
}

fn longest(stats: &Stats) -> Duration {
    let longest = stats.time.longest;
    longest.translating.max(longest.dropping).max(longest.sweeping)
}

fn misses(stats: &Stats) -> u64 {
    let engine = &stats.engine;
    engine.walks.saturating_add(engine.fetch_walks).saturating_add(engine.retagged)
}

/// The table.
pub(super) fn report(vcpus: &[Stats]) -> String {
    let shown = if vcpus.len() > MOST_COLUMNS || vcpus.len() == 1 { &[] } else { vcpus };
    let mut table = Table { shown, all: vcpus, text: String::new() };
    let names = (0..shown.len()).map(|vcpu| format!("vCPU {vcpu}"));
    let all = match vcpus.len() {
        1 => "vCPU 0".to_owned(),
        count => format!("all {count}"),
    };
    table.row("engine", names.chain([all]));
    let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
    table.row_of("time, s", |stats| seconds(sum(stats, |stats| stats.elapsed)));
    for (name, part) in TIMES {
        table.row_of(name, |stats| share(sum(stats, part), sum(stats, |stats| stats.elapsed)));
    }
    table.numbers(&BLOCKS);
    if vcpus.iter().any(|stats| stats.translator.capacity != 0) {
        for (name, number) in SHARED {
            table.row_of(name, |stats| {
                stats.iter().map(number).max().unwrap_or_default().to_string()
            });
        }
        table.numbers(&CODE);
        table.row_of("  MB a second, beside", |stats| {
            let made = total(stats, |stats| stats.translator.beside_bytes) as f64 / 1e6;
            let seconds = sum(stats, |stats| stats.time.beside).as_secs_f64();
            format!("{:.1}", if seconds > 0.0 { made / seconds } else { 0.0 })
        });
        table.numbers(&MIRROR);
        for (number, reason) in Counters::EXITS.iter().enumerate() {
            if !reason.is_empty() {
                table.row_of(&format!("  left for {reason}"), |stats| {
                    total(stats, |stats| stats.translator.exits[number]).to_string()
                });
            }
        }
        table.numbers(&LEFT);
    }
    table.numbers(&REST);
    for (name, pause) in PAUSES {
        table.row_of(name, |stats| {
            let longest = stats.iter().map(pause).max().unwrap_or_default();
            format!("{:.2}", longest.as_secs_f64() * 1e3)
        });
    }
    table.row_of("TLB misses a second", |stats| {
        let busy = |stats: &Stats| stats.elapsed.saturating_sub(stats.time.halted);
        let (misses, busy) = (total(stats, misses), sum(stats, busy).as_secs_f64());
        format!("{:.0}", if busy > 0.0 { misses as f64 / busy } else { 0.0 })
    });
    if let Some(line) = most_called_back(vcpus) {
        table.text.push_str(&line);
    }
    table.text
}

fn total(stats: &[Stats], number: impl Fn(&Stats) -> u64) -> u64 {
    stats.iter().map(number).fold(0, u64::saturating_add)
}

fn sum(stats: &[Stats], part: impl Fn(&Stats) -> Duration) -> Duration {
    stats.iter().map(part).fold(Duration::ZERO, Duration::saturating_add)
}

fn share(part: Duration, whole: Duration) -> String {
    let whole = whole.as_secs_f64();
    let share = if whole > 0.0 { part.as_secs_f64() / whole } else { 0.0 };
    format!("{:.1} %", share * 100.0)
}

/// The instructions that translated code has most often interpreted.
fn most_called_back(vcpus: &[Stats]) -> Option<String> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, count) in vcpus.iter().flat_map(|stats| &stats.called_back) {
        let sum = sums.entry(name).or_default();
        *sum = sum.saturating_add(*count);
    }
    let all: u64 = sums.values().fold(0, |all, count| all.saturating_add(*count));
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let percent = |count: u64| count as f64 / all as f64 * 100.0;
    let named: Vec<_> = sums
        .iter()
        .take(NAMED)
        .map(|(name, count)| format!("{name} {:.0} %", percent(*count)))
        .collect();
    (!named.is_empty()).then(|| format!("single ops were {}\n", named.join(", ")))
}

struct Table<'a> {
    /// Those with a column of their own.
    shown: &'a [Stats],
    all: &'a [Stats],
    text: String,
}

impl Table<'_> {
    fn row(&mut self, name: &str, cells: impl IntoIterator<Item = String>) {
        let cells: String = cells.into_iter().map(|cell| format!(" {cell:>13}")).collect();
        self.text.push_str(&format!("{name:<25}{cells}\n"));
    }

    fn row_of(&mut self, name: &str, cell: impl Fn(&[Stats]) -> String) {
        let single = self.shown.iter().map(|stats| cell(std::slice::from_ref(stats)));
        let cells: Vec<String> = single.chain([cell(self.all)]).collect();
        self.row(name, cells);
    }

    fn numbers(&mut self, rows: &[(&str, Number)]) {
        for (name, number) in rows {
            self.row_of(name, |stats| total(stats, number).to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use softcpu::stats::{Times, TimesInCode};

    fn stats() -> Stats {
        let detail =
            TimesInCode { translated: Duration::from_secs(5), called_back: Duration::from_secs(1) };
        let time =
            Times { halted: Duration::from_secs(2), detail: Some(detail), ..Times::default() };
        let mut stats = Stats { elapsed: Duration::from_secs(10), time, ..Stats::default() };
        stats.translator.capacity = 64 << 20;
        stats.translator.exits[1] = 30;
        stats.engine.walks = 16;
        stats.called_back = vec![("rdmsr".into(), 1), ("div".into(), 3)];
        stats
    }

    /// The cells of the row that begins with `name`.
    #[track_caller]
    fn cells(report: &str, name: &str) -> Vec<String> {
        let line = report.lines().find_map(|line| line.trim_start().strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{report}"));
        line.trim()
            .split("  ")
            .map(|cell| cell.trim().to_owned())
            .filter(|c| !c.is_empty())
            .collect()
    }

    #[test]
    fn columns_are_vcpus_and_their_sum() {
        let report = report(&[stats(), stats()]);
        assert_eq!(cells(&report, "engine"), ["vCPU 0", "vCPU 1", "all 2"]);
        assert_eq!(cells(&report, "time, s"), ["10.00", "10.00", "20.00"]);
        assert_eq!(cells(&report, "in translated code"), ["50.0 %"; 3]);
        assert_eq!(cells(&report, "interpreter, cold code"), ["20.0 %"; 3]);
        assert_eq!(cells(&report, "left for look-up"), ["30", "30", "60"]);
        assert_eq!(cells(&report, "code cache, KiB"), ["65536"; 3]);
        assert_eq!(cells(&report, "TLB misses a second"), ["2", "2", "2"]);
        assert!(report.ends_with("single ops were div 75 %, rdmsr 25 %\n"), "{report}");
        assert!(report.lines().all(|line| line.len() <= 80), "{report}");
    }

    #[test]
    fn many_vcpus_are_only_added_up_and_nothing_is_no_trouble() {
        assert_eq!(cells(&report(&vec![stats(); 64]), "engine"), ["all 64"]);
        let empty = report(&[Stats::default()]);
        assert_eq!(cells(&empty, "halted"), ["0.0 %"]);
        assert!(!empty.contains("code cache") && !empty.contains("single ops"));
    }
}
