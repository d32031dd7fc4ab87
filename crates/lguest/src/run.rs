//! `lguest run`: from the options to a machine, from its end to an exit status.
//!
//! The machine runs on threads of its own while `main` waits for its end. Around it stand
//! the threads that listen to the user: one reads the terminal, one takes signals. Whoever
//! of them ends the run leaves the reason here and stops the machine.

use crate::cli::{self, CpuChoice, EngineChoice, RunOptions};
use crate::console;
use crate::engine_options::{self, TraceChoice};
use crate::escape::{self, EscapeKeys, Key};
use crate::logging::say;
use crate::ports::{Input, Ports};
use crate::profile::{self, Profile};
use crate::signals::{self, Request};
use crate::stats::{Board, OnBoard};
use crate::status::Status;
use crate::{Error, boot, devices, sandbox, size, terminal};
use softcpu::cpuid::CpuModel;
use std::fs::File;
use std::io::{self, Read};
use std::sync::mpsc::{self, Sender, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;
use vmm::engine::Engine;
use vmm::engine::trace::{TraceOutput, TracedBlocks};
use vmm::engine::watch::Watcher;
use vmm::machine::{Controller, Machine, MachineConfig, MachineError, Outcome};

/// The most vCPUs a machine gets: each is a thread of this process.
const MAX_CPUS: u32 = 64;
/// The longest `--timeout`, in seconds: thirty years, well within what clocks can add.
const MAX_TIMEOUT: f64 = 1e9;
/// How many keys may wait for a guest that does not read: a pasted file or two.
const TYPED_AHEAD: usize = 1 << 20;
/// How long a machine may take to stop before the process ends without it.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Boots the guest and stays until it ends.
///
/// # Errors
/// Bad input, or a host that refuses something the machine needs.
pub(crate) fn run(options: &RunOptions) -> Result<Status, Error> {
    if options.help_engine {
        engine_options::print_help();
        return Ok(Status::PoweredOff);
    }
    let translation = options.engine_options.translation()?;
    let symbols = profile::symbols(&options.engine_options)?;
    let timeout = options.timeout.map(check_timeout).transpose()?;
    check_cpus(options.cpus)?;
    check_memory(options.mem)?;
    let io = devices::start_io(options)?;
    let (ports, console) = Ports::open(options, &io)?;
    let devices = devices::open(options, console, &io)?;
    let source = boot::source(options, devices.first_disk)?;
    let profile = Profile::open(&options.engine_options, symbols)?;
    let wants_report = options.engine_options.stats;
    let board = Board::new(source.kernel.name(), options.cpus, options.mem, wants_report);
    let mut watchers: Vec<Arc<dyn Watcher>> = profile.watchers().collect();
    watchers.push(Arc::new(OnBoard(Arc::clone(&board))));
    if let Some(choice) = &options.engine_options.trace {
        watchers.push(Arc::new(open_trace(choice)?));
    }
    tracing::info!(
        cpus = options.cpus,
        memory = size::display(options.mem),
        kernel = source.kernel.name(),
        "building the machine"
    );

    let machine = Machine::new(MachineConfig {
        memory: options.mem,
        cpus: options.cpus,
        cpu_model: cpu_model(options.cpu),
        engine: engine(options.engine),
        platform: platform(options.platform),
        kernel: source.kernel,
        initrds: source.initrds,
        command_line: source.command_line,
        serial_output: ports.serial_output(),
        io,
        devices: devices.all,
        debug_exit: options.debug_exit,
        timeout,
        sandbox: sandbox::choose(options.seccomp, &devices.needs)?,
        translation,
        watchers: watchers.into_iter().collect(),
    })
    .map_err(machine_error)?;
    tracing::info!(engine = %machine.engine(), "starting the guest");

    let ender = Ender::new(machine.controller(), Arc::clone(&board))?;
    listen_to_signals(&ender, &ports)?;
    let raw = match ports.input(&ender.controller) {
        // When a script has said all it had to, puppy is told to end.
        Some(input) if options.demo => listen_to_stdin(&ender, input, b"\nexit\n")?,
        Some(input) => listen_to_stdin(&ender, input, b"")?,
        None => None,
    };
    let outcome = machine.run();
    ports.finish();
    drop(raw);
    profile.finish();
    board.close();
    board.report().iter().flat_map(|report| report.lines()).for_each(say);
    let status = conclude(outcome.map_err(machine_error)?, &ender, ports.panic_message());
    tracing::info!(status = status.code(), "the run is over");
    Ok(status)
}

/// What a choice on the command line comes to on this host.
///
/// # Errors
/// What was asked for by name is not there.
pub(crate) fn choose_engine(choice: EngineChoice) -> Result<Engine, Error> {
    engine(choice).select().map_err(|error| machine_error(error.into()))
}

fn engine(choice: EngineChoice) -> vmm::engine::EngineChoice {
    match choice {
        EngineChoice::Auto => vmm::engine::EngineChoice::Auto,
        EngineChoice::Soft => vmm::engine::EngineChoice::Soft,
        EngineChoice::Interpreter => vmm::engine::EngineChoice::Interpreter,
        EngineChoice::Lockstep => vmm::engine::EngineChoice::Lockstep,
        EngineChoice::Kvm => vmm::engine::EngineChoice::Kvm,
    }
}

fn platform(choice: cli::PlatformChoice) -> vmm::machine::PlatformChoice {
    match choice {
        cli::PlatformChoice::Auto => vmm::machine::PlatformChoice::Auto,
        cli::PlatformChoice::Pc => vmm::machine::PlatformChoice::Pc,
        cli::PlatformChoice::Lguest => vmm::machine::PlatformChoice::Lguest,
    }
}

fn cpu_model(choice: CpuChoice) -> CpuModel {
    match choice {
        CpuChoice::V2 => CpuModel::V2,
        CpuChoice::V3 => CpuModel::V3,
        CpuChoice::Max => CpuModel::best_for_host(),
    }
}

fn check_timeout(seconds: f64) -> Result<Duration, Error> {
    if seconds > 0.0 && seconds <= MAX_TIMEOUT {
        return Ok(Duration::from_secs_f64(seconds));
    }
    let remedy = "give seconds above 0, such as --timeout 60, or leave it out";
    Err(Error::Input(format!("--timeout {seconds} makes no sense: {remedy}")))
}

fn check_cpus(cpus: u32) -> Result<(), Error> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(Error::Input(format!(
            "--cpus {cpus} is out of range: give a number from 1 to {MAX_CPUS}"
        )));
    }
    let host = thread::available_parallelism().map_or(1, usize::from);
    if cpus as usize > host {
        tracing::warn!("{cpus} vCPUs share {host} host CPUs: the guest will be slow");
    }
    Ok(())
}

