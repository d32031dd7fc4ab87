//! Measures one run of a guest from outside: time to `/init`, memory, idle processor time.
//!
//! The guest's `/init` prints a line before anything else and, in idle mode, another one
//! before it goes to sleep; the clock starts just before the process is made.

use crate::running::Running;
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// The first line of the guest's /init.
const STARTED: &str = "init: started";
/// What it prints once it only sleeps.
const IDLE: &str = "init: idle";
/// A boot that takes longer, up to its last line, has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// How long an idle guest is left alone before it is watched, and then watched.
const SETTLE: Duration = Duration::from_secs(5);
const WATCH: Duration = Duration::from_secs(10);
/// `_SC_CLK_TCK`: the unit of processor time in /proc, fixed at 100 on x86.
pub(crate) const TICKS_PER_SECOND: f64 = 100.0;

/// What one run showed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// From the start of the process to the first line of /init.
    pub(crate) to_init: Duration,
    /// Peak memory beyond the guest's RAM, bytes.
    pub(crate) overhead: u64,
    /// What of it is translated code, bytes.
    pub(crate) code: u64,
    /// Part of one core that an idle guest uses, if watched.
    pub(crate) idle: Option<f64>,
}

/// Runs `command`, whose guest boots in idle mode with `mem_mib` of RAM, and ends it; its
/// boot may take `limit`.
pub(crate) fn run(
    command: Command,
    mem_mib: u64,
    watch_idle: bool,
    limit: Duration,
) -> Result<Run> {
    let start = Instant::now();
    let name = command.get_program().display().to_string();
    let mut guest = Running::start(command, &name)?;
    // The kernel may still be in the middle of a line of its own.
    let ends_with = |words: &'static str| move |line: &str| line.ends_with(words).then_some(());
    let (started, ()) = guest.wait_for(STARTED, limit, ends_with(STARTED))?;
    guest.wait_for(IDLE, limit.saturating_sub(start.elapsed()), ends_with(IDLE))?;
    let pid = guest.pid();
    let idle = if watch_idle {
        thread::sleep(SETTLE);
        let (before, begun) = (processor_time(pid)?, Instant::now());
        thread::sleep(WATCH);
        Some((processor_time(pid)? - before) / begun.elapsed().as_secs_f64())
    } else {
        None
    };
    let (overhead, code) = overhead(pid, mem_mib)?;
    Ok(Run { to_init: started - start, overhead, code, idle })
}

/// Processor seconds a process has used, all threads, user and system.
pub(crate) fn processor_time(pid: u32) -> Result<f64> {
    Ok(ticks(&fs::read_to_string(format!("/proc/{pid}/stat"))?)? / TICKS_PER_SECOND)
}

/// Processor time, user and system, of what a file /proc/.../stat is about.
pub(crate) fn ticks(stat: &str) -> Result<f64> {
    // The name in parentheses may hold anything; fields count from after it, state being 3.
    let (_, fields) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || fields.next().and_then(|field| field.parse::<f64>().ok());
    let (user, system) = (next(), next());
    Ok(user.context("no utime")? + system.context("no stime")?)
}

/// Peak resident memory less what of the guest's RAM is resident, and what of that is translated
/// code; bytes.
fn overhead(pid: u32, mem_mib: u64) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status
        .lines()
        .find_map(|line| kib(line.strip_prefix("VmHWM:")?))
        .context("no VmHWM in /proc/PID/status")?;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let ram =
        guest_ram(&smaps, mem_mib * 1024).context("cannot tell which mapping is guest RAM")?;
    let code = CodeMemory::of(&smaps);
    let overhead = peak.saturating_sub(ram).saturating_sub(code.twice);
    Ok((overhead * 1024, code.resident * 1024))
}

/// Memory for translated code, KiB.
#[derive(Debug, Default, PartialEq)]
struct CodeMemory {
    /// What of it is resident.
    resident: u64,
    /// What of that is mapped at two addresses: one view to write, the other to execute.
    twice: u64,
}

