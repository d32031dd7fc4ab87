//! `cargo xtask kvm-unit-tests`: runs the x86 tests of a kvm-unit-tests tree that somebody
//! has built, and says in a table how each went.
//!
//! The tests are small kernels that know what a CPU and its interrupt controllers owe them;
//! their verdict comes by the debug-exit port, their reasons by the serial port. The same
//! kernels can be given to QEMU without KVM, so that a test that asks for what only KVM has
//! is told from one that found a fault of ours.

mod list;
mod verdict;

use crate::qemu::Qemu;
use crate::{bounded, paths, progress};
use anyhow::{Context, Result, bail};
use clap::Args;
use list::{Architecture, Test, Tree};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use verdict::{Outcome, Verdict};

/// Run the x86 tests of a built kvm-unit-tests tree
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where kvm-unit-tests was configured and built
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Seconds each test may take, if its list does not grant it more
    #[arg(long, value_name = "SECONDS", default_value = "300")]
    timeout: u64,
    /// Run each test under QEMU without KVM as well
    #[arg(long)]
    qemu: bool,
}

/// RAM for each test, MiB, unless its list asks for more: QEMU's default, which is what the
/// tests are tried with.
const MEMORY_MIB: u32 = 128;

/// `cargo xtask kvm-unit-tests`
pub(crate) fn kvm_unit_tests(options: &Options) -> Result<()> {
    let tree = Tree::open(&options.dir)?;
    let tests = tree.tests()?;
    let wanted = |test: &&Test| match &options.filter {
        Some(part) => test.name.contains(part.as_str()),
        None => !test.only_on_request,
    };
    let tests: Vec<&Test> = tests.iter().filter(wanted).collect();
    if tests.is_empty() {
        bail!("no test is called that: leave --filter out to see them all");
    }
    let lguest = paths::release_lguest()?;
    let qemu = options.qemu.then(Qemu::find).transpose()?;
    let logs = paths::target_directory()?.join("kvm-unit-tests").join(tree.architecture.name());
    fs::create_dir_all(&logs).with_context(|| format!("{}", logs.display()))?;

    let mut rows = Vec::new();
    for test in tests {
        let Some(kernel) = tree.kernel(test) else { continue };
        if let Some(lacking) = test.lacking() {
            rows.push(Row { name: &test.name, ours: Outcome::left_out(lacking), theirs: None });
            continue;
        }
        let environment = logs.join(format!("{}.environment", test.name));
        fs::write(&environment, test.environment(MEMORY_MIB))?;
        let limit = Duration::from_secs(options.timeout.max(test.timeout));
        let run = |what: &str, command: Command| {
            let log = logs.join(format!("{}.{what}.log", test.name));
            progress::step(&format!("{} ({what})", test.name), || observe(command, limit, &log))
        };
        let given = Given { test, kernel: &kernel, environment: &environment };
        let ours = run("lguest", given.to_lguest(&lguest))?;
        let theirs = qemu.as_ref().map(|qemu| run("qemu", given.to_qemu(qemu, tree.architecture)));
        rows.push(Row { name: &test.name, ours, theirs: theirs.transpose()? });
    }
    print!("{}", table(&rows));
    println!("\nwhat each test said: {}", logs.display());
    let failed = rows.iter().filter(|row| row.ours.verdict.is_bad()).count();
    if failed > 0 {
        bail!("{failed} of {} tests did not pass", rows.len());
    }
    Ok(())
}

/// What a test is run with.
struct Given<'t> {
    test: &'t Test,
    kernel: &'t Path,
    environment: &'t Path,
}

