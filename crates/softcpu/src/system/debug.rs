//! Debug registers, breakpoints and single step.
//!
//! Source: SDM vol. 3, chapter 17. While DR7 enables anything the run loop executes one
//! instruction at a time: it asks [`Vcpu::check_code_breakpoint`] before, and
//! [`Vcpu::after_step`] after each. Data accesses are reported by the slow path of
//! memory access, which is the only path then, because nothing is cached.

use crate::decode::op::{Op, OpFlags};
use crate::exception::Exception;
use crate::mmu::Access;
use crate::state::control::Cr4;
use crate::state::rflags::RFlags;
use crate::state::{DR6_FIXED, DR7_FIXED};
use crate::vcpu::{Shadow, Step, Vcpu};

/// DR6.BD: a debug register was used while DR7.GD was set.
const DR6_ACCESS_DETECTED: u64 = 1 << 13;
/// DR6.BS: single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR6 bits that can be written.
const DR6_WRITABLE: u64 = 0xe00f;
/// DR7.GD.
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// DR7: local and global enable of the four breakpoints.
const DR7_ENABLES: u64 = 0xff;
/// DR7 bits that can be written: enables, LE, GE, GD and the conditions.
const DR7_WRITABLE: u64 = 0xffff_23ff;

/// What a breakpoint waits for (DR7.R/W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Io,
    ReadWrite,
}

#[derive(Clone, Copy, Debug)]
struct Breakpoint {
    /// Its bit in DR6.
    bit: u64,
    condition: Condition,
    start: u64,
    len: u64,
}

impl Breakpoint {
    fn touches(&self, addr: u64, len: u64) -> bool {
        addr.wrapping_sub(self.start) < self.len || self.start.wrapping_sub(addr) < len
    }
}

impl Vcpu {
    /// Whether DR7 enables any breakpoint.
    #[inline(always)]
    pub(crate) fn debug_active(&self) -> bool {
        self.state.dr7 & DR7_ENABLES != 0
    }

    /// Whether data accesses must be reported to [`Vcpu::note_data_access`]; they must
    /// not be answered from the TLB then.
    #[inline]
    pub(crate) fn data_breakpoints_active(&self) -> bool {
        self.debug_active() && self.breakpoints().any(|point| point.condition != Condition::Execute)
    }

    /// The enabled breakpoints.
    fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> {
        let (dr, dr7) = (self.state.dr, self.state.dr7);
        (0_u32..4).zip(dr).filter_map(move |(index, addr)| {
            let enabled = dr7 >> index.wrapping_mul(2) & 3 != 0;
            let fields = dr7 >> 16_u32.wrapping_add(index.wrapping_mul(4));
            let condition = match fields & 3 {
                0 => Condition::Execute,
                1 => Condition::Write,
                2 => Condition::Io,
                _ => Condition::ReadWrite,
            };
            let len = match fields >> 2 & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            // The low bits of the address are ignored as far as the length says.
            let start = addr & !u64::wrapping_sub(len, 1);
            enabled.then_some(Breakpoint { bit: 1 << index, condition, start, len })
        })
    }

    /// Raises `#DB` if an instruction breakpoint is set on the instruction at `rip` (RFLAGS.RF
    /// holds that off once), or if the one before it still owes a single-step trap.
    ///
    /// An instruction behind `mov ss` is no exception: AMD's processors, whose name CPUID
    /// gives, stop there. What the `mov ss` itself hit is reported along with it.
    ///
    /// # Errors
    /// [`Abort::Fault`](crate::vcpu::Abort::Fault) with the exception recorded.
    pub(crate) fn check_code_breakpoint(&mut self, rip: u64) -> Step {
        if std::mem::take(&mut self.system.step_due) {
            return Err(self.raise(Exception::debug(DR6_SINGLE_STEP)));
        }
        if self.state.rflags.contains(RFlags::RF) {
            self.state.rflags.remove(RFlags::RF);
            return Ok(());
        }
        if !self.debug_active() {
            return Ok(());
        }
        let base = if self.state.code_size() == crate::state::CodeSize::Bits64 {
            0
        } else {
            self.state.segment(crate::state::segment::SegReg::Cs).base
        };
        let linear = self.wrap_linear(base.wrapping_add(rip));
        let hits = self
            .breakpoints()
            .filter(|point| point.condition == Condition::Execute && point.start == linear)
            .fold(0, |bits, point| bits | point.bit);
        if hits == 0 {
            return Ok(());
        }
        let put_off = std::mem::take(&mut self.system.data_breakpoints);
        Err(self.raise(Exception::debug(hits | put_off)))
    }

