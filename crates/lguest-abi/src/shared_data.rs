//! `struct lguest_data`: what host and guest read and write without asking each other.
//!
//! Five layouts came and went. Each is a plain `repr(C)` structure here, for guests, and a
//! table of [`Offsets`] taken from it, for hosts, which reach into guest memory field by
//! field. The guest fills in its own part before LGUEST_INIT, with constants from the
//! compiler, and that is how a host can tell one layout from another: [`identify`].

use crate::bytes::{get_u32, put, put_u32};
use crate::ring::{SLOT_FREE, SLOTS, Slot16, Slot20};

/// IF's place in EFLAGS, and in `irq_enabled` and `irq_pending`.
pub const IRQ_FLAG: u32 = 0x200;

/// Whether the word lets interrupts in. Only the flag's own bit counts: a guest's `iret`
/// path stores all of EFLAGS there, where bit 1 is always set. (The old host took anything
/// but zero for yes, and interrupted code that had asked not to be.)
pub const fn interrupts_enabled(irq_enabled: u32) -> bool {
    irq_enabled & IRQ_FLAG != 0
}

/// `blocked_interrupts` as Linux starts: the timer's bit.
pub const INITIALLY_BLOCKED: u32 = 1;

/// Which `struct lguest_data`. Named for the first band that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// 2.6.23.
    V0,
    /// V1a, V1b, V2.
    V1,
    /// V3, V4.
    V3,
    /// V5.
    V5,
    /// V6.
    V6,
}

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $type,)* }
    };
}

layout! {
    /// Of 2.6.23.
    DataV0 {
        irq_enabled: u32, blocked_interrupts: u32, cr2: u32, time: [u32; 2],
        hcall_status: [u8; SLOTS], hcalls: [Slot16; SLOTS],
        reserve_mem: u32, guestid: u16, padding: u16, tsc_khz: u32,
        noirq_start: u32, noirq_end: u32,
    }
}

layout! {
    /// Of V1a, V1b and V2.
    DataV1 {
        irq_enabled: u32, blocked_interrupts: u32, cr2: u32, time: [u32; 2],
        hcall_status: [u8; SLOTS], hcalls: [Slot16; SLOTS],
        reserve_mem: u32, tsc_khz: u32, pgdir: u32,
        noirq_start: u32, noirq_end: u32, kernel_address: u32, syscall_vec: u32,
    }
}

layout! {
    /// Of V3 and V4.
    DataV3 {
        irq_enabled: u32, blocked_interrupts: u32, cr2: u32, time: [u32; 2], irq_pending: u32,
        hcall_status: [u8; SLOTS], hcalls: [Slot20; SLOTS],
        reserve_mem: u32, tsc_khz: u32, pgdir: u32,
        noirq_start: u32, noirq_end: u32, kernel_address: u32, syscall_vec: u32,
    }
}

layout! {
    /// Of V5.
    DataV5 {
        irq_enabled: u32, blocked_interrupts: u32, cr2: u32, time: [u32; 2], irq_pending: u32,
        hcall_status: [u8; SLOTS], hcalls: [Slot20; SLOTS],
        reserve_mem: u32, tsc_khz: u32,
        noirq_start: u32, noirq_end: u32, kernel_address: u32, syscall_vec: u32,
    }
}

layout! {
    /// Of V6.
    DataV6 {
        irq_enabled: u32, blocked_interrupts: u32, cr2: u32, time: [u32; 2], irq_pending: u32,
        hcall_status: [u8; SLOTS], hcalls: [Slot20; SLOTS],
        reserve_mem: u32, tsc_khz: u32,
        noirq_iret: u32, kernel_address: u32, syscall_vec: u32,
    }
}

/// Where a layout has its fields, in bytes from its start. `None`: it has no such field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// 0x200: interrupts are enabled. Both write.
    pub irq_enabled: usize,
    /// Bit n: IRQ n is masked. The guest writes.
    pub blocked_interrupts: usize,
    /// Address of a page fault. The host writes, before it reflects trap 14.
    pub cr2: usize,
    /// Seconds, then nanoseconds, since 1970. The host writes.
    pub time: usize,
    /// 0x200: an interrupt waits for `irq_enabled`. The host writes.
    pub irq_pending: Option<usize>,
    /// One byte a slot. Both write.
    pub hcall_status: usize,
    /// The slots. The guest writes.
    pub hcalls: usize,
    /// Bytes at the top of the address space that are the host's. The host writes, once.
    pub reserve_mem: usize,
    /// A 16-bit number of the guest. The host writes, once.
    pub guestid: Option<usize>,
    /// Frequency of the TSC, 0 if it is no good. The host writes, once.
    pub tsc_khz: usize,
    /// Physical address of the host's page tables. The host writes, once; then the guest
    /// keeps its CR3 there.
    pub pgdir: Option<usize>,
    /// Static: the two words of the range, or the one address.
    pub noirq: usize,
    /// Static: addresses from here on are the same in all page tables.
    pub kernel_address: Option<usize>,
    /// Static: vector of system calls.
    pub syscall_vec: Option<usize>,
    /// All of it.
    pub size: usize,
}

