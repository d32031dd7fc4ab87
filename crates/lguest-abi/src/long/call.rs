//! Hypercalls of 64-bit guests.
//!
//! `int $0x1f` in ring 1: the number in RAX, arguments in RDI, RSI, RDX and RCX, which is
//! where functions have theirs. All registers are kept; no call returns anything. Numbers
//! that exist in the old ABI mean the same here, or are not used. The same words in a slot
//! of the ring are a call that waits for the next direct one.

use core::fmt;

use super::{Phys, Virt};

/// The bytes of the trap instruction.
pub const TRAP: [u8; 2] = [0xcd, crate::traps::HYPERCALL_VECTOR];

/// Most bytes of SHUTDOWN's text.
pub const SHUTDOWN_TEXT_MAX: u64 = 1024;
/// Most bytes of one CONSOLE.
pub const CONSOLE_TEXT_MAX: u64 = 4096;

/// Number and arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct CallWords {
    /// RAX.
    pub number: u64,
    /// RDI, RSI, RDX, RCX.
    pub args: [u64; 4],
}

/// The numbers, as in RAX.
pub mod number {
    /// Drain the ring.
    pub const FLUSH_ASYNC: u64 = 0;
    /// First, and once.
    pub const LGUEST_INIT: u64 = 1;
    /// The end.
    pub const SHUTDOWN: u64 = 2;
    /// CR3.
    pub const NEW_PGTABLE: u64 = 4;
    /// User part of this address space, or everything.
    pub const FLUSH_TLB: u64 = 5;
    /// One gate.
    pub const LOAD_IDT_ENTRY: u64 = 6;
    /// Kernel stack for entries from user mode.
    pub const SET_STACK: u64 = 7;
    /// CR0.TS.
    pub const TS: u64 = 8;
    /// One-shot timer.
    pub const SET_CLOCKEVENT: u64 = 9;
    /// Sleep.
    pub const HALT: u64 = 10;
    /// An entry of the lowest level changed.
    pub const SET_PTE: u64 = 14;
    /// An entry above it changed.
    pub const SET_DIRECTORY: u64 = 15;
    /// FS or GS base.
    pub const SET_BASE: u64 = 16;
    /// A queue has work.
    pub const NOTIFY: u64 = 17;
    /// Take what is pending.
    pub const SEND_INTERRUPTS: u64 = 19;
    /// One page.
    pub const FLUSH_PAGE: u64 = 20;
    /// A device's status.
    pub const SET_STATUS: u64 = 21;
    /// Text for the early console.
    pub const CONSOLE: u64 = 22;
    /// Where `syscall` goes.
    pub const SET_SYSCALL: u64 = 23;

    /// All that there are, with their names.
    pub const ALL: &[(&str, u64)] = &[
        ("FLUSH_ASYNC", FLUSH_ASYNC),
        ("LGUEST_INIT", LGUEST_INIT),
        ("SHUTDOWN", SHUTDOWN),
        ("NEW_PGTABLE", NEW_PGTABLE),
        ("FLUSH_TLB", FLUSH_TLB),
        ("LOAD_IDT_ENTRY", LOAD_IDT_ENTRY),
        ("SET_STACK", SET_STACK),
        ("TS", TS),
        ("SET_CLOCKEVENT", SET_CLOCKEVENT),
        ("HALT", HALT),
        ("SET_PTE", SET_PTE),
        ("SET_DIRECTORY", SET_DIRECTORY),
        ("SET_BASE", SET_BASE),
        ("NOTIFY", NOTIFY),
        ("SEND_INTERRUPTS", SEND_INTERRUPTS),
        ("FLUSH_PAGE", FLUSH_PAGE),
        ("SET_STATUS", SET_STATUS),
        ("CONSOLE", CONSOLE),
        ("SET_SYSCALL", SET_SYSCALL),
    ];
}

