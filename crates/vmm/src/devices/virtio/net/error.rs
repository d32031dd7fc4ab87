//! Why a card could not be made: what the user or the host must do about it.

use std::io;
use std::path::PathBuf;

use super::config::Forward;

/// The host's side of a network card is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// `passt` is not there.
    #[error("--net user: passt is not installed: apt install passt (or use --net tap=NAME)")]
    PasstMissing,
    /// `passt` cannot be started.
    #[error("--net user: cannot start passt ({0}): check that it runs by itself: passt --version")]
    PasstStart(io::Error),
    /// `passt` has given up.
    #[error("--net user: passt gives up: {0}")]
    Passt(String),
    /// A port of the host is taken, or not for this user.
    #[error("--net user: fwd={forward}: this host will not listen on {} ({error}): choose another host port", .forward.host)]
    Forward {
        /// Which forward.
        forward: Forward,
        /// What the host said.
        error: io::Error,
    },
    /// A tap interface cannot be had.
    #[error("--net tap={name}: {operation}: {error}: {remedy}")]
    Tap {
        /// The interface.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        error: io::Error,
        /// What to do.
        remedy: String,
    },
    /// A socket cannot be had.
    #[error("--net unix={}: {operation}: {error}: {remedy}", .path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        error: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// Something else that every card needs.
    #[error("--net: the host has no {what} to give: {error}")]
    Host {
        /// What.
        what: &'static str,
        /// What the host said.
        error: io::Error,
    },
}
