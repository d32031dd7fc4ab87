//! The body of the 64-bit platform's fuzz target: bytes played as what a guest does.
//!
//! No guest code runs, so one input always does the same and ends: the bytes are hypercalls
//! with any registers, traps in any state, stores to the shared page, interrupts. The guest
//! of each input begins with page tables, shared data and devices as they should be, and
//! stays with what it makes of them.

use std::cell::RefCell;
use std::sync::Arc;

use lguest_abi::long::Wire;
use lguest_abi::long::entry::{KERNEL_CS, KERNEL_DS, USER_CS, USER_DS};
use lguest_abi::long::shared_data::SharedData;
use softcpu::cpuid::{CpuModel, CpuidTable, Topology};
use softcpu::exception::Exception;
use softcpu::state::regs::Gpr;
use softcpu::state::segment::SegReg;
use softcpu::{Supervisor, Trap, Vcpu, VcpuConfig, VcpuHandle};
use vm_memory::{Bytes as _, GuestAddress};

use super::{LongConfig, LongGuest, Phys, start, vcpu_state};
use crate::clock::TscFrequency;
use crate::devices::InterruptLine;
use crate::devices::fuzz::Bytes;
use crate::devices::virtio::long_bus::LongBus;
use crate::devices::virtio::testing::IdleDevice;
use crate::memory::{GuestRam, MIN_RAM};
use crate::platform::lguest::{EndSink, InterruptLines, LguestEnvironment};
use crate::platform::pc::kvm::clock::Epoch;

/// RAM ends below the bus.
const RAM: u64 = MIN_RAM - 0x1000;
const SHARED: u64 = 0x20_0000;
/// A top level, two tables and sixteen pages of 2 MiB: all of RAM and the bus, for users too.
const TABLES: u64 = 0x30_0000;
const TABLE: u64 = 0x1000;
const USER_TABLE: u64 = 7;
const USER_LARGE_PAGE: u64 = 0xe7;
/// What an input may do before it is stopped.
const STEPS: usize = 256;

/// What inputs have in common: memory is dear.
struct Host {
    ram: GuestRam,
    cpu: Box<Vcpu>,
    handle: VcpuHandle,
    cpuid: CpuidTable,
}

impl Host {
    fn new() -> Option<Self> {
        let ram = GuestRam::without_hole(MIN_RAM).ok()?;
        let handle = VcpuHandle::new();
        let ended: EndSink = Arc::new(|_| ());
        let topology = Topology { apic_id: 0, cpus: 1 };
        let table = || CpuidTable::for_model(CpuModel::best_for_host(), topology).ok();
        let cpu = Vcpu::new(VcpuConfig {
            engine: softcpu::Engine::Translator,
            translation: softcpu::translate::Config::default(),
            stubs: Arc::new(softcpu::Stubs::new().ok()?),
            code: None,
            memory: Arc::new(ram.phys_memory().ok()?),
            cpuid: table()?,
            env: Box::new(LguestEnvironment::new(handle.clone(), None, ended)),
            handle: handle.clone(),
        });
        Some(Self { ram, cpu: cpu.ok()?, handle, cpuid: table()? })
    }

    fn put(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // All of these places are RAM.
        let _ = self.ram.mmap().write_slice(&bytes, GuestAddress(at));
    }

    /// A guest at its beginning.
    fn guest(&mut self) -> Option<LongGuest> {
        let mut shared = SharedData::new();
        shared.irq_words = SHARED.saturating_add(64);
        shared.kernel_address = 0xffff_8000_0000_0000;
        let mut page = vec![0; TABLE as usize];
        shared.write(&mut page)?;
        let _ = self.ram.mmap().write_slice(&page, GuestAddress(SHARED));
        let table = |n: u64| TABLES.saturating_add(n.saturating_mul(TABLE));
        for (n, next) in [(0, table(1) | USER_TABLE), (1, table(2) | USER_TABLE)] {
            let mut words = vec![0; 512];
            if let Some(first) = words.first_mut() {
                *first = next;
            }
            self.put(table(n), &words);
        }
        let large = (0..512).map(|n: u64| if n < 16 { n << 21 | USER_LARGE_PAGE } else { 0 });
        self.put(table(2), &large.collect::<Vec<_>>());

        let lines = Arc::new(InterruptLines::new(self.handle.clone()));
        let sink = Arc::clone(&lines);
        let line = move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq);
        let cores = vec![Box::new(IdleDevice::default()) as _];
        let bus = LongBus::new(cores, Arc::clone(self.ram.mmap()), RAM, line).ok()?;
        self.cpu.hold_descriptors(&start::GDT);
        self.cpu.state = vcpu_state(0x10_0000, Phys(TABLES), 0, &self.cpuid);
        self.cpu.state_changed();
        Some(LongGuest::new(LongConfig {
            memory: Arc::new(self.ram.phys_memory().ok()?),
            ram: RAM,
            bus_len: TABLE,
            epoch: Epoch::now(TscFrequency::from_hz(1_000_000_000)),
            console: Box::new(std::io::sink()),
            lines,
            bus: Arc::new(bus),
            ended: Arc::new(|_| ()),
        }))
    }
}

