//! The start of a machine's threads: all get ready, the process is confined, then they go.
//!
//! A vCPU's thread maps memory for generated code, which its sandbox forbids; and no guest
//! code may run before every thread is in it. So each thread of the machine gets a place at
//! the line, where it waits until the others are ready or have failed.

use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::sandbox::{Sandbox, ThreadKind};

#[derive(Debug, Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.opened.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A thread's place. Dropping it unused says that the thread does not start.
pub(crate) struct Place {
    /// Nothing is sent: that it is gone is the message.
    getting_ready: Sender<Infallible>,
    gate: Arc<Gate>,
    sandbox: Option<Arc<dyn Sandbox>>,
}

impl Place {
    /// The thread is ready: waits for the start, and confines the thread.
    pub(crate) fn cross(self, kind: ThreadKind) {
        let Self { getting_ready, gate, sandbox } = self;
        drop(getting_ready);
        gate.pass();
        if let Some(sandbox) = sandbox {
            sandbox.enter(kind);
        }
    }
}

/// Whoever starts them. Dropped, it lets everybody go: then the machine has ended.
pub(super) struct Starter {
    place: Option<Place>,
    getting_ready: Receiver<Infallible>,
    gate: Arc<Gate>,
}

impl Starter {
    /// Threads are to be confined by `sandbox`.
    pub(super) fn new(sandbox: Option<Arc<dyn Sandbox>>) -> Self {
        let gate = Arc::<Gate>::default();
        let (sender, getting_ready) = channel();
        let place = Place { getting_ready: sender, gate: Arc::clone(&gate), sandbox };
        Self { place: Some(place), getting_ready, gate }
    }

    /// A place for one more thread, until [`Starter::start`].
    pub(super) fn place(&self) -> Option<Place> {
        self.place.as_ref().map(|Place { getting_ready, gate, sandbox }| Place {
            getting_ready: getting_ready.clone(),
            gate: Arc::clone(gate),
            sandbox: sandbox.clone(),
        })
    }

    /// Waits until all are ready, confines the process, lets `others` enter the sandbox, and
    /// opens.
    ///
    /// # Errors
    /// The host refuses the sandbox. Nobody is let go before this is dropped.
    pub(super) fn start(&mut self, others: impl FnOnce(Arc<dyn Sandbox>)) -> io::Result<()> {
        let sandbox = self.place.take().and_then(|place| place.sandbox);
        // Ends, by an error, when no thread is getting ready any more.
        while self.getting_ready.recv().is_ok() {}
        if let Some(sandbox) = sandbox {
            sandbox.seal()?;
            others(sandbox);
        }
        self.gate.open();
        Ok(())
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.gate.open();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Writes down what happens.
    #[derive(Default)]
    struct Witness {
        refuses: bool,
        seen: Mutex<Vec<&'static str>>,
    }

    impl Witness {
        fn note(&self, what: &'static str) {
            self.seen.lock().unwrap().push(what);
        }
    }

    impl Sandbox for Witness {
        fn seal(&self) -> io::Result<()> {
            self.note("sealed");
            if self.refuses { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
        }

        fn enter(&self, kind: ThreadKind) {
            self.note(match kind {
                ThreadKind::Vcpu => "vcpu",
                ThreadKind::Timer => "timer",
                ThreadKind::Translator => "translator",
                ThreadKind::Memory => "memory",
                ThreadKind::Device => "device",
            });
        }
    }

    #[test]
    fn nobody_starts_before_all_are_ready_and_the_process_is_sealed() {
        let witness = Arc::new(Witness::default());
        let mut starter = Starter::new(Some(witness.clone()));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (place, witness) = (starter.place().unwrap(), witness.clone());
                thread::spawn(move || {
                    witness.note("ready");
                    place.cross(ThreadKind::Vcpu);
                    witness.note("runs");
                })
            })
            .collect();
        // One that fails does not hold up the others.
        drop(starter.place());
        starter.start(|sandbox| sandbox.enter(ThreadKind::Device)).unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let seen = witness.seen.lock().unwrap();
        assert_eq!(seen[..5], ["ready", "ready", "ready", "sealed", "device"]);
        assert_eq!(seen.len(), 11);
        let first_run = seen.iter().position(|what| *what == "runs").unwrap();
        assert!(seen[..first_run].contains(&"vcpu"), "{seen:?}");
    }

    #[test]
    fn a_refused_sandbox_is_an_error_and_nobody_waits_for_ever() {
        let witness = Arc::new(Witness { refuses: true, ..Witness::default() });
        let mut starter = Starter::new(Some(witness));
        let place = starter.place().unwrap();
        let thread = thread::spawn(move || place.cross(ThreadKind::Timer));
        starter.start(|_| panic!("there is no sandbox")).unwrap_err();
        assert!(!*starter.gate.open.lock().unwrap());
        drop(starter);
        thread.join().unwrap();
    }
}
