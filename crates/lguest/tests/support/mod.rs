//! Starts the real `lguest` with the real kernels and looks at what comes out.
//!
//! The kernels and the initial RAM disk are what `cargo xtask guests` has put under
//! `target/guests` (or `LGUEST_GUESTS`). The tests that need them are ignored in a plain
//! `cargo test`; `cargo verify` fetches them and runs those too.

pub(crate) mod disk;
pub(crate) mod pty;
pub(crate) mod tiny;

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A boot takes seconds; one that takes this long has failed.
pub(crate) const LIMIT: &str = "240";

/// What the kernel's log must not contain.
const ALARMING: &[&str] =
    &["BUG", "WARNING", "Oops", "soft lockup", "clocksource unstable", "unstable", "Call Trace"];

/// Where the guests are.
fn guests() -> PathBuf {
    std::env::var_os("LGUEST_GUESTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guests"),
        PathBuf::from,
    )
}

/// A file of the guests'; the message says how to get it.
pub(crate) fn guest_file(name: &str) -> PathBuf {
    let path = guests().join(name);
    assert!(path.exists(), "{} is missing: run `cargo xtask guests`", path.display());
    path
}

/// A run of lguest, not yet started.
#[derive(Debug)]
pub(crate) struct Run {
    command: Command,
    append: Vec<String>,
}

impl Run {
    /// `lguest run` with nothing else.
    pub(crate) fn bare() -> Self {
        Self::with_program(Path::new(env!("CARGO_BIN_EXE_lguest")))
    }

    fn with_program(program: &Path) -> Self {
        let mut command = Command::new(program);
        command.arg("run");
        Self { command, append: Vec::new() }
    }

    /// A run of kernel `name` in the given mode of its `/init`.
    pub(crate) fn of(name: &str, mode: &str) -> Self {
        let (kernel, initrd) =
            (guest_file(&format!("{name}/vmlinuz")), guest_file("initramfs.cpio"));
        Self::bare().files(&kernel, &initrd, mode)
    }

    /// The same with the kernel's modules for devices in the initial RAM disk.
    pub(crate) fn with_modules(name: &str, mode: &str) -> Self {
        let kernel = guest_file(&format!("{name}/vmlinuz"));
        let initrd = guest_file(&format!("{name}/virtio-initrd.cpio"));
        Self::bare().files(&kernel, &initrd, mode)
    }

    fn files(self, kernel: &Path, initrd: &Path, mode: &str) -> Self {
        self.path("--kernel", kernel)
            .path("--initrd", initrd)
            .arguments(&["--timeout", LIMIT])
            .append(&format!("lguest.mode={mode}"))
    }

    /// The same as user and group 65534 without capabilities. Program and guests are copied
    /// into `place`, because such a user may not be able to reach a checkout.
    pub(crate) fn unprivileged(name: &str, mode: &str, place: &Path) -> Self {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
        let copy = |from: &Path, to: &str, permissions| {
            let to = place.join(to);
            fs::copy(from, &to).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(permissions)).unwrap();
            to
        };
        let program = copy(Path::new(env!("CARGO_BIN_EXE_lguest")), "lguest", 0o755);
        let kernel = copy(&guest_file(&format!("{name}/vmlinuz")), "vmlinuz", 0o644);
        let initrd = copy(&guest_file("initramfs.cpio"), "initramfs.cpio", 0o644);
        // setpriv(1) is part of util-linux, which every Debian has.
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
        command.args(["--bounding-set=-all", "--no-new-privs", "--reset-env", "--"]);
        command.arg(program).arg("run").current_dir("/");
        Self { command, append: Vec::new() }.files(&kernel, &initrd, mode)
    }

    /// Adds words.
    pub(crate) fn arguments(mut self, words: &[&str]) -> Self {
        self.command.args(words);
        self
    }

    /// Adds an option with a path.
    pub(crate) fn path(mut self, option: &str, path: &Path) -> Self {
        self.command.arg(option).arg(path);
        self
    }

    /// Adds to the kernel's command line.
    pub(crate) fn append(mut self, words: &str) -> Self {
        self.append.push(words.to_owned());
        self
    }

    /// Starts it with nothing typed.
    pub(crate) fn start(self) -> Running {
        self.start_with(Stdio::null())
    }

    /// Adds an option with a path and what follows it: a disk, a network.
    pub(crate) fn option(mut self, option: &str, start: &str, path: &Path, end: &str) -> Self {
        let mut value = OsString::from(start);
        value.push(path);
        value.push(end);
        self.command.arg(option).arg(value);
        self
    }

    /// Has it started by another program, whose words these are.
    pub(crate) fn through(mut self, words: &[&str]) -> Self {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(self.command.get_program()).args(self.command.get_args());
        self.command = command;
        self
    }

    /// Adds to its environment.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// The command that it comes to.
    pub(crate) fn command(mut self) -> Command {
        if !self.append.is_empty() {
            self.command.arg("--append").arg(self.append.join(" "));
        }
        self.command
    }

    /// Starts it with `stdin`.
    pub(crate) fn start_with(self, stdin: Stdio) -> Running {
        Running::of(self.command().stdin(stdin))
    }

    /// Starts it and waits for its end.
    pub(crate) fn finish(self) -> Finished {
        self.start().finish()
    }
}

type Collected = std::sync::Arc<std::sync::Mutex<Vec<u8>>>;

/// Collects what comes out of a pipe on a thread of its own.
fn collect(mut pipe: impl Read + Send + 'static) -> Collected {
    let collected = Collected::default();
    let shared = collected.clone();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = pipe.read(&mut buffer) {
            shared.lock().unwrap().extend_from_slice(&buffer[..len]);
        }
    });
    collected
}