/// Why a guest ends itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShutdownReason {
    /// Power off: all is well.
    PowerOff,
    /// Start again from the image.
    Restart,
    /// A panic; the text says what.
    Panic,
    /// A program's end with this exit status, which becomes the Launcher's.
    Exit(u8),
}

impl ShutdownReason {
    /// The reasons' numbers, with their names.
    pub const ALL: &'static [(&'static str, u64)] =
        &[("POWER_OFF", 1), ("RESTART", 2), ("PANIC", 3), ("EXIT", 4)];

    const fn words(self) -> (u64, u64) {
        match self {
            ShutdownReason::PowerOff => (1, 0),
            ShutdownReason::Restart => (2, 0),
            ShutdownReason::Panic => (3, 0),
            ShutdownReason::Exit(status) => (4, status as u64),
        }
    }
}

/// Which part of the TLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlushScope {
    /// Below `kernel_address`, in the current address space.
    User,
    /// Everything.
    All,
}

/// Which base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// Of FS.
    Fs,
    /// Of GS.
    Gs,
}

/// A level of page tables above the lowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// An entry covers 2 MiB.
    Directory,
    /// 1 GiB.
    Pointers,
    /// 512 GiB.
    Top,
}

impl Level {
    /// How many bytes of addresses an entry covers.
    pub const fn covers(self) -> u64 {
        match self {
            Level::Directory => 1 << 21,
            Level::Pointers => 1 << 30,
            Level::Top => 1 << 39,
        }
    }
}

/// A gate: what LOAD_IDT_ENTRY's third argument says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GateKind {
    /// Interrupts stay as they were; else they are off in the handler.
    pub trap: bool,
    /// User mode may come here by `int`.
    pub user: bool,
}

impl GateKind {
    /// Bit 0 of the argument.
    pub const TRAP: u64 = 1;
    /// Bit 1.
    pub const USER: u64 = 2;

    const fn word(self) -> u64 {
        (if self.trap { Self::TRAP } else { 0 }) | (if self.user { Self::USER } else { 0 })
    }
}

/// A hypercall, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Call {
    FlushAsync,
    Init { data: Phys },
    Shutdown { text: Phys, len: u64, reason: ShutdownReason },
    NewPgtable { top: Phys },
    FlushTlb(FlushScope),
    LoadIdtEntry { vector: u8, handler: Option<Virt>, kind: GateKind },
    SetStack { rsp: Virt },
    Ts(bool),
    SetClockevent { nanoseconds: u64 },
    Halt,
    SetPte { top: Phys, at: Virt, entry: u64 },
    SetDirectory { top: Phys, at: Virt, level: Level },
    SetBase { base: Base, value: Virt },
    Notify { device: u16, queue: u16 },
    SendInterrupts,
    FlushPage { at: Virt },
    SetStatus { device: u16, status: u8 },
    Console { text: Phys, len: u64 },
    SetSyscall { entry: Option<Virt> },
}

/// Why a call kills the guest before anybody tried it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadCall {
    /// No such number.
    Unknown(u64),
    /// An argument that nothing is known by.
    Argument {
        /// The call.
        number: u64,
        /// Which argument, from 1.
        argument: u8,
        /// What it was.
        value: u64,
    },
    /// It must not wait in the ring.
    NotInRing(u64),
}

/// The name of a call, for messages.
pub fn name(number: u64) -> Option<&'static str> {
    number::ALL.iter().find(|(_, n)| *n == number).map(|(name, _)| *name)
}

impl fmt::Display for BadCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let called = |n: u64| name(n).unwrap_or("?");
        match *self {
            BadCall::Unknown(n) => write!(f, "hypercall {n:#x} does not exist"),
            BadCall::Argument { number, argument, value } => {
                write!(f, "{}: argument {argument} is {value:#x}", called(number))
            }
            BadCall::NotInRing(n) => write!(f, "{} must not wait in the ring", called(n)),
        }
    }
}

impl core::error::Error for BadCall {}

