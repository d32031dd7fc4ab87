//! Hypercalls of 32-bit guests: numbers, and arguments with types.
//!
//! A call is a number and up to four words, whether they come in registers or from a slot
//! of the ring: [`CallWords`]. What they mean depends on the band, and with PAE on the
//! page tables' format too: [`Call::decode`]. No call returns a value; all registers are
//! kept. A call that makes no sense kills the guest, so the errors here are reasons to
//! print.

use core::fmt;

use crate::band::{Band, Paging, RegisterOrder};
use crate::{Phys, Virt};

/// The numbers, as in EAX.
pub mod number {
    /// Nothing but an occasion to drain the ring.
    pub const FLUSH_ASYNC: u32 = 0;
    /// Must come first, and once.
    pub const LGUEST_INIT: u32 = 1;
    /// The end. Called CRASH in 2.6.24 and before, without a reason.
    pub const SHUTDOWN: u32 = 2;
    /// V0, V1: the whole GDT.
    pub const LOAD_GDT: u32 = 3;
    /// CR3.
    pub const NEW_PGTABLE: u32 = 4;
    /// User part of this address space, or everything.
    pub const FLUSH_TLB: u32 = 5;
    /// One gate.
    pub const LOAD_IDT_ENTRY: u32 = 6;
    /// Kernel stack for traps from user mode.
    pub const SET_STACK: u32 = 7;
    /// CR0.TS.
    pub const TS: u32 = 8;
    /// One-shot timer.
    pub const SET_CLOCKEVENT: u32 = 9;
    /// Sleep.
    pub const HALT: u32 = 10;
    /// V0.
    pub const BIND_DMA: u32 = 12;
    /// V0; SET_PMD from V3 on.
    pub const SEND_DMA: u32 = 13;
    /// V3 on, PAE only: a middle-level entry changed.
    pub const SET_PMD: u32 = 13;
    /// A page-table entry changed.
    pub const SET_PTE: u32 = 14;
    /// A top-level entry changed. Called SET_PMD until 2.6.30.
    pub const SET_PGD: u32 = 15;
    /// The three TLS descriptors.
    pub const LOAD_TLS: u32 = 16;
    /// V1 to V5: ring, device status or string.
    pub const NOTIFY: u32 = 17;
    /// V2 on: one descriptor.
    pub const LOAD_GDT_ENTRY: u32 = 18;
    /// V3 on: nothing but an occasion to take interrupts.
    pub const SEND_INTERRUPTS: u32 = 19;
}

/// The length of SHUTDOWN's text in the guest: so many bytes are read, all of which must
/// be RAM, and the last is taken for 0.
pub const SHUTDOWN_TEXT_BYTES: usize = 128;

/// A call as it is passed: number and arguments, the latter in the order of the
/// documentation, wherever they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CallWords {
    /// EAX.
    pub number: u32,
    /// Arguments 1 to 4; what the band does not have is 0.
    pub args: [u32; 4],
}

/// The registers that a call can be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub struct CallRegisters {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
}

impl CallWords {
    /// Picks the words out of the registers.
    pub const fn from_registers(order: RegisterOrder, r: CallRegisters) -> CallWords {
        let args = match order {
            RegisterOrder::DxBxCx => [r.edx, r.ebx, r.ecx, 0],
            RegisterOrder::BxCxDx => [r.ebx, r.ecx, r.edx, 0],
            RegisterOrder::BxCxDxSi => [r.ebx, r.ecx, r.edx, r.esi],
        };
        CallWords { number: r.eax, args }
    }

    /// Puts the words into registers; those that carry none are 0.
    pub const fn to_registers(self, order: RegisterOrder) -> CallRegisters {
        let [a, b, c, d] = self.args;
        let (eax, r) = (self.number, CallRegisters { eax: 0, ebx: 0, ecx: 0, edx: 0, esi: 0 });
        match order {
            RegisterOrder::DxBxCx => CallRegisters { eax, edx: a, ebx: b, ecx: c, ..r },
            RegisterOrder::BxCxDx => CallRegisters { eax, ebx: a, ecx: b, edx: c, ..r },
            RegisterOrder::BxCxDxSi => CallRegisters { eax, ebx: a, ecx: b, edx: c, esi: d },
        }
    }
}