impl CodeMemory {
    /// An anonymous mapping that is shared, which has a file that is called so: ours; or one that
    /// may be written and executed: QEMU's.
    fn of(smaps: &str) -> Self {
        let (mut shared, mut at_once, mut code) = (false, false, Self::default());
        for line in smaps.lines() {
            let rss = line.strip_prefix("Rss:").and_then(kib).unwrap_or(0);
            let pss = line.strip_prefix("Pss:").and_then(kib).unwrap_or(0);
            if shared {
                code.resident += pss;
                code.twice = (code.twice + rss).saturating_sub(pss);
            } else if at_once {
                code.resident += rss;
            }
            let mut words = line.split_whitespace();
            if words.next().is_some_and(|word| !word.ends_with(':')) {
                shared = line.contains("/dev/zero");
                at_once = words.next().is_some_and(|permissions| permissions == "rwxp");
            }
        }
        code
    }
}

fn kib(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// The resident part of the guest's RAM, KiB: the mapping of a memfd that is large enough, with
/// all others of one, which are parts of it once more; or else the largest mapping that is.
fn guest_ram(smaps: &str, mem_kib: u64) -> Option<u64> {
    let mut best: Option<(bool, u64, u64)> = None;
    let (mut is_memfd, mut size, mut parts) = (false, 0, 0);
    for line in smaps.lines() {
        if let Some(text) = line.strip_prefix("Size:") {
            size = kib(text)?;
        } else if let Some(text) = line.strip_prefix("Rss:") {
            if size >= mem_kib {
                best = best.max(Some((is_memfd, size, kib(text)?)));
            } else if is_memfd {
                parts += kib(text)?;
            }
        } else if !line.split_whitespace().next()?.ends_with(':') {
            is_memfd = line.contains("memfd:");
        }
    }
    best.map(|(is_memfd, _, resident)| resident + if is_memfd { parts } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55e0-55e1 r-xp 00000000 08:01 1 /usr/bin/qemu
Size:                 64 kB
Rss:                  60 kB
7f00-7f01 rw-p 00000000 00:00 0
Size:            1048576 kB
Rss:              100000 kB
VmFlags: rd wr
7f02-7f03 rw-s 00000000 00:01 7 /memfd:ram (deleted)
Size:             524288 kB
Rss:              200000 kB
";

    #[test]
    fn code_memory_counts_once_and_is_told_apart() {
        let view = |at: &str| {
            format!("{at} 00000000 00:01 9 /dev/zero (deleted)\nRss:  900 kB\nPss:  450 kB\n")
        };
        let smaps = [&view("7e00-7e01 rw-s"), SMAPS, &view("7e02-7e03 r-xs")].concat();
        assert_eq!(CodeMemory::of(SMAPS), CodeMemory::default());
        assert_eq!(CodeMemory::of(&smaps), CodeMemory { resident: 900, twice: 900 });
        let theirs = SMAPS.replace("7f00-7f01 rw-p", "7f00-7f01 rwxp");
        assert_eq!(CodeMemory::of(&theirs), CodeMemory { resident: 100_000, twice: 0 });
        assert_eq!(guest_ram(&smaps, 524_288), Some(200_000));
    }

    #[test]
    fn guest_ram_is_the_memfd_or_the_largest_mapping() {
        assert_eq!(guest_ram(SMAPS, 524_288), Some(200_000));
        assert_eq!(guest_ram(&SMAPS.replace("memfd:", ""), 524_288), Some(100_000));
        assert_eq!(guest_ram(SMAPS, 4_194_304), None);
        let again = "7e02-7e03 rw-s 00000000 00:01 7 /memfd:ram (deleted)\nSize: 8 kB\nRss: 8 kB\n";
        assert_eq!(guest_ram(&[SMAPS, again].concat(), 524_288), Some(200_008));
    }

    /// The process that hangs is ended with its run: the shell's child would keep its output.
    #[test]
    fn a_boot_that_hangs_is_given_up() {
        for script in ["exec sleep 600", "echo init: started; exec sleep 600"] {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            let error = run(command, 1, false, Duration::from_millis(300)).unwrap_err();
            assert!(error.to_string().contains("within"), "{error}");
        }
    }

    /// However loaded the machine is, who computes gets processor time in the end; and both
    /// kinds of clock agree on how much, to a few ticks.
    #[test]
    fn our_own_processor_time_grows() {
        let used = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
        };
        let pid = std::process::id();
        let (before, begun) = (processor_time(pid).unwrap(), used());
        while used() - begun < Duration::from_millis(100) {}
        let grown = processor_time(pid).unwrap() - before;
        assert!(grown >= 0.07, "{grown} s");
    }
}
