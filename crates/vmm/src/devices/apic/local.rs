//! A local APIC: what is requested, in service and masked on one vCPU.
//!
//! Two kinds of callers. Any thread may post to it ([`LocalApic::post`],
//! [`LocalApic::timer_expired`]) and ask who it is. Everything else is the vCPU's own
//! thread's: registers, acknowledge, end of interrupt. The two meet in the request
//! register and the processor priority: the poster sets the request, then looks at the
//! priority; the owner sets the priority, then looks at the requests. Both in
//! sequentially consistent order, so one of them sees that there is something to
//! deliver and raises [`Event::INTERRUPT`].

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use softcpu::{Event, VcpuHandle};

use super::base::{ApicBase, ApicMode};
use super::bitmap::VectorSet;
use super::message::{Address, DeliveryMode, InterruptMessage, Trigger};
use super::register::{LVT_ENTRIES, LVT_MASKED, Lvt};
use super::timer::{ApicTimer, TimerMode};
use crate::clock::{TscFrequency, host_tsc};

/// Who waits for the timers' deadlines: the machine's timer thread.
pub trait DeadlineSink: Send + Sync {
    /// The timer of the vCPU number `vcpu` fires at `deadline` (host TSC), or not at all.
    /// May be called with locks of the local APIC held.
    fn arm(&self, vcpu: usize, deadline: Option<u64>);
}

/// What a register write asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// An interprocessor interrupt is to be sent.
    Send(InterruptMessage),
    /// A level-triggered interrupt ended: the IO-APIC wants to know its vector.
    EndOfLevel(u8),
}

/// Errors the error status register tells (SDM vol. 3, 11.5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ApicError {
    /// A vector below 16 was to be sent.
    SendIllegalVector = 1 << 5,
    /// A vector below 16 arrived, or stands in the local vector table.
    ReceiveIllegalVector = 1 << 6,
    /// A reserved register was touched.
    IllegalRegister = 1 << 7,
}

/// INIT or startup messages that the vCPU's thread has yet to act on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Startup {
    /// An INIT came.
    pub init: bool,
    /// A startup message came (after the INIT, if both did).
    pub vector: Option<u8>,
}

const STARTUP_INIT: u32 = 1 << 8;
const STARTUP_SIPI: u32 = 1 << 9;

/// SVR: the APIC is enabled by software.
pub(super) const SVR_ENABLED: u32 = 1 << 8;
/// SVR after reset: disabled, spurious vector 0xFF.
const SVR_AT_RESET: u32 = 0xff;
/// DFR after reset: flat model; the rest reads as ones.
const DFR_AT_RESET: u32 = 0xffff_ffff;
/// Vectors below this are reserved for exceptions.
pub(super) const FIRST_VECTOR: u8 = 16;

/// Who a local APIC belongs to and whom it tells.
#[derive(Clone)]
pub struct LocalApicConfig {
    /// Its identifier, which is also CPUID's.
    pub id: u32,
    /// The vCPU's number in the machine; number 0 starts first.
    pub vcpu: usize,
    /// The width of a guest-physical address.
    pub phys_bits: u8,
    /// How fast the TSC counts.
    pub frequency: TscFrequency,
    /// The vCPU's attention.
    pub handle: VcpuHandle,
    /// Who waits for its timer.
    pub deadlines: Arc<dyn DeadlineSink>,
}

impl fmt::Debug for LocalApicConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalApicConfig")
            .field("id", &self.id)
            .field("vcpu", &self.vcpu)
            .finish_non_exhaustive()
    }
}

/// The local APIC of one vCPU. See the module's own words for who may call what.
#[derive(Debug)]
pub struct LocalApic {
    pub(super) config: LocalApicConfig,
    base: AtomicU64,
    pub(super) task_priority: AtomicU32,
    pub(super) processor_priority: AtomicU32,
    pub(super) logical_destination: AtomicU32,
    pub(super) destination_format: AtomicU32,
    pub(super) spurious: AtomicU32,
    pub(super) command_low: AtomicU32,
    pub(super) command_high: AtomicU32,
    pub(super) lvt: [AtomicU32; LVT_ENTRIES],
    /// The error status register, as last latched.
    pub(super) error_status: AtomicU32,
    /// Errors since then.
    pub(super) errors: AtomicU32,
    pub(super) requested: VectorSet,
    pub(super) in_service: VectorSet,
    pub(super) level: VectorSet,
    timer: Mutex<ApicTimer>,
    startup: AtomicU32,
    kicked: AtomicBool,
}

