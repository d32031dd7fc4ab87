//! Exit statuses: how a script learns what became of the guest.
//!
//! The numbers are part of the interface: they are listed by `lguest run --help` and in
//! `docs/specification.md`, and a test holds the list to this file.

/// How a run ended, as the process's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The guest powered itself off.
    PoweredOff,
    /// lguest itself or the host failed.
    Failed,
    /// Bad input: a file, an option, or something this build cannot do.
    BadInput,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU shut down: a triple fault.
    TripleFault,
    /// The guest asked for a reset (lguest does not restart it).
    Reset,
    /// The user quit with Ctrl-A x.
    Quit,
    /// Translator and interpreter differ, under `--engine lockstep`.
    Diverged,
    /// `--timeout` passed; the number is that of timeout(1).
    TimedOut,
    /// A signal ended the run; the number is 128 plus the signal's, as a shell has it.
    Signal(u8),
    /// The guest wrote this value to the debug-exit port; the status is `2 * value + 1`, as
    /// test kernels written for QEMU's `isa-debug-exit` expect.
    DebugExit(u8),
    /// A guest of the 64-bit lguest platform ended as a program does, with this status.
    Exited(u8),
}

impl Status {
    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Failed => 1,
            Self::BadInput => 2,
            Self::Panicked => 3,
            Self::TripleFault => 4,
            Self::Reset => 5,
            Self::Quit => 6,
            Self::Diverged => 7,
            Self::TimedOut => 124,
            Self::Signal(number) => number.saturating_add(128),
            Self::Exited(status) => status,
            Self::DebugExit(value) => value.wrapping_shl(1) | 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Status;

    #[test]
    fn no_two_endings_of_an_ordinary_run_share_a_number() {
        let all = [
            Status::PoweredOff,
            Status::Failed,
            Status::BadInput,
            Status::Panicked,
            Status::TripleFault,
            Status::Reset,
            Status::Quit,
            Status::Diverged,
            Status::TimedOut,
            Status::Signal(2),
            Status::Signal(15),
        ];
        let mut codes: Vec<u8> = all.iter().map(|status| status.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), all.len());
    }

    #[test]
    fn debug_exit_is_odd_and_doubled() {
        let code = |value| Status::DebugExit(value).code();
        assert_eq!((code(0), code(1), code(38), code(0x80)), (1, 3, 77, 1));
    }
}