fn text(collected: &Collected) -> String {
    String::from_utf8_lossy(&collected.lock().unwrap()).replace('\r', "")
}

/// What follows `start` on the first line that has it.
#[track_caller]
pub(crate) fn after<'a>(console: &'a str, start: &str) -> &'a str {
    let found = console.lines().find_map(|line| line.split_once(start));
    found.unwrap_or_else(|| panic!("no {start:?} in:\n{console}")).1.trim()
}

/// Says what is not tried here, past the test harness, which would keep it to itself.
pub(crate) fn skipped(why: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// A run under way. Killed when dropped, so that a failed test leaves no guest behind.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    console: Collected,
    messages: Collected,
    started: Instant,
}

impl Running {
    /// Starts the command.
    pub(crate) fn of(command: &mut Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let console = collect(child.stdout.take().unwrap());
        let messages = collect(child.stderr.take().unwrap());
        Self { child, console, messages, started: Instant::now() }
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub(crate) fn send(&self, signal: Signal) {
        send(&self.child, signal);
    }

    /// Waits until the console shows `wanted`.
    pub(crate) fn wait_for(&self, wanted: &str) {
        while !text(&self.console).contains(wanted) {
            assert!(
                self.started.elapsed() < Duration::from_secs(240),
                "no {wanted:?} on the console:\n{}\n{}",
                text(&self.console),
                text(&self.messages)
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until lguest itself has said `wanted`.
    pub(crate) fn wait_for_message(&self, wanted: &str) {
        while !text(&self.messages).contains(wanted) {
            assert!(
                self.started.elapsed() < Duration::from_secs(60),
                "lguest did not say {wanted:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the guest has printed so far.
    pub(crate) fn console(&self) -> String {
        text(&self.console)
    }

    /// Kills it, as a crash would end it, and returns what the guest had printed.
    pub(crate) fn kill(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        thread::sleep(Duration::from_millis(50));
        text(&self.console)
    }

    /// Types at the guest.
    pub(crate) fn type_in(&mut self, keys: &[u8]) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(keys).unwrap();
        stdin.flush().unwrap();
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> Finished {
        let status = self.child.wait().unwrap();
        // The collecting threads see the ends of the pipes a moment later.
        thread::sleep(Duration::from_millis(50));
        let finished = Finished {
            status: status.code(),
            console: text(&self.console),
            messages: text(&self.messages),
        };
        eprintln!("took {:.1} s", self.started.elapsed().as_secs_f64());
        finished
    }
}

/// Sends a process of ours a signal.
fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run that is over.
#[derive(Clone, Debug)]
pub(crate) struct Finished {
    /// The exit status; `None` if a signal killed it.
    pub(crate) status: Option<i32>,
    /// What the guest printed.
    pub(crate) console: String,
    /// What lguest printed on stderr.
    pub(crate) messages: String,
}

impl Finished {
    /// Asserts the exit status.
    #[track_caller]
    pub(crate) fn assert_status(&self, status: i32) {
        assert_eq!(self.status, Some(status), "{}", self.story());
    }

    /// Asserts that the console shows `wanted`.
    #[track_caller]
    pub(crate) fn assert_console(&self, wanted: &str) {
        assert!(self.console.contains(wanted), "no {wanted:?}; {}", self.story());
    }

    /// What there is to know of a run that went wrong; what its guest found amiss comes first,
    /// as reports are cut short.
    fn story(&self) -> String {
        let amiss = |line: &&str| ["FAIL", "panic"].iter().any(|word| line.contains(word));
        let amiss: Vec<&str> = self.console.lines().filter(amiss).collect();
        let Self { messages, console, .. } = self;
        format!("amiss: {amiss:#?}\nstderr: {messages}\nconsole:\n{console}")
    }

    /// Asserts that the guest's own checks went well, and the run with them.
    #[track_caller]
    pub(crate) fn assert_good(&self) {
        self.assert_status(0);
        self.assert_console("init: all checks passed");
        self.assert_quiet_log();
        assert_eq!(self.messages, "", "a good run is silent on stderr");
    }

    /// What follows `start` on the first line of the console that has it.
    #[track_caller]
    pub(crate) fn after(&self, start: &str) -> &str {
        after(&self.console, start)
    }

    /// Asserts that lguest logged exactly one line, containing `wanted`.
    #[track_caller]
    pub(crate) fn assert_one_line_of_log(&self, wanted: &str) {
        let lines: Vec<&str> = self.messages.lines().collect();
        let [line] = lines[..] else { panic!("not one line: {}", self.messages) };
        assert!(line.contains(" WARN ") && line.contains(wanted), "{line:?} lacks {wanted:?}");
    }

    /// Asserts that lguest said exactly one line, containing `wanted`.
    #[track_caller]
    pub(crate) fn assert_one_line(&self, wanted: &str) {
        let lines: Vec<&str> = self.messages.lines().collect();
        let [line] = lines[..] else { panic!("not one line: {}", self.messages) };
        assert!(line.starts_with("lguest: ") && line.contains(wanted), "{line:?} lacks {wanted:?}");
    }

    /// Asserts that the kernel found nothing to complain about.
    #[track_caller]
    pub(crate) fn assert_quiet_log(&self) {
        let alarming: Vec<&str> = self
            .console
            .lines()
            .filter(|line| ALARMING.iter().any(|word| line.contains(word)))
            .collect();
        assert!(alarming.is_empty(), "the kernel's log says: {}", alarming.join("\n"));
    }
}