impl LocalApic {
    /// A local APIC as after reset.
    #[must_use]
    pub fn new(config: LocalApicConfig) -> Self {
        let apic = Self {
            base: AtomicU64::new(ApicBase::at_reset(config.vcpu == 0).raw()),
            task_priority: AtomicU32::default(),
            processor_priority: AtomicU32::default(),
            logical_destination: AtomicU32::default(),
            destination_format: AtomicU32::default(),
            spurious: AtomicU32::default(),
            command_low: AtomicU32::default(),
            command_high: AtomicU32::default(),
            lvt: Default::default(),
            error_status: AtomicU32::default(),
            errors: AtomicU32::default(),
            requested: VectorSet::default(),
            in_service: VectorSet::default(),
            level: VectorSet::default(),
            timer: Mutex::new(ApicTimer::new(config.frequency)),
            startup: AtomicU32::default(),
            kicked: AtomicBool::default(),
            config,
        };
        apic.reset();
        apic
    }

    /// Everything but `IA32_APIC_BASE` as after reset: power-up, INIT, or a return from
    /// the globally disabled state (SDM vol. 3, 11.4.7).
    pub fn reset(&self) {
        self.task_priority.store(0, SeqCst);
        self.destination_format.store(DFR_AT_RESET, SeqCst);
        self.logical_destination.store(self.logical_at_reset(), SeqCst);
        self.spurious.store(SVR_AT_RESET, SeqCst);
        for word in [&self.command_low, &self.command_high, &self.error_status, &self.errors] {
            word.store(0, SeqCst);
        }
        for entry in &self.lvt {
            entry.store(LVT_MASKED, SeqCst);
        }
        self.requested.clear();
        self.in_service.clear();
        self.level.clear();
        self.processor_priority.store(0, SeqCst);
        let frequency = self.config.frequency;
        self.with_timer(|timer| *timer = ApicTimer::new(frequency));
    }

    /// The logical identifier: fixed by the identifier in x2APIC mode (SDM vol. 3, 11.12.10.2).
    fn logical_at_reset(&self) -> u32 {
        match self.mode() {
            ApicMode::X2apic => (self.config.id >> 4) << 16 | 1 << (self.config.id & 15),
            _ => 0,
        }
    }

    /// `IA32_APIC_BASE`.
    #[must_use]
    pub fn base(&self) -> ApicBase {
        ApicBase::from_raw(self.base.load(SeqCst))
    }

    /// The interface it has now.
    #[must_use]
    pub fn mode(&self) -> ApicMode {
        self.base().mode()
    }

    /// A write of `IA32_APIC_BASE`; `false` is `#GP`.
    #[must_use]
    pub fn set_base(&self, value: u64) -> bool {
        let old = self.base();
        let Some(new) = old.write(value, self.config.phys_bits) else { return false };
        self.base.store(new.raw(), SeqCst);
        match (old.mode(), new.mode()) {
            (old, new) if old == new => {}
            (_, ApicMode::X2apic) => {
                self.logical_destination.store(self.logical_at_reset(), SeqCst)
            }
            _ => self.reset(),
        }
        true
    }

