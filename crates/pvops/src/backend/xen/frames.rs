//! Xen's frame numbers: a guest of its own making, another in page-table entries.
//!
//! A paravirtual guest numbers its frames from 0 (pseudo-physical) and writes machine frame
//! numbers into its page tables. Making an entry (`make_pte` and its like) looks up the
//! guest's own table, frame to machine; reading one (`pte_val`) looks up Xen's, machine to
//! frame, and believes the answer only if the first table says the same: a machine frame
//! may be another guest's, and what Xen's table has for that one is not ours to use.
//!
//! Only entries with the present bit name a frame. What cannot be translated is made not
//! present, never passed on: an invalid frame becomes an empty entry, a foreign machine
//! frame a value without the present bit. Paravirtual guests have no large pages, so the
//! levels differ in nothing.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::backend::installed::Installed;
use crate::families::mmu;
use crate::families::types::{Pgd, Pmd, Pte, Pud};
use crate::{BindError, Binding, Bindings, callee_save};

/// In the guest's table: no machine frame is behind this one.
pub const INVALID: u64 = u64::MAX;
/// In the guest's table: the machine frame is another guest's, mapped here.
pub const FOREIGN: u64 = 1 << 63;
/// In the guest's table: the frame is the machine's own of that number (a device's).
pub const IDENTITY: u64 = 1 << 62;

/// The present bit of an entry.
const PRESENT: u64 = 1;
/// The bits of an entry that hold the frame: 12 to 51 (SDM vol. 3, 4.5).
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const FRAME_SHIFT: u32 = 12;

/// The two tables.
#[derive(Debug)]
pub struct Frames {
    /// Machine frame of each of the guest's: a number, [`INVALID`], or a number with
    /// [`FOREIGN`] or [`IDENTITY`]. Frames beyond its end are the machine's own.
    pub to_machine: &'static [AtomicU64],
    /// What Xen's table has for a machine frame; `None` where it has a hole. (Reading
    /// there faults, and only the kernel can catch that.)
    pub of_machine: fn(u64) -> Option<u64>,
}

impl Frames {
    /// The machine frame behind one of the guest's.
    pub fn machine(&self, frame: u64) -> Option<u64> {
        let machine = match self.entry(frame) {
            Some(INVALID) => return None,
            Some(entry) => entry & !(FOREIGN | IDENTITY),
            None => frame,
        };
        // Beyond what an entry holds it would spill into the flags.
        (machine <= FRAME >> FRAME_SHIFT).then_some(machine)
    }

    /// The guest's number for a machine frame, if it is the guest's or the machine's own.
    pub fn frame(&self, machine: u64) -> Option<u64> {
        if let Some(frame) = (self.of_machine)(machine)
            && self.entry(frame) == Some(machine)
        {
            return Some(frame);
        }
        let own = self.entry(machine).is_none_or(|entry| entry == IDENTITY | machine);
        own.then_some(machine)
    }

    fn entry(&self, frame: u64) -> Option<u64> {
        let index = usize::try_from(frame).ok()?;
        self.to_machine.get(index).map(|entry| entry.load(Ordering::Relaxed))
    }

    /// The entry for a value with a frame of the guest's.
    pub fn make(&self, value: u64) -> u64 {
        if value & PRESENT == 0 {
            return value;
        }
        match self.machine((value & FRAME) >> FRAME_SHIFT) {
            Some(machine) => value & !FRAME | machine << FRAME_SHIFT,
            None => 0,
        }
    }

    /// The value of an entry with a machine frame.
    pub fn value(&self, entry: u64) -> u64 {
        if entry & PRESENT == 0 {
            return entry;
        }
        match self.frame((entry & FRAME) >> FRAME_SHIFT) {
            Some(frame) => entry & !FRAME | (frame << FRAME_SHIFT & FRAME),
            None => entry & !(FRAME | PRESENT),
        }
    }
}

static FRAMES: Installed<Frames> = Installed::empty();

fn made(value: u64) -> u64 {
    FRAMES.get().map_or(value, |frames| frames.make(value))
}

fn valued(entry: u64) -> u64 {
    FRAMES.get().map_or(entry, |frames| frames.value(entry))
}

macro_rules! levels {
    ($($entry:ident $make:ident $value:ident;)*) => {$(
        #[callee_save]
        fn $make(value: u64) -> $entry {
            $entry(made(value))
        }

        #[callee_save]
        fn $value(entry: $entry) -> u64 {
            valued(entry.0)
        }
    )*};
}

levels! {
    Pte make_pte pte_val;
    Pmd make_pmd pmd_val;
    Pud make_pud pud_val;
    Pgd make_pgd pgd_val;
}