/// Plays `data`.
pub fn fuzz_long(data: &[u8]) {
    thread_local! {
        static HOST: RefCell<Option<Host>> = RefCell::new(Host::new());
    }
    HOST.with_borrow_mut(|host| {
        let Some(host) = host else { return };
        let Some(mut guest) = host.guest() else { return };
        let mut bytes = Bytes::new(data);
        for _ in 0..STEPS {
            if step(host, &mut guest, &mut bytes).is_none() {
                return;
            }
        }
    });
}

/// One thing that the guest does. `None`: the input has ended.
fn step(host: &mut Host, guest: &mut LongGuest, bytes: &mut Bytes<'_>) -> Option<()> {
    let long = |bytes: &mut Bytes<'_>| bytes.take().map(u64::from_le_bytes);
    // Small numbers and places in memory come in few bytes.
    let word = |bytes: &mut Bytes<'_>| match bytes.byte()? {
        0xff => long(bytes),
        0xfe => Some(u64::from(bytes.word()?)),
        n @ 0x80.. => Some(u64::from(n & 0x7f) << 18 | u64::from(bytes.byte()?) << 12),
        n => Some(n.into()),
    };
    let operation = bytes.byte()?;
    let cpu = &mut host.cpu;
    let at = cpu.state.rip;
    let trap = match operation & 7 {
        0..=2 => {
            for reg in [Gpr::Rax, Gpr::Rdi, Gpr::Rsi, Gpr::Rdx, Gpr::Rcx] {
                let value = word(bytes)?;
                cpu.state.set_reg(reg, value);
            }
            Trap::Software { vector: 0x1f, at, checked: true }
        }
        3 => Trap::Software { vector: bytes.byte()?, at, checked: operation & 8 == 0 },
        4 => match operation >> 3 & 3 {
            0 => Trap::Syscall { at },
            1 => Trap::Hypercall { at },
            2 => Trap::Exception(Exception::general_protection(bytes.byte()?.into())),
            _ => Trap::Exception(Exception::invalid_opcode()),
        },
        5 => {
            // A store to the shared page, or to tables or bus.
            let page = [SHARED, TABLES, TABLES + TABLE, TABLES + 2 * TABLE, RAM];
            let page = page.get(usize::from(operation >> 3 & 7)).copied().unwrap_or(SHARED);
            let at = page | u64::from(bytes.word()?) & 0xff8;
            let value = word(bytes)?;
            let _ = host.ram.mmap().write_obj(value, GuestAddress(at));
            Trap::Interrupt
        }
        6 => {
            guest.lines.raise(bytes.byte()?);
            Trap::Interrupt
        }
        _ => {
            // The guest is elsewhere, and in either ring.
            let (rip, rsp) = (word(bytes)?, word(bytes)?);
            cpu.state.rip = rip;
            cpu.state.set_reg(Gpr::Rsp, rsp);
            let user = operation & 8 != 0;
            let (code, data) = if user { (USER_CS, USER_DS) } else { (KERNEL_CS, KERNEL_DS) };
            *cpu.state.segment_mut(SegReg::Cs) = start::segment(code);
            *cpu.state.segment_mut(SegReg::Ss) = start::segment(data);
            cpu.segments_changed();
            Trap::Interrupt
        }
    };
    let _ = guest.trap(&mut host.cpu, trap);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_guest_does_is_borne(
            init: bool, noise in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            // LGUEST_INIT of the page at 2 MiB.
            let begin: &[u8] = if init { &[0, 1, 0x88, 0, 0, 0, 0] } else { &[] };
            fuzz_long(&[begin, &noise].concat());
        }
    }

    #[test]
    fn the_words_for_a_beginning_begin() {
        let mut host = Host::new().unwrap();
        let mut guest = host.guest().unwrap();
        step(&mut host, &mut guest, &mut Bytes::new(&[0, 1, 0x88, 0, 0, 0, 0])).unwrap();
        assert!(guest.session.is_some());
    }
}
