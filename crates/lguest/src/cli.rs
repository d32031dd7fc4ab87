//! The command line. Option names and their defaults are the interface: they change only
//! with `docs/specification.md`. Help texts are kept so short that each fits an 80x24 screen.

use crate::engine_options::EngineOptions;
use crate::status::Status;
use crate::{Error, size};
use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;
use vmm::devices::virtio::block::DiskConfig;
use vmm::devices::virtio::io_threads::MAX_THREADS;
use vmm::devices::virtio::net::NetConfig;

/// Runs Linux guests as ordinary processes, without /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "lguest", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// How many times `-v` was given.
    pub(crate) fn verbose(&self) -> u8 {
        match &self.command {
            Command::Run(options) => options.verbose,
            Command::Demo(options) => options.verbose,
            Command::Check(options) => options.verbose,
            Command::Top(options) => options.verbose,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a kernel and give it this terminal
    Run(Box<RunOptions>),
    /// Boot puppy, a small kernel that lguest brings along
    Demo(DemoOptions),
    /// Say what this host offers, and which engine would be used
    Check(CheckOptions),
    /// Show what your running guests are doing
    Top(TopOptions),
}

/// The order of `lguest run --help`: there are too many options for headings.
const RUN_HELP: &str = "\
{about}: {usage}

{options}{after-help}";

/// The last lines of `lguest run --help`.
const RUN_NOTES: &str = "\
Exit: 0 off, 1 lguest failed, 2 bad input, 3 panic, 4 triple fault, 5 reset,
6 quit by key, 7 lockstep, 124 timeout, 128+N signal N. Ctrl-A x quits, ? helps.";

/// Boot a kernel and give it this terminal
#[derive(Args, Debug)]
#[command(help_template = RUN_HELP, after_help = RUN_NOTES)]
pub(crate) struct RunOptions {
    /// Kernel: bzImage or ELF vmlinux; else the first disk's
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk; several are concatenated
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Vec<PathBuf>,
    /// The guest's disks.
    #[arg(long, value_name = "IMAGE")]
    #[arg(help = "Disk: PATH[,readonly][,format=F][,serial=S][,direct]")]
    pub(crate) disk: Vec<DiskConfig>,
    /// The guest's network cards.
    #[arg(long, value_name = "HOW")]
    #[arg(help = "Net: user[,fwd=tcp:HOST:GUEST], tap=NAME or unix=PATH")]
    pub(crate) net: Vec<NetConfig>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::parse)]
    pub(crate) mem: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true)]
    pub(crate) cpus: u32,
    /// More kernel command line; your words come last
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) append: String,
    /// Engine: auto, soft, interpreter, lockstep or kvm
    #[arg(long, value_name = "NAME", default_value = "auto", hide_possible_values = true)]
    #[arg(hide_default_value = true)]
    pub(crate) engine: EngineChoice,
    /// Platform: auto, pc or lguest
    #[arg(long, value_name = "NAME", default_value = "auto", hide_possible_values = true)]
    pub(crate) platform: PlatformChoice,
    /// CPU model: v2, v3 or max
    #[arg(long, value_name = "MODEL", default_value = "max", hide_possible_values = true)]
    pub(crate) cpu: CpuChoice,
    /// COM1: stdio (default), null or a file
    #[arg(long, value_name = "WHERE")]
    pub(crate) serial: Option<PortChoice>,
    /// Virtio console (hvc0): stdio, null or a file
    #[arg(long, value_name = "WHERE")]
    pub(crate) console: Option<PortChoice>,
    /// How devices' work is done
    #[arg(long, value_name = "HOW", default_value = "threads=1")]
    pub(crate) io: IoChoice,
    /// System-call filter: on (default), log or off
    #[arg(long, value_name = "HOW", hide_possible_values = true)]
    pub(crate) seccomp: Option<SeccompChoice>,
    /// End the run after so many seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub(crate) timeout: Option<f64>,
    /// Let the guest end the run by port 0xf4 (test kernels)
    #[arg(long)]
    pub(crate) debug_exit: bool,
    #[command(flatten)]
    pub(crate) engine_options: EngineOptions,
    /// List the options for looking at the engine
    #[arg(long)]
    pub(crate) help_engine: bool,
    /// Say more on stderr; -vv even more
    #[arg(short, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// The kernel is the one that lguest brings along.
    #[arg(skip)]
    pub(crate) demo: bool,
}

/// Boot puppy, a small kernel that lguest brings along
#[derive(Args, Debug)]
pub(crate) struct DemoOptions {
    /// Disk, a file of zeroes, for puppy's file
    #[arg(long, value_name = "IMAGE")]
    disk: Option<String>,
    /// Command line: "test" runs its tests, "bench" measures
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    append: String,
    /// Platform: lguest (default) or pc
    #[arg(long, value_name = "NAME", default_value = "auto", hide_possible_values = true)]
    #[arg(hide_default_value = true)]
    platform: PlatformChoice,
    /// End the run after so many seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    timeout: Option<f64>,
    /// Say more on stderr; -vv even more
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
}

impl DemoOptions {
    /// As options of `lguest run`.
    ///
    /// # Errors
    /// The disk makes no sense.
    pub(crate) fn to_run(&self) -> Result<RunOptions, clap::Error> {
        let mut words = vec!["lguest", "run", "--mem", "64M"];
        words.extend(self.disk.iter().flat_map(|disk| ["--disk", disk.as_str()]));
        let Command::Run(options) = Cli::try_parse_from(words)?.command else {
            return Err(clap::Error::new(ErrorKind::InvalidSubcommand));
        };
        Ok(RunOptions {
            append: self.append.clone(),
            platform: self.platform,
            timeout: self.timeout,
            verbose: self.verbose,
            demo: true,
            ..*options
        })
    }
}

