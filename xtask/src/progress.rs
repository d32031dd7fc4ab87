//! Saying what is going on: a spinner on a terminal, a line anywhere else.

use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How often something that goes on is told of where there is no terminal.
const QUIET: Duration = Duration::from_secs(30);

/// Something that goes on, with news of it.
#[derive(Debug)]
pub(crate) struct Live {
    what: String,
    bar: Option<ProgressBar>,
    start: Instant,
    told: Cell<Instant>,
}

impl Live {
    pub(crate) fn start(what: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| spinner(what));
        let start = Instant::now();
        if bar.is_none() {
            eprintln!("{what} ...");
        }
        Self { what: what.to_owned(), bar, start, told: Cell::new(start) }
    }

    pub(crate) fn say(&self, news: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {news}", self.what));
        } else if self.told.get().elapsed() >= QUIET {
            self.told.set(Instant::now());
            eprintln!("{:>5} s: {news}", self.start.elapsed().as_secs());
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Runs `work` while showing `what`, and says how long it took if that was a while.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let live = Live::start(what);
    let result = work();
    let took = live.start.elapsed();
    drop(live);
    if took >= Duration::from_secs(1) {
        eprintln!("{what}: {:.1} s", took.as_secs_f64());
    }
    result
}
