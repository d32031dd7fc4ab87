//! `lguest top`: what the guests of this user are doing, each second on a terminal, once
//! elsewhere.
//!
//! Reads what runs publish ([`super::publish`]) and shows how it grows. The files are
//! untrusted: what is wrong with one is said in its line.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use super::publish::{self, Found};
use super::record::{self, BadFile, Field, Header, Row};
use crate::cli::TopOptions;
use crate::status::Status;
use crate::{Error, size, terminal};

/// How often a terminal is refreshed.
const EVERY: Duration = Duration::from_secs(1);

/// A column: its head, and what is in it for two rows so many seconds apart.
type Column = (&'static str, fn(&Growth) -> String);

const COLUMNS: [Column; 9] = [
    ("busy", |growth| format!("{:.0} %", growth.busy() * 100.0)),
    ("blocks/s", |growth| growth.rate(Field::Blocks)),
    ("drops/s", |growth| growth.rate(Field::Dropped)),
    ("enter/s", |growth| growth.rate(Field::Entered)),
    ("interp/s", |growth| growth.rate(Field::CalledBack)),
    ("walks/s", |growth| growth.rate(Field::Walks)),
    ("faults/s", |growth| growth.rate(Field::Exceptions)),
    ("irqs/s", |growth| growth.rate(Field::Interrupts)),
    ("cache", |growth| format!("{} M", growth.now.get(Field::CodeUsed) >> 20)),
];

/// How a row has grown.
struct Growth {
    before: Row,
    now: Row,
    /// Seconds in between.
    seconds: f64,
}

impl Growth {
    fn of(&self, field: Field) -> f64 {
        self.now.get(field).saturating_sub(self.before.get(field)) as f64
    }

    fn rate(&self, field: Field) -> String {
        let rate = self.of(field) / self.seconds;
        match rate {
            1e7.. => format!("{:.0}M", rate / 1e6),
            1e4.. => format!("{:.0}k", rate / 1e3),
            _ => format!("{rate:.0}"),
        }
    }

    /// How much of the time it was not halted.
    fn busy(&self) -> f64 {
        (self.of(Field::Elapsed) - self.of(Field::Halted)).max(0.0) / (self.seconds * 1e9)
    }
}

/// A run as it was at a moment.
struct Run {
    process: u32,
    read: Result<(Header, Vec<Row>), BadFile>,
}

/// Shows them until stdout is closed, or once.
///
/// # Errors
/// There is no such run, or the files cannot be looked at.
pub(crate) fn top(options: &TopOptions) -> Result<Status, Error> {
    let mut before = (look(options)?, Instant::now());
    let mut out = io::stdout().lock();
    if !out.is_terminal() {
        let _ = out.write_all(screen(&before.0, None, options).as_bytes());
        return Ok(Status::PoweredOff);
    }
    // The first look has nothing to compare with, but what was since the start is true too.
    let mut text = screen(&before.0, None, options);
    loop {
        let rows = terminal::size().map_or(24, |(_, rows)| rows).max(2);
        let lines = text.lines().take(usize::from(rows).saturating_sub(1));
        let lines: String = lines.map(|line| format!("{line}\x1b[K\n")).collect();
        if write!(out, "\x1b[H{lines}\x1b[J").and_then(|()| out.flush()).is_err() {
            return Ok(Status::PoweredOff);
        }
        thread::sleep(EVERY);
        // A guest that was asked for by name may end while it is looked at.
        let Ok(runs) = look(options) else { return Ok(Status::PoweredOff) };
        let now = (runs, Instant::now());
        let apart = now.1.duration_since(before.1).as_secs_f64();
        text = screen(&now.0, Some((&before.0, apart)), options);
        before = now;
    }
}

/// What all runs say, or the one that was asked for.
fn look(options: &TopOptions) -> Result<Vec<Run>, Error> {
    let found = publish::runs()
        .map_err(|error| Error::Host(format!("the guests cannot be looked at: {error}")))?;
    let wanted = |found: &Found| options.pid.is_none_or(|pid| pid == found.process);
    let runs: Vec<Run> = found
        .into_iter()
        .filter(wanted)
        .map(|found| Run { process: found.process, read: read(&found.file) })
        .collect();
    match options.pid {
        Some(pid) if runs.is_empty() => Err(Error::Input(format!(
            "no guest of yours has process number {pid}: \"lguest top\" lists them"
        ))),
        _ => Ok(runs),
    }
}

fn read(file: &File) -> Result<(Header, Vec<Row>), BadFile> {
    let len = file.metadata().map_or(0, |metadata| metadata.len()).min(record::LONGEST);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    // What was cut off in between is zeroes.
    let mut done = 0;
    while let Some(rest @ [_, ..]) = bytes.get_mut(done..) {
        match file.read_at(rest, done as u64) {
            Ok(count @ 1..) => done = done.saturating_add(count),
            Ok(0) | Err(_) => break,
        }
    }
    record::read(&bytes)
}

/// All of it as text. `before` is what was there so many seconds ago; without it everything
/// is since the start.
fn screen(runs: &[Run], before: Option<(&[Run], f64)>, options: &TopOptions) -> String {
    if runs.is_empty() {
        return "no guest of yours is running\n".into();
    }
    let mut text = format!("{:>8}", if options.pid.is_some() { "vCPU" } else { "PID" });
    COLUMNS.iter().for_each(|(head, _)| text.push_str(&format!("{head:>9}")));
    text.push_str(if options.pid.is_some() { "\n" } else { "  guest\n" });
    let (earlier, seconds) = before.unwrap_or_default();
    let earlier: HashMap<u32, &Run> = earlier.iter().map(|run| (run.process, run)).collect();
    for run in runs {
        let (header, rows) = match &run.read {
            Ok(read) => read,
            Err(error) => {
                text.push_str(&format!("{:>8}  {error}\n", run.process));
                continue;
            }
        };
        let old = match earlier.get(&run.process).map(|run| &run.read) {
            Some(Ok((_, rows))) => rows.as_slice(),
            _ => &[],
        };
        let growths = rows.iter().enumerate().map(|(vcpu, now)| match old.get(vcpu) {
            Some(before) => Growth { before: *before, now: *now, seconds },
            None => since_start(*now),
        });
        if options.pid.is_some() {
            growths.enumerate().for_each(|(vcpu, growth)| {
                text.push_str(&line(&vcpu.to_string(), &growth));
                text.push('\n');
            });
        } else {
            text.push_str(&line(&run.process.to_string(), &sum(growths)));
            let (name, memory) = (&header.name, size::display(header.memory));
            let vcpus = if header.vcpus == 1 { "vCPU" } else { "vCPUs" };
            text.push_str(&format!("  {name}, {} {vcpus}, {memory}\n", header.vcpus));
        }
    }
    text
}

fn since_start(now: Row) -> Growth {
    let seconds = (now.get(Field::Elapsed) as f64 / 1e9).max(1e-3);
    Growth { before: Row::default(), now, seconds }
}

/// Several vCPUs as one.
fn sum(growths: impl Iterator<Item = Growth>) -> Growth {
    let zero = Growth { before: Row::default(), now: Row::default(), seconds: 1e-3 };
    growths.fold(zero, |mut sum, growth| {
        let add = |to: &mut Row, row: &Row| {
            to.0.iter_mut().zip(row.0).for_each(|(to, one)| *to = to.saturating_add(one));
        };
        add(&mut sum.before, &growth.before);
        add(&mut sum.now, &growth.now);
        sum.seconds = sum.seconds.max(growth.seconds);
        sum
    })
}

fn line(name: &str, growth: &Growth) -> String {
    let cells = COLUMNS.iter().map(|(_, cell)| format!("{:>9}", cell(growth)));
    format!("{name:>8}{}", cells.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(process: u32, scale: u64) -> Run {
        let mut row = Row::default();
        row.0[Field::Elapsed as usize] = scale * 1_000_000_000;
        row.0[Field::Halted as usize] = scale * 250_000_000;
        row.0[Field::Blocks as usize] = scale * 20_000;
        Run { process, read: Ok((Header::new("vmlinuz", 2, 512 << 20), vec![row, row])) }
    }

    fn options(pid: Option<u32>) -> TopOptions {
        TopOptions { pid, verbose: 0 }
    }

    #[test]
    fn guests_have_a_line_each_and_rates() {
        let now = [run(7, 3), run(8, 1)];
        let text = screen(&now, Some((&[run(7, 1)], 2.0)), &options(None));
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[1][..4], ["7", "150", "%", "40k"], "{text}");
        assert!(text.contains("vmlinuz, 2 vCPUs, 512 MiB"), "{text}");
        // One that is new is shown since its start.
        assert_eq!(lines[2][..4], ["8", "150", "%", "40k"], "{text}");
    }

    #[test]
    fn one_guest_has_a_line_per_vcpu() {
        let text = screen(&[run(7, 1)], None, &options(Some(7)));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].trim_start().starts_with("vCPU"));
        assert!(lines[2].trim_start().starts_with("1     75 %"), "{text}");
    }

    #[test]
    fn what_is_wrong_is_said_and_nothing_is_a_line_too() {
        assert_eq!(screen(&[], None, &options(None)), "no guest of yours is running\n");
        let broken = Run { process: 9, read: Err(BadFile::OtherVersion) };
        let text = screen(&[broken, run(7, 0)], None, &options(None));
        assert!(text.contains("9  written by another version"), "{text}");
        let hostile = Run {
            process: 1,
            read: Ok((Header::new("x", 1, u64::MAX), vec![Row([u64::MAX; record::FIELDS]); 1024])),
        };
        assert_eq!(
            screen(&[hostile], Some((&[run(1, 1)], 1e-9)), &options(None)).lines().count(),
            2
        );
    }

    #[test]
    fn a_file_that_is_cut_is_read_as_far_as_it_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let bytes = Header::new("k", 3, 0).to_bytes();
        for len in [0, 1, bytes.len() - 1, bytes.len()] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert_eq!(read(&File::open(&path).unwrap()).is_ok(), len == bytes.len());
        }
    }
}
