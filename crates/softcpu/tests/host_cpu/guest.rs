//! The same stretch of addresses in a guest, and one step of its CPU.

use std::sync::{Arc, Mutex, PoisonError};

use softcpu::state::VcpuState;
use softcpu::state::control::{Cr0, Cr4, Efer};
use softcpu::state::segment::{DescriptorTable, SegReg, Segment};
use softcpu::testing::TestMachine;
use softcpu::trace::{Event, Tracer};
use softcpu::translate::{Config, Workshop};
use softcpu::{Exception, Exit};

use crate::layout::{AREA, CODE, CODE_LEN, DATA, DATA_LEN, GDT, LDT, Mode, segment};
use crate::oracle::{End, Placed};

/// Where [`AREA`] is in guest-physical memory.
const PHYSICAL: u64 = 0x10_0000;
/// Where the descriptor tables are, in linear addresses too.
const DESCRIPTORS: u64 = 0x20_0000;
/// Page tables: four levels, then the two of 32-bit paging.
const TABLES: u64 = 0x30_0000;
/// The task state segment.
const TASK: u64 = DESCRIPTORS + 0x400;
const LEGACY: u64 = TABLES + 0x5000;
/// Page tables for [`elsewhere`].
const ELSEWHERE: u64 = TABLES + 0x9000;

/// How far from where it is code can be found too, with the data around it: `n` is any number.
pub(crate) fn elsewhere(n: u64) -> u64 {
    ((1 + n % 200) << 39) + ((n % 32) << 21)
}

/// The state at the first exception since it was last looked.
type Raised = Arc<Mutex<Option<(Exception, Box<VcpuState>)>>>;

/// `jmp $`: where translated code ends up, and looks for events.
const STAY: [u8; 2] = [0xeb, 0xfe];

/// The interpreter's side of the comparison, or the translator's.
pub(crate) struct Guest {
    machine: TestMachine,
    raised: Raised,
    memory: Vec<u8>,
    translates: bool,
}

/// How a row came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowEnd {
    /// It came to its end.
    Reached,
    /// A fault of this vector.
    Fault(u8),
    /// It still runs.
    Runs,
}

struct Watch(Raised);

