//! Engines: what executes vCPUs.
//!
//! There is one, the CPU in software. What was asked for by name is never silently
//! replaced: asking for an engine this build has not is an error.

use std::fmt;

pub(crate) mod dump;
pub(crate) mod soft;
pub(crate) mod supervised;
pub mod trace;
pub(crate) mod translation;
pub mod watch;

/// What executes a machine's vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The CPU in software: no /dev/kvm, no privileges.
    Soft,
    /// The same without its translator.
    Interpreter,
    /// The same with both, one checking the other.
    Lockstep,
}

impl Engine {
    /// What of the CPU in software it uses.
    pub(crate) const fn execution(self) -> softcpu::Engine {
        match self {
            Self::Soft => softcpu::Engine::Translator,
            Self::Interpreter => softcpu::Engine::Interpreter,
            Self::Lockstep => softcpu::Engine::Lockstep,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Interpreter => "interpreter",
            Self::Lockstep => "lockstep",
        })
    }
}

/// Which engine is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The best that this build and this host have.
    #[default]
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

/// Why the wanted engine cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Using /dev/kvm is not built yet.
    #[error("this build has no kvm engine: give --engine soft, or leave it out")]
    NoKvm,
    /// Another vCPU's stores would come between what is compared.
    #[error("--engine lockstep follows one vCPU: give --cpus 1 with it")]
    LockstepCpus,
    /// What such a platform does for its guest is not done twice.
    #[error("--engine lockstep is for guests of a PC: leave it out for those of lguest")]
    LockstepPlatform,
}

impl EngineChoice {
    /// The engine that is used for this choice. Looks at no device.
    ///
    /// # Errors
    /// [`EngineError`] when it was asked for by name and is not there.
    pub const fn select(self) -> Result<Engine, EngineError> {
        match self {
            Self::Auto | Self::Soft => Ok(Engine::Soft),
            Self::Interpreter => Ok(Engine::Interpreter),
            Self::Lockstep => Ok(Engine::Lockstep),
            Self::Kvm => Err(EngineError::NoKvm),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_never_replaced() {
        assert_eq!(EngineChoice::Auto.select(), Ok(Engine::Soft));
        assert_eq!(EngineChoice::Soft.select(), Ok(Engine::Soft));
        assert_eq!(EngineChoice::Interpreter.select(), Ok(Engine::Interpreter));
        assert_eq!(EngineChoice::Lockstep.select(), Ok(Engine::Lockstep));
        assert_eq!(EngineChoice::Kvm.select(), Err(EngineError::NoKvm));
    }
}
