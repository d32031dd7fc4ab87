//! Bodies of the fuzz targets for the CPU: hostile code in hostile surroundings.
//!
//! [`fuzz_interpreter`] runs arbitrary bytes in 16-, 32- or 64-bit code, at any privilege
//! level, with arbitrary registers, descriptors and page tables, [`fuzz_translator`] does so
//! with 64- and 32-bit code translated, and [`fuzz_decoder`] only decodes them. Neither may panic, hang, or touch host memory that is not the guest's
//! RAM (which lies between unmapped pages). The fuzzers call them, and so does a short
//! run in the tests, where arithmetic overflow panics too.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "test support: it runs guests, they do not reach it"
)]

use crate::decode::cache::BlockCache;
use crate::handle::Event;
use crate::state::control::{Cr0, Cr4, Efer};
use crate::state::rflags::RFlags;
use crate::state::segment::{Access, DescriptorTable, SegReg, Segment};
use crate::state::{CodeSize, VcpuState};
use crate::testing::{RAM, TestMachine};
use crate::translate::Workshop;
use crate::vcpu::{Abort, Exit, Vcpu};

/// Steps, of an instruction or a block each, that one input gets.
const STEPS: usize = 96;
/// Descriptor tables and the task state, as physical addresses.
const GDT: u64 = 0x3000;
const IDT: u64 = 0x4000;
const TSS: u64 = 0x5000;
/// Where exceptions are handled, by code that comes from the input as well.
const HANDLER: u64 = 0x6000;
/// The code, around a page boundary.
const CODE: u64 = 0x1f00;
/// The tables of each paging mode; the last level of all maps the first 2 MiB.
const TABLES: u64 = 0x10_0000;
const LAST_LEVEL: u64 = TABLES + 0x3000;
const LAST_LEVEL_32: u64 = TABLES + 0x5000;

/// Takes numbers off the front of the input; zero when there are no more.
struct Bytes<'d>(&'d [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let (head, tail) = self.0.split_at(self.0.len().min(N));
        taken[..head.len()].copy_from_slice(head);
        self.0 = tail;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    /// A number of the kind that goes wrong: small, at an edge, an address, or anything.
    fn number(&mut self) -> u64 {
        let kind = self.byte();
        let low = u64::from(kind & 0x1f);
        match kind >> 5 {
            0 => low,
            1 => low.wrapping_neg(),
            2 => 1 << (low * 2),
            3 => (1 << (low * 2)) - 1,
            4 => (low + 1) * 0x1000 - u64::from(self.byte() & 31),
            5 => RAM - u64::from(self.byte()),
            6 => 0x7fff_ffff_ffff - u64::from(self.byte()),
            _ => u64::from_le_bytes(self.take()),
        }
    }
}

/// Code size, privilege, control registers: some state the CPU could really be in.
fn mode(state: &mut VcpuState, bytes: &mut Bytes<'_>) {
    let [kind, cr0, cr4, flags] = bytes.take();
    let (size, user, paging) = (kind & 3, kind & 4 != 0, kind & 8 != 0);
    let long = size == 3;
    let protected = size != 0;
    state.cr0 = Cr0::ET;
    state.cr0.set(Cr0::PE, protected);
    state.cr0.set(Cr0::PG, protected && paging || long);
    for (bit, flag) in
        [Cr0::WP, Cr0::AM, Cr0::NE, Cr0::MP, Cr0::TS, Cr0::EM].into_iter().enumerate()
    {
        state.cr0.set(flag, cr0 >> bit & 1 != 0);
    }
    state.cr4 = Cr4::empty();
    let rare = [Cr4::PSE, Cr4::PGE, Cr4::SMEP, Cr4::SMAP, Cr4::UMIP, Cr4::FSGSBASE, Cr4::TSD];
    for (bit, flag) in rare.into_iter().enumerate() {
        state.cr4.set(flag, cr4 >> bit & 1 != 0);
    }
    let units = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    state.cr4.set(units, cr4 >> 7 == 0);
    state.cr4.set(Cr4::PAE, long || cr0 & 0x40 != 0);
    state.efer = Efer::SCE;
    state.efer.set(Efer::NXE, cr0 & 0x80 != 0);
    state.efer.set(
        Efer::LME | Efer::LMA,
        long || kind & 0x10 != 0 && paging && state.cr4.contains(Cr4::PAE) && protected,
    );
    state.xcr0 = if flags & 0x80 == 0 { 7 } else { 1 };
    state.cr3 = match (state.cr4.contains(Cr4::PAE), state.efer.contains(Efer::LMA)) {
        (true, true) => TABLES,
        (true, false) => TABLES + 0x6000,
        _ => TABLES + 0x4000,
    };
    segments(state, size, user);
    let status = RFlags::STATUS.bits() & u64::from(flags & 0x55) | RFlags::FIXED.bits();
    state.rflags = RFlags::from_bits_retain(status);
    state.rflags.set(RFlags::DF, flags & 2 != 0);
    state.rflags.set(RFlags::TF, flags & 0xa == 0xa);
    state.rflags.set(RFlags::IF, flags & 0x20 != 0);
    state.rflags.set(RFlags::AC, kind & 0x20 != 0);
    state.rflags.set(RFlags::NT, kind & 0x40 != 0);
    if kind & 0x80 != 0 {
        state.rflags |= RFlags::IOPL;
    }
}

