//! What threads give up before a guest runs.
//!
//! Who embeds a machine may confine its process (a system-call filter, say) once everything
//! is open, mapped and started, and no vCPU has executed an instruction. What that means
//! is not known here: the machine says when, and which thread does what. Called by
//! [`Machine::run`](crate::machine::Machine::run) and by the threads themselves.

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

/// What a thread does for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and what a store to a device's register asks for at once.
    Vcpu,
    /// Waits for the time of timers.
    Timer,
    /// Translates guest code for vCPUs.
    Translator,
    /// Has the host prepare memory for vCPUs.
    Memory,
    /// Does devices' work: an I/O thread, or one that waits for a disk.
    Device,
}

/// A way to confine a process and its threads.
pub trait Sandbox: Send + Sync {
    /// Confines all threads that there are. From here on nothing is opened, no executable
    /// memory is mapped and no thread or process is started.
    ///
    /// # Errors
    /// The host refuses, and the guest is not to run without.
    fn seal(&self) -> io::Result<()>;

    /// Confines the calling thread further, after [`Sandbox::seal`].
    fn enter(&self, kind: ThreadKind);
}

/// The sandbox that device threads enter, which is known when the machine runs.
#[derive(Clone, Default)]
pub(crate) struct DeviceSandbox(Arc<OnceLock<Arc<dyn Sandbox>>>);

impl fmt::Debug for DeviceSandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceSandbox").field("known", &self.0.get().is_some()).finish()
    }
}

impl DeviceSandbox {
    /// Makes it known. The first one stays.
    pub(crate) fn set(&self, sandbox: Arc<dyn Sandbox>) {
        let _ = self.0.set(sandbox);
    }

    /// Confines the calling thread, if there is a sandbox.
    pub(crate) fn enter(&self) {
        if let Some(sandbox) = self.0.get() {
            sandbox.enter(ThreadKind::Device);
        }
    }
}