impl Call {
    /// Understands a direct call. Addresses are judged where they are used, but virtual ones
    /// are canonical.
    ///
    /// # Errors
    ///
    /// An unknown number, or an argument that is none of its possible values.
    pub fn decode(words: &CallWords) -> Result<Call, BadCall> {
        let number = words.number;
        let [a, b, c, d] = words.args;
        let bad = |argument: u8, value| BadCall::Argument { number, argument, value };
        let virt = |argument, value| match Virt(value) {
            at if at.is_canonical() => Ok(at),
            _ => Err(bad(argument, value)),
        };
        let short = |argument, value| u16::try_from(value).map_err(|_| bad(argument, value));
        let byte = |argument, value| u8::try_from(value).map_err(|_| bad(argument, value));
        let at_most = |argument, value: u64, most: u64| {
            if value <= most { Ok(value) } else { Err(bad(argument, value)) }
        };
        let optional =
            |argument, value| if value == 0 { Ok(None) } else { virt(argument, value).map(Some) };
        Ok(match number {
            number::FLUSH_ASYNC => Call::FlushAsync,
            number::LGUEST_INIT => Call::Init { data: Phys(a) },
            number::SHUTDOWN => Call::Shutdown {
                text: Phys(a),
                len: at_most(2, b, SHUTDOWN_TEXT_MAX)?,
                reason: match c {
                    1 => ShutdownReason::PowerOff,
                    2 => ShutdownReason::Restart,
                    3 => ShutdownReason::Panic,
                    4 => ShutdownReason::Exit(byte(4, d)?),
                    _ => return Err(bad(3, c)),
                },
            },
            number::NEW_PGTABLE => Call::NewPgtable { top: Phys(a) },
            number::FLUSH_TLB => Call::FlushTlb(match a {
                0 => FlushScope::User,
                1 => FlushScope::All,
                _ => return Err(bad(1, a)),
            }),
            number::LOAD_IDT_ENTRY => {
                let bits = at_most(3, c, GateKind::TRAP | GateKind::USER)?;
                Call::LoadIdtEntry {
                    vector: byte(1, a)?,
                    handler: optional(2, b)?,
                    kind: GateKind {
                        trap: bits & GateKind::TRAP != 0,
                        user: bits & GateKind::USER != 0,
                    },
                }
            }
            number::SET_STACK => Call::SetStack { rsp: virt(1, a)? },
            number::TS => Call::Ts(at_most(1, a, 1)? != 0),
            number::SET_CLOCKEVENT => Call::SetClockevent { nanoseconds: a },
            number::HALT => Call::Halt,
            number::SET_PTE => Call::SetPte { top: Phys(a), at: virt(2, b)?, entry: c },
            number::SET_DIRECTORY => Call::SetDirectory {
                top: Phys(a),
                at: virt(2, b)?,
                level: match c {
                    2 => Level::Directory,
                    3 => Level::Pointers,
                    4 => Level::Top,
                    _ => return Err(bad(3, c)),
                },
            },
            number::SET_BASE => Call::SetBase {
                base: match a {
                    0 => Base::Fs,
                    1 => Base::Gs,
                    _ => return Err(bad(1, a)),
                },
                value: virt(2, b)?,
            },
            number::NOTIFY => Call::Notify { device: short(1, a)?, queue: short(2, b)? },
            number::SEND_INTERRUPTS => Call::SendInterrupts,
            number::FLUSH_PAGE => Call::FlushPage { at: virt(1, a)? },
            number::SET_STATUS => Call::SetStatus { device: short(1, a)?, status: byte(2, b)? },
            number::CONSOLE => {
                Call::Console { text: Phys(a), len: at_most(2, b, CONSOLE_TEXT_MAX)? }
            }
            number::SET_SYSCALL => Call::SetSyscall { entry: optional(1, a)? },
            other => return Err(BadCall::Unknown(other)),
        })
    }

    /// Understands a call from the ring.
    ///
    /// # Errors
    ///
    /// As for [`decode`](Call::decode), and a call that must be direct.
    pub fn decode_queued(words: &CallWords) -> Result<Call, BadCall> {
        let call = Call::decode(words)?;
        if call.may_queue() { Ok(call) } else { Err(BadCall::NotInRing(words.number)) }
    }

