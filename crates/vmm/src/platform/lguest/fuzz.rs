//! Body of the fuzz target for the platform: bytes played as a guest without scruples.
//!
//! The guest's memory, registers and ring are what the input makes of them, and it traps for
//! whatever reason the input likes. It may die, of a reason in one line; the process may not.
//! Nothing of the guest runs, so that each input takes a bounded time: how the CPU executes
//! code is other targets' business.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lguest_abi::band::Trap as CallTrap;
use lguest_abi::bus::Form;
use lguest_abi::call::number;
use lguest_abi::ring::{SLOT_READY, SLOTS};
use lguest_abi::segments::{Gate, GateKind};
use lguest_abi::shared_data::{NoIrqWindow, StaticFields};
use lguest_abi::{Band, Call, Phys, entry};
use softcpu::cpuid::{CpuModel, CpuidTable, Topology};
use softcpu::exception::{Exception, Vector};
use softcpu::state::regs::Gpr;
use softcpu::state::segment::{SegReg, Segment};
use softcpu::{GuestPhysAddr, PhysMemory, Supervisor, Trap, Vcpu, VcpuConfig, VcpuHandle, Verdict};

use super::{
    Ended, GuestDevices, InterruptLines, Lguest, LguestConfig, LguestEnvironment, vcpu_state,
};
use crate::clock::TscFrequency;
use crate::devices::InterruptLine;
use crate::devices::fuzz::Bytes;
use crate::devices::virtio::lguest_bus::{self, LguestBus};
use crate::devices::virtio::{Entropy, IoThreads, VirtioDevice};
use crate::memory::{GuestRam, MIN_RAM};

/// What the guest has of it.
const RAM: u32 = 2 << 20;
/// Where `lguest_data` lies of a guest that introduces itself properly.
const DATA: u32 = 0x1_0000;
/// Where the first instruction would be.
const ENTRY: u32 = 0x10_0000;
/// What of it the input can change, and as much of what is not the guest's.
const REACH: u32 = 4 << 20;
/// Bands with a host: all but the first.
const BANDS: u8 = 7;
/// The exceptions that a guest can raise.
const VECTORS: [Vector; 8] = [
    Vector::DivideError,
    Vector::Debug,
    Vector::InvalidOpcode,
    Vector::DeviceNotAvailable,
    Vector::StackSegment,
    Vector::GeneralProtection,
    Vector::PageFault,
    Vector::AlignmentCheck,
];
/// The most that is done for one input.
const STEPS: usize = 400;
const KERNEL: u32 = 0xc000_0000;
/// Flat data for ring 3.
const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
const USER_CODE: u64 = 0x00cf_fb00_0000_ffff;
/// Segments of ring 3.
const USER_CS: u16 = 0x73;
const USER_DS: u16 = 0x7b;

struct Play {
    cpu: Box<Vcpu>,
    platform: Lguest,
    memory: Arc<PhysMemory>,
    lines: Arc<InterruptLines>,
    ended: Arc<Mutex<Vec<Ended>>>,
    band: Band,
}

/// One thread for the devices of all inputs.
fn io() -> Option<Arc<IoThreads>> {
    static IO: OnceLock<Option<Arc<IoThreads>>> = OnceLock::new();
    IO.get_or_init(|| IoThreads::start(1).ok()).clone()
}