/// Why a guest asks to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShutdownReason {
    /// CRASH, of kernels that knew no other: the second argument is 0.
    Crash,
    /// Power off. Panics come with it too; their text tells.
    PowerOff,
    /// Start again.
    Restart,
    /// A number nobody gave a meaning. The old Launcher took it for the end.
    Other(u32),
}

impl ShutdownReason {
    /// From the second argument.
    pub const fn from_word(word: u32) -> ShutdownReason {
        match word {
            0 => ShutdownReason::Crash,
            1 => ShutdownReason::PowerOff,
            2 => ShutdownReason::Restart,
            n => ShutdownReason::Other(n),
        }
    }

    /// The second argument.
    pub const fn word(self) -> u32 {
        match self {
            ShutdownReason::Crash => 0,
            ShutdownReason::PowerOff => 1,
            ShutdownReason::Restart => 2,
            ShutdownReason::Other(n) => n,
        }
    }
}

/// What FLUSH_TLB is to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlushScope {
    /// Below `kernel_address`, in the current address space.
    User,
    /// Everything, in every address space.
    All,
}

/// A hypercall, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Call {
    FlushAsync,
    Init {
        data: Phys,
    },
    Shutdown {
        /// [`SHUTDOWN_TEXT_BYTES`] of text.
        text: Phys,
        reason: ShutdownReason,
    },
    LoadGdt {
        table: Phys,
        /// Entries. More than 32 are fatal.
        count: u32,
    },
    NewPgtable {
        top: Phys,
    },
    FlushTlb(FlushScope),
    LoadIdtEntry {
        /// 256 and above are fatal.
        vector: u32,
        low: u32,
        high: u32,
    },
    SetStack {
        ss: u32,
        esp: Virt,
        /// More than 2 are fatal.
        pages: u32,
    },
    /// CR0.TS, as the guest sees it.
    Ts(bool),
    SetClockevent {
        /// From now; 0 cancels.
        nanoseconds: u32,
    },
    Halt,
    BindDma {
        key: u32,
        array: Phys,
        /// Above the low byte; the IRQ is that byte.
        count: u32,
        irq: u8,
    },
    SendDma {
        key: u32,
        dma: Phys,
    },
    SetPmd {
        table: Phys,
        index: u32,
    },
    SetPte {
        top: Phys,
        at: Virt,
        /// Of 32 bits, with PAE of 64.
        entry: u64,
    },
    SetPgd {
        top: Phys,
        index: u32,
    },
    LoadTls {
        /// Three descriptors.
        table: Phys,
        /// Ignored.
        cpu: u32,
    },
    Notify {
        address: Phys,
    },
    LoadGdtEntry {
        /// 32 and above are fatal.
        index: u32,
        low: u32,
        high: u32,
    },
    SendInterrupts,
}

/// A number that this band has no call for. It kills the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnknownCall {
    /// EAX.
    pub number: u32,
    /// Whom it was asked of.
    pub band: Band,
}

impl fmt::Display for UnknownCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hypercall {:#x} does not exist in band {}", self.number, self.band)
    }
}

impl core::error::Error for UnknownCall {}

/// What TS is called with to set the bit: CR0.TS itself.
const TS_SET: u32 = 8;

