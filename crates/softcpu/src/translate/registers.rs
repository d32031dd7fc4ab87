//! Where guest registers are while translated code runs.
//!
//! Nearly all sit in the host registers of the same name, so that instructions with
//! implied operands (shifts by CL, products in RDX) need no moves. Three host registers
//! are taken: RSP is the host's stack, RAX and R13 are scratch. RAX is one of them because
//! `lahf` and `seto` are the cheapest way to keep flags. Guest RAX and RSP move to R11 and
//! R15, and what compilers use last stays in memory: R11, R13 and R15.

use iced_x86::Register as R;

/// Scratch: flags, and values on their way to or from registers kept in memory.
pub(super) const VALUE: R = R::RAX;
/// Scratch: addresses.
pub(super) const ADDRESS: R = R::R13;
/// Guest RSP.
pub(super) const STACK: R = R::R15;
/// Guest RAX.
pub(super) const ACCUMULATOR: R = R::R11;

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// In this host register (64 bits).
    Host(R),
    /// In the vCPU's state.
    Memory,
}

/// Where guest register `number` is.
pub(super) fn home(number: u8) -> Home {
    match number {
        0 => Home::Host(ACCUMULATOR),
        4 => Home::Host(STACK),
        11 | 13 | 15 => Home::Memory,
        number => Home::Host(whole(number)),
    }
}

/// Guest registers in host registers, with their numbers.
pub(super) fn pinned() -> impl Iterator<Item = (u8, R)> {
    (0..16).filter_map(|number| match home(number) {
        Home::Host(host) => Some((number, host)),
        Home::Memory => None,
    })
}

/// The 64-bit register `number`.
#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
pub(super) fn whole(number: u8) -> R {
    R::RAX + u32::from(number & 15)
}

/// The part of the 64-bit register `full` that is as wide as `like`, which is not AH to BH.
#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
pub(super) fn part(full: R, like: R) -> R {
    let number = full.number() as u32 & 15;
    match (like.size(), number) {
        (8, _) => R::RAX + number,
        (4, _) => R::EAX + number,
        (2, _) => R::AX + number,
        // In iced-x86's order AH to BH come between BL and SPL.
        (_, 0..4) => R::AL + number,
        (_, _) => R::SPL + (number - 4),
    }
}

/// Whether `register` is AH, CH, DH or BH.
pub(super) fn is_high_byte(register: R) -> bool {
    matches!(register, R::AH | R::CH | R::DH | R::BH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_width_and_the_number_asked_for() {
        for number in 0..16 {
            for like in [R::AL, R::R9L, R::AX, R::ECX, R::RSI] {
                let part = part(whole(number), like);
                assert_eq!(part.size(), like.size());
                assert_eq!(part.full_register(), whole(number));
                assert!(!is_high_byte(part));
            }
        }
    }

    #[test]
    fn no_two_guest_registers_share_a_host_register() {
        let mut hosts: Vec<R> = pinned().map(|(_, host)| host).collect();
        hosts.extend([VALUE, ADDRESS, R::RSP]);
        hosts.sort();
        hosts.dedup();
        assert_eq!(hosts.len(), 16);
    }
}
