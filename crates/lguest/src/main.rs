//! The Launcher: the `lguest` program.
//!
//! Command line, terminal, signals, logs and exit statuses live here and nowhere else;
//! the Machine (crate `vmm`) and the CPU (crate `softcpu`) know nothing of them. Everything
//! a user can get wrong ends in one line on stderr and exit status 2.

mod boot;
mod check;
mod cli;
mod console;
mod devices;
mod engine_options;
mod escape;
mod logging;
mod old_syntax;
mod ports;
mod profile;
mod run;
mod sandbox;
mod signals;
mod size;
mod stats;
mod status;
mod terminal;

use clap::Parser;
use cli::{Cli, Command};
use status::Status;
use std::process::ExitCode;

fn main() -> ExitCode {
    let status = match old_syntax::translate(std::env::args_os().collect()) {
        Ok(args) => Cli::try_parse_from(args),
        Err(error) => return fail(&error),
    };
    let status = match status {
        Ok(cli) => {
            logging::start(cli.verbose());
            terminal::restore_on_panic();
            match cli.command {
                Command::Run(options) => run::run(&options),
                Command::Demo(options) => match options.to_run() {
                    Ok(options) => run::run(&options),
                    Err(error) => cli::explain(&error),
                },
                Command::Check(options) => check::check(&options),
                Command::Top(options) => stats::top::top(&options),
            }
        }
        Err(error) => cli::explain(&error),
    };
    terminal::restore();
    ExitCode::from(match status {
        Ok(status) => status.code(),
        Err(error) => return fail(&error),
    })
}

/// Says what went wrong, and with which status that ends.
fn fail(error: &Error) -> ExitCode {
    logging::complain(error);
    ExitCode::from(error.status().code())
}

/// What ends the program before or instead of a guest's own end.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The user asked for something impossible; the message says what and what to do.
    #[error("{0}")]
    Input(String),
    /// The host let us down while the guest ran.
    #[error("{0}")]
    Host(String),
}

impl Error {
    /// The exit status that goes with the error.
    fn status(&self) -> Status {
        match self {
            Self::Input(_) => Status::BadInput,
            Self::Host(_) => Status::Failed,
        }
    }
}