macro_rules! offsets {
    ($type:ty, noirq: $noirq:ident, $($optional:ident),*) => {
        Offsets {
            irq_enabled: core::mem::offset_of!($type, irq_enabled),
            blocked_interrupts: core::mem::offset_of!($type, blocked_interrupts),
            cr2: core::mem::offset_of!($type, cr2),
            time: core::mem::offset_of!($type, time),
            hcall_status: core::mem::offset_of!($type, hcall_status),
            hcalls: core::mem::offset_of!($type, hcalls),
            reserve_mem: core::mem::offset_of!($type, reserve_mem),
            tsc_khz: core::mem::offset_of!($type, tsc_khz),
            noirq: core::mem::offset_of!($type, $noirq),
            size: size_of::<$type>(),
            $($optional: Some(core::mem::offset_of!($type, $optional)),)*
            ..NO_OPTIONAL
        }
    };
}

const NO_OPTIONAL: Offsets = Offsets {
    irq_enabled: 0,
    blocked_interrupts: 0,
    cr2: 0,
    time: 0,
    irq_pending: None,
    hcall_status: 0,
    hcalls: 0,
    reserve_mem: 0,
    guestid: None,
    tsc_khz: 0,
    pgdir: None,
    noirq: 0,
    kernel_address: None,
    syscall_vec: None,
    size: 0,
};

static V0: Offsets = offsets!(DataV0, noirq: noirq_start, guestid);
static V1: Offsets = offsets!(DataV1, noirq: noirq_start, pgdir, kernel_address, syscall_vec);
static V3: Offsets =
    offsets!(DataV3, noirq: noirq_start, irq_pending, pgdir, kernel_address, syscall_vec);
static V5: Offsets = offsets!(DataV5, noirq: noirq_start, irq_pending, kernel_address, syscall_vec);
static V6: Offsets = offsets!(DataV6, noirq: noirq_iret, irq_pending, kernel_address, syscall_vec);

impl Layout {
    /// All of them, oldest first.
    pub const ALL: [Layout; 5] = [Layout::V0, Layout::V1, Layout::V3, Layout::V5, Layout::V6];

    /// Where the fields are.
    pub const fn offsets(self) -> &'static Offsets {
        match self {
            Layout::V0 => &V0,
            Layout::V1 => &V1,
            Layout::V3 => &V3,
            Layout::V5 => &V5,
            Layout::V6 => &V6,
        }
    }
}

/// The stretch of guest code that no interrupt may be pushed into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoIrqWindow {
    /// V0 to V5: `noirq_start` up to and without `noirq_end`.
    Range {
        /// First address.
        start: u32,
        /// First address after it.
        end: u32,
    },
    /// V6: the `iret` itself.
    Iret(u32),
}

impl NoIrqWindow {
    /// Whether a guest about to execute this address is in it.
    pub const fn contains(self, eip: u32) -> bool {
        match self {
            NoIrqWindow::Range { start, end } => start <= eip && eip < end,
            NoIrqWindow::Iret(at) => eip == at,
        }
    }
}

/// What the guest has written before LGUEST_INIT, and never again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StaticFields {
    /// `noirq_start` and `noirq_end`, or `noirq_iret`.
    pub window: NoIrqWindow,
    /// PAGE_OFFSET. V0 has none; then 0.
    pub kernel_address: u32,
    /// 0x80 in Linux, 0x40 in Plan 9. V0 has none; then 0x80.
    pub syscall_vec: u32,
}

impl StaticFields {
    /// Reads them from a structure of that layout. `None` if it ends before they do.
    pub fn read(layout: Layout, data: &[u8]) -> Option<StaticFields> {
        let at = layout.offsets();
        let first = get_u32(data, at.noirq)?;
        let window = match layout {
            Layout::V6 => NoIrqWindow::Iret(first),
            _ => NoIrqWindow::Range { start: first, end: get_u32(data, at.noirq.wrapping_add(4))? },
        };
        let kernel_address = match at.kernel_address {
            Some(at) => get_u32(data, at)?,
            None => 0,
        };
        let syscall_vec = match at.syscall_vec {
            Some(at) => get_u32(data, at)?,
            None => 0x80,
        };
        Some(StaticFields { window, kernel_address, syscall_vec })
    }

