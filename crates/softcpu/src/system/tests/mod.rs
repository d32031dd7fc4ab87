//! System behaviour by small guests: code is put in memory, run, and ends in a `hlt`
//! of its own or in that of an exception handler, whose address tells the vector.

mod control;
mod debug;
mod events;
mod hostile;
mod io;
mod rings;
mod segments;
mod supervisor;
mod tlb;

use crate::state::control::Efer;
use crate::state::regs::Gpr;
use crate::state::segment::{DescriptorTable, SegReg, Segment};
use crate::testing::TestMachine;
use crate::vcpu::Exit;

/// Where ring-0 code goes.
const CODE: u64 = 0x1000;
/// Where ring-3 code goes.
const USER: u64 = 0x1800;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const TSS: u64 = 0x5000;
/// Handler of vector `v` at `HANDLERS + 16 * v`: a `hlt`.
const HANDLERS: u64 = 0x8000;
/// Data for tests to use.
const DATA: u64 = 0xc000;
/// Tops of stacks: ring 0's initial one, the TSS's, IST1's, ring 3's.
const STACK: u64 = 0x2_0000;
const RING0_STACK: u64 = 0x2_4000;
const IST1_STACK: u64 = 0x2_8000;
const USER_STACK: u64 = 0x3_0000;

/// Selectors of the test GDT.
mod sel {
    pub(super) const CODE32: u16 = 0x08;
    pub(super) const CODE64: u16 = 0x10;
    pub(super) const DATA: u16 = 0x18;
    pub(super) const USER_CODE32: u16 = 0x23;
    pub(super) const USER_DATA: u16 = 0x2b;
    pub(super) const USER_CODE64: u16 = 0x33;
    pub(super) const TSS: u16 = 0x38;
    pub(super) const GATE: u16 = 0x48;
    pub(super) const ABSENT: u16 = 0x58;
    pub(super) const CONFORMING: u16 = 0x60;
    pub(super) const READ_ONLY: u16 = 0x68;
    /// Data with the accessed bit clear.
    pub(super) const FRESH: u16 = 0x70;
    pub(super) const TASK_GATE: u16 = 0x78;
    /// A second, available TSS.
    pub(super) const TSS2: u16 = 0x80;
    pub(super) const EXECUTE_ONLY: u16 = 0x90;
    pub(super) const LIMIT: u16 = 0x9f;
}

const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

/// What ended a run.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The code's own `hlt`.
    Done,
    /// A handler's `hlt`, with the error code if the vector has one.
    Vector(u8, Option<u64>),
    Shutdown,
}

struct Guest {
    machine: TestMachine,
    long: bool,
}

impl Guest {
    /// 64-bit mode in ring 0.
    fn long() -> Self {
        Self::new(true)
    }

    /// 32-bit protected mode in ring 0, no paging.
    fn protected() -> Self {
        Self::new(false)
    }

    fn new(long: bool) -> Self {
        let machine = if long { TestMachine::long_mode() } else { TestMachine::protected_mode() };
        let mut guest = Self { machine, long };
        guest.fill_gdt();
        for vector in 0..=255 {
            guest.gate(vector, 0, 0);
            guest.machine.put(HANDLERS + u64::from(vector) * 16, &[0xf4]);
        }
        guest.fill_tss();
        let state = &mut guest.machine.vcpu.state;
        state.gdtr = DescriptorTable { base: GDT, limit: sel::LIMIT };
        state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        state.efer |= Efer::SCE;
        state.tr.selector = sel::TSS;
        state.tr.base = TSS;
        state.tr.limit = 0x2067;
        state.ldtr = Segment::null(0);
        let (code, raw) = if long {
            (sel::CODE64, 0x00af_9b00_0000_ffff)
        } else {
            (sel::CODE32, 0x00cf_9b00_0000_ffff)
        };
        *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(code, raw);
        state.set_reg(Gpr::Rsp, STACK);
        guest.machine.vcpu.state_changed();
        guest
    }

    fn fill_gdt(&mut self) {
        let entries: [(u16, u64); 11] = [
            (sel::CODE32, 0x00cf_9b00_0000_ffff),
            (sel::CODE64, 0x00af_9b00_0000_ffff),
            (sel::DATA, DATA_SEGMENT),
            (sel::USER_CODE32, 0x00cf_fb00_0000_ffff),
            (sel::USER_DATA, 0x00cf_f300_0000_ffff),
            (sel::USER_CODE64, 0x00af_fb00_0000_ffff),
            (sel::ABSENT, 0x00cf_1300_0000_ffff),
            (
                sel::CONFORMING,
                if self.long { 0x00af_9f00_0000_ffff } else { 0x00cf_9f00_0000_ffff },
            ),
            (sel::READ_ONLY, 0x00cf_9100_0000_ffff),
            (sel::FRESH, 0x00cf_9200_0000_ffff),
            (sel::EXECUTE_ONLY, 0x00cf_9900_0000_ffff),
        ];
        for (selector, raw) in entries {
            self.descriptor(selector, raw);
        }
        self.descriptor(sel::TASK_GATE, 0x0000_8500_0000_0000 | u64::from(sel::TSS2) << 16);
        self.descriptor(sel::TSS2, 0x0000_8900_0000_0067 | 0x6000 << 16);
    }