/// The conversions of all four levels.
///
/// # Errors
/// When one is bound already.
pub fn bind(
    bindings: &mut Bindings<mmu::Family>,
    frames: &'static Frames,
) -> Result<(), BindError> {
    bindings
        .bind(mmu::op::MakePte, Binding::call(make_pte::CALLEE_SAVE))?
        .bind(mmu::op::PteVal, Binding::call(pte_val::CALLEE_SAVE))?
        .bind(mmu::op::MakePmd, Binding::call(make_pmd::CALLEE_SAVE))?
        .bind(mmu::op::PmdVal, Binding::call(pmd_val::CALLEE_SAVE))?
        .bind(mmu::op::MakePud, Binding::call(make_pud::CALLEE_SAVE))?
        .bind(mmu::op::PudVal, Binding::call(pud_val::CALLEE_SAVE))?
        .bind(mmu::op::MakePgd, Binding::call(make_pgd::CALLEE_SAVE))?
        .bind(mmu::op::PgdVal, Binding::call(pgd_val::CALLEE_SAVE))?;
    FRAMES.set(frames);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// NX, a software bit, dirty, accessed, user, write, present.
    const FLAGS: u64 = 1 << 63 | 1 << 52 | 0x67;

    fn frames(to_machine: &[u64], of_machine: fn(u64) -> Option<u64>) -> Frames {
        let table: Vec<_> = to_machine.iter().copied().map(AtomicU64::new).collect();
        Frames { to_machine: table.leak(), of_machine }
    }

    fn at(frame: u64) -> u64 {
        frame << 12 | FLAGS
    }

    #[test]
    fn frames_of_all_kinds() {
        let table = [0x70, INVALID, FOREIGN | 0x99, IDENTITY | 3, 1 << 40, 0x72];
        let frames = frames(&table, |machine| match machine {
            0x70 => Some(0),
            0x72 => Some(5),
            // A liar, or another guest's frames: number 0 there is not ours.
            0x80 => Some(0),
            0x81 => Some(u64::MAX),
            0x99 => Some(2),
            _ => None,
        });
        // Ours, both ways, with the flags as they are.
        assert_eq!(frames.make(at(0)), at(0x70));
        assert_eq!(frames.value(at(0x72)), at(5));
        // Invalid, and too wide for an entry: nothing of it.
        assert_eq!((frames.make(at(1)), frames.make(at(4))), (0, 0));
        // Foreign: can be mapped, but has no number of ours when read.
        assert_eq!(frames.make(at(2)), at(0x99));
        assert_eq!(frames.value(at(0x99)), at(0x99));
        // The machine's own.
        assert_eq!((frames.make(at(3)), frames.value(at(3))), (at(3), at(3)));
        let beyond = at(0xfee00);
        assert_eq!((frames.make(beyond), frames.value(beyond)), (beyond, beyond));
        // A machine frame whose number is one of ours, and is not ours.
        assert_eq!(frames.value(at(5)), FLAGS & !1);
        // What only one table says is not believed: beyond ours it is the machine's own.
        assert_eq!((frames.value(at(0x80)), frames.value(at(0x81))), (at(0x80), at(0x81)));
        // Not present: not frames at all.
        for word in [0, 0x70 << 12, !1] {
            assert_eq!((frames.make(word), frames.value(word)), (word, word));
        }
    }

    proptest! {
        /// Whatever is in the tables: flags stay or the entry is not present, a frame comes
        /// back as it was, and no other guest's frame is taken for one of ours.
        #[test]
        fn any_tables(
            table in prop::collection::vec(
                prop_oneof![Just(INVALID), 0u64..32, any::<u64>(),
                    (0u64..32).prop_map(|m| m | FOREIGN), (0u64..32).prop_map(|m| m | IDENTITY)],
                0..32),
            word in prop_oneof![any::<u64>(), (0u64..40).prop_map(at)],
            salt in 0u64..32,
        ) {
            std::thread_local!(static SALT: core::cell::Cell<u64> = const { core::cell::Cell::new(0) });
            SALT.set(salt);
            let frames = frames(&table, |machine| Some(machine ^ SALT.get()));
            let frame = (word & FRAME) >> 12;
            let entry = frames.make(word);
            if word & 1 == 0 {
                prop_assert_eq!(entry, word);
                prop_assert_eq!(frames.value(word), word);
            } else {
                prop_assert!(entry == 0 || entry & !FRAME == word & !FRAME);
                let value = frames.value(word);
                prop_assert!(value & !FRAME == word & !FRAME || value == word & !FRAME & !1);
                if value & 1 != 0 {
                    // Believed: both tables agree, or it is the machine's own.
                    let ours = (value & FRAME) >> 12;
                    let said = table.get(ours as usize).copied();
                    prop_assert!(said.is_none_or(|m| m == frame || m == IDENTITY | frame));
                }
            }
            // A frame that the tables agree on comes back.
            let agreed = table.get(frame as usize).is_some_and(|m| *m ^ salt == frame);
            if word & 1 != 0 && agreed {
                prop_assert_eq!(frames.value(entry), word);
            }
        }
    }
}
