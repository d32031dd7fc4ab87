//! The ring of asynchronous hypercalls.
//!
//! 64 slots in the shared data, and a status byte for each. The guest fills the slot at its
//! cursor and marks it; the host, at the next direct call and before that call, carries out
//! marked slots from its own cursor on, and frees each. Both cursors start at 0 and wrap;
//! program order is ring order. The guest's cursor is no part of the shared data: a host
//! that loses count cannot ask.

use crate::band::Band;
use crate::bytes::{get_u32, put_u32};
use crate::call::CallWords;

/// Slots in the ring.
pub const SLOTS: usize = 64;
/// Status of a slot that the guest may fill.
pub const SLOT_FREE: u8 = 0xff;
/// Status of a slot that waits for the host. The host takes any other value than
/// [`SLOT_FREE`] for this.
pub const SLOT_READY: u8 = 0;

/// A slot of four words, of V0 to V2.
pub type Slot16 = [u32; 4];
/// A slot of five words, of V3 on, PAE or not.
pub type Slot20 = [u32; 5];

/// In which order a slot has its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotForm {
    /// Number and arguments 1 to 3.
    InOrder3,
    /// Number and arguments 2, 3, 1: V1's registers by name, from EAX to EDX.
    ByRegister,
    /// Number and arguments 1 to 4.
    InOrder4,
}

impl Band {
    /// The form of the ring's slots.
    pub const fn slot_form(self) -> SlotForm {
        match self {
            Band::V0 | Band::V2 => SlotForm::InOrder3,
            Band::V1a | Band::V1b => SlotForm::ByRegister,
            Band::V3 | Band::V4 | Band::V5 | Band::V6 => SlotForm::InOrder4,
        }
    }
}

impl SlotForm {
    /// Size of a slot in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            SlotForm::InOrder3 | SlotForm::ByRegister => size_of::<Slot16>(),
            SlotForm::InOrder4 => size_of::<Slot20>(),
        }
    }

    /// Where in `hcalls` a slot begins. Slots beyond the last wrap.
    pub const fn offset(self, slot: usize) -> usize {
        (slot % SLOTS).wrapping_mul(self.bytes())
    }

    /// The call in a slot's bytes. `None` if they are too few.
    pub fn read(self, slot: &[u8]) -> Option<CallWords> {
        let mut words = [0; 5];
        for (word, at) in words.iter_mut().zip((0..self.bytes()).step_by(4)) {
            *word = get_u32(slot, at)?;
        }
        let [number, a, b, c, d] = words;
        let args = match self {
            SlotForm::InOrder3 | SlotForm::InOrder4 => [a, b, c, d],
            SlotForm::ByRegister => [c, a, b, 0],
        };
        Some(CallWords { number, args })
    }

    /// Writes a call into a slot's bytes. `None` if they are too few.
    pub fn write(self, words: &CallWords, slot: &mut [u8]) -> Option<()> {
        let [a, b, c, d] = words.args;
        let words = match self {
            SlotForm::InOrder3 | SlotForm::InOrder4 => [words.number, a, b, c, d],
            SlotForm::ByRegister => [words.number, b, c, a, 0],
        };
        for (word, at) in words.iter().zip((0..self.bytes()).step_by(4)) {
            put_u32(slot, at, *word)?;
        }
        Some(())
    }
}

/// One side's place in the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cursor(u8);

impl Cursor {
    /// The slot it stands at.
    pub const fn slot(self) -> usize {
        self.0 as usize
    }

    /// The next one, after the last the first.
    #[must_use]
    pub const fn next(self) -> Cursor {
        Cursor(self.0.wrapping_add(1) & (SLOTS as u8).wrapping_sub(1))
    }
}

/// The slots that a host carries out at a direct call: from its cursor on, as long as they
/// are marked in this copy of the status bytes, and each at most once.
pub fn marked(status: &[u8; SLOTS], from: Cursor) -> impl Iterator<Item = Cursor> {
    core::iter::successors(Some(from), |c| Some(c.next()))
        .take(SLOTS)
        .take_while(|c| status.get(c.slot()).is_some_and(|&s| s != SLOT_FREE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slots_are_as_in_the_reference() {
        let call = CallWords { number: 9, args: [1, 2, 3, 0] };
        let words = |band: Band| {
            let mut bytes = [0xee; 20];
            band.slot_form().write(&call, &mut bytes).unwrap();
            let size = band.slot_form().bytes();
            bytes[..size].chunks(4).map(|w| u32::from(w[0])).collect::<Vec<_>>()
        };
        assert_eq!(words(Band::V0), [9, 1, 2, 3]);
        assert_eq!(words(Band::V1a), [9, 2, 3, 1]);
        assert_eq!(words(Band::V1b), [9, 2, 3, 1]);
        assert_eq!(words(Band::V2), [9, 1, 2, 3]);
        for band in [Band::V3, Band::V4, Band::V5, Band::V6] {
            assert_eq!(words(band), [9, 1, 2, 3, 0]);
        }
    }

    #[test]
    fn a_ring_has_room_for_its_slots() {
        for band in Band::ALL {
            let o = band.layout().offsets();
            assert_eq!(o.hcall_status + SLOTS, o.hcalls);
            assert_eq!(o.hcalls + SLOTS * band.slot_form().bytes(), o.reserve_mem);
        }
    }

    #[test]
    fn the_last_slot_is_followed_by_the_first() {
        let mut cursor = Cursor::default();
        for expected in (0..SLOTS).chain(0..3) {
            assert_eq!(cursor.slot(), expected);
            cursor = cursor.next();
        }
    }

    #[test]
    fn a_full_ring_is_carried_out_once() {
        let from = Cursor(60);
        let slots: Vec<_> = marked(&[SLOT_READY; SLOTS], from).map(Cursor::slot).collect();
        assert_eq!(slots, (60..64).chain(0..60).collect::<Vec<_>>());
        assert_eq!(marked(&[SLOT_FREE; SLOTS], from).count(), 0);
    }

    proptest! {
        #[test]
        fn calls_survive_the_ring(
            band in proptest::sample::select(Band::ALL.to_vec()), number: u32, mut args: [u32; 4],
        ) {
            let form = band.slot_form();
            if form != SlotForm::InOrder4 {
                args[3] = 0;
            }
            let words = CallWords { number, args };
            let mut slot = vec![0; form.bytes()];
            form.write(&words, &mut slot).unwrap();
            prop_assert_eq!(form.read(&slot), Some(words));
            slot.pop();
            prop_assert_eq!(form.read(&slot), None);
            prop_assert_eq!(form.write(&words, &mut slot), None);
        }

        #[test]
        fn a_free_slot_ends_the_run(status: [u8; 32], from in 0u8..64) {
            let mut all = [SLOT_FREE; SLOTS];
            all[16..48].copy_from_slice(&status);
            let run: Vec<_> = marked(&all, Cursor(from)).map(Cursor::slot).collect();
            for slot in &run {
                prop_assert_ne!(all[*slot], SLOT_FREE);
            }
            let stop = (usize::from(from) + run.len()) % SLOTS;
            prop_assert_eq!(all[stop], SLOT_FREE);
        }
    }
}
