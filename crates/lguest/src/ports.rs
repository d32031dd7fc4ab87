//! Where the guest's serial port and its virtio console go, and who has the terminal.
//!
//! One of the two can have stdio: its output is on the screen, and what is typed goes to
//! it. The kernel is told of every console that leads somewhere, of the terminal's last,
//! for that is the one its first program talks to.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use vmm::devices::virtio::{Console, ConsoleHandle, ConsoleInput, IoThreads};
use vmm::machine::Controller;

use crate::cli::{PortChoice, RunOptions};
use crate::console::Output;
use crate::{Error, terminal};

/// How long a port may take to write out the guest's last words.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

const SERIAL: &str = "console=ttyS0";
pub(crate) const CONSOLE: &str = "console=hvc0";

/// What is said of the serial port, or follows from what is said of the console.
fn serial_choice(options: &RunOptions) -> PortChoice {
    match (&options.serial, &options.console) {
        (Some(serial), _) => serial.clone(),
        (None, Some(PortChoice::Stdio)) => PortChoice::Null,
        (None, _) => PortChoice::Stdio,
    }
}

/// What the kernel is told of its consoles.
pub(crate) fn kernel_consoles(options: &RunOptions) -> String {
    let Some(console) = &options.console else { return SERIAL.into() };
    let words = match (serial_choice(options), console) {
        (PortChoice::Null, PortChoice::Null) | (_, PortChoice::Null) => &[SERIAL][..],
        (PortChoice::Null, _) => &[CONSOLE],
        (PortChoice::Stdio, _) => &[CONSOLE, SERIAL],
        (PortChoice::File(_), _) => &[SERIAL, CONSOLE],
    };
    words.join(" ")
}

/// The ports of one machine, from the outside.
#[derive(Debug)]
pub(crate) struct Ports {
    serial: Output,
    console: Option<(Output, ConsoleHandle)>,
    terminal: Terminal,
}

/// Who has the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Terminal {
    Serial,
    Console,
    Nobody,
}

/// Where what is typed goes.
pub(crate) enum Input {
    Serial(Controller),
    Console(ConsoleInput),
}

impl Input {
    /// Hands `bytes` to the guest; waits while it does not read.
    pub(crate) fn send(&self, bytes: &[u8]) {
        // Fewer are taken only when the machine has ended.
        match self {
            Self::Serial(controller) => controller.serial_input(bytes),
            Self::Console(input) => input.send(bytes),
        };
    }
}

/// The console's window, if the terminal's is its.
#[derive(Clone, Debug)]
pub(crate) struct Window(Option<ConsoleHandle>);

impl Window {
    /// Takes over the size that the terminal has now.
    pub(crate) fn follow(&self) {
        if let Some(console) = &self.0
            && let Some((cols, rows)) = terminal::size()
        {
            console.resize(cols, rows);
        }
    }
}

impl Ports {
    /// Opens what the options name. The second part is the device that the machine gets,
    /// if there is to be a virtio console.
    ///
    /// # Errors
    /// Both want the terminal, a file cannot be written, or the host refuses a thread.
    pub(crate) fn open(
        options: &RunOptions,
        io: &Arc<IoThreads>,
    ) -> Result<(Self, Option<Console>), Error> {
        let serial = serial_choice(options);
        let terminal = match (&serial, &options.console) {
            (PortChoice::Stdio, Some(PortChoice::Stdio)) => {
                let remedy = "give one of them null or a file";
                return Err(Error::Input(format!(
                    "--serial stdio and --console stdio cannot both have the terminal: {remedy}"
                )));
            }
            (PortChoice::Stdio, _) => Terminal::Serial,
            (_, Some(PortChoice::Stdio)) => Terminal::Console,
            _ => Terminal::Nobody,
        };
        if let (PortChoice::File(one), Some(PortChoice::File(other))) = (&serial, &options.console)
            && one == other
        {
            return Err(Error::Input(format!(
                "{}: --serial and --console would overwrite each other: give them two files",
                one.display()
            )));
        }
        let serial = open_output("--serial", &serial)?;
        let opened = options.console.as_ref().map(|choice| open_console(choice, io)).transpose()?;
        let (console, device) = match opened {
            Some((output, device)) => (Some((output, device.handle())), Some(device)),
            None => (None, None),
        };
        let ports = Self { serial, console, terminal };
        ports.window().follow();
        Ok((ports, device))
    }

    /// For the machine's serial port.
    pub(crate) fn serial_output(&self) -> Box<dyn Write + Send> {
        Box::new(self.serial.clone())
    }

    /// Where what is typed goes, if there is a port that has the terminal.
    pub(crate) fn input(&self, controller: &Controller) -> Option<Input> {
        match (self.terminal, &self.console) {
            (Terminal::Serial, _) => Some(Input::Serial(controller.clone())),
            (Terminal::Console, Some((_, console))) => Some(Input::Console(console.input())),
            (Terminal::Console, None) | (Terminal::Nobody, _) => None,
        }
    }

