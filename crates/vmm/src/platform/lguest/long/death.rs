//! What a 64-bit guest dies of: the reasons of the specification's last table, in words.

use lguest_abi::long::call::BadCall;
use lguest_abi::long::shared_data::{BadGreeting, RING_SLOTS};

use crate::devices::virtio::long_bus::NoSuch;

/// Why a guest cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LongDeath {
    #[error("it made hypercall {0:#x} before LGUEST_INIT")]
    BeforeInit(u64),
    #[error("it called LGUEST_INIT twice")]
    SecondInit,
    #[error(transparent)]
    Call(#[from] BadCall),
    #[error(transparent)]
    Greeting(#[from] BadGreeting),
    #[error("{waiting} calls wait in its ring, which has {RING_SLOTS} slots")]
    Ring { waiting: u32 },
    #[error("{call}: {len} bytes at physical {at:#x} are not all memory, which ends at {end:#x}")]
    OutsideMemory { call: &'static str, at: u64, len: u64, end: u64 },
    #[error("NEW_PGTABLE: the table at physical {0:#x} is no page of memory")]
    Table(u64),
    #[error("a page table at physical {table:#x}, on the way to {at:#x}, is no memory")]
    StrayTable { table: u64, at: u64 },
    #[error(transparent)]
    Device(#[from] NoSuch),
    #[error("HALT: all interrupts are blocked, so nothing could end it")]
    HaltForEver,
    #[error("unhandled trap {vector} ({detail:#x})")]
    UnhandledTrap { vector: u8, detail: u64 },
    #[error("the frame of trap {vector} cannot be pushed: {at:#x} is not mapped for writing")]
    Frame { vector: u8, at: u64 },
}