impl Call {
    /// Understands a call of a guest of that band with page tables of that format.
    ///
    /// # Errors
    ///
    /// The number means nothing there. Arguments can be anything: whoever carries out the
    /// call judges them.
    pub const fn decode(
        band: Band,
        paging: Paging,
        words: &CallWords,
    ) -> Result<Call, UnknownCall> {
        let [a, b, c, d] = words.args;
        let v1 = matches!(band, Band::V1a | Band::V1b);
        let v0 = matches!(band, Band::V0);
        let v3_on = matches!(band, Band::V3 | Band::V4 | Band::V5 | Band::V6);
        let pae = v3_on && matches!(paging, Paging::Pae);
        Ok(match words.number {
            number::FLUSH_ASYNC => Call::FlushAsync,
            number::LGUEST_INIT => Call::Init { data: Phys(a) },
            number::SHUTDOWN => {
                Call::Shutdown { text: Phys(a), reason: ShutdownReason::from_word(b) }
            }
            number::LOAD_GDT if v0 || v1 => Call::LoadGdt { table: Phys(a), count: b },
            number::NEW_PGTABLE => Call::NewPgtable { top: Phys(a) },
            number::FLUSH_TLB => {
                Call::FlushTlb(if a == 0 { FlushScope::User } else { FlushScope::All })
            }
            number::LOAD_IDT_ENTRY => Call::LoadIdtEntry { vector: a, low: b, high: c },
            number::SET_STACK => Call::SetStack { ss: a, esp: Virt(b), pages: c },
            number::TS => Call::Ts(a != 0),
            number::SET_CLOCKEVENT => Call::SetClockevent { nanoseconds: a },
            number::HALT => Call::Halt,
            number::BIND_DMA if v0 => {
                Call::BindDma { key: a, array: Phys(b), count: c >> 8, irq: c as u8 }
            }
            number::SEND_DMA if v0 => Call::SendDma { key: a, dma: Phys(b) },
            number::SET_PMD if pae => Call::SetPmd { table: Phys(a), index: b },
            number::SET_PTE => {
                let high = if pae { d } else { 0 };
                Call::SetPte { top: Phys(a), at: Virt(b), entry: (high as u64) << 32 | c as u64 }
            }
            number::SET_PGD => Call::SetPgd { top: Phys(a), index: b },
            number::LOAD_TLS => Call::LoadTls { table: Phys(a), cpu: b },
            number::NOTIFY if !v0 && !matches!(band, Band::V6) => Call::Notify { address: Phys(a) },
            number::LOAD_GDT_ENTRY if !v0 && !v1 => {
                Call::LoadGdtEntry { index: a, low: b, high: c }
            }
            number::SEND_INTERRUPTS if v3_on => Call::SendInterrupts,
            number => return Err(UnknownCall { number, band }),
        })
    }

    /// The words of the call. Unused arguments are 0.
    pub const fn encode(&self) -> CallWords {
        let (number, args) = match *self {
            Call::FlushAsync => (number::FLUSH_ASYNC, [0; 4]),
            Call::Init { data } => (number::LGUEST_INIT, [data.0, 0, 0, 0]),
            Call::Shutdown { text, reason } => (number::SHUTDOWN, [text.0, reason.word(), 0, 0]),
            Call::LoadGdt { table, count } => (number::LOAD_GDT, [table.0, count, 0, 0]),
            Call::NewPgtable { top } => (number::NEW_PGTABLE, [top.0, 0, 0, 0]),
            Call::FlushTlb(FlushScope::User) => (number::FLUSH_TLB, [0; 4]),
            Call::FlushTlb(FlushScope::All) => (number::FLUSH_TLB, [1, 0, 0, 0]),
            Call::LoadIdtEntry { vector, low, high } => {
                (number::LOAD_IDT_ENTRY, [vector, low, high, 0])
            }
            Call::SetStack { ss, esp, pages } => (number::SET_STACK, [ss, esp.0, pages, 0]),
            Call::Ts(false) => (number::TS, [0; 4]),
            Call::Ts(true) => (number::TS, [TS_SET, 0, 0, 0]),
            Call::SetClockevent { nanoseconds } => (number::SET_CLOCKEVENT, [nanoseconds, 0, 0, 0]),
            Call::Halt => (number::HALT, [0; 4]),
            Call::BindDma { key, array, count, irq } => {
                (number::BIND_DMA, [key, array.0, count << 8 | irq as u32, 0])
            }
            Call::SendDma { key, dma } => (number::SEND_DMA, [key, dma.0, 0, 0]),
            Call::SetPmd { table, index } => (number::SET_PMD, [table.0, index, 0, 0]),
            Call::SetPte { top, at, entry } => {
                (number::SET_PTE, [top.0, at.0, entry as u32, (entry >> 32) as u32])
            }
            Call::SetPgd { top, index } => (number::SET_PGD, [top.0, index, 0, 0]),
            Call::LoadTls { table, cpu } => (number::LOAD_TLS, [table.0, cpu, 0, 0]),
            Call::Notify { address } => (number::NOTIFY, [address.0, 0, 0, 0]),
            Call::LoadGdtEntry { index, low, high } => {
                (number::LOAD_GDT_ENTRY, [index, low, high, 0])
            }
            Call::SendInterrupts => (number::SEND_INTERRUPTS, [0; 4]),
        };
        CallWords { number, args }
    }