    /// The window to keep up to date.
    pub(crate) fn window(&self) -> Window {
        let console = self.console.as_ref().filter(|_| self.terminal == Terminal::Console);
        Window(console.map(|(_, handle)| handle.clone()))
    }

    /// Writes out the guest's last words; nothing is typed any more.
    pub(crate) fn finish(&self) {
        if let Some((output, console)) = &self.console {
            console.input().close();
            console.drain(LAST_OUTPUT);
            output.finish(LAST_OUTPUT);
        }
        self.serial.finish(LAST_OUTPUT);
    }

    /// What the kernel said when it panicked, if it did.
    pub(crate) fn panic_message(&self) -> Option<String> {
        let console = || self.console.as_ref().and_then(|(output, _)| output.panic_message());
        self.serial.panic_message().or_else(console)
    }
}

fn open_console(choice: &PortChoice, io: &Arc<IoThreads>) -> Result<(Output, Console), Error> {
    let output = open_output("--console", choice)?;
    let console = Console::new(Arc::clone(io), Box::new(output.clone())).map_err(refused)?;
    Ok((output, console))
}

fn open_output(option: &str, choice: &PortChoice) -> Result<Output, Error> {
    let output = match choice {
        PortChoice::Stdio => Output::to(io::stdout()),
        PortChoice::Null => Output::to(io::sink()),
        PortChoice::File(path) => {
            let file = File::create(path).map_err(|error| {
                let remedy = format!("give {option} a file that can be written, stdio or null");
                Error::Input(format!("{}: {error}: {remedy}", path.display()))
            })?;
            Output::to(file)
        }
    };
    output.map_err(refused)
}

fn refused(error: io::Error) -> Error {
    Error::Host(format!("the host refuses a thread: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::status::Status;
    use clap::Parser;
    use std::path::Path;

    fn options(words: &[&str]) -> RunOptions {
        let words = ["lguest", "run", "--kernel", "k"].iter().chain(words);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(options) => *options,
            _ => panic!("that was `run`"),
        }
    }

    fn open(words: &[&str]) -> Result<(Ports, Option<Console>), Error> {
        Ports::open(&options(words), &IoThreads::start(1).unwrap())
    }

    #[test]
    fn the_kernel_is_told_of_what_leads_somewhere_and_of_the_terminal_last() {
        let told = |words: &[&str]| kernel_consoles(&options(words));
        assert_eq!(told(&[]), "console=ttyS0");
        assert_eq!(told(&["--serial", "null"]), "console=ttyS0");
        assert_eq!(told(&["--console", "null"]), "console=ttyS0");
        assert_eq!(told(&["--console", "stdio"]), "console=hvc0");
        assert_eq!(told(&["--console", "file"]), "console=hvc0 console=ttyS0");
        assert_eq!(told(&["--console", "file", "--serial", "null"]), "console=hvc0");
        let both = ["--console", "stdio", "--serial", "log"];
        assert_eq!(told(&both), "console=ttyS0 console=hvc0");
    }

    #[test]
    fn one_port_has_the_terminal() {
        let terminal = |words: &[&str]| open(words).unwrap().0.terminal;
        assert_eq!(terminal(&[]), Terminal::Serial);
        assert_eq!(terminal(&["--console", "null"]), Terminal::Serial);
        assert_eq!(terminal(&["--console", "stdio"]), Terminal::Console);
        assert_eq!(terminal(&["--console", "null", "--serial", "null"]), Terminal::Nobody);
        assert!(open(&[]).unwrap().1.is_none());
        assert!(open(&["--console", "null"]).unwrap().1.is_some());
    }

    #[test]
    fn what_cannot_be_is_one_line_with_a_remedy() {
        for (words, remedy) in [
            (&["--console", "stdio", "--serial", "stdio"][..], "null or a file"),
            (&["--console", "same", "--serial", "same"], "two files"),
            (&["--console", "/nonexistent/file"], "give --console a file"),
            (&["--serial", "/nonexistent/file"], "give --serial a file"),
        ] {
            let error = open(words).unwrap_err();
            let line = error.to_string();
            assert!(line.contains(remedy) && !line.contains('\n'), "{words:?}: {line}");
            assert_eq!(error.status(), Status::BadInput);
        }
        assert!(!Path::new("same").exists());
    }

    #[test]
    fn last_words_reach_a_file_and_their_panic_is_found() {
        use vmm::devices::virtio::VirtioDevice;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let (ports, device) = open(&["--console", path.to_str().unwrap()]).unwrap();
        let text = b"Kernel panic - not syncing: over\n";
        let mut device = device.unwrap();
        text.iter().for_each(|byte| device.write_config(8, &[*byte]));
        ports.finish();
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(ports.panic_message().as_deref(), Some("over"));
    }
}