impl Given<'_> {
    fn to_lguest(&self, lguest: &Path) -> Command {
        let mut command = Command::new(lguest);
        command
            .args(["run", "--engine", "soft", "--debug-exit"])
            .args(["--mem", &format!("{}M", self.test.memory_mib.unwrap_or(MEMORY_MIB))])
            .args(["--cpus", &self.test.cpus.to_string()])
            .args(["--append", &self.test.arguments(now())])
            .arg("--kernel")
            .arg(self.kernel)
            .arg("--initrd")
            .arg(self.environment);
        command
    }

    /// The devices the tests' own runner asks for; `-cpu host` means the host's under KVM,
    /// for which the most QEMU has must do.
    fn to_qemu(&self, qemu: &Qemu, architecture: Architecture) -> Command {
        let cpu = self.test.qemu_cpu.as_deref().unwrap_or(architecture.qemu_cpu());
        let mut command = qemu.command();
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-accel", "tcg", "-cpu", cpu, "-smp", &self.test.cpus.to_string()])
            .args(["-m", &format!("{}M", self.test.memory_mib.unwrap_or(MEMORY_MIB))])
            .args(["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
            .args(["-device", "pci-testdev", "-serial", "stdio"])
            .args(["-append", &self.test.arguments(now())])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.environment);
        command
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Runs `command` for `limit` at most, its output in `log`, and judges it by that.
fn observe(command: Command, limit: Duration, log: &Path) -> Result<Outcome> {
    let start = Instant::now();
    let status = bounded::run(command, limit, log)?;
    let said = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    Ok(Outcome::judge(status.and_then(|status| status.code()), &said, start.elapsed()))
}

/// One test's line of the table.
struct Row<'t> {
    name: &'t str,
    ours: Outcome,
    theirs: Option<Outcome>,
}

/// The table, aligned, in a form that Markdown takes as well, and a line that counts.
fn table(rows: &[Row<'_>]) -> String {
    let with_qemu = rows.iter().any(|row| row.theirs.is_some());
    let mut lines =
        vec![["test", "lguest", "s", "QEMU TCG", "what lguest's run said"].map(str::to_owned)];
    for row in rows {
        let theirs = row.theirs.as_ref().map_or("", |theirs| theirs.verdict.word());
        lines.push([
            row.name.to_owned(),
            row.ours.verdict.word().to_owned(),
            format!("{:.1}", row.ours.took.as_secs_f64()),
            theirs.to_owned(),
            row.ours.detail.clone(),
        ]);
    }
    let mut widths = [0; 5];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    lines.insert(1, widths.map(|width| "-".repeat(width)));
    let mut text = String::new();
    for line in &lines {
        for (column, (width, cell)) in widths.iter().zip(line).enumerate() {
            if column != 3 || with_qemu {
                text += &format!("| {cell:<width$} ");
            }
        }
        text += "|\n";
    }
    let count = |verdict: Verdict| rows.iter().filter(|row| row.ours.verdict == verdict).count();
    text += "\n";
    for verdict in Verdict::ALL {
        text += &format!("{} {}, ", count(verdict), verdict.word());
    }
    text += &format!("{} in all\n", rows.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_every_test_and_counts() {
        let outcome = |code, said: &str| Outcome::judge(code, said, Duration::from_millis(1500));
        let rows = [
            Row { name: "sieve", ours: outcome(Some(1), ""), theirs: Some(outcome(None, "")) },
            Row { name: "s3", ours: outcome(Some(3), "FAIL: wakes up\n"), theirs: None },
        ];
        let text = table(&rows);
        assert!(text.contains("| sieve | pass   | 1.5 | timeout  |"), "{text}");
        assert!(text.contains("FAIL: wakes up"), "{text}");
        assert!(
            text.contains("1 pass, 1 fail, 0 skip, 0 timeout, 0 crash, 0 left out, 2 in all"),
            "{text}"
        );
        let widths: Vec<usize> = text.lines().take(4).map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
    }

    #[test]
    fn a_test_that_does_not_end_is_ended() {
        let log = std::env::temp_dir().join(format!("lguest-observe-{}", std::process::id()));
        let mut command = Command::new("sleep");
        command.arg("100");
        let outcome = observe(command, Duration::from_millis(50), &log).unwrap();
        assert_eq!(outcome.verdict, Verdict::Timeout);
        let mut command = Command::new("sh");
        command.args(["-c", "echo SUMMARY: 2 tests, 1 skipped; exit 1"]);
        let outcome = observe(command, Duration::from_secs(30), &log).unwrap();
        assert_eq!(
            (outcome.verdict, outcome.detail.as_str()),
            (Verdict::Pass, "2 tests, 1 skipped")
        );
        fs::remove_file(log).unwrap();
    }
}