    /// Whether the call may wait in the ring. Those that begin, end or stop the guest, or
    /// are made for what they do at once, may not.
    pub const fn may_queue(&self) -> bool {
        !matches!(
            self,
            Call::FlushAsync
                | Call::Init { .. }
                | Call::Shutdown { .. }
                | Call::Halt
                | Call::SendInterrupts
        )
    }

    /// Whether the call may come before LGUEST_INIT, beside that one itself: a guest that
    /// cannot begin should be able to say why.
    pub const fn may_come_first(&self) -> bool {
        matches!(self, Call::Init { .. } | Call::Shutdown { .. } | Call::Console { .. })
    }

    /// The words of the call. Unused arguments are 0.
    pub const fn encode(&self) -> CallWords {
        const fn address(at: Option<Virt>) -> u64 {
            match at {
                Some(at) => at.0,
                None => 0,
            }
        }
        let (number, args) = match *self {
            Call::FlushAsync => (number::FLUSH_ASYNC, [0; 4]),
            Call::Init { data } => (number::LGUEST_INIT, [data.0, 0, 0, 0]),
            Call::Shutdown { text, len, reason } => {
                let (reason, status) = reason.words();
                (number::SHUTDOWN, [text.0, len, reason, status])
            }
            Call::NewPgtable { top } => (number::NEW_PGTABLE, [top.0, 0, 0, 0]),
            Call::FlushTlb(scope) => {
                let all = matches!(scope, FlushScope::All);
                (number::FLUSH_TLB, [all as u64, 0, 0, 0])
            }
            Call::LoadIdtEntry { vector, handler, kind } => {
                (number::LOAD_IDT_ENTRY, [vector as u64, address(handler), kind.word(), 0])
            }
            Call::SetStack { rsp } => (number::SET_STACK, [rsp.0, 0, 0, 0]),
            Call::Ts(set) => (number::TS, [set as u64, 0, 0, 0]),
            Call::SetClockevent { nanoseconds } => (number::SET_CLOCKEVENT, [nanoseconds, 0, 0, 0]),
            Call::Halt => (number::HALT, [0; 4]),
            Call::SetPte { top, at, entry } => (number::SET_PTE, [top.0, at.0, entry, 0]),
            Call::SetDirectory { top, at, level } => {
                let level = match level {
                    Level::Directory => 2,
                    Level::Pointers => 3,
                    Level::Top => 4,
                };
                (number::SET_DIRECTORY, [top.0, at.0, level, 0])
            }
            Call::SetBase { base, value } => {
                let gs = matches!(base, Base::Gs);
                (number::SET_BASE, [gs as u64, value.0, 0, 0])
            }
            Call::Notify { device, queue } => (number::NOTIFY, [device as u64, queue as u64, 0, 0]),
            Call::SendInterrupts => (number::SEND_INTERRUPTS, [0; 4]),
            Call::FlushPage { at } => (number::FLUSH_PAGE, [at.0, 0, 0, 0]),
            Call::SetStatus { device, status } => {
                (number::SET_STATUS, [device as u64, status as u64, 0, 0])
            }
            Call::Console { text, len } => (number::CONSOLE, [text.0, len, 0, 0]),
            Call::SetSyscall { entry } => (number::SET_SYSCALL, [address(entry), 0, 0, 0]),
        };
        CallWords { number, args }
    }
}

impl CallWords {
    /// As in a slot of the ring.
    pub const fn to_slot(self) -> super::shared_data::Slot {
        let [a, b, c, d] = self.args;
        [self.number, a, b, c, d]
    }