/// Memory is taken as the guest touches it, so the host would promise more than it has and
/// kill somebody later.
fn check_memory(bytes: u64) -> Result<(), Error> {
    let host = crate::check::meminfo("MemTotal")
        .unwrap_or(u64::MAX)
        .saturating_add(crate::check::meminfo("SwapTotal").unwrap_or(0));
    if bytes <= host {
        return Ok(());
    }
    Err(Error::Input(format!(
        "--mem {} is more than this host has ({} MiB with swap): give a smaller --mem",
        size::display(bytes),
        host >> 20
    )))
}

fn open_trace(choice: &TraceChoice) -> Result<TraceOutput, Error> {
    let path = &choice.path;
    let file = File::create(path).map_err(|error| {
        let remedy = "give --trace a file that can be written";
        Error::Input(format!("{}: {error}: {remedy}", path.display()))
    })?;
    let blocks = if choice.translations { TracedBlocks::Translated } else { TracedBlocks::Run };
    Ok(TraceOutput::new(io::BufWriter::new(file), blocks))
}

pub(crate) fn machine_error(error: MachineError) -> Error {
    if error.is_users() { Error::Input(error.to_string()) } else { Error::Host(error.to_string()) }
}

/// Ends the run from outside of the guest. The first reason given is the one that counts.
#[derive(Clone, Debug)]
struct Ender {
    controller: Controller,
    reason: Arc<OnceLock<Status>>,
    last_resort: Sender<Status>,
    board: Arc<Board>,
}

impl Ender {
    /// # Errors
    /// The host refuses a thread.
    fn new(controller: Controller, board: Arc<Board>) -> Result<Self, Error> {
        let (last_resort, ended) = mpsc::channel();
        thread::Builder::new()
            .name("last-resort".into())
            .spawn(move || ended.recv().map(leave_without_the_machine))
            .map_err(thread_refused)?;
        Ok(Self { controller, reason: Arc::default(), last_resort, board })
    }

    fn end(&self, reason: Status) {
        if self.reason.set(reason).is_err() {
            return;
        }
        self.controller.stop();
        // The machine stops within milliseconds. Should it not, the user still gets the
        // terminal back.
        if self.last_resort.send(reason).is_err() {
            tracing::warn!("no thread to watch over the end of the machine");
        }
    }

    fn show(&self) {
        self.controller.dump().lines().for_each(say);
        // Those who have answered have published, too.
        self.board.report().iter().flat_map(|report| report.lines()).for_each(say);
    }
}

/// Ends the process if the machine has not done so after a while.
fn leave_without_the_machine(reason: Status) {
    thread::sleep(STOP_PATIENCE);
    terminal::restore();
    say("the machine does not stop; leaving without it");
    std::process::exit(reason.code().into());
}

fn thread_refused(error: io::Error) -> Error {
    Error::Host(format!("the host refuses a thread: {error}"))
}

fn listen_to_signals(ender: &Ender, ports: &Ports) -> Result<(), Error> {
    let (ender, window) = (ender.clone(), ports.window());
    signals::watch(move |request| match request {
        Request::End(signal) => ender.end(Status::Signal(signal)),
        Request::Show => ender.show(),
        Request::Resize => window.follow(),
    })
    .map_err(|error| Error::Host(format!("the host refuses signal handlers: {error}")))
}