    /// Fills a structure of that layout in as a guest does before LGUEST_INIT: these
    /// fields, every slot of the ring free, the timer blocked, the rest zero. `None`, with
    /// the bytes in disorder, if it does not fit or the window is of the other kind.
    pub fn write(&self, layout: Layout, data: &mut [u8]) -> Option<()> {
        let at = layout.offsets();
        let data = data.get_mut(..at.size)?;
        data.fill(0);
        put(data, at.hcall_status, &[SLOT_FREE; SLOTS])?;
        put_u32(data, at.blocked_interrupts, INITIALLY_BLOCKED)?;
        match (layout, self.window) {
            (Layout::V6, NoIrqWindow::Iret(address)) => put_u32(data, at.noirq, address)?,
            (Layout::V6, _) | (_, NoIrqWindow::Iret(_)) => return None,
            (_, NoIrqWindow::Range { start, end }) => {
                put_u32(data, at.noirq, start)?;
                put_u32(data, at.noirq.wrapping_add(4), end)?;
            }
        }
        if let Some(at) = at.kernel_address {
            put_u32(data, at, self.kernel_address)?;
        }
        if let Some(at) = at.syscall_vec {
            put_u32(data, at, self.syscall_vec)?;
        }
        Some(())
    }

    /// Whether a kernel could have been linked with these: the kernel begins at a page, the
    /// window lies in it, and system calls come by a vector above the exceptions.
    fn plausible(&self) -> bool {
        let kernel = self.kernel_address;
        let in_kernel = match self.window {
            NoIrqWindow::Range { start, end } => kernel <= start && start < end,
            NoIrqWindow::Iret(at) => kernel <= at,
        };
        kernel != 0
            && kernel.trailing_zeros() >= 12
            && in_kernel
            && (0x20..0x100).contains(&self.syscall_vec)
    }
}

/// The most bytes that [`identify`] looks at: the largest layout.
pub const IDENTIFY_BYTES: usize = size_of::<DataV3>();

