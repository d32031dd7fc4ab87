//! LGUEST_INIT: the guest introduces itself, and thereby says which band it is of.
//!
//! There never was a version number. The pointer is in EDX (V1) or EBX (later), and the
//! structure it points at was filled in by the guest's compiler in a way that tells the
//! layouts apart; the instruction that trapped tells the rest.

use std::time::{SystemTime, UNIX_EPOCH};

use lguest_abi::band::{InitialTables, RegisterOrder, Trap as CallTrap};
use lguest_abi::call::CallRegisters;
use lguest_abi::ring::Cursor;
use lguest_abi::shared_data::{IDENTIFY_BYTES, StaticFields, identify};
use lguest_abi::{Band, Paging, Phys};
use softcpu::Vcpu;

use super::shared_data::SharedData;
use super::{Death, Lguest, Session, paging};

/// How much of the top of the address space guests are asked to leave alone. Nothing is
/// there in this host; the number is the one all those kernels were run with.
const RESERVED_AT_TOP: u32 = 0x40_0000;
/// Vectors a guest may have its system calls at: behind those of interrupts.
const SYSCALL_VECTORS: std::ops::RangeInclusive<u32> = 0x40..=0xff;

impl Lguest {
    /// The guest's first hypercall.
    pub(super) fn init(
        &mut self,
        cpu: &mut Vcpu,
        registers: CallRegisters,
        trap: CallTrap,
    ) -> Result<(), Death> {
        let (band, at, fields) = self.recognise(registers, trap).ok_or(Death::UnknownAbi)?;
        if !SYSCALL_VECTORS.contains(&fields.syscall_vec) {
            return Err(Death::SyscallVector(fields.syscall_vec));
        }
        let data = SharedData::new(self.memory.clone(), at, band.layout(), band.slot_form())?;
        data.introduce(self.frequency.khz(), RESERVED_AT_TOP)?;
        data.set_time(now())?;
        let mut format = Paging::TwoLevel;
        if band.initial_tables() != InitialTables::None {
            if band.may_have_pae() && paging::calls_set_pmd(&self.memory) {
                format = Paging::Pae;
            }
            let top = self.make_first_tables(format, fields.kernel_address)?;
            data.set_pgdir(top)?;
            paging::enter(cpu, format, top)?;
        }
        tracing::info!(%band, ?format, "a guest of the lguest ABI introduces itself");
        self.session = Some(Session {
            band,
            data,
            fields,
            cursor: Cursor::default(),
            paging: format,
            on_first_tables: true,
        });
        Ok(())
    }

    fn recognise(
        &self,
        registers: CallRegisters,
        trap: CallTrap,
    ) -> Option<(Band, Phys, StaticFields)> {
        [registers.ebx, registers.edx].into_iter().find_map(|pointer| {
            let at = Phys(pointer);
            let bytes = self.memory.up_to(at, IDENTIFY_BYTES);
            let layout = identify(&bytes)?;
            let band = Band::observed(layout, trap)?;
            let first = match band.register_order() {
                RegisterOrder::DxBxCx => registers.edx,
                RegisterOrder::BxCxDx | RegisterOrder::BxCxDxSi => registers.ebx,
            };
            let fields = StaticFields::read(layout, &bytes)?;
            (first == pointer && band != Band::V0).then_some((band, at, fields))
        })
    }
}

/// The time of day.
pub(super) fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
