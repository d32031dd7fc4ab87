//! KVM's hypercalls: waking a halted vCPU and sending interrupts to many.
//! Source: Linux Documentation/virt/kvm/x86/hypercalls.rst.

use softcpu::Hypercall;

use crate::devices::apic::controller::InterruptController;
use crate::devices::apic::message::{DeliveryMode, Trigger};

/// Wake the vCPU whose APIC identifier is the second argument.
const KICK_CPU: u64 = 5;
/// Send an interrupt to a bitmap of APIC identifiers.
const SEND_IPI: u64 = 10;

/// No such hypercall.
const ENOSYS: u64 = 1000_u64.wrapping_neg();
/// Not from this privilege level.
const EPERM: u64 = 1_u64.wrapping_neg();
/// Arguments that make no sense.
const EINVAL: u64 = 22_u64.wrapping_neg();

/// Does what `call` asks; returns what goes into RAX.
pub fn perform(call: &Hypercall, controller: &InterruptController) -> u64 {
    if call.cpl != 0 {
        return EPERM;
    }
    let [first, second, third, fourth] = call.args;
    match call.number {
        KICK_CPU => {
            if let Some(local) =
                controller.locals().iter().find(|local| u64::from(local.id()) == second)
            {
                local.kick();
            }
            0
        }
        SEND_IPI => {
            let word = if call.long { 64 } else { 32 };
            send_ipi(controller, u128::from(second) << word | u128::from(first), third, fourth)
        }
        _ => ENOSYS,
    }
}

/// Bit n of `bitmap` is the APIC identifier `lowest + n`. Returns how many took it.
fn send_ipi(controller: &InterruptController, bitmap: u128, lowest: u64, icr: u64) -> u64 {
    let mode = match DeliveryMode::from_bits((icr >> 8) as u32) {
        mode @ (DeliveryMode::Fixed | DeliveryMode::Nmi) => mode,
        _ => return EINVAL,
    };
    let named = |id: u32| {
        let bit = u64::from(id).checked_sub(lowest).and_then(|bit| u32::try_from(bit).ok());
        bit.and_then(|bit| bitmap.checked_shr(bit)).is_some_and(|rest| rest & 1 != 0)
    };
    let taken = controller.locals().iter().filter(|local| named(local.id()));
    taken.filter(|local| local.post(mode, icr as u8, Trigger::Edge)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::pc::test_controller;
    use softcpu::Event;

    fn call(number: u64, args: [u64; 4], cpl: u8) -> Hypercall {
        Hypercall { number, args, cpl, long: true }
    }

    #[test]
    fn interrupts_go_to_the_bitmap() {
        let controller = test_controller(3);
        let icr = 0x40;
        assert_eq!(perform(&call(SEND_IPI, [0b11, 0, 1, icr], 0), &controller), 2);
        let taken: Vec<_> = controller.locals().iter().map(|local| local.acknowledge()).collect();
        assert_eq!(taken, [None, Some(0x40), Some(0x40)]);
        assert_eq!(perform(&call(SEND_IPI, [1, 1, 64_u64.wrapping_neg(), icr], 0), &controller), 0);
        assert_eq!(perform(&call(SEND_IPI, [1, 0, 0, 0x500], 0), &controller), EINVAL);
        // 32-bit code: the second word of the bitmap is bits 32 and up.
        let controller = test_controller(33);
        let wide = call(SEND_IPI, [0, 1, 0, icr], 0);
        assert_eq!(perform(&wide, &controller), 0);
        assert_eq!(perform(&Hypercall { long: false, ..wide }, &controller), 1);
        assert_eq!(controller.local(32).unwrap().acknowledge(), Some(0x40));
    }

    #[test]
    fn a_kick_is_kept_until_it_is_taken() {
        let controller = test_controller(2);
        assert_eq!(perform(&call(KICK_CPU, [0, 1, 0, 0], 0), &controller), 0);
        let local = controller.local(1).unwrap();
        assert_eq!(local.handle().pending(), Event::ATTENTION);
        assert!(local.take_kick() && !local.take_kick());
    }

    #[test]
    fn the_rest_is_refused() {
        let controller = test_controller(1);
        assert_eq!(perform(&call(SEND_IPI, [1, 0, 0, 0x40], 3), &controller), EPERM);
        assert_eq!(perform(&call(99, [0; 4], 0), &controller), ENOSYS);
    }
}