/// Reads what the user types. On a terminal, every key is the guest's except after Ctrl-A;
/// from a file or pipe every byte is, and then `last`.
fn listen_to_stdin(
    ender: &Ender,
    input: Input,
    last: &'static [u8],
) -> Result<Option<terminal::Guard>, Error> {
    let raw = terminal::make_raw()
        .map_err(|error| Error::Host(format!("the terminal cannot be made raw: {error}")))?;
    let feed = move |bytes: &[u8]| input.send(bytes);
    let started = if raw.is_some() {
        let (typed, for_guest) = mpsc::sync_channel(TYPED_AHEAD);
        let (ender, mut keys) = (ender.clone(), EscapeKeys::default());
        // Two threads, because a guest that does not read must not keep the user from
        // quitting.
        thread::Builder::new()
            .name("serial-feed".into())
            .spawn(move || for_guest.iter().for_each(|byte| feed(&[byte])))
            .and_then(|_| {
                console::read_input(io::stdin(), move |bytes| {
                    bytes.iter().for_each(|&byte| obey_key(keys.press(byte), &typed, &ender));
                })
            })
    } else {
        console::read_input(io::stdin().chain(last), feed)
    };
    started.map_err(thread_refused)?;
    Ok(raw)
}

fn obey_key(key: Key, typed: &SyncSender<u8>, ender: &Ender) {
    match key {
        Key::Guest(byte) => {
            if typed.try_send(byte).is_err() {
                tracing::warn!("a key is lost: the guest reads no input");
            }
        }
        Key::Pending => {}
        Key::Quit => ender.end(Status::Quit),
        Key::Show => ender.show(),
        Key::Help => escape::HELP.lines().for_each(say),
    }
}

/// Says in one line how it ended, unless the guest simply powered off.
fn conclude(outcome: Outcome, ender: &Ender, panic: Option<String>) -> Status {
    let (status, line) = match (outcome, panic) {
        (Outcome::PoweredOff, _) => return Status::PoweredOff,
        (Outcome::Panicked, reason) => {
            let reason = reason.map_or(String::new(), |reason| format!(": {reason}"));
            (Status::Panicked, format!("the guest's kernel panicked{reason}"))
        }
        (Outcome::PanickedSaying(words), _) => {
            (Status::Panicked, format!("the guest's kernel panicked: {words}"))
        }
        (Outcome::Died(reason), _) => (Status::TripleFault, format!("the guest died: {reason}")),
        // A kernel without the driver for our panic device only says so, and then resets.
        (Outcome::Reset | Outcome::TripleFault { .. }, Some(reason)) => {
            (Status::Panicked, format!("the guest's kernel panicked: {reason}"))
        }
        (Outcome::TripleFault { vcpu, rip }, None) => {
            (Status::TripleFault, format!("vCPU {vcpu} shut down after a triple fault at {rip:#x}"))
        }
        (Outcome::Reset, None) => (Status::Reset, "the guest asked for a reset".to_owned()),
        (Outcome::Diverged(report), _) => {
            report.lines().for_each(say);
            (Status::Diverged, "--engine lockstep has found a bug in lguest".to_owned())
        }
        (Outcome::TimedOut, _) => {
            (Status::TimedOut, "the time given by --timeout is over".to_owned())
        }
        (Outcome::Exited(status), _) => {
            tracing::info!(status, "the guest ended as a program does");
            return Status::Exited(status);
        }
        (Outcome::DebugExit(value), _) => {
            tracing::info!(value, "the guest ended the run by the debug-exit port");
            return Status::DebugExit(value);
        }
        (Outcome::Stopped, _) => match ender.reason.get() {
            Some(&Status::Signal(number)) => {
                (Status::Signal(number), format!("ended by signal {number}"))
            }
            Some(&reason) => (reason, "quit".to_owned()),
            None => (Status::Failed, "the machine stopped by itself".to_owned()),
        },
    };
    say(&line);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_numbers_are_refused_with_a_remedy() {
        for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
            let error = check_timeout(seconds).unwrap_err();
            assert!(error.to_string().contains("--timeout 60"));
            assert_eq!(error.status(), Status::BadInput);
        }
        assert_eq!(check_timeout(0.5).unwrap(), Duration::from_millis(500));
        assert!(check_cpus(0).is_err() && check_cpus(1).is_ok() && check_cpus(65).is_err());
        assert!(check_memory(1 << 20).is_ok());
        assert!(check_memory(1 << 60).unwrap_err().to_string().contains("smaller --mem"));
    }

    #[test]
    fn an_engine_asked_for_by_name_is_not_replaced() {
        assert_eq!(choose_engine(EngineChoice::Auto).unwrap(), Engine::Soft);
        let error = choose_engine(EngineChoice::Kvm).unwrap_err();
        assert_eq!(error.status(), Status::BadInput);
    }
}