/// Say what this host offers, and which engine would be used
#[derive(Args, Debug)]
pub(crate) struct CheckOptions {
    /// Say more on stderr; -vv even more
    #[arg(short, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// Show what your running guests are doing
#[derive(Args, Debug)]
pub(crate) struct TopOptions {
    /// The process of the guest whose vCPUs to show
    #[arg(value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Say more on stderr; -vv even more
    #[arg(short, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// What executes vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// The best this build and host have.
    Auto,
    /// The CPU in software.
    Soft,
    /// The CPU in software, every instruction interpreted.
    Interpreter,
    /// The CPU in software, translated and interpreted side by side.
    Lockstep,
    /// The host's /dev/kvm.
    Kvm,
}

/// What the guest is to believe it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlatformChoice {
    /// What its kernel is for.
    Auto,
    /// A PC.
    Pc,
    /// The lguest platform.
    Lguest,
}

/// The CPU the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CpuChoice {
    /// x86-64-v2: up to SSE4.2.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    V3,
    /// The best the host can run.
    Max,
}

/// What becomes of system calls that a running guest has no need of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompChoice {
    /// They end the run.
    On,
    /// The kernel logs them and lets them pass.
    Log,
    /// Nobody looks.
    Off,
}

/// How devices' work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoChoice {
    /// On how many threads.
    pub(crate) threads: usize,
}

impl FromStr for IoChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let threads = text.strip_prefix("threads=").and_then(|number| number.parse().ok());
        match threads {
            Some(threads) if (1..=MAX_THREADS).contains(&threads) => Ok(Self { threads }),
            _ => Err(format!("give threads=N, with N from 1 to {MAX_THREADS}")),
        }
    }
}

/// Where the guest's serial port or virtio console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PortChoice {
    /// This terminal.
    Stdio,
    /// Nowhere.
    Null,
    /// A file, output only; it is overwritten.
    File(PathBuf),
}

impl FromStr for PortChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdio" => Self::Stdio,
            "null" => Self::Null,
            path => Self::File(path.into()),
        })
    }
}

/// Turns what clap has to say into our own form: help as it is, errors as one line.
pub(crate) fn explain(error: &clap::Error) -> Result<Status, Error> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed stdout (`lguest --help | head -1`) is no failure.
            let _ = error.print();
            Ok(Status::PoweredOff)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Err(Error::Input("what shall I do? Try \"lguest run --help\"".into()))
        }
        _ => {
            let text = error.to_string();
            // The first paragraph is the message; usage and tips follow after an empty line.
            let message = text.split("\n\n").next().unwrap_or(&text);
            let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
            let message = message.trim_start_matches("error: ");
            Err(Error::Input(format!("{message} (see \"lguest run --help\")")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_help_fits_a_screen() {
        Cli::command().debug_assert();
        for words in [
            &["lguest", "--help"][..],
            &["lguest", "run", "--help"],
            &["lguest", "demo", "--help"],
            &["lguest", "check", "-h"],
            &["lguest", "top", "--help"],
        ] {
            let help = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(help.lines().count() <= 24, "{words:?} has {} lines", help.lines().count());
            for line in help.lines() {
                assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
            }
        }
    }

    #[test]
    fn the_specification_has_every_option_and_its_default() {
        let specification = include_str!("../../../docs/specification.md");
        let (_, table) = specification.split_once("### The options of `lguest run`").unwrap();
        let (table, _) = table.split_once("\n## ").unwrap();
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for option in run.get_arguments() {
            let name = match (option.get_long(), option.get_short()) {
                (Some(long), _) => format!("--{long}"),
                (None, short) => format!("-{}", short.unwrap()),
            };
            let is_its = |row: &&str| {
                let rest = row.strip_prefix(&format!("| `{name}"));
                rest.is_some_and(|rest| rest.starts_with(['`', ' ']))
            };
            let row = table.lines().find(is_its).unwrap_or_else(|| panic!("no {name}"));
            for default in option.get_default_values() {
                let default = default.to_str().unwrap();
                assert!(row.contains(default), "{name} is {default} by default: {row}");
            }
        }
    }

    #[test]
    fn the_help_lists_the_exit_statuses() {
        use Status::{Diverged, Panicked, Quit, Reset, TripleFault};
        for status in [Panicked, TripleFault, Reset, Quit, Diverged] {
            assert!(RUN_NOTES.contains(&format!("{} ", status.code())));
        }
        assert!(RUN_NOTES.contains(&Status::TimedOut.code().to_string()));
    }

    #[test]
    fn mistakes_are_one_line() {
        for words in [
            &["lguest"][..],
            &["lguest", "frobnicate"],
            &["lguest", "run", "--kernel", "k", "--mem", "lots"],
            &["lguest", "run", "--kernel", "k", "--cpus", "-1"],
            &["lguest", "run", "--kernel", "k", "--engine", "warp"],
            &["lguest", "run", "--kernel", "k", "--timeout", "soon"],
        ] {
            let error = explain(&Cli::try_parse_from(words).unwrap_err()).unwrap_err();
            let line = error.to_string();
            assert!(!line.contains('\n') && !line.is_empty(), "{words:?}: {line}");
            assert!(line.contains("lguest run --help"), "{words:?} has no remedy: {line}");
            assert_eq!(error.status(), Status::BadInput);
        }
    }

    #[test]
    fn an_appended_line_may_begin_with_a_dash() {
        let words = ["lguest", "run", "--kernel", "k", "--append", "-- single"];
        let Command::Run(options) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        assert_eq!(options.append, "-- single");
    }
}