impl Tracer for Watch {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Exception { state, exception } = event {
            let mut raised = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // What follows the first is its delivery failing: there is no IDT.
            raised.get_or_insert_with(|| (exception, Box::new(state.clone())));
        }
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut machine = TestMachine::long_mode();
        let put = |at: u64, value: u64| machine.put(at, &value.to_le_bytes());
        let (l3, l2, l1, low) =
            (TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000, TABLES + 0x4000);
        put(TABLES, l3 | 0x67);
        put(l3, l2 | 0x67);
        put(l2 + (AREA >> 21) * 8, l1 | 0x67);
        put(l2 + (DESCRIPTORS >> 21) * 8, low | 0x67);
        let legacy = |at: u64, value: u64| machine.put(at, &(value as u32).to_le_bytes());
        let (l1_32, low_32) = (LEGACY + 0x1000, LEGACY + 0x2000);
        legacy(LEGACY + (AREA >> 22) * 4, l1_32 | 0x67);
        legacy(LEGACY + (DESCRIPTORS >> 22) * 4, low_32 | 0x67);
        for start in [CODE..CODE + CODE_LEN as u64, DATA..DATA + DATA_LEN as u64] {
            for page in start.step_by(0x1000) {
                let entry = (page - AREA + PHYSICAL) | 0x67;
                put(l1 + (page >> 12 & 511) * 8, entry);
                legacy(l1_32 + (page >> 12 & 1023) * 4, entry);
            }
        }
        put(ELSEWHERE, (ELSEWHERE + 0x1000) | 0x67);
        for n in 0..32 {
            put(ELSEWHERE + 0x1000 + ((AREA >> 21) + n) * 8, l1 | 0x67);
        }
        for n in 1..=200 {
            put(TABLES + n * 8, ELSEWHERE | 0x67);
        }
        // Not for user mode.
        put(low + (DESCRIPTORS >> 12 & 511) * 8, DESCRIPTORS | 0x63);
        legacy(low_32 + (DESCRIPTORS >> 12 & 1023) * 4, DESCRIPTORS | 0x63);
        // A task state whose I/O permission bitmap is beyond its limit.
        machine.put(TASK + 0x66, &0x68_u16.to_le_bytes());
        for (number, raw) in GDT.iter().enumerate() {
            put(DESCRIPTORS + number as u64 * 8, *raw);
        }
        for (number, raw) in LDT.iter().enumerate() {
            put(DESCRIPTORS + 0x800 + number as u64 * 8, *raw);
        }
        let raised = Raised::default();
        machine.vcpu.set_tracer(Some(Box::new(Watch(Arc::clone(&raised)))));
        Self { machine, raised, memory: vec![0; DATA_LEN], translates: false }
    }

    /// The same with all code translated.
    pub(crate) fn translating() -> Self {
        Self::translating_as(0, Config::default())
    }

    /// The same with code translated that has run so often, by a translator with
    /// this configuration.
    pub(crate) fn translating_as(runs: u32, config: Config) -> Self {
        let Self { machine, raised, memory, .. } = Self::new();
        Self { machine: machine.translating_as(runs, config), raised, memory, translates: true }
    }

    /// The same, with all of it translated by somebody else.
    pub(crate) fn ordering(self) -> Self {
        Self { machine: self.machine.ordering(&Workshop::default().prompt()), ..self }
    }

    /// The same in lockstep.
    pub(crate) fn in_lockstep() -> Self {
        let Self { machine, raised, memory, .. } = Self::new();
        let mut machine = machine.in_lockstep();
        machine.vcpu.set_tracer(Some(Box::new(Watch(Arc::clone(&raised)))));
        Self { machine, raised, memory, translates: true }
    }

    /// What lockstep did.
    pub(crate) fn lockstep_counters(&self) -> softcpu::lockstep::Counters {
        self.machine.vcpu.lockstep_counters().unwrap_or_default()
    }

    /// What the translator did.
    pub(crate) fn counters(&self) -> softcpu::translate::Counters {
        self.machine.vcpu.translator_counters().unwrap_or_default()
    }

    /// What the guest's CPU has of state that no comparison varies.
    pub(crate) fn state(&self, mode: Mode) -> VcpuState {
        let mut state = self.machine.vcpu.state.clone();
        state.cr3 = TABLES;
        state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
        state.cr4 =
            Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE | Cr4::UMIP;
        state.efer = Efer::LME | Efer::LMA | Efer::SCE;
        state.gdtr = DescriptorTable { base: DESCRIPTORS, limit: (GDT.len() * 8 - 1) as u16 };
        state.idtr = DescriptorTable { base: 0, limit: 0 };
        state.ldtr =
            Segment::from_descriptor(8 * 8, 0x0000_8200_0000_0000 | (LDT.len() as u64 * 8 - 1));
        state.ldtr.base = DESCRIPTORS + 0x800;
        state.tr = Segment::from_descriptor(8 * 8, 0x0000_8b00_0000_0067);
        state.tr.base = TASK;
        let registers = [SegReg::Es, SegReg::Cs, SegReg::Ss, SegReg::Ds];
        for (register, selector) in registers.into_iter().zip(mode.selectors()) {
            *state.segment_mut(register) = segment(selector);
        }
        for register in [SegReg::Fs, SegReg::Gs] {
            *state.segment_mut(register) = Segment::null(0);
        }
        state
    }

    /// Leaves long mode for legacy protected mode with 32-bit paging, which 32- and
    /// 16-bit code cannot tell from compatibility mode.
    pub(crate) fn legacy(state: &mut VcpuState) {
        state.efer = Efer::empty();
        state.cr4 -= Cr4::PAE;
        state.cr3 = LEGACY;
    }

    pub(crate) fn put_data(&mut self, data: &[u8; DATA_LEN]) {
        self.machine.put(DATA - AREA + PHYSICAL, data);
    }

    pub(crate) fn data(&mut self) -> &[u8] {
        let at = softcpu::GuestPhysAddr(DATA - AREA + PHYSICAL);
        assert!(self.machine.memory.read(at, &mut self.memory));
        &self.memory
    }

    /// Makes all memory for code zero.
    pub(crate) fn clear_code(&mut self) {
        self.machine.put(CODE - AREA + PHYSICAL, &[0; CODE_LEN]);
    }

    /// Puts a row of instructions, and behind it where it is to end.
    pub(crate) fn put_row(&mut self, offset: u64, bytes: &[u8]) {
        let start = CODE + offset - AREA + PHYSICAL;
        self.machine.put(start, bytes);
        self.machine.put(start + bytes.len() as u64, &STAY);
    }

    /// Whether the row is as it was put there.
    pub(crate) fn has_row(&self, offset: u64, bytes: &[u8]) -> bool {
        let at = softcpu::GuestPhysAddr(CODE + offset - AREA + PHYSICAL);
        let mut row = vec![0; bytes.len()];
        assert!(self.machine.memory.read(at, &mut row));
        row == bytes
    }

    /// Runs a row of `len` bytes, which RIP has at `start`, to its end or to the first fault,
    /// or gives up after `most` blocks.
    pub(crate) fn run_row(
        &mut self,
        start: u64,
        len: usize,
        state: &mut VcpuState,
        most: usize,
    ) -> RowEnd {
        let end = start + len as u64;
        state.rip = start;
        let vcpu = &mut self.machine.vcpu;
        vcpu.state = state.clone();
        vcpu.state_changed();
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).take();
        for _ in 0..most {
            match vcpu.run_one_block() {
                Some(Exit::Diverged) => panic!("{}", vcpu.divergence().unwrap_or_default()),
                Some(Exit::Failed) => panic!("{}", vcpu.failure().expect("it says why")),
                _ => {}
            }
            let raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((exception, at)) = raised {
                *state = *at;
                return RowEnd::Fault(exception.vector as u8);
            }
            if vcpu.state.rip == end {
                *state = vcpu.state.clone();
                return RowEnd::Reached;
            }
        }
        *state = vcpu.state.clone();
        RowEnd::Runs
    }

    /// Runs `bytes` on `state`, as [`Oracle::run`](crate::oracle::Oracle::run) does.
    /// `None`: it ended up where no landing pad is.
    pub(crate) fn run(
        &mut self,
        placed: Placed,
        bytes: &[u8],
        state: &mut VcpuState,
    ) -> Option<End> {
        let vcpu = &mut self.machine.vcpu;
        assert!(vcpu.state.gpr[16] == 0);
        let code = CODE - placed.mode.base();
        let start = code + placed.offset;
        state.rip = start;
        vcpu.state = state.clone();
        self.machine.put(CODE - AREA + PHYSICAL + placed.offset, bytes);
        if self.translates {
            let next = placed.offset + bytes.len() as u64;
            for at in [next, placed.target] {
                self.machine.put(CODE - AREA + PHYSICAL + at, &STAY);
            }
        }
        let vcpu = &mut self.machine.vcpu;
        vcpu.state_changed();
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut end = None;
        // A repeated instruction may come back several times.
        for _ in 0..64 {
            if self.translates {
                vcpu.run_one_block();
            } else {
                vcpu.single_step();
            }
            let raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((exception, at)) = raised {
                *state = *at;
                let code = exception.error_code.unwrap_or(0);
                end = Some(End::Fault {
                    vector: exception.vector as u8,
                    code,
                    address: exception.payload,
                });
                return if state.rip == start { end } else { None };
            }
            if vcpu.state.rip != start {
                break;
            }
        }
        *state = vcpu.state.clone();
        if state.rip == start + bytes.len() as u64 {
            end = Some(End::Next);
        } else if state.rip == code + placed.target {
            end = Some(End::Taken);
        }
        end
    }
}