    /// A load or store of `len` bytes at linear address `addr` is about to happen. What it
    /// hits is reported after the instruction: data breakpoints are traps.
    pub(crate) fn note_data_access(&mut self, addr: u64, len: u64, access: Access) {
        let hits = self
            .breakpoints()
            .filter(|point| match point.condition {
                Condition::ReadWrite => access != Access::Fetch,
                Condition::Write => access == Access::Write,
                Condition::Execute | Condition::Io => false,
            })
            .filter(|point| point.touches(addr, len))
            .fold(0, |bits, point| bits | point.bit);
        self.system.data_breakpoints |= hits;
    }

    /// The same for ports, with CR4.DE.
    pub(crate) fn note_port_access(&mut self, port: u16, len: u64) {
        if !self.debug_active() || !self.state.cr4.contains(Cr4::DE) {
            return;
        }
        let hits = self
            .breakpoints()
            .filter(|point| point.condition == Condition::Io && point.touches(u64::from(port), len))
            .fold(0, |bits, point| bits | point.bit);
        self.system.data_breakpoints |= hits;
    }

    /// The traps due after an instruction that completed: data breakpoints it hit, and the
    /// single-step trap if TF was set when it began (`stepping`). RIP is past it.
    ///
    /// # Errors
    /// [`Abort::Fault`](crate::vcpu::Abort::Fault) with the `#DB` recorded.
    pub(crate) fn after_step(&mut self, stepping: bool) -> Step {
        let quiet = std::mem::take(&mut self.system.step_inhibited);
        if self.shadow == Shadow::MovSs {
            return Ok(());
        }
        let mut bits = std::mem::take(&mut self.system.data_breakpoints);
        if stepping && !quiet {
            bits |= DR6_SINGLE_STEP;
        }
        if bits == 0 { Ok(()) } else { Err(self.raise(Exception::debug(bits))) }
    }

    /// The checks every access to a debug register passes. DR4 and DR5 are DR6 and DR7
    /// unless CR4.DE makes them undefined.
    fn debug_register(&mut self, number: u8) -> Result<u8, crate::vcpu::Abort> {
        let alias = matches!(number, 4 | 5);
        if number > 7 || alias && self.state.cr4.contains(Cr4::DE) {
            return Err(self.ud());
        }
        self.require_cpl0()?;
        if self.state.dr7 & DR7_GENERAL_DETECT != 0 {
            return Err(self.raise(Exception::debug(DR6_ACCESS_DETECTED)));
        }
        Ok(if alias { number.wrapping_add(2) } else { number })
    }
}

/// `mov r, drN`.
pub(crate) fn mov_from_dr(cpu: &mut Vcpu, op: &Op) -> Step {
    let number = cpu.debug_register(op.src)?;
    let value = match number {
        6 => cpu.state.dr6,
        7 => cpu.state.dr7,
        _ => cpu.state.dr.get(usize::from(number)).copied().unwrap_or(0),
    };
    let long = op.flags.contains(OpFlags::LONG);
    *cpu.state.gpr_slot_mut(op.dst) = if long { value } else { value & 0xffff_ffff };
    Ok(())
}

/// `mov drN, r`.
pub(crate) fn mov_to_dr(cpu: &mut Vcpu, op: &Op) -> Step {
    let number = cpu.debug_register(op.dst)?;
    let long = op.flags.contains(OpFlags::LONG);
    let value = cpu.state.gpr_slot(op.src);
    let value = if long { value } else { value & 0xffff_ffff };
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    match number {
        6 => cpu.state.dr6 = value & DR6_WRITABLE | DR6_FIXED,
        7 => cpu.state.dr7 = value & DR7_WRITABLE | DR7_FIXED,
        _ => {
            if let Some(slot) = cpu.state.dr.get_mut(usize::from(number)) {
                *slot = value;
            }
        }
    }
    // From here on accesses must (or need no longer) be seen one by one.
    cpu.mmu.flush_all();
    cpu.end_block(op)
}
