//! What a program measures by itself: lines of the form `measured NAME NUMBER UNIT` that it
//! prints, in a guest or on the host, and `chose NAME WHAT` where it went one of several ways.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::running::Running;

/// A run that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(600);

/// What one run measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    pub(super) values: Vec<Value>,
    /// Names, and which way was taken there.
    pub(super) chosen: Vec<(String, String)>,
}

/// A number with a name and a unit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Value {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) unit: String,
}

impl Measured {
    /// Takes down what a line says, if it says anything. `since`: since the start.
    fn line(&mut self, line: &str, since: Duration) -> Result<()> {
        if let Some((_, words)) = line.split_once("measured ") {
            let words: Vec<_> = words.split_whitespace().collect();
            if let ["init", ..] = words.as_slice() {
                let (name, value, unit) = ("start to /init", since.as_secs_f64(), "s");
                self.values.push(Value { name: name.into(), value, unit: unit.into() });
            } else if let [name, number, unit] = words.as_slice() {
                let value = number.parse()?;
                self.values.push(Value { name: (*name).into(), value, unit: (*unit).into() });
            }
        } else if let Some((name, what)) =
            line.split_once("chose ").and_then(|(_, words)| words.trim().split_once(' '))
        {
            self.chosen.push((name.into(), what.into()));
        }
        Ok(())
    }

    /// The number called `name`.
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|value| value.name == name).map(|value| value.value)
    }
}

/// Runs a guest (or a program on the host) to its end, and takes down what it measured: all
/// of `wanted`. `name` is for messages.
pub(super) fn run(command: Command, name: &str, wanted: &[&str]) -> Result<Measured> {
    let start = Instant::now();
    let mut running = Running::start(command, name)?;
    let mut measured = Measured::default();
    while let Some((time, line)) = running.next_line(start + LIMIT) {
        measured.line(&line, time.duration_since(start))?;
    }
    if start.elapsed() >= LIMIT {
        bail!("{name}: it did not end within {} s{}", LIMIT.as_secs(), running.quote());
    }
    running.end()?;
    if let Some(missing) = wanted.iter().find(|name| measured.value(name).is_none()) {
        bail!("{name}: it has not measured {missing}{}", running.quote());
    }
    if measured.values.is_empty() {
        bail!("{name}: it measured nothing{}", running.quote());
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_are_taken_down_wherever_they_begin() {
        let script = "echo noise; printf '[ 1.0] measured a 2.50 ns\\r\\n'; echo chose a b c; \
                      echo measured a; echo measured init 0 s";
        let measured = run(shell(script), "sh", &["a"]).unwrap();
        let names: Vec<_> = measured.values.iter().map(|value| value.name.as_str()).collect();
        assert_eq!(names, ["a", "start to /init"]);
        assert_eq!(measured.value("a"), Some(2.5));
        assert_eq!(measured.chosen, [("a".to_owned(), "b c".to_owned())]);
    }

    #[test]
    fn what_was_not_measured_is_named_with_the_last_words() {
        let error = run(shell("echo measured a 1 ns; echo sorry >&2"), "sh", &["a", "b"]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("not measured b") && error.contains("sorry"), "{error}");
        assert!(run(shell("exit 0"), "sh", &[]).is_err());
        let failed = run(shell("echo measured a 1 ns; exit 3"), "sh", &["a"]).unwrap_err();
        assert!(failed.to_string().contains("exit status: 3"), "{failed}");
        assert!(run(shell("echo measured a nonsense ns"), "sh", &[]).is_err());
    }
}
