//! Devices on the lguest bus, used by a guest: the console that every machine has.

use lguest_abi::bus::{VqConfig, status};
use lguest_abi::segments::GateKind;
use lguest_abi::{Band, Call, Phys};
use vmm::machine::{Machine, Outcome};

use super::guest::*;

/// RAM's end, where the descriptor page is. Two-level tables map this much beyond it.
const PAGE: u32 = 32 << 20;
/// The console's queues have so many entries.
const NUM: u32 = 64;

fn ring(n: u32) -> u32 {
    PAGE + 0x1000 + n * VqConfig::ring_pages(NUM as u16) * 0x1000
}

/// The output queue's ring, and its used index's address.
fn transmit() -> (u32, u32) {
    let ring = ring(1);
    (ring, ring + (NUM * 18 + 4).next_multiple_of(4096))
}

/// A word of physical memory above RAM, as the guest reaches it: in linear mode.
fn linear(band: Band) -> Guest {
    let mut guest = Guest::bare(band, lguest_abi::Paging::TwoLevel);
    guest.linear = true;
    guest.call(Call::Init { data: Phys(DATA) });
    guest.mov(Reg::Esp, STACK);
    guest
}

#[test]
fn the_console_is_described_and_prints() {
    // A page's mapping is the guest's business; without one V5 sees all of it.
    let mut guest = linear(Band::V5);
    guest.expect(PAGE, 0x0004_0203, "type, two queues, features, no configuration");
    let (ring, used) = transmit();
    for (n, word) in b"from a ring\n".chunks(4).enumerate() {
        let word = u32::from_le_bytes(word.try_into().unwrap());
        guest.store(VARS + 0x100 + 4 * n as u32, word);
    }
    // The driver's words: acknowledged, and features (none) final.
    guest.store(PAGE + 4, status::ACKNOWLEDGE as u32 | status::DRIVER as u32 | NUM << 8 | 1 << 24);
    guest.call(Call::Notify { address: Phys(PAGE) });
    guest.store(ring, VARS + 0x100);
    guest.store(ring + 8, 12);
    guest.store(ring + 12, 0);
    guest.store(ring + NUM * 16, 1 << 16);
    guest.call(Call::Notify { address: Phys(ring) });
    // The used index is the upper half of the first word: wait for 1.
    guest.wait_for_upper_half(used, 1);
    guest.done();
    let (outcome, console) = guest.run();
    assert_eq!((outcome, console.as_str()), (Outcome::PoweredOff, "from a ring\n"));
}

#[test]
fn a_used_buffer_interrupts_by_the_queues_line() {
    let mut guest = linear(Band::V5);
    // Line 2 is the output queue's. The handler runs at its physical address.
    guest.handler(0x22, GateKind::Interrupt, 0, |guest| {
        guest.inc(VARS);
        guest.raw(&[0xcf]);
    });
    let (ring, _) = transmit();
    guest.store(DATA + 4, 0);
    guest.store(ring, VARS + 0x100);
    guest.store(ring + 8, 1);
    guest.store(ring + 12, 0);
    guest.store(ring + NUM * 16, 1 << 16);
    guest.call(Call::Notify { address: Phys(ring) });
    guest.call(Call::Halt);
    guest.expect(VARS, 1, "one interrupt");
    guest.done();
    assert_eq!(guest.run().0, Outcome::PoweredOff);
}

#[test]
fn what_is_typed_arrives() {
    let mut guest = linear(Band::V5);
    let ring = ring(0);
    let used = ring + (NUM * 18 + 4).next_multiple_of(4096);
    guest.store(ring, VARS + 0x200);
    guest.store(ring + 8, 4);
    guest.store(ring + 12, 2);
    guest.store(ring + NUM * 16, 1 << 16);
    guest.call(Call::Notify { address: Phys(ring) });
    guest.wait_for_upper_half(used, 1);
    guest.expect(VARS + 0x200, u32::from_le_bytes(*b"key!"), "what was typed");
    guest.done();
    let (config, _) = guest.config(20.0);
    let machine = Machine::new(config).unwrap();
    let controller = machine.controller();
    assert_eq!(controller.serial_input(b"key!"), 4);
    assert_eq!(machine.run().unwrap(), Outcome::PoweredOff);
}
