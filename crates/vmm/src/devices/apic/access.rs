//! How the guest reaches the local APIC's registers: the xAPIC's page of memory and the
//! x2APIC's MSRs. Called on the vCPU's own thread.

use std::sync::atomic::Ordering::SeqCst;

use super::base::ApicMode;
use super::icr::{ICR_LOW_VALID, Icr};
use super::local::{ApicError, Effect, FIRST_VECTOR, LocalApic, SVR_ENABLED};
use super::message::{DeliveryMode, Destination, InterruptMessage, Trigger};
use super::register::{LVT_ENTRIES, LVT_MASKED, Register};
use crate::clock::host_tsc;

/// Integrated APIC, six vector-table entries, no EOI-broadcast suppression.
const VERSION: u32 = 0x14 | (LVT_ENTRIES as u32 - 1) << 16;
/// The first x2APIC MSR.
const X2APIC_BASE: u32 = 0x800;

/// The MSR does not exist, or not with this value: `#GP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl LocalApic {
    fn read(&self, register: Register) -> u32 {
        let load = |cell: &std::sync::atomic::AtomicU32| cell.load(SeqCst);
        match register {
            Register::Id if self.mode() == ApicMode::X2apic => self.id(),
            Register::Id => self.id() << 24,
            Register::Version => VERSION,
            Register::TaskPriority => load(&self.task_priority),
            Register::ProcessorPriority => load(&self.processor_priority),
            Register::LogicalDestination => load(&self.logical_destination),
            Register::DestinationFormat => load(&self.destination_format),
            Register::SpuriousVector => load(&self.spurious),
            Register::InService(index) => self.in_service.show(index),
            Register::TriggerMode(index) => self.level.show(index),
            Register::Requested(index) => self.requested.show(index),
            Register::ErrorStatus => load(&self.error_status),
            Register::CommandLow => load(&self.command_low),
            Register::CommandHigh => load(&self.command_high),
            Register::Lvt(entry) => self.lvt_entry(entry),
            Register::InitialCount => self.read_timer(|timer, _| timer.initial_count()),
            Register::CurrentCount => self.read_timer(|timer, now| timer.current_count(now)),
            Register::DivideConfiguration => {
                self.read_timer(|timer, _| timer.divide_configuration())
            }
            Register::EndOfInterrupt | Register::SelfIpi => 0,
        }
    }

    fn write(&self, register: Register, value: u32) -> Effect {
        match register {
            Register::TaskPriority => self.set_task_priority(value as u8),
            Register::EndOfInterrupt => return self.end_of_interrupt(),
            Register::LogicalDestination => {
                self.logical_destination.store(value & 0xff00_0000, SeqCst)
            }
            Register::DestinationFormat => {
                self.destination_format.store(value | 0x0fff_ffff, SeqCst)
            }
            Register::SpuriousVector => self.write_spurious(value),
            Register::ErrorStatus => self.error_status.store(self.errors.swap(0, SeqCst), SeqCst),
            Register::CommandLow => {
                self.command_low.store(value & ICR_LOW_VALID, SeqCst);
                return self.send(Icr::xapic(value, self.command_high.load(SeqCst)));
            }
            Register::CommandHigh => self.command_high.store(value & 0xff00_0000, SeqCst),
            Register::Lvt(entry) => self.set_lvt_entry(entry, value),
            Register::InitialCount => {
                self.with_timer(|timer| timer.set_initial_count(value, host_tsc()))
            }
            Register::DivideConfiguration => {
                self.with_timer(|timer| timer.set_divide_configuration(value, host_tsc()));
            }
            Register::SelfIpi => return self.self_ipi(value as u8),
            Register::Id
            | Register::Version
            | Register::ProcessorPriority
            | Register::InService(_)
            | Register::TriggerMode(_)
            | Register::Requested(_)
            | Register::CurrentCount => {}
        }
        Effect::None
    }

    /// Disabling by software masks the whole vector table (SDM vol. 3, 11.4.7.2).
    fn write_spurious(&self, value: u32) {
        self.spurious.store(value & 0x3ff, SeqCst);
        if value & SVR_ENABLED == 0 {
            for entry in &self.lvt {
                entry.fetch_or(LVT_MASKED, SeqCst);
            }
        }
    }

    fn send(&self, icr: Icr) -> Effect {
        if icr.mode().has_vector() && icr.vector() < FIRST_VECTOR {
            self.error(ApicError::SendIllegalVector);
            return Effect::None;
        }
        if icr.is_init_deassert() || icr.mode() == DeliveryMode::Reserved {
            return Effect::None;
        }
        Effect::Send(icr.into())
    }

    fn self_ipi(&self, vector: u8) -> Effect {
        if vector < FIRST_VECTOR {
            self.error(ApicError::SendIllegalVector);
            return Effect::None;
        }
        Effect::Send(InterruptMessage {
            destination: Destination::Oneself,
            mode: DeliveryMode::Fixed,
            vector,
            trigger: Trigger::Edge,
        })
    }

    /// A load from the register page: `offset` is within it. Registers are 32 bits wide
    /// at multiples of 16; what lies between reads as zero. `false`: there is no page now.
    #[must_use]
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) -> bool {
        if self.mode() != ApicMode::Xapic {
            return false;
        }
        data.fill(0);
        let offset = offset as u16;
        let within = usize::from(offset & 0xf);
        let Some(register) = Register::at(offset & 0xff0).filter(|register| register.in_xapic())
        else {
            self.error(ApicError::IllegalRegister);
            return true;
        };
        let bytes = self.read(register).to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes.iter().skip(within)) {
            *to = *from;
        }
        true
    }

    /// A store to the register page. Only whole registers can be written.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Option<Effect> {
        if self.mode() != ApicMode::Xapic {
            return None;
        }
        let offset = offset as u16;
        let value = match data.first_chunk() {
            Some(bytes) if offset & 0xf == 0 => u32::from_le_bytes(*bytes),
            _ => return Some(Effect::None),
        };
        let Some(register) = Register::at(offset).filter(|register| register.in_xapic()) else {
            self.error(ApicError::IllegalRegister);
            return Some(Effect::None);
        };
        Some(self.write(register, value))
    }

    fn x2apic_register(&self, msr: u32) -> Result<Register, Refused> {
        if self.mode() != ApicMode::X2apic {
            return Err(Refused);
        }
        let index = msr.wrapping_sub(X2APIC_BASE);
        let offset = u16::try_from(index).ok().filter(|index| *index < 0x100).ok_or(Refused)? << 4;
        Register::at(offset).ok_or(Refused)
    }

    /// `rdmsr` of an x2APIC register.
    ///
    /// # Errors
    /// [`Refused`] outside x2APIC mode, and for registers that are reserved or write-only.
    pub fn x2apic_read(&self, msr: u32) -> Result<u64, Refused> {
        let register = self.x2apic_register(msr)?;
        if !register.x2apic_readable() {
            return Err(Refused);
        }
        let low = u64::from(self.read(register));
        let high =
            if register == Register::CommandLow { self.command_high.load(SeqCst) } else { 0 };
        Ok(low | u64::from(high) << 32)
    }

    /// `wrmsr` of an x2APIC register.
    ///
    /// # Errors
    /// [`Refused`] outside x2APIC mode, for registers that are reserved or read-only,
    /// and for reserved bits.
    pub fn x2apic_write(&self, msr: u32, value: u64) -> Result<Effect, Refused> {
        let register = self.x2apic_register(msr)?;
        let valid = register.x2apic_writable().ok_or(Refused)?;
        let (low, high) = (value as u32, (value >> 32) as u32);
        if low & !valid != 0 || high != 0 && register != Register::CommandLow {
            return Err(Refused);
        }
        if register == Register::CommandLow {
            self.command_low.store(low, SeqCst);
            self.command_high.store(high, SeqCst);
            return Ok(self.send(Icr::x2apic(value)));
        }
        Ok(self.write(register, low))
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