    fn fill_tss(&mut self) {
        if self.long {
            self.machine.put(TSS + 4, &RING0_STACK.to_le_bytes());
            self.machine.put(TSS + 0x24, &IST1_STACK.to_le_bytes());
        } else {
            self.machine.put(TSS + 4, &(RING0_STACK as u32).to_le_bytes());
            self.machine.put(TSS + 8, &sel::DATA.to_le_bytes());
        }
        // The I/O bitmap starts right behind, and lets nothing through.
        self.machine.put(TSS + 0x66, &0x68_u16.to_le_bytes());
        self.machine.put(TSS + 0x68, &[0xff; 0x2000]);
    }

    fn descriptor(&mut self, selector: u16, raw: u64) {
        self.machine.put(GDT + u64::from(selector & !7), &raw.to_le_bytes());
    }

    fn descriptor_at(&self, selector: u16) -> u64 {
        self.word(GDT + u64::from(selector & !7))
    }

    /// An interrupt gate for `vector` to its handler, with `dpl` and `ist`.
    fn gate(&mut self, vector: u8, dpl: u64, ist: u64) {
        let target = HANDLERS + u64::from(vector) * 16;
        let selector = u64::from(if self.long { sel::CODE64 } else { sel::CODE32 });
        let raw = target & 0xffff | selector << 16 | ist << 32 | (0x8e | dpl << 5) << 40;
        if self.long {
            self.machine.put(IDT + u64::from(vector) * 16, &raw.to_le_bytes());
            self.machine.put(IDT + u64::from(vector) * 16 + 8, &[0; 8]);
        } else {
            self.machine.put(IDT + u64::from(vector) * 8, &raw.to_le_bytes());
        }
    }

    /// Replaces the type byte (P, DPL, type) of a gate.
    fn gate_type(&mut self, vector: u8, byte: u8) {
        let size = if self.long { 16 } else { 8 };
        self.machine.put(IDT + u64::from(vector) * size + 5, &[byte]);
    }

    /// The handler of `vector` runs `code`.
    fn handler(&mut self, vector: u8, code: &[u8]) {
        assert!(code.len() <= 16);
        self.machine.put(HANDLERS + u64::from(vector) * 16, code);
    }

    /// The 64-bit word at `addr`.
    fn word(&self, addr: u64) -> u64 {
        u64::from_le_bytes(self.machine.get(addr, 8).try_into().unwrap())
    }

    /// The stack word `index` places above the stack pointer, of the mode's width.
    fn stack(&self, index: u64) -> u64 {
        let rsp = self.reg(Gpr::Rsp);
        if self.long {
            self.word(rsp + 8 * index)
        } else {
            self.word(rsp + 4 * index) & 0xffff_ffff
        }
    }

    fn reg(&self, reg: Gpr) -> u64 {
        self.machine.vcpu.state.reg(reg)
    }

    fn set(&mut self, reg: Gpr, value: u64) {
        self.machine.vcpu.state.set_reg(reg, value);
    }

    fn selector(&self, reg: SegReg) -> u16 {
        self.machine.vcpu.state.segment(reg).selector
    }

    /// Puts `code` where ring-0 code goes and points RIP at it.
    fn load(&mut self, code: &[u8]) {
        let mut code = code.to_vec();
        code.push(0xf4);
        self.machine.put(CODE, &code);
        self.machine.vcpu.state.rip = CODE;
    }

    /// Runs `code` in ring 0, followed by a `hlt`.
    fn run(&mut self, code: &[u8]) -> End {
        self.load(code);
        self.go()
    }

    /// Runs `code` in ring 3, in the mode's own width. An interrupt or exception ends it.
    fn run_user(&mut self, code: &[u8]) -> End {
        self.machine.put(USER, code);
        self.drop_to_ring3();
        self.go()
    }

    fn drop_to_ring3(&mut self) {
        let state = &mut self.machine.vcpu.state;
        let (code, raw) = if self.long {
            (sel::USER_CODE64, 0x00af_fb00_0000_ffff)
        } else {
            (sel::USER_CODE32, 0x00cf_fb00_0000_ffff)
        };
        *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(code, raw);
        for reg in [SegReg::Ss, SegReg::Ds, SegReg::Es] {
            *state.segment_mut(reg) =
                Segment::from_descriptor(sel::USER_DATA, 0x00cf_f300_0000_ffff);
        }
        state.set_reg(Gpr::Rsp, USER_STACK);
        state.rip = USER;
        self.machine.vcpu.state_changed();
    }

    fn go(&mut self) -> End {
        match self.machine.vcpu.run() {
            Exit::Halt => {}
            Exit::Shutdown => return End::Shutdown,
            other => panic!("unexpected {other:?}"),
        }
        let rip = self.machine.vcpu.state.rip;
        let Some(place) =
            rip.checked_sub(HANDLERS + 1).filter(|place| place % 16 == 0 && *place < 4096)
        else {
            return End::Done;
        };
        let vector = (place / 16) as u8;
        let with_code = matches!(vector, 8 | 10..=14 | 17);
        End::Vector(vector, with_code.then(|| self.stack(0)))
    }
}

/// `mov eax, value`.
fn mov_eax(value: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(value.to_le_bytes());
    code
}

/// `mov eax, selector; mov <segment register>, eax`, by the register's number.
fn load_segment(reg: SegReg, selector: u16) -> Vec<u8> {
    [mov_eax(u32::from(selector)), vec![0x8e, 0xc0 | (reg as u8) << 3]].concat()
}

const UD: End = End::Vector(6, None);

fn gp(code: u64) -> End {
    End::Vector(13, Some(code))
}

fn np(code: u64) -> End {
    End::Vector(11, Some(code))
}

fn ss(code: u64) -> End {
    End::Vector(12, Some(code))
}

fn ts(code: u64) -> End {
    End::Vector(10, Some(code))
}