fn segments(state: &mut VcpuState, size: u8, user: bool) {
    let registers = [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs];
    let data = if user {
        Segment::from_descriptor(0x23, DESCRIPTORS[4])
    } else {
        Segment::from_descriptor(0x18, DESCRIPTORS[3])
    };
    if size != 0 {
        for register in registers {
            *state.segment_mut(register) = data;
        }
    }
    let code = match (size, user) {
        (0, _) => Segment { base: 0, ..Segment::real_mode(0) },
        (1, false) => Segment::from_descriptor(0x28, DESCRIPTORS[5]),
        (1, true) => Segment::from_descriptor(0x33, DESCRIPTORS[6]),
        (2, false) => Segment::from_descriptor(0x38, DESCRIPTORS[7]),
        (2, true) => Segment::from_descriptor(0x43, DESCRIPTORS[8]),
        (_, false) => Segment::from_descriptor(0x10, DESCRIPTORS[2]),
        (_, true) => Segment::from_descriptor(0x4b, DESCRIPTORS[9]),
    };
    *state.segment_mut(SegReg::Cs) = code;
    state.gdtr = DescriptorTable { base: GDT, limit: 0x1ff };
    state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    state.tr = Segment::from_descriptor(0x50, 0x0000_8b00_0000_2067);
    state.tr.base = TSS;
    state.ldtr = Segment::from_descriptor(0x60, 0x0000_8200_0000_00ff);
    state.ldtr.base = GDT + 0x100;
}

/// Outside 64-bit code, segments that are not flat.
fn move_segments(state: &mut VcpuState, habits: u8, bytes: &mut Bytes<'_>) {
    let registers = [(4, SegReg::Fs), (4, SegReg::Gs), (8, SegReg::Ds), (16, SegReg::Ss)];
    for (bit, register) in registers.into_iter().chain([(32, SegReg::Es)]) {
        if habits & bit != 0 {
            let segment = state.segment_mut(register);
            segment.base = bytes.number() & 0xffff_ffff;
            segment.limit = (bytes.number() as u32).wrapping_neg().wrapping_sub(1);
            // No stack that could not be loaded.
            let odd = if register == SegReg::Ss { 4 } else { 6 };
            segment.access.toggle(Access::from_bits_retain(u32::from(bytes.byte() & odd)));
        }
    }
    if habits & 64 != 0 {
        state.segment_mut(SegReg::Ss).access.toggle(Access::BIG);
    }
    if habits & 128 != 0 {
        // The same code, in a segment that begins somewhere before it.
        let base = bytes.number() % state.rip.saturating_add(1);
        state.segment_mut(SegReg::Cs).base = base;
        state.rip -= base;
    }
}

/// The sane part of the GDT; what follows comes from the input.
const DESCRIPTORS: [u64; 10] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x000f_9b00_0000_ffff,
    0x000f_fb00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00af_fb00_0000_ffff,
];

