//! What makes a driver's request wrong beyond repair: the device needs a reset.

use super::super::{ChainError, QueueError};
use super::backends::MAX_FRAME;
use super::header::HEADER_LEN;

/// The longest request, in bytes.
const LONGEST: usize = HEADER_LEN + MAX_FRAME;

/// The driver broke a rule.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The queue or a chain makes no sense.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver changed a chain under the device's hands.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A frame to send with room to write to.
    #[error("a frame to send has writable parts")]
    WritableFrame,
    /// Too little for a header, or more than a frame.
    #[error("a frame to send has {0} bytes, header included; {HEADER_LEN} to {LONGEST} will do")]
    FrameLength(u64),
    /// An offload that was not agreed on.
    #[error("a frame asks for an offload that was not agreed on")]
    Offload,
    /// No room for the header, or something to read.
    #[error("a buffer for received frames is too small for a header, or readable")]
    Buffer,
    /// A command without its two bytes or its answer's one.
    #[error("a control command has no room for its class or its answer")]
    Command,
}
