//! The page that host and guest share, and the word in which the guest keeps its interrupt
//! flag.
//!
//! The guest allocates both and names the page in LGUEST_INIT. The page is one virtual
//! CPU's: there is one CPU in version 1, and more would each bring their own. The host
//! reads and writes it between any two instructions of the guest, so a guest reads it as
//! volatile and stores each field at once.

use super::layout::shared;
use super::{Phys, Virt, Wire};

/// What the page begins with.
pub const MAGIC: [u8; 8] = *b"lguest64";
/// Size and alignment of the page.
pub const SHARED_DATA_BYTES: usize = 4096;
/// Slots in the ring. A power of two.
pub const RING_SLOTS: usize = 64;

pub use crate::shared_data::{IRQ_FLAG, interrupts_enabled};

shared! {
    /// The interrupt flag and what waits for it. Eight bytes, aligned to eight, anywhere in
    /// RAM: a guest may keep them beside the code that uses them.
    IrqWords {
        /// [`IRQ_FLAG`] set: interrupts are on. Other bits mean nothing. Both write.
        irq_enabled: u32,
        /// [`IRQ_FLAG`] while an unblocked IRQ waits for `irq_enabled`, else 0. The host
        /// writes.
        irq_pending: u32,
    }
}

shared! {
    /// A clock in the form of KVM's `pvclock_vcpu_time_info`. An odd version: it is being
    /// written.
    Clock {
        /// Even, and the same before and after the reading.
        version: u32,
        /// 0.
        pad: u32,
        /// The TSC when `system_time` was.
        tsc_timestamp: u64,
        /// Nanoseconds since the guest's start.
        system_time: u64,
        /// Of ticks, shifted by `tsc_shift`: times this, divided by 2^32, is nanoseconds.
        tsc_to_system_mul: u32,
        /// Left if positive.
        tsc_shift: i8,
        /// Bit 0: never runs backwards, on any CPU.
        flags: u8,
        /// 0.
        pad2: [u8; 2],
    }
}

/// A slot: number and four arguments.
pub type Slot = [u64; 5];

shared! {
    /// The page.
    SharedData {
        /// [`MAGIC`]. The guest writes, before LGUEST_INIT, as up to `vcpu`.
        magic: [u8; 8],
        /// The version the guest speaks.
        version: u32,
        /// [`SHARED_DATA_BYTES`].
        size: u32,
        /// What the guest accepts of the offered [features](super::feature).
        features: u64,
        /// Physical address of the [`IrqWords`].
        irq_words: u64,
        /// Virtual address of the `iretq` that ends an interrupt.
        noirq_iret: u64,
        /// Virtual: from here on all page tables are the same.
        kernel_address: u64,
        /// 0: the first CPU, and the only one.
        vcpu: u32,
        /// 0.
        reserved0: u32,
        /// Bit n: IRQ n waits. The guest writes.
        blocked: u64,
        /// A place for the [`IrqWords`], for guests with no better one.
        irq: IrqWords,
        /// Address of the last page fault. The host writes, before it reflects trap 14.
        cr2: u64,
        /// Seconds since 1970 at the guest's start. The host writes, at LGUEST_INIT.
        start_seconds: u64,
        /// And nanoseconds.
        start_nanoseconds: u64,
        /// 0.
        reserved1: [u64; 4],
        /// The time. The host writes.
        clock: Clock,
        /// 0.
        reserved2: [u64; 4],
        /// Slots carried out, ever. The host writes.
        ring_head: u32,
        /// 0.
        reserved3: [u32; 15],
        /// Slots filled, ever. The guest writes.
        ring_tail: u32,
        /// 0.
        reserved4: [u32; 63],
        /// The calls: number n in slot n % [`RING_SLOTS`].
        ring: [Slot; RING_SLOTS],
        /// 0.
        reserved5: [u64; 128],
    }
}

impl SharedData {
    /// A page with everything zero but magic, version and size.
    pub const fn new() -> SharedData {
        SharedData {
            magic: MAGIC,
            version: super::VERSION,
            size: SHARED_DATA_BYTES as u32,
            ..<SharedData as Wire>::ZERO
        }
    }
}

impl Default for SharedData {
    fn default() -> Self {
        Self::new()
    }
}

/// What the guest says of itself in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Greeting {
    /// Accepted features.
    pub features: u64,
    /// Where the interrupt flag is.
    pub irq_words: Phys,
    /// The guarded `iretq`.
    pub noirq_iret: Virt,
    /// Where the kernel's part of all address spaces begins.
    pub kernel_address: Virt,
}

