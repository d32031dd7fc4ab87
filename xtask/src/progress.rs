//! Saying what is going on: a spinner on a terminal, a line anywhere else.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Runs `work` while showing `what`, and says how long it took if that was a while.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let on_terminal = std::io::stderr().is_terminal();
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    if on_terminal {
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
    } else {
        eprintln!("{what} ...");
    }
    let result = work();
    bar.finish_and_clear();
    let took = start.elapsed();
    if took >= Duration::from_secs(1) {
        eprintln!("{what}: {:.1} s", took.as_secs_f64());
    }
    result
}
