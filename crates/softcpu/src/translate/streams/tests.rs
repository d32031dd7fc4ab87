use super::super::Config;
use super::*;
use crate::testing::TestMachine;
use crate::trace::{Event, Tracer};
use crate::vcpu::Exit;
use std::sync::{Arc, Mutex};

/// Adds up words from RBX on, stores the sums so far from RSI on, and counts in the word that
/// RDI points to; then `hlt`.
const SUMS: &[u8] = &[
    0xb9, 0xb0, 0x04, 0x00, 0x00, // mov ecx, 1200
    0x31, 0xd2, // xor edx, edx
    0x48, 0x03, 0x13, // again: add rdx, [rbx]
    0x48, 0x89, 0x16, // mov [rsi], rdx
    0x48, 0x83, 0xc3, 0x08, // add rbx, 8
    0x48, 0x8d, 0x76, 0x08, // lea rsi, [rsi + 8]
    0x48, 0xff, 0x07, // inc qword [rdi]
    0xff, 0xc9, // dec ecx
    0x75, 0xeb, // jnz again
    0xf4, // hlt
];
const WORDS: u64 = 1200;

/// Keeps whether some translation has streams.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<bool>>);

impl Tracer for Seen {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Translated { code, .. } = event {
            let page = fields::stream_page(0).0.to_le_bytes();
            *self.0.lock().unwrap() |= code.windows(4).any(|bytes| bytes == page);
        }
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

#[test]
fn what_steps_through_pages_is_what_it_would_be() {
    // The words on pages of their own, misaligned, on one page with what is stored, and all in
    // the way of each other: the sums are stored over words that come later.
    for (from, to, count) in [
        (0x8000, 0xc000, 0x7000),
        (0x8ffd, 0xc7fb, 0x7ffc),
        (0x8000, 0x8008, 0x7000),
        (0x8000, 0xc000, 0x9000),
    ] {
        let config = Config { verify: true, turns: 7, ..Config::default() };
        let seen = Seen::default();
        let mut ends = Vec::new();
        for translated in [false, true] {
            let mut machine = TestMachine::long_mode();
            if translated {
                machine = machine.translating_as(1, config);
                machine.vcpu.set_tracer(Some(Box::new(seen.clone())));
            }
            machine.put(0x1000, SUMS);
            for word in 0..WORDS {
                machine.put(from + 8 * word, &(word * word).to_le_bytes());
            }
            let state = &mut machine.vcpu.state;
            (state.rip, state.gpr[3], state.gpr[6], state.gpr[7]) = (0x1000, from, to, count);
            assert_eq!(machine.vcpu.run(), Exit::Halt);
            let memory = machine.get(0x7000, 0x9000);
            ends.push((machine.vcpu.state.gpr, memory));
        }
        assert_eq!(ends[0].0, ends[1].0);
        assert!(ends[0].1 == ends[1].1, "{from:#x} {to:#x}");
        assert!(*seen.0.lock().unwrap());
    }
}