    /// From a slot of the ring.
    pub const fn from_slot(slot: super::shared_data::Slot) -> CallWords {
        let [number, a, b, c, d] = slot;
        CallWords { number, args: [a, b, c, d] }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_old_numbers_keep_their_meaning() {
        use crate::call::number as old;
        let pairs = [
            (old::FLUSH_ASYNC, number::FLUSH_ASYNC),
            (old::LGUEST_INIT, number::LGUEST_INIT),
            (old::SHUTDOWN, number::SHUTDOWN),
            (old::NEW_PGTABLE, number::NEW_PGTABLE),
            (old::FLUSH_TLB, number::FLUSH_TLB),
            (old::LOAD_IDT_ENTRY, number::LOAD_IDT_ENTRY),
            (old::SET_STACK, number::SET_STACK),
            (old::TS, number::TS),
            (old::SET_CLOCKEVENT, number::SET_CLOCKEVENT),
            (old::HALT, number::HALT),
            (old::SET_PTE, number::SET_PTE),
            (old::SET_PGD, number::SET_DIRECTORY),
            (old::LOAD_TLS, number::SET_BASE),
            (old::NOTIFY, number::NOTIFY),
            (old::SEND_INTERRUPTS, number::SEND_INTERRUPTS),
        ];
        for (old, new) in pairs {
            assert_eq!(u64::from(old), new);
        }
    }

    #[test]
    fn every_number_is_a_call_and_no_other_is() {
        for n in (0..64).chain([u64::MAX, 1 << 32]) {
            let words = CallWords { number: n, args: [1, 1, 2, 0] };
            let known = !matches!(Call::decode(&words), Err(BadCall::Unknown(_)));
            assert_eq!(known, name(n).is_some(), "{n}");
        }
    }

    #[test]
    fn senseless_arguments_are_named() {
        let bad = |number, args| Call::decode(&CallWords { number, args }).unwrap_err().to_string();
        assert_eq!(bad(number::SHUTDOWN, [0, 0, 9, 0]), "SHUTDOWN: argument 3 is 0x9");
        assert_eq!(bad(number::SHUTDOWN, [0, 1025, 1, 0]), "SHUTDOWN: argument 2 is 0x401");
        assert_eq!(bad(number::SHUTDOWN, [0, 0, 4, 256]), "SHUTDOWN: argument 4 is 0x100");
        assert_eq!(
            bad(number::LOAD_IDT_ENTRY, [256, 0, 0, 0]),
            "LOAD_IDT_ENTRY: argument 1 is 0x100"
        );
        assert_eq!(
            bad(number::SET_STACK, [1 << 47, 0, 0, 0]),
            "SET_STACK: argument 1 is 0x800000000000"
        );
        assert_eq!(bad(3, [0; 4]), "hypercall 0x3 does not exist");
    }

    #[test]
    fn the_ring_takes_no_call_that_must_be_direct() {
        for number in
            [number::FLUSH_ASYNC, number::LGUEST_INIT, number::HALT, number::SEND_INTERRUPTS]
        {
            let words = CallWords { number, args: [0; 4] };
            assert_eq!(Call::decode_queued(&words), Err(BadCall::NotInRing(number)));
        }
        let words = CallWords { number: number::SET_PTE, args: [0; 4] };
        assert!(Call::decode_queued(&words).is_ok());
    }

    /// Words among which many mean something.
    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..6, 0u64..5000, any::<u64>(), 0xffff_8000_0000_0000..=u64::MAX]
    }

    proptest! {
        #[test]
        fn what_is_understood_is_said_again_and_understood_the_same(
            number in 0u64..26, args in [word(), word(), word(), word()],
        ) {
            let words = CallWords { number, args };
            match Call::decode(&words) {
                Ok(call) => {
                    let again = call.encode();
                    prop_assert_eq!(again.number, number);
                    prop_assert_eq!(Call::decode(&again), Ok(call));
                    prop_assert_eq!(CallWords::from_slot(again.to_slot()), again);
                }
                Err(BadCall::Argument { argument, value, .. }) => {
                    prop_assert_eq!(args[usize::from(argument) - 1], value);
                }
                Err(e) => prop_assert_eq!(e, BadCall::Unknown(number)),
            }
        }
    }
}
