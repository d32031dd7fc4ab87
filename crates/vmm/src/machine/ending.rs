//! How a machine ends: the first reason given counts, and stops all vCPUs.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use softcpu::translate::BadTranslation;
use softcpu::{Event, Vcpu, VcpuHandle};

use super::MachineError;
use crate::devices::Request;
use crate::platform::lguest::Ended;

/// How long a guest that reported its panic may go on talking: the rest of the message
/// is worth having, and many kernels reset themselves a moment later.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How a machine's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest asked for a reset. Who restarts machines is not decided here.
    Reset,
    /// The guest kernel reported a panic (by the pvpanic device; one without its driver
    /// says so only on its console and then resets).
    Panicked,
    /// A vCPU faulted while delivering a double fault: it has shut down.
    TripleFault {
        /// Which one.
        vcpu: usize,
        /// Where.
        rip: u64,
    },
    /// A guest of the lguest platform panicked, with these words.
    PanickedSaying(String),
    /// A guest of the lguest platform broke its rules: what it did, and where.
    Died(String),
    /// A guest of the lguest platform ended as a program does, with this exit status.
    Exited(u8),
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u8),
    /// Translator and interpreter differ, and this is the report.
    Diverged(String),
    /// The configured time is over.
    TimedOut,
    /// [`Controller::stop`](super::Controller::stop) was called.
    Stopped,
}

/// Why it ended, as the threads report it.
#[derive(Debug)]
pub(crate) enum End {
    /// By [`Controller::stop`](super::Controller::stop).
    Stopped,
    /// The guest asked for it.
    Requested(Request),
    /// A guest of the lguest platform ended, by its own call or for breaking the rules.
    Lguest(Ended),
    /// See [`Outcome::TripleFault`].
    TripleFault {
        /// Which one.
        vcpu: usize,
        /// Where.
        rip: u64,
    },
    /// See [`Outcome::Diverged`].
    Diverged(String),
    /// The host refused the engine something.
    Failed(io::Error),
    /// The translator has made what must not be run.
    Translation {
        /// Which vCPU's.
        vcpu: usize,
        /// What is wrong with it.
        reason: BadTranslation,
    },
    /// A vCPU's thread panicked.
    Crashed {
        /// Which one.
        vcpu: usize,
    },
}

#[derive(Debug, Default)]
struct State {
    end: Option<End>,
    /// The guest has panicked, and may speak until then.
    panicked: Option<Instant>,
}

/// Where the end is reported and waited for.
#[derive(Debug)]
pub(crate) struct Ending {
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
    vcpus: Vec<VcpuHandle>,
}

impl Ending {
    /// For a machine with these vCPUs.
    pub(crate) fn new(vcpus: Vec<VcpuHandle>) -> Arc<Self> {
        let (state, changed, ended) = (Mutex::default(), Condvar::new(), AtomicBool::new(false));
        Arc::new(Self { state, changed, ended, vcpus })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether vCPUs should stop.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(SeqCst)
    }

    /// The machine ends, for this reason unless there was one already.
    pub(crate) fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.halt_vcpus();
        self.changed.notify_all();
    }

    fn halt_vcpus(&self) {
        self.ended.store(true, SeqCst);
        for vcpu in &self.vcpus {
            vcpu.raise(Event::STOP);
        }
    }

    /// `vcpu`, number `index`, has returned [`softcpu::Exit::Failed`].
    pub(crate) fn failed(&self, index: usize, vcpu: &Vcpu) {
        let end = match vcpu.failure() {
            Some(reason) => End::Translation { vcpu: index, reason: reason.clone() },
            None => End::Crashed { vcpu: index },
        };
        self.end(end);
    }

    /// The guest asks for something.
    pub(crate) fn request(&self, request: Request) {
        if request == Request::Panicked {
            let now = Instant::now();
            self.lock().panicked.get_or_insert(now.checked_add(LAST_WORDS).unwrap_or(now));
            self.changed.notify_all();
        } else {
            self.end(End::Requested(request));
        }
    }

    /// Ends the machine from outside.
    pub(crate) fn stop(&self) {
        self.end(End::Stopped);
    }

    /// Waits for the end, until `deadline` at the latest, and stops the vCPUs.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Outcome, MachineError> {
        let mut state = self.lock();
        let outcome = loop {
            let panicked = state.panicked;
            if let Some(end) = state.end.take() {
                break end.outcome(panicked.is_some());
            }
            let now = Instant::now();
            if panicked.is_some_and(|until| until <= now) {
                break Ok(Outcome::Panicked);
            }
            if deadline.is_some_and(|deadline| deadline <= now) {
                break Ok(Outcome::TimedOut);
            }
            state = match [panicked, deadline].into_iter().flatten().min() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let waited =
                        self.changed.wait_timeout(state, until.saturating_duration_since(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        };
        drop(state);
        self.halt_vcpus();
        outcome
    }
}