/// Why LGUEST_INIT kills the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadGreeting {
    /// The page is not where a page is, or not all RAM.
    Place,
    /// It does not begin with [`MAGIC`].
    Magic([u8; 8]),
    /// A version that is not spoken here.
    Version(u32),
    /// Not [`SHARED_DATA_BYTES`].
    Size(u32),
    /// Features that were not offered.
    Features(u64),
    /// Not aligned to eight, or outside of RAM.
    IrqWords(Phys),
    /// Not a canonical address of the upper half.
    KernelAddress(Virt),
    /// Not 0.
    Vcpu(u32),
}

impl core::fmt::Display for BadGreeting {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            BadGreeting::Place => write!(f, "LGUEST_INIT: shared data is not a page of RAM"),
            BadGreeting::Magic(m) => {
                write!(f, "LGUEST_INIT: shared data begins with {:?}, not {MAGIC:?}", m)
            }
            BadGreeting::Version(v) => {
                write!(f, "LGUEST_INIT: the guest speaks ABI {v}, this host {}", super::VERSION)
            }
            BadGreeting::Size(s) => {
                write!(f, "LGUEST_INIT: shared data of {s} bytes, not {SHARED_DATA_BYTES}")
            }
            BadGreeting::Features(bits) => {
                write!(f, "LGUEST_INIT: features {bits:#x} were not offered")
            }
            BadGreeting::IrqWords(at) => {
                write!(f, "LGUEST_INIT: interrupt flag at {:#x}: unaligned or not RAM", at.0)
            }
            BadGreeting::KernelAddress(at) => {
                write!(f, "LGUEST_INIT: kernel address {:#x} is not in the upper half", at.0)
            }
            BadGreeting::Vcpu(n) => write!(f, "LGUEST_INIT: CPU {n}: there is only 0"),
        }
    }
}

impl core::error::Error for BadGreeting {}

impl Greeting {
    /// Reads and judges the page at `at` of a guest with `memory` bytes of RAM, who was
    /// offered those features. `page` is what could be read there.
    ///
    /// # Errors
    ///
    /// All of them kill the guest.
    pub fn read(at: Phys, page: &[u8], memory: u64, offered: u64) -> Result<Greeting, BadGreeting> {
        let in_ram = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= memory);
        let size = SHARED_DATA_BYTES as u64;
        if at.0.checked_rem(size) != Some(0) || !in_ram(at.0, size) {
            return Err(BadGreeting::Place);
        }
        fn field<T: Wire>(page: &[u8], at: usize) -> Result<T, BadGreeting> {
            page.get(at..).and_then(T::read).ok_or(BadGreeting::Place)
        }
        let word = |at| field::<u32>(page, at);
        let long = |at| field::<u64>(page, at);
        use core::mem::offset_of;
        let magic = field(page, offset_of!(SharedData, magic))?;
        if magic != MAGIC {
            return Err(BadGreeting::Magic(magic));
        }
        match word(offset_of!(SharedData, version))? {
            super::VERSION => {}
            other => return Err(BadGreeting::Version(other)),
        }
        match word(offset_of!(SharedData, size))? {
            size if size as usize == SHARED_DATA_BYTES => {}
            other => return Err(BadGreeting::Size(other)),
        }
        let features = long(offset_of!(SharedData, features))?;
        if features & !offered != 0 {
            return Err(BadGreeting::Features(features & !offered));
        }
        let irq_words = long(offset_of!(SharedData, irq_words))?;
        if irq_words & 7 != 0 || !in_ram(irq_words, size_of::<IrqWords>() as u64) {
            return Err(BadGreeting::IrqWords(Phys(irq_words)));
        }
        let kernel_address = Virt(long(offset_of!(SharedData, kernel_address))?);
        if !kernel_address.is_canonical() || kernel_address.0 >> 63 == 0 {
            return Err(BadGreeting::KernelAddress(kernel_address));
        }
        match word(offset_of!(SharedData, vcpu))? {
            0 => {}
            other => return Err(BadGreeting::Vcpu(other)),
        }
        let noirq_iret = Virt(long(offset_of!(SharedData, noirq_iret))?);
        Ok(Greeting { features, irq_words: Phys(irq_words), noirq_iret, kernel_address })
    }
}

/// How many slots wait in the ring, from its two counters. `None`: more than there are,
/// which kills the guest.
pub const fn ring_waiting(head: u32, tail: u32) -> Option<u32> {
    let waiting = tail.wrapping_sub(head);
    if waiting <= RING_SLOTS as u32 { Some(waiting) } else { None }
}

