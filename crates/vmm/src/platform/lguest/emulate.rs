//! The instructions that old kernels still issue beside their hooks.
//!
//! Ports are probed, interrupts switched off by `cli` where nobody had put a hook, debug
//! registers looked at; and before a kernel has a handler for #GP, early microcode loaders
//! use MSRs and CR3. All of it is answered as by a machine without the thing: ones from
//! ports, zeroes from registers; only the ports of PCI have devices behind them. A kernel that has a handler gets the #GP for an MSR, as its
//! `rdmsr_safe` expects of an MSR that is not there.

use lguest_abi::Band;
use softcpu::Vcpu;
use softcpu::exception::Vector;
use softcpu::state::regs::Gpr;
use softcpu::state::segment::SegReg;

use super::{GuestDevices, Lguest};

/// The keyboard controller's status, and what kernels from 4.0 on are told there: output
/// buffer full, so that its probe ends.
const KEYBOARD_STATUS: u16 = 0x64;
const KEYBOARD_ANSWER: u32 = 1;
/// Configuration mechanism #1.
const PCI_PORTS: std::ops::RangeInclusive<u16> = 0xcf8..=0xcff;
const DR6: u8 = 6;

/// What of EAX a port access moves.
fn width(opcode: u8, prefix: bool) -> u32 {
    match (opcode & 1, prefix) {
        (0, _) => 0xff,
        (_, true) => 0xffff,
        (_, false) => u32::MAX,
    }
}

impl Lguest {
    /// Carries out the instruction at RIP in place of the CPU, if it is one of these.
    pub(super) fn emulate(&mut self, cpu: &mut Vcpu) -> bool {
        if cpu.state.cpl() != 1 {
            return false;
        }
        let Some(len) = self.emulate_one(cpu) else { return false };
        cpu.state.rip = cpu.state.rip.wrapping_add(len) & 0xffff_ffff;
        true
    }

    /// Returns the instruction's length.
    fn emulate_one(&mut self, cpu: &mut Vcpu) -> Option<u64> {
        let prefix = fetch(cpu, 0)? == 0x66;
        let at = u64::from(prefix);
        let opcode = fetch(cpu, at)?;
        let after = at.wrapping_add(1);
        Some(match opcode {
            // in al/ax/eax, imm8, and through dx.
            0xe4 | 0xe5 => {
                let port = fetch(cpu, after)?.into();
                self.input(cpu, port, width(opcode, prefix));
                after.wrapping_add(1)
            }
            0xec | 0xed => {
                let port = cpu.state.reg(Gpr::Rdx) as u16;
                self.input(cpu, port, width(opcode, prefix));
                after
            }
            // out: mostly to nobody.
            0xe6 | 0xe7 => {
                let port = fetch(cpu, after)?.into();
                self.output(cpu, port, width(opcode, prefix));
                after.wrapping_add(1)
            }
            0xee | 0xef => {
                let port = cpu.state.reg(Gpr::Rdx) as u16;
                self.output(cpu, port, width(opcode, prefix));
                after
            }
            // cli: kernels that mean it write to `irq_enabled`.
            0xfa => after,
            // hlt: no kernel had a hook for the last one, after which it wants nothing more.
            0xf4 => {
                let data = &self.session.as_ref()?.data;
                match data.interrupts_enabled().ok()? {
                    true => self.halted = true,
                    false => self.stopped = true,
                }
                after
            }
            0x0f => {
                let second = fetch(cpu, after)?;
                let len = after.wrapping_add(1);
                let early = self.gate(Vector::GeneralProtection as u8).is_none();
                match second {
                    // mov r32, drN and mov drN, r32.
                    0x21 => {
                        let modrm = fetch(cpu, len)?;
                        let value = if modrm >> 3 & 7 == DR6 { cpu.state.dr6 } else { 0 };
                        *cpu.state.gpr_slot_mut(modrm & 7) = value & 0xffff_ffff;
                        len.wrapping_add(1)
                    }
                    0x23 => {
                        if fetch(cpu, len)? >> 3 & 7 == DR6 {
                            cpu.state.dr6 = softcpu::state::DR6_FIXED;
                        }
                        len.wrapping_add(1)
                    }
                    // mov r32, crN: what a guest before its hooks may want to know.
                    0x20 if early => {
                        let modrm = fetch(cpu, len)?;
                        let value = match modrm >> 3 & 7 {
                            0 => cpu.state.cr0.bits(),
                            3 => cpu.state.cr3,
                            _ => 0,
                        };
                        *cpu.state.gpr_slot_mut(modrm & 7) = value & 0xffff_ffff;
                        len.wrapping_add(1)
                    }
                    // rdmsr, wrmsr.
                    0x32 if early => {
                        cpu.state.set_reg32(Gpr::Rax, 0);
                        cpu.state.set_reg32(Gpr::Rdx, 0);
                        len
                    }
                    0x30 if early => len,
                    _ => return None,
                }
            }
            _ => return None,
        })
    }

    fn input(&self, cpu: &mut Vcpu, port: u16, width: u32) {
        let newest = self.session.as_ref().is_some_and(|session| session.band == Band::V6);
        let value = match &self.devices {
            GuestDevices::Pci(bus) if PCI_PORTS.contains(&port) => {
                let mut bytes = [0; 4];
                bus.port_read(port, bytes.get_mut(..bytes_of(width)).unwrap_or_default());
                u32::from_le_bytes(bytes)
            }
            _ if newest && port == KEYBOARD_STATUS => KEYBOARD_ANSWER,
            _ => u32::MAX,
        };
        let eax = cpu.state.reg(Gpr::Rax) as u32;
        cpu.state.set_reg32(Gpr::Rax, eax & !width | value & width);
    }

    fn output(&self, cpu: &Vcpu, port: u16, width: u32) {
        let bytes = (cpu.state.reg(Gpr::Rax) as u32).to_le_bytes();
        if let GuestDevices::Pci(bus) = &self.devices
            && PCI_PORTS.contains(&port)
        {
            bus.port_write(port, bytes.get(..bytes_of(width)).unwrap_or_default());
        }
    }
}

/// How many bytes that is.
fn bytes_of(width: u32) -> usize {
    (width.count_ones() / 8) as usize
}

/// The byte `offset` behind RIP. `None` if it cannot be read, which is somebody else's fault.
fn fetch(cpu: &mut Vcpu, offset: u64) -> Option<u8> {
    let eip = cpu.state.rip.wrapping_add(offset) & 0xffff_ffff;
    let at = cpu.state.segment(SegReg::Cs).base.wrapping_add(eip) & 0xffff_ffff;
    let mut byte = [0];
    cpu.read_virtual(at, &mut byte).ok()?;
    byte.first().copied()
}