impl End {
    fn outcome(self, panicked: bool) -> Result<Outcome, MachineError> {
        Ok(match self {
            Self::Stopped => Outcome::Stopped,
            Self::Requested(Request::PowerOff) | Self::Lguest(Ended::PoweredOff) => {
                Outcome::PoweredOff
            }
            Self::Lguest(Ended::Exited(status)) => Outcome::Exited(status),
            Self::Lguest(Ended::Restart(_)) => Outcome::Reset,
            Self::Lguest(Ended::Panicked(words)) => Outcome::PanickedSaying(words),
            Self::Lguest(Ended::Died(reason)) => Outcome::Died(reason),
            Self::Requested(Request::Exit(value)) => Outcome::DebugExit(value),
            Self::Requested(Request::Panicked) => Outcome::Panicked,
            Self::Requested(Request::Reset) if panicked => Outcome::Panicked,
            Self::Requested(Request::Reset) => Outcome::Reset,
            Self::TripleFault { .. } if panicked => Outcome::Panicked,
            Self::TripleFault { vcpu, rip } => Outcome::TripleFault { vcpu, rip },
            Self::Diverged(report) => Outcome::Diverged(report),
            Self::Failed(reason) => return Err(MachineError::Vcpu(reason)),
            Self::Translation { vcpu, reason } => {
                return Err(MachineError::Translation { vcpu, reason });
            }
            Self::Crashed { vcpu } => return Err(MachineError::Crashed(vcpu)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(reports: impl FnOnce(&Ending)) -> Outcome {
        let vcpu = VcpuHandle::new();
        let ending = Ending::new(vec![vcpu.clone()]);
        reports(&ending);
        let outcome = ending.wait(Some(Instant::now() + Duration::from_millis(20))).unwrap();
        assert!(ending.has_ended());
        assert!(vcpu.pending().contains(Event::STOP));
        outcome
    }

    #[test]
    fn the_first_reason_counts() {
        let both = |ending: &Ending| {
            ending.request(Request::PowerOff);
            ending.stop();
        };
        assert_eq!(outcome(both), Outcome::PoweredOff);
        assert_eq!(
            outcome(|ending| ending.end(End::TripleFault { vcpu: 1, rip: 2 })),
            Outcome::TripleFault { vcpu: 1, rip: 2 }
        );
        assert_eq!(outcome(|ending| ending.request(Request::Exit(7))), Outcome::DebugExit(7));
        assert_eq!(outcome(|_| ()), Outcome::TimedOut);
    }

    #[test]
    fn a_translation_that_must_not_run_is_our_failure_and_not_the_users() {
        let ending = Ending::new(Vec::new());
        let reason = BadTranslation { rip: 0x1234, violation: "syscall".into() };
        ending.end(End::Translation { vcpu: 3, reason });
        let error = ending.wait(None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("vCPU 3") && text.contains("0x1234"), "{text}");
        assert!(!text.contains('\n') && !error.is_users());
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let panic_and_reset = |ending: &Ending| {
            ending.request(Request::Panicked);
            ending.request(Request::Reset);
        };
        assert_eq!(outcome(panic_and_reset), Outcome::Panicked);
        let ending = Ending::new(Vec::new());
        ending.request(Request::Panicked);
        assert_eq!(ending.wait(None).unwrap(), Outcome::Panicked);
    }
}
