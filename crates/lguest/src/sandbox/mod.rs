//! The second wall: a filter on the system calls of this process, and narrower ones on its
//! threads (seccomp, Documentation/userspace-api/seccomp_filter.rst).
//!
//! A guest is kept in by how its CPU is built. Should it get out of that and into the process,
//! it finds the kernel's door closed but for what `lists` has. The machine says when
//! ([`vmm::sandbox`]): all is open, mapped and started, and no guest code has run. Called by
//! `run`.

mod lists;
mod report;
mod rule;
#[cfg(test)]
mod tests;

use crate::Error;
use crate::cli::SeccompChoice;
use rule::{Rule, allowed_only, compile_allowed, compile_refused};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, apply_filter, apply_filter_all_threads,
};
use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm::sandbox::{Sandbox, ThreadKind};

/// What the devices of a run need beyond what every guest does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    /// There are disks.
    pub(crate) disk: bool,
    /// There are tap interfaces.
    pub(crate) tap: bool,
    /// There are sockets that join guests.
    pub(crate) unix: bool,
    /// The processes that are ended with the machine.
    pub(crate) children: Vec<u32>,
}

/// The filters of a run.
#[derive(Debug)]
struct Filters {
    /// Violations end the run. Otherwise the kernel logs them.
    strict: bool,
    /// The user asked for it by name: no guest without.
    insisted: bool,
    sealed: AtomicBool,
    /// All threads have each of these.
    process: Vec<BpfProgram>,
    vcpu: BpfProgram,
    timer: BpfProgram,
    translator: BpfProgram,
    device: BpfProgram,
}

/// The sandbox that was chosen. None said: on, if the host has it.
///
/// # Errors
/// The filters cannot be made, which is a bug.
pub(crate) fn choose(
    choice: Option<SeccompChoice>,
    needs: &Needs,
) -> Result<Option<Arc<dyn Sandbox>>, Error> {
    let strict = match choice {
        Some(SeccompChoice::Off) => return Ok(None),
        Some(SeccompChoice::Log) => false,
        Some(SeccompChoice::On) | None => true,
    };
    match Filters::new(strict, choice.is_some(), needs) {
        Ok(filters) => Ok(Some(Arc::new(filters))),
        Err(error) => Err(Error::Host(format!("the system-call filter cannot be made: {error}"))),
    }
}

impl Filters {
    fn new(strict: bool, insisted: bool, needs: &Needs) -> Result<Self, BackendError> {
        let compile = |rules: Vec<Rule>| {
            if strict {
                compile_allowed(&rules, SeccompAction::Trap)
            } else {
                compile_allowed(&allowed_only(rules), SeccompAction::Log)
            }
        };
        let mut process = vec![compile(lists::process(needs))?];
        if strict {
            process.push(compile_refused(&lists::process(needs))?);
        }
        Ok(Self {
            strict,
            insisted,
            sealed: AtomicBool::new(false),
            process,
            vcpu: compile(lists::vcpu(needs))?,
            timer: compile(lists::timer())?,
            translator: compile(lists::translator())?,
            device: compile(lists::device(needs))?,
        })
    }

    fn apply(&self) -> Result<(), Refused> {
        if self.strict {
            report::install().map_err(Refused::Handler)?;
        }
        for program in &self.process {
            apply_filter_all_threads(program).map_err(Refused::Filter)?;
        }
        Ok(())
    }
}

/// What the host does not want.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Handler(io::Error),
    #[error("{0}")]
    Filter(seccompiler::Error),
}

fn refusal(reason: &impl Display) -> String {
    format!("this host refuses a filter on system calls ({reason})")
}

impl Sandbox for Filters {
    fn seal(&self) -> io::Result<()> {
        match self.apply() {
            Ok(()) => {
                self.sealed.store(true, Ordering::Release);
                tracing::info!(strict = self.strict, "system calls are filtered");
                Ok(())
            }
            Err(reason) if self.insisted => {
                let remedy = "give --seccomp off to run the guest without";
                Err(io::Error::other(format!("{}: {remedy}", refusal(&reason))))
            }
            Err(reason) => {
                let remedy = "the guest runs without (--seccomp off leaves out this line)";
                tracing::warn!("{}: {remedy}", refusal(&reason));
                Ok(())
            }
        }
    }

    fn enter(&self, kind: ThreadKind) {
        if !self.sealed.load(Ordering::Acquire) {
            return;
        }
        let program = match kind {
            ThreadKind::Vcpu => &self.vcpu,
            ThreadKind::Timer => &self.timer,
            ThreadKind::Translator | ThreadKind::Memory => &self.translator,
            ThreadKind::Device => &self.device,
        };
        if let Err(error) = apply_filter(program) {
            tracing::warn!(?kind, %error, "a thread has no more than the process's filter");
        }
    }
}