/// Where in the page the slot of that number is.
pub const fn slot_at(number: u32) -> usize {
    let slot = (number as usize) & (RING_SLOTS.wrapping_sub(1));
    core::mem::offset_of!(SharedData, ring).wrapping_add(slot.wrapping_mul(size_of::<Slot>()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::long::layout::{assert_packed, assert_wire};

    #[test]
    fn structures_have_no_holes() {
        assert_packed(IrqWords::FIELDS, 8);
        assert_packed(Clock::FIELDS, 32);
        assert_packed(SharedData::FIELDS, SHARED_DATA_BYTES);
        assert_eq!(size_of::<SharedData>(), SHARED_DATA_BYTES);
        assert_wire::<IrqWords>();
        assert_wire::<Clock>();
        assert_wire::<SharedData>();
    }

    #[test]
    fn the_flag_is_followed_by_what_waits_for_it() {
        // The code of pvops' backend says [flag] and [flag + 4].
        assert_eq!(core::mem::offset_of!(IrqWords, irq_enabled), 0);
        assert_eq!(core::mem::offset_of!(IrqWords, irq_pending), 4);
        assert_eq!(IRQ_FLAG, 0x200);
    }

    #[test]
    fn the_rings_counters_do_not_share_a_cache_line() {
        let head = core::mem::offset_of!(SharedData, ring_head);
        let tail = core::mem::offset_of!(SharedData, ring_tail);
        assert_ne!(head / 64, tail / 64);
    }

    #[test]
    fn counters_wrap() {
        assert_eq!(ring_waiting(u32::MAX, 1), Some(2));
        assert_eq!(ring_waiting(5, 69), Some(64));
        assert_eq!(ring_waiting(5, 70), None);
        assert_eq!(ring_waiting(5, 4), None);
        assert_eq!(slot_at(u32::MAX), slot_at(63));
        assert_eq!(slot_at(64), slot_at(0));
    }

    /// A page that is right, with one field overwritten.
    fn page(change: Option<(usize, &[u8])>) -> Vec<u8> {
        let mut page = vec![0; SHARED_DATA_BYTES];
        let mut put = |at: usize, what: &[u8]| page[at..at + what.len()].copy_from_slice(what);
        put(0, b"lguest64");
        put(8, &1u32.to_le_bytes());
        put(12, &4096u32.to_le_bytes());
        put(16, &3u64.to_le_bytes());
        put(24, &0x2040u64.to_le_bytes());
        put(32, &0xffff_ffff_8000_1234u64.to_le_bytes());
        put(40, &0xffff_8000_0000_0000u64.to_le_bytes());
        if let Some((at, what)) = change {
            put(at, what);
        }
        page
    }

    #[test]
    fn a_greeting_is_judged_field_by_field() {
        let read = |page: &[u8]| Greeting::read(Phys(0x2000), page, 0x10000, 3);
        assert_eq!(
            read(&page(None)),
            Ok(Greeting {
                features: 3,
                irq_words: Phys(0x2040),
                noirq_iret: Virt(0xffff_ffff_8000_1234),
                kernel_address: Virt(0xffff_8000_0000_0000),
            })
        );
        let with = |at, what: u64| read(&page(Some((at, &what.to_le_bytes())))).unwrap_err();
        assert_eq!(with(0, 0), BadGreeting::Magic([0; 8]));
        assert_eq!(with(8, 0x1000_0000_0002), BadGreeting::Version(2));
        assert_eq!(with(8, 0x2000_0000_0001), BadGreeting::Size(0x2000));
        assert_eq!(with(16, 7), BadGreeting::Features(4));
        assert_eq!(with(24, 0x2044), BadGreeting::IrqWords(Phys(0x2044)));
        assert_eq!(with(24, 0x10000), BadGreeting::IrqWords(Phys(0x10000)));
        assert_eq!(with(24, u64::MAX - 7), BadGreeting::IrqWords(Phys(u64::MAX - 7)));
        assert_eq!(with(40, 0x1000), BadGreeting::KernelAddress(Virt(0x1000)));
        assert_eq!(with(48, 1), BadGreeting::Vcpu(1));
        let at = |at| Greeting::read(Phys(at), &page(None), 0x10000, 3);
        assert_eq!(at(0x2001), Err(BadGreeting::Place));
        assert_eq!(at(0x10000), Err(BadGreeting::Place));
        assert_eq!(at(!0xfff), Err(BadGreeting::Place));
        assert_eq!(read(&page(None)[..100]), read(&page(None)));
        assert_eq!(read(&page(None)[..20]), Err(BadGreeting::Place));
    }

    proptest! {
        #[test]
        fn any_page_is_judged(
            at: u64, bytes in proptest::collection::vec(any::<u8>(), 0..64), memory: u64, offered: u64,
            greet: bool,
        ) {
            let mut page = page(None);
            let skip = if greet { 16 } else { 0 };
            for (to, from) in page[skip..].iter_mut().zip(&bytes) {
                *to = *from;
            }
            if let Ok(g) = Greeting::read(Phys(at & !0xfff), &page, memory, offered) {
                prop_assert_eq!(g.features & !offered, 0);
                prop_assert!(g.irq_words.0 + 8 <= memory);
            }
        }
    }
}