impl Play {
    fn new(band: Band) -> Option<Self> {
        let io = io()?;
        let cores: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Entropy::new(io))];
        let pages = lguest_bus::pages(&cores).ok()?;
        let ram = GuestRam::new(MIN_RAM).ok()?;
        let memory = Arc::new(ram.phys_memory().ok()?);
        let handle = VcpuHandle::new();
        let lines = Arc::new(InterruptLines::new(handle.clone()));
        let sink = Arc::clone(&lines);
        let line = move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq);
        let form = if band == Band::V1a { Form::Tagged } else { Form::Packed };
        let bus = LguestBus::new(cores, Arc::clone(ram.mmap()), RAM, form, line).ok()?;
        let devices = GuestDevices::Bus(Arc::new(bus));
        let ended = Arc::new(Mutex::new(Vec::new()));
        let words = Arc::clone(&ended);
        let sink: super::EndSink = Arc::new(move |end| {
            words.lock().unwrap_or_else(PoisonError::into_inner).push(end);
        });
        let mut cpu = Vcpu::new(VcpuConfig {
            engine: softcpu::Engine::Translator,
            translation: softcpu::translate::Config::default(),
            stubs: Arc::new(softcpu::Stubs::new().ok()?),
            code: None,
            memory: Arc::clone(&memory),
            cpuid: CpuidTable::for_model(CpuModel::V2, Topology { apic_id: 0, cpus: 1 }).ok()?,
            env: Box::new(LguestEnvironment::new(
                handle.clone(),
                Some(devices.clone()),
                Arc::clone(&sink),
            )),
            handle,
        })
        .ok()?;
        cpu.state = vcpu_state(ENTRY);
        cpu.state_changed();
        let platform = Lguest::new(LguestConfig {
            memory: Arc::clone(&memory),
            ram: RAM,
            limit: RAM.saturating_add(pages.saturating_mul(4096)),
            initrd: 0,
            frequency: TscFrequency::from_hz(1_000_000_000),
            console: Box::new(std::io::sink()),
            lines: Arc::clone(&lines),
            devices,
            ended: sink,
        });
        cpu.hold_descriptors(platform.gdt.entries());
        Some(Self { cpu, platform, memory, lines, ended, band })
    }

    fn write(&self, at: u32, bytes: &[u8]) {
        // What lies outside is the input's mistake, not a guest's.
        let _ = self.memory.write(GuestPhysAddr(at.into()), bytes);
    }

    fn registers(&mut self, call: Call) {
        let registers = call.encode().to_registers(self.band.register_order());
        for (reg, value) in [
            (Gpr::Rax, registers.eax),
            (Gpr::Rbx, registers.ebx),
            (Gpr::Rcx, registers.ecx),
            (Gpr::Rdx, registers.edx),
            (Gpr::Rsi, registers.esi),
        ] {
            self.cpu.state.set_reg32(reg, value);
        }
    }

    /// As an honest guest begins.
    fn introduce(&mut self) -> Verdict {
        let mut data = vec![0; 4096];
        let window = match self.band {
            Band::V6 => NoIrqWindow::Iret(ENTRY),
            _ => NoIrqWindow::Range { start: ENTRY, end: ENTRY.saturating_add(4) },
        };
        let fields = StaticFields { window, kernel_address: KERNEL, syscall_vec: 0x80 };
        let _ = fields.write(self.band.layout(), &mut data);
        self.write(DATA, &data);
        self.registers(Call::Init { data: Phys(DATA) });
        self.call()
    }

    fn call(&mut self) -> Verdict {
        match self.band.trap() {
            CallTrap::Int1f => self.trap(Trap::Software { vector: 31, at: 0, checked: true }),
            CallTrap::Vmcall => self.trap(Trap::Hypercall { at: 0 }),
        }
    }

    fn trap(&mut self, trap: Trap) -> Verdict {
        self.platform.trap(&mut self.cpu, trap)
    }

    fn ring(&mut self, user: bool) {
        let (cs, ss) = if user {
            let code = Segment::from_descriptor(USER_CS, USER_CODE);
            (code, Segment::from_descriptor(USER_DS, USER_DATA))
        } else {
            let code = Segment::from_descriptor(entry::CS, entry::CODE.0);
            (code, Segment::from_descriptor(entry::DS, entry::DATA.0))
        };
        *self.cpu.state.segment_mut(SegReg::Cs) = cs;
        *self.cpu.state.segment_mut(SegReg::Ss) = ss;
        self.cpu.segments_changed();
    }

    /// One step; `None` when the input is at its end.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> Option<Verdict> {
        let offsets = self.band.layout().offsets();
        let mut verdict = Verdict::Resume;
        match bytes.byte()? % 14 {
            0 => verdict = self.introduce(),
            // A hypercall with any arguments.
            1 => {
                self.cpu.state.set_reg32(Gpr::Rax, u32::from(bytes.byte()? % 24));
                for reg in [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi] {
                    self.cpu.state.set_reg32(reg, bytes.word()?);
                }
                verdict = self.call();
            }
            // The same with small ones, which are more often possible.
            2 => {
                self.cpu.state.set_reg32(Gpr::Rax, u32::from(bytes.byte()? % 24));
                for reg in [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi] {
                    let [low, shift] = bytes.take()?;
                    self.cpu.state.set_reg32(reg, u32::from(low).wrapping_shl(shift.into()));
                }
                verdict = self.call();
            }
            3 => verdict = self.trap(Trap::Hypercall { at: 0 }),
            4 => {
                let [vector, code, checked] = bytes.take()?;
                let payload = bytes.word()?.into();
                let vector = *VECTORS.get(usize::from(vector % 8))?;
                let error_code = (checked & 1 != 0).then_some(code.into());
                verdict = self.trap(Trap::Exception(Exception { vector, error_code, payload }));
            }
            5 => {
                let [vector, checked] = bytes.take()?;
                verdict = self.trap(Trap::Software { vector, at: 0, checked: checked & 1 != 0 });
            }
            6 => {
                self.lines.raise(bytes.byte()?);
                verdict = self.trap(Trap::Interrupt);
            }
            // A privileged instruction.
            7 => {
                let at = bytes.byte()?;
                self.write(ENTRY, &bytes.take::<6>()?);
                self.cpu.state.rip = u64::from(ENTRY).saturating_add(u64::from(at & 3));
                verdict = self.trap(Trap::Exception(Exception::general_protection(0)));
            }
            // Memory: tables, shared data, rings, descriptors.
            8 => {
                let at = bytes.word()? % REACH;
                self.write(at, &bytes.take::<4>()?);
            }
            9 => {
                let [page, slot, target, flags] = bytes.take()?;
                let at = u32::from(page)
                    .saturating_mul(4096)
                    .saturating_add(u32::from(slot).saturating_mul(4));
                self.write(at, &(u32::from(target) << 12 | u32::from(flags)).to_le_bytes());
            }
            10 => {
                let [at, value] = bytes.take()?;
                self.write(DATA.saturating_add(at.into()), &[value]);
            }
            // The ring.
            11 => {
                let slot = usize::from(bytes.byte()?) % SLOTS;
                let words: [u8; 20] = bytes.take()?;
                let form = self.band.slot_form();
                let at = offsets.hcalls.saturating_add(form.offset(slot)) as u32;
                let words = words.get(..form.bytes()).unwrap_or(&words);
                self.write(DATA.saturating_add(at), words);
                let status = offsets.hcall_status.saturating_add(slot) as u32;
                self.write(DATA.saturating_add(status), &[SLOT_READY]);
                self.cpu.state.set_reg32(Gpr::Rax, number::FLUSH_ASYNC);
                verdict = self.call();
            }
            // A gate, and a stack pointer.
            12 => {
                let [vector, kind] = bytes.take()?;
                let offset = bytes.word()?;
                let gate = Gate {
                    offset,
                    dpl: kind & 3,
                    kind: if kind & 4 == 0 { GateKind::Interrupt } else { GateKind::Trap },
                };
                let (low, high) = gate.words();
                self.registers(Call::LoadIdtEntry { vector: vector.into(), low, high });
                verdict = self.call();
            }
            _ => {
                let user = bytes.byte()? & 1 != 0;
                self.cpu.state.set_reg32(Gpr::Rsp, bytes.word()?);
                self.ring(user);
            }
        }
        Some(verdict)
    }
}

/// The platform: a band, and steps.
pub fn fuzz_lguest(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let bands = Band::ALL.get(1..).unwrap_or_default();
    let Some(band) = bytes.byte().and_then(|n| bands.get(usize::from(n % BANDS))) else {
        return;
    };
    let Some(mut play) = Play::new(*band) else { return };
    for _ in 0..STEPS {
        let Some(verdict) = play.step(&mut bytes) else { break };
        let ended = play.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let words = match ended.as_slice() {
            [] => {
                assert_ne!(verdict, Verdict::Stop, "it stops without a word");
                continue;
            }
            [Ended::PoweredOff] => return,
            [Ended::Restart(words) | Ended::Panicked(words) | Ended::Died(words)] => words,
            several => unreachable!("it ends several times: {several:?}"),
        };
        assert!(!words.contains('\n'), "not one line: {words}");
        return;
    }
}