/// Page tables for every mode: most pages as they are, some as the input wants them.
fn tables(machine: &TestMachine, bytes: &mut Bytes<'_>) {
    let put = |at: u64, value: u64| machine.put(at, &value.to_le_bytes());
    let put32 = |at: u64, value: u64| machine.put(at, &(value as u32).to_le_bytes());
    put(TABLES, (TABLES + 0x1000) | 0x67);
    put(TABLES + 0xff8, (TABLES + 0x1000) | 0x67);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 0x67);
    put(TABLES + 0x1ff8, (TABLES + 0x2000) | 0x67);
    put(TABLES + 0x2000, LAST_LEVEL | 0x67);
    put(TABLES + 0x2008, 0x20_00e7);
    put(TABLES + 0x6000, (TABLES + 0x2000) | 1);
    put32(TABLES + 0x4000, LAST_LEVEL_32 | 0x67);
    let entries = (0..512_u64).map(|page| page << 12 | 0x67);
    machine.put(LAST_LEVEL, &entries.clone().flat_map(u64::to_le_bytes).collect::<Vec<_>>());
    machine.put(
        LAST_LEVEL_32,
        &entries.flat_map(|entry| (entry as u32).to_le_bytes()).collect::<Vec<_>>(),
    );
    for _ in 0..bytes.byte() & 15 {
        let index = u64::from(bytes.byte());
        let entry = bytes.number();
        // Upper levels now and then.
        let table = if index & 0xc0 == 0xc0 { TABLES + (index & 7) * 0x1000 } else { LAST_LEVEL };
        put(table + (index & 0x3f) * 8, entry);
        put32(LAST_LEVEL_32 + (index & 0x3f) * 4, entry);
    }
}

/// A GDT, an IDT for each kind of gate, and a task state.
fn descriptors(machine: &TestMachine, long: bool, protected: bool, rest: &[u8]) {
    for (number, raw) in DESCRIPTORS.iter().enumerate() {
        machine.put(GDT + number as u64 * 8, &raw.to_le_bytes());
    }
    let own = &rest[..rest.len().min(0x100)];
    machine.put(GDT + 0x80, own);
    for vector in 0..256 {
        let target = HANDLER + vector % 8;
        // A few gates are the input's.
        let raw = rest
            .get(vector as usize..)
            .and_then(<[u8]>::first_chunk)
            .copied()
            .map_or(0, u64::from_le_bytes);
        let strange = vector % 16 == 5;
        if long {
            let gate = target & 0xffff | 0x10 << 16 | 0xee00 << 32 | (target >> 16) << 48;
            machine.put(IDT + vector * 16, &(if strange { raw } else { gate }).to_le_bytes());
        } else if protected {
            let gate = target & 0xffff | 0x38 << 16 | 0xee00 << 32;
            machine.put(IDT + vector * 8, &(if strange { raw } else { gate }).to_le_bytes());
        } else {
            machine.put(vector * 4, &(target as u32).to_le_bytes());
        }
    }
    machine.put(TSS, own);
    // Stacks for the rings, as a 32-bit and as a 64-bit task state has them.
    machine.put(TSS + 4, &0x9f00_u64.to_le_bytes());
    machine.put(TSS + 8, &0x18_u32.to_le_bytes());
    if long {
        machine.put(TSS + 4, &0x9f00_u64.to_le_bytes());
    }
    machine.put(TSS + 0x66, &0x68_u16.to_le_bytes());
}

/// Runs the input as a guest: a header for state, then code.
pub fn fuzz_interpreter(data: &[u8]) {
    let (mut machine, habits) = guest(Bytes(data));
    run(&mut machine, habits);
    assert_eq!(machine.vcpu.state.gpr[16..], [0; 16], "registers that do not exist were written");
    assert!(machine.vcpu.state.rflags.contains(RFlags::FIXED));
}

/// The same, with all 64- and 32-bit code translated.
pub fn fuzz_translator(data: &[u8]) {
    let (machine, habits) = guest(Bytes(data));
    let mut machine = machine.translating(0);
    if habits & 4 != 0 {
        machine = machine.ordering(&Workshop::default().prompt());
    }
    run(&mut machine, habits);
    assert_eq!(machine.vcpu.state.gpr[16..], [0; 16], "registers that do not exist were written");
    assert!(machine.vcpu.state.rflags.contains(RFlags::FIXED));
}

/// The same, with the interpreter checking what the translator does.
pub fn fuzz_lockstep(data: &[u8]) {
    let (machine, habits) = guest(Bytes(data));
    run(&mut machine.in_lockstep(), habits);
}

