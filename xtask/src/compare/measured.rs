//! What a program measures by itself: lines of the form `measured NAME NUMBER UNIT` that it
//! prints, in a guest or on the host.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// What one run measured.
pub(super) type Measured = Vec<(String, f64, String)>;

/// Runs a guest (or a program on the host) to its end, and takes down what it measured.
pub(super) fn run(mut command: Command) -> Result<Measured> {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let output = child.stdout.take().context("its output is not there")?;
    let mut measured = Measured::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let Some((_, words)) = line.split_once("measured ") else { continue };
        let words: Vec<_> = words.split_whitespace().collect();
        let [name, number, unit] = words.as_slice() else { continue };
        if *name == "init" {
            measured.push(("start to /init".into(), start.elapsed().as_secs_f64(), "s".into()));
        } else {
            measured.push(((*name).into(), number.parse()?, (*unit).into()));
        }
    }
    child.wait()?;
    if measured.is_empty() {
        bail!("{command:?}: it measured nothing");
    }
    Ok(measured)
}