/// Which layout the structure at LGUEST_INIT's argument has, from what a compiler put
/// there. `bytes` begins at the structure and may end where guest memory does; at best it
/// has [`IDENTIFY_BYTES`]. `None`: it is none of them, and the guest no kernel we know
/// (2.6.23, whose structure says too little, is known by
/// [`V0_MAGIC`](crate::boot::V0_MAGIC) instead).
///
/// Two signs: the ring's status bytes are all [`SLOT_FREE`], which the fifth word being
/// there or not moves by four; and the static words at the end make sense together. The
/// layouts that share their first sign differ by one word there, and what is a page-aligned
/// address in one is a vector in the next, so no two can fit at once.
pub fn identify(bytes: &[u8]) -> Option<Layout> {
    [Layout::V1, Layout::V3, Layout::V5, Layout::V6].into_iter().find(|layout| {
        let at = layout.offsets().hcall_status;
        let free = bytes
            .get(at..)
            .and_then(|rest| rest.get(..SLOTS))
            .is_some_and(|status| status.iter().all(|&s| s == SLOT_FREE));
        free && StaticFields::read(*layout, bytes).is_some_and(|fields| fields.plausible())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn offsets_are_those_of_the_reference() {
        let [v0, v1, v3, v5, v6] = Layout::ALL.map(Layout::offsets);
        for o in [v0, v1, v3, v5, v6] {
            assert_eq!((o.irq_enabled, o.blocked_interrupts, o.cr2, o.time), (0, 4, 8, 12));
        }
        let column = |f: fn(&Offsets) -> usize| [v0, v1, v3, v5, v6].map(f);
        let optional = |f: fn(&Offsets) -> Option<usize>| [v0, v1, v3, v5, v6].map(f);
        assert_eq!(optional(|o| o.irq_pending), [None, None, Some(20), Some(20), Some(20)]);
        assert_eq!(column(|o| o.hcall_status), [20, 20, 24, 24, 24]);
        assert_eq!(column(|o| o.hcalls), [84, 84, 88, 88, 88]);
        assert_eq!(column(|o| o.reserve_mem), [1108, 1108, 1368, 1368, 1368]);
        assert_eq!(optional(|o| o.guestid), [Some(1112), None, None, None, None]);
        assert_eq!(column(|o| o.tsc_khz), [1116, 1112, 1372, 1372, 1372]);
        assert_eq!(optional(|o| o.pgdir), [None, Some(1116), Some(1376), None, None]);
        assert_eq!(column(|o| o.noirq), [1120, 1120, 1380, 1376, 1376]);
        assert_eq!(
            optional(|o| o.kernel_address),
            [None, Some(1128), Some(1388), Some(1384), Some(1380)]
        );
        assert_eq!(
            optional(|o| o.syscall_vec),
            [None, Some(1132), Some(1392), Some(1388), Some(1384)]
        );
        assert_eq!(column(|o| o.size), [1128, 1136, 1396, 1392, 1388]);
        assert_eq!(IDENTIFY_BYTES, 1396);
    }

    #[test]
    fn only_the_flags_own_bit_enables() {
        assert!(interrupts_enabled(0x202));
        assert!(!interrupts_enabled(0x002));
        assert!(!interrupts_enabled(!0x200));
    }

    #[test]
    fn the_window_ends_before_its_end() {
        let range = NoIrqWindow::Range { start: 10, end: 12 };
        assert_eq!([9, 10, 11, 12].map(|a| range.contains(a)), [false, true, true, false]);
        assert_eq!([9, 10, 11].map(|a| NoIrqWindow::Iret(10).contains(a)), [false, true, false]);
    }

    fn fields(layout: Layout) -> impl Strategy<Value = StaticFields> {
        // What kernels were really linked with: the choices of CONFIG_VMSPLIT, and the text
        // within the first mebibytes.
        let splits = vec![0xc000_0000u32, 0xb000_0000, 0x8000_0000, 0x7800_0000, 0x4000_0000];
        (proptest::sample::select(splits), 0u32..0x0100_0000, 1u32..64, 0x20u32..0x100).prop_map(
            move |(kernel_address, offset, length, syscall_vec)| {
                let start = kernel_address + offset;
                let window = match layout {
                    Layout::V6 => NoIrqWindow::Iret(start),
                    _ => NoIrqWindow::Range { start, end: start + length },
                };
                StaticFields { window, kernel_address, syscall_vec }
            },
        )
    }

    fn layout_and_fields() -> impl Strategy<Value = (Layout, StaticFields)> {
        proptest::sample::select(vec![Layout::V1, Layout::V3, Layout::V5, Layout::V6])
            .prop_flat_map(|layout| (Just(layout), fields(layout)))
    }

    proptest! {
        #[test]
        fn a_structure_tells_its_layout_whatever_follows(
            (layout, fields) in layout_and_fields(),
            mut bytes in proptest::collection::vec(any::<u8>(), IDENTIFY_BYTES),
        ) {
            fields.write(layout, &mut bytes).unwrap();
            prop_assert_eq!(identify(&bytes), Some(layout));
            prop_assert_eq!(StaticFields::read(layout, &bytes), Some(fields));
            // And with no more of it than there is.
            bytes.truncate(layout.offsets().size);
            prop_assert_eq!(identify(&bytes), Some(layout));
            bytes.pop();
            prop_assert_ne!(identify(&bytes), Some(layout));
        }

        #[test]
        fn a_slot_in_use_is_no_structure_yet(
            (layout, fields) in layout_and_fields(), slot in 0..SLOTS,
        ) {
            let mut bytes = vec![0; IDENTIFY_BYTES];
            fields.write(layout, &mut bytes).unwrap();
            bytes[layout.offsets().hcall_status + slot] = 0;
            prop_assert_eq!(identify(&bytes), None);
        }

        #[test]
        fn any_bytes_are_judged(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..1500),
            fill in any::<bool>(),
        ) {
            if fill && bytes.len() > 88 {
                bytes[20..88].fill(0xff); // both places of the status bytes
            }
            if let Some(layout) = identify(&bytes) {
                prop_assert!(bytes.len() >= layout.offsets().size);
                prop_assert!(StaticFields::read(layout, &bytes).unwrap().plausible());
            }
        }

        #[test]
        fn the_wrong_window_is_refused(address: u32) {
            let fields = StaticFields {
                window: NoIrqWindow::Iret(address), kernel_address: 0xc000_0000, syscall_vec: 0x80,
            };
            let mut bytes = vec![0; IDENTIFY_BYTES];
            prop_assert_eq!(fields.write(Layout::V5, &mut bytes), None);
        }
    }
}