    /// Whether Linux may put it into the ring. The host takes any call from there; that
    /// these alone come is for who counts or tests.
    pub const fn is_lazy(&self) -> bool {
        matches!(
            self,
            Call::SetPte { .. }
                | Call::SetPgd { .. }
                | Call::SetPmd { .. }
                | Call::NewPgtable { .. }
                | Call::FlushTlb(_)
                | Call::LoadTls { .. }
                | Call::Ts(_)
                | Call::SetStack { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference's table: number, and the bands that have it (without, with PAE).
    fn exists(band: Band, paging: Paging, number: u32) -> bool {
        let v = |bands: &[Band]| bands.contains(&band);
        use Band::*;
        match number {
            0..=2 | 4..=10 | 14..=16 => true,
            3 => v(&[V0, V1a, V1b]),
            12 => v(&[V0]),
            13 => v(&[V0]) || v(&[V3, V4, V5, V6]) && paging == Paging::Pae,
            17 => v(&[V1a, V1b, V2, V3, V4, V5]),
            18 => v(&[V2, V3, V4, V5, V6]),
            19 => v(&[V3, V4, V5, V6]),
            _ => false,
        }
    }

    #[test]
    fn each_band_has_its_numbers_and_no_others() {
        for band in Band::ALL {
            for paging in [Paging::TwoLevel, Paging::Pae] {
                for number in (0..64).chain([u32::MAX]) {
                    let words = CallWords { number, args: [1, 2, 3, 4] };
                    let call = Call::decode(band, paging, &words);
                    assert_eq!(call.is_ok(), exists(band, paging, number), "{band} {number}");
                    match call {
                        Ok(call) => assert_eq!(call.encode().number, number),
                        Err(e) => assert_eq!(e, UnknownCall { number, band }),
                    }
                }
            }
        }
    }

    #[test]
    fn the_registers_are_those_of_the_reference() {
        let r = CallRegisters { eax: 14, ebx: 2, ecx: 3, edx: 4, esi: 5 };
        let words = |band: Band| CallWords::from_registers(band.register_order(), r).args;
        assert_eq!(words(Band::V0), [4, 2, 3, 0]);
        assert_eq!(words(Band::V1a), [4, 2, 3, 0]);
        assert_eq!(words(Band::V1b), [4, 2, 3, 0]);
        assert_eq!(words(Band::V2), [2, 3, 4, 0]);
        for band in [Band::V3, Band::V4, Band::V5, Band::V6] {
            assert_eq!(words(band), [2, 3, 4, 5]);
        }
    }

    #[test]
    fn a_pte_has_its_high_half_with_pae_only() {
        let words = CallWords { number: number::SET_PTE, args: [1, 2, 3, 4] };
        let entry = |band, paging| match Call::decode(band, paging, &words) {
            Ok(Call::SetPte { entry, .. }) => entry,
            other => panic!("{other:?}"),
        };
        assert_eq!(entry(Band::V5, Paging::TwoLevel), 3);
        assert_eq!(entry(Band::V5, Paging::Pae), 0x4_0000_0003);
        assert_eq!(entry(Band::V2, Paging::Pae), 3);
    }

    fn band() -> impl Strategy<Value = Band> {
        proptest::sample::select(Band::ALL.to_vec())
    }

    fn paging() -> impl Strategy<Value = Paging> {
        proptest::sample::select(vec![Paging::TwoLevel, Paging::Pae])
    }

    proptest! {
        #[test]
        fn what_is_understood_is_said_again_and_understood_the_same(
            band in band(), paging in paging(), number in 0u32..24, args: [u32; 4],
        ) {
            if let Ok(call) = Call::decode(band, paging, &CallWords { number, args }) {
                let again = call.encode();
                prop_assert_eq!(again.number, number);
                prop_assert_eq!(Call::decode(band, paging, &again), Ok(call));
            }
        }

        #[test]
        fn words_survive_the_registers(band in band(), number: u32, mut args: [u32; 4]) {
            let order = band.register_order();
            if order != RegisterOrder::BxCxDxSi {
                args[3] = 0;
            }
            let words = CallWords { number, args };
            prop_assert_eq!(CallWords::from_registers(order, words.to_registers(order)), words);
        }

        #[test]
        fn any_registers_are_judged(
            band in band(), paging in paging(), regs: [u32; 5],
        ) {
            let [eax, ebx, ecx, edx, esi] = regs;
            let registers = CallRegisters { eax, ebx, ecx, edx, esi };
            let words = CallWords::from_registers(band.register_order(), registers);
            let known = exists(band, paging, eax);
            prop_assert_eq!(Call::decode(band, paging, &words).is_ok(), known);
        }
    }
}