/// The guest that the input describes, and how to run it.
fn guest(mut bytes: Bytes<'_>) -> (TestMachine, u8) {
    let mut machine = TestMachine::new();
    mode(&mut machine.vcpu.state, &mut bytes);
    let state = &mut machine.vcpu.state;
    for register in &mut state.gpr[..16] {
        *register = bytes.number();
    }
    if state.code_size() != CodeSize::Bits64 {
        state.gpr[..16].iter_mut().for_each(|register| *register &= 0xffff_ffff);
    }
    let [place, habits] = bytes.take();
    let start = CODE + u64::from(place);
    state.rip = start;
    if state.code_size() != CodeSize::Bits64 {
        move_segments(state, habits, &mut bytes);
    }
    let (long, protected) = (state.long_mode(), state.protected_mode());
    tables(&machine, &mut bytes);
    let code = &bytes.0[..bytes.0.len().min(512)];
    descriptors(&machine, long, protected, code);
    machine.put(start, code);
    machine.put(HANDLER, &code[code.len() / 2..]);
    machine.put(0x8000, code);
    for i in 0..4 {
        machine.vcpu.mmu.pdpte[i] = if i == 0 { (TABLES + 0x2000) | 1 } else { 0 };
    }
    machine.vcpu.state_changed();
    (machine, habits)
}

fn run(machine: &mut TestMachine, habits: u8) {
    for step in 0..STEPS {
        let vcpu = &mut machine.vcpu;
        let exit = if step & 1 == usize::from(habits & 1) {
            vcpu.single_step()
        } else {
            vcpu.run_one_block()
        };
        match exit {
            None | Some(Exit::Stopped | Exit::Attention) => {}
            Some(Exit::Halt) => vcpu.handle().raise(Event::NMI),
            // No verifier is asked for here: what it finds ends a build with assertions.
            Some(Exit::Shutdown | Exit::Failed) => return,
            Some(Exit::Diverged) => panic!("{}", vcpu.divergence().unwrap_or_default()),
        }
        if habits & 2 != 0 && step % 16 == 7 {
            vcpu.handle().raise(Event::FLUSH_TLB | Event::INTERRUPT);
        }
        let mut log = machine.devices.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        log.clear();
    }
}

/// Decodes the input in each code size, at each of some offsets, without running it.
pub fn fuzz_decoder(data: &[u8]) {
    let data = &data[..data.len().min(256)];
    for size in 0..4 {
        let mut machine = TestMachine::new();
        mode(&mut machine.vcpu.state, &mut Bytes(&[size]));
        if size == 3 {
            tables(&machine, &mut Bytes(&[]));
        }
        machine.put(CODE, data);
        machine.vcpu.state_changed();
        for start in (0..data.len()).step_by(7) {
            let rip = CODE + start as u64;
            machine.vcpu.state.rip = rip;
            machine.vcpu.with_blocks(|vcpu, blocks| decode(vcpu, blocks, rip));
        }
    }
}

/// Decodes the block at RIP, which is `rip`, and checks that it hangs together.
fn decode(vcpu: &mut Vcpu, blocks: &mut BlockCache, rip: u64) {
    let ops = match vcpu.find_block(blocks) {
        Ok((_, ops)) => ops,
        Err(Abort::Fault) => return,
        Err(other) => panic!("decoding ended in {other:?}"),
    };
    assert!(!ops.is_empty(), "an empty block at {rip:#x}");
    let mut expected = rip;
    for op in ops {
        assert!(op.len <= 15 && op.rip == expected, "{:#x} follows, not {expected:#x}", op.rip);
        assert!(
            op.base < 32 && op.index < 32 && op.seg < 8,
            "operands of {:#x} do not exist",
            op.rip
        );
        expected = op.next_rip();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_reach_every_mode() {
        let mut modes = std::collections::BTreeSet::new();
        for kind in 0..0x20_u8 {
            for cr0 in [0, 0x40] {
                let header = [kind, cr0, 0, 0];
                // Registers, place, habits, no strange page; `mov al, 5ah`.
                let input = [&header[..], &[0; 16], &[0x10, 0], &[0], &[0xb0, 0x5a]].concat();
                let (mut machine, _) = guest(Bytes(&input));
                assert_eq!(machine.vcpu.single_step(), None);
                let state = &machine.vcpu.state;
                assert_eq!((state.gpr[0], state.rip), (0x5a, CODE + 0x12), "{header:x?}");
                let paging = format!("{:?}", machine.vcpu.mmu.mode);
                modes.insert((
                    state.code_size() as u8,
                    state.protected_mode(),
                    state.cpl(),
                    paging,
                ));
            }
        }
        // Real; 16- and 32-bit code in two rings under each kind of paging; 64-bit code.
        assert_eq!(modes.len(), 1 + 2 * 2 * 4 + 2, "{modes:?}");
    }
}