    /// Its identifier.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.config.id
    }

    /// The vCPU's attention.
    #[must_use]
    pub const fn handle(&self) -> &VcpuHandle {
        &self.config.handle
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.spurious.load(SeqCst) & SVR_ENABLED != 0
    }

    // ---- from any thread ----

    /// Whether `address` names this APIC physically (SDM vol. 3, 11.6.2.1).
    #[must_use]
    pub fn is_physically(&self, address: Address) -> bool {
        address.is_broadcast() || address.id() == self.config.id
    }

    /// Whether `address` names this APIC logically (SDM vol. 3, 11.6.2.2 and 11.12.10).
    #[must_use]
    pub fn is_logically(&self, address: Address) -> bool {
        if address.is_broadcast() {
            return true;
        }
        let (wanted, own) = (address.id(), self.logical_destination.load(SeqCst));
        match self.mode() {
            ApicMode::Disabled => false,
            ApicMode::X2apic => wanted >> 16 == own >> 16 && wanted & own & 0xffff != 0,
            ApicMode::Xapic => {
                let own = own >> 24;
                let flat = self.destination_format.load(SeqCst) >> 28 == 0xf;
                wanted <= 0xff
                    && if flat {
                        wanted & own != 0
                    } else {
                        wanted >> 4 == own >> 4 && wanted & own & 0xf != 0
                    }
            }
        }
    }

    /// The processor priority, for lowest-priority arbitration.
    #[must_use]
    pub fn priority(&self) -> u32 {
        self.processor_priority.load(SeqCst)
    }

    /// Whether it would take a vector at all.
    #[must_use]
    pub fn accepts_vectors(&self) -> bool {
        self.mode() != ApicMode::Disabled && self.software_enabled()
    }

    /// Takes a message addressed to it. `false`: not accepted.
    pub fn post(&self, mode: DeliveryMode, vector: u8, trigger: Trigger) -> bool {
        if self.mode() == ApicMode::Disabled {
            return false;
        }
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.post_vector(vector, trigger),
            DeliveryMode::Nmi => {
                self.config.handle.raise(Event::NMI);
                true
            }
            DeliveryMode::Init => {
                self.startup.store(STARTUP_INIT, SeqCst);
                self.config.handle.raise(Event::ATTENTION);
                true
            }
            DeliveryMode::Startup => {
                let sipi = STARTUP_SIPI | u32::from(vector);
                let _ = self
                    .startup
                    .fetch_update(SeqCst, SeqCst, |before| Some(before & STARTUP_INIT | sipi));
                self.config.handle.raise(Event::ATTENTION);
                true
            }
            DeliveryMode::Smi | DeliveryMode::External | DeliveryMode::Reserved => false,
        }
    }

    fn post_vector(&self, vector: u8, trigger: Trigger) -> bool {
        if vector < FIRST_VECTOR {
            self.error(ApicError::ReceiveIllegalVector);
            return false;
        }
        if !self.software_enabled() {
            return false;
        }
        match trigger {
            Trigger::Level => self.level.insert(vector),
            Trigger::Edge => {
                self.level.remove(vector);
            }
        }
        self.requested.insert(vector);
        if u32::from(vector) >> 4 > self.priority() >> 4 {
            self.config.handle.raise(Event::INTERRUPT);
        }
        true
    }

    /// The timer's deadline has passed, says the timer thread (or the vCPU's own, when
    /// it slept until then).
    pub fn timer_expired(&self, now: u64) {
        if self.with_timer(|timer| timer.expire(now)) {
            self.timer_interrupt();
        }
    }

    fn timer_interrupt(&self) {
        let entry = self.lvt_entry(Lvt::Timer);
        if entry & LVT_MASKED == 0 {
            self.post_vector(entry as u8, Trigger::Edge);
        }
    }

    /// Records an error, and interrupts if the vector table says so.
    pub(super) fn error(&self, error: ApicError) {
        let bit = error as u32;
        let entry = self.lvt_entry(Lvt::Error);
        // Only the first of a kind interrupts, which also ends the recursion when the
        // error's own vector is illegal.
        if self.errors.fetch_or(bit, SeqCst) & bit == 0 && entry & LVT_MASKED == 0 {
            self.post_vector(entry as u8, Trigger::Edge);
        }
    }

    /// Takes the INIT and startup messages that came.
    #[must_use]
    pub fn take_startup(&self) -> Startup {
        let word = self.startup.swap(0, SeqCst);
        Startup {
            init: word & STARTUP_INIT != 0,
            vector: (word & STARTUP_SIPI != 0).then_some(word as u8),
        }
    }

    /// Wakes the vCPU from a halt, whatever its interrupt flag says (KVM's kick).
    pub fn kick(&self) {
        self.kicked.store(true, SeqCst);
        self.config.handle.raise(Event::ATTENTION);
    }

    /// Takes a kick.
    #[must_use]
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, SeqCst)
    }

    /// Whether an interrupt is requested that the priority lets through.
    #[must_use]
    pub fn is_deliverable(&self) -> bool {
        self.requested.highest().is_some_and(|vector| u32::from(vector) >> 4 > self.priority() >> 4)
    }

    // ---- from the vCPU's own thread ----

    /// Recomputes the processor priority (SDM vol. 3, 11.8.3.1), and asks for attention
    /// if it now lets something through.
    pub(super) fn update_priority(&self) {
        let task = self.task_priority.load(SeqCst);
        let servicing = self.in_service.highest().map_or(0, u32::from);
        let priority = if task >> 4 >= servicing >> 4 { task } else { servicing & 0xf0 };
        self.processor_priority.store(priority, SeqCst);
        if self.is_deliverable() {
            self.config.handle.raise(Event::INTERRUPT);
        }
    }

    /// The CPU takes an interrupt: the highest deliverable vector moves into service.
    #[must_use]
    pub fn acknowledge(&self) -> Option<u8> {
        let vector = self
            .requested
            .highest()
            .filter(|vector| u32::from(*vector) >> 4 > self.priority() >> 4)?;
        self.requested.remove(vector);
        self.in_service.insert(vector);
        self.update_priority();
        Some(vector)
    }

    /// The guest ends the interrupt in service with the highest vector.
    pub fn end_of_interrupt(&self) -> Effect {
        let Some(vector) = self.in_service.highest() else { return Effect::None };
        self.in_service.remove(vector);
        self.update_priority();
        if self.level.contains(vector) { Effect::EndOfLevel(vector) } else { Effect::None }
    }

    /// CR8: the task priority's class.
    #[must_use]
    pub fn task_priority_class(&self) -> u8 {
        (self.task_priority.load(SeqCst) >> 4) as u8 & 0xf
    }

    /// The task-priority register.
    pub fn set_task_priority(&self, value: u8) {
        self.task_priority.store(u32::from(value), SeqCst);
        self.update_priority();
    }

    /// `IA32_TSC_DEADLINE`.
    #[must_use]
    pub fn tsc_deadline(&self) -> u64 {
        self.lock_timer().tsc_deadline()
    }

    /// A write of `IA32_TSC_DEADLINE`; `offset` is guest TSC minus host TSC. A deadline that
    /// has passed already interrupts at once, with no thread to wait for.
    pub fn set_tsc_deadline(&self, value: u64, offset: u64) {
        let now = host_tsc();
        let passed = self.with_timer(|timer| {
            timer.set_tsc_deadline(value, offset);
            timer.expire(now)
        });
        if passed {
            self.timer_interrupt();
        }
    }

    /// The guest's TSC was moved.
    pub fn tsc_moved(&self, offset: u64) {
        self.with_timer(|timer| timer.tsc_moved(offset));
    }

    pub(super) fn lvt_entry(&self, entry: Lvt) -> u32 {
        self.lvt.get(entry as usize).map_or(LVT_MASKED, |cell| cell.load(SeqCst))
    }

    pub(super) fn set_lvt_entry(&self, entry: Lvt, value: u32) {
        let forced = if self.software_enabled() { 0 } else { LVT_MASKED };
        if let Some(cell) = self.lvt.get(entry as usize) {
            cell.store(value & entry.writable() | forced, SeqCst);
        }
        if entry == Lvt::Timer {
            self.with_timer(|timer| timer.set_mode(TimerMode::of(value)));
        }
    }

    fn lock_timer(&self) -> MutexGuard<'_, ApicTimer> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the timer and tells the timer thread, in one go: a change by the guest
    /// and the expiry of what it replaces cannot pass each other.
    pub(super) fn with_timer<T>(&self, change: impl FnOnce(&mut ApicTimer) -> T) -> T {
        let mut timer = self.lock_timer();
        let before = timer.deadline();
        let result = change(&mut timer);
        if timer.deadline() != before {
            self.config.deadlines.arm(self.config.vcpu, timer.deadline());
        }
        result
    }

    pub(super) fn read_timer<T>(&self, read: impl FnOnce(&ApicTimer, u64) -> T) -> T {
        read(&self.lock_timer(), host_tsc())
    }
}

impl fmt::Display for LocalApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timer = *self.lock_timer();
        let vectors =
            |set: &VectorSet| (0..=255).filter(|vector| set.contains(*vector)).collect::<Vec<u8>>();
        write!(
            f,
            "apic {} {:?} svr {:#x} tpr {:#x} ppr {:#x} requested {:02x?} in service {:02x?} timer lvt {:#x} deadline {:?}",
            self.config.id,
            self.mode(),
            self.spurious.load(SeqCst),
            self.task_priority.load(SeqCst),
            self.priority(),
            vectors(&self.requested),
            vectors(&self.in_service),
            self.lvt_entry(Lvt::Timer),
            timer.deadline().map(|at| at.wrapping_sub(host_tsc()) as i64),
        )
    }
}
