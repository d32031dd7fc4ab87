//! A small machine for tests: one vCPU, a few MiB of RAM, no devices.
//!
//! Not part of the public interface; public only so that this crate's integration
//! tests and benchmarks can use it.

#![allow(
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    reason = "support for tests, where a panic is how a wrong assumption is reported"
)]

use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use crate::addr::{GuestPhysAddr, PAGE_SHIFT, PAGE_SIZE};
use crate::cpuid::{CpuModel, CpuidTable, Topology};
use crate::env::{Environment, MsrRefused};
use crate::handle::VcpuHandle;
use crate::memory::{CodeMap, PhysMemory, RamRegion, SharedRam};
use crate::native::Stubs;
use crate::state::control::{Cr0, Cr4, Efer};
use crate::state::segment::{SegReg, Segment};
use crate::sync::lock;
use crate::translate::{self, Batch, CodeCache, Config};
use crate::vcpu::{Engine, Vcpu, VcpuConfig};

/// RAM of a [`TestMachine`], bytes. Its page tables take the last 32 KiB.
pub const RAM: u64 = 4 << 20;
/// Where [`TestMachine::long_mode`] puts its page tables.
const TABLES: u64 = RAM - 8 * PAGE_SIZE;
/// The first address after RAM that reads and writes as a device.
pub const DEVICE: u64 = RAM;

/// What devices were told, in order: address, bytes.
pub type DeviceLog = Arc<Mutex<Vec<(GuestPhysAddr, Vec<u8>)>>>;

/// One vCPU and its memory.
#[derive(Debug)]
pub struct TestMachine {
    /// The CPU.
    pub vcpu: Box<Vcpu>,
    /// Its memory.
    pub memory: Arc<PhysMemory>,
    /// Stores to addresses that are not RAM. Loads there yield the low byte of each
    /// byte's address, inverted.
    pub devices: DeviceLog,
}

impl TestMachine {
    /// A CPU at reset, with RAM from address zero.
    ///
    /// # Panics
    /// When the host has no memory.
    #[must_use]
    pub fn new() -> Self {
        let owner = Arc::new(Pages::new(RAM as usize));
        let region = RamRegion { start: GuestPhysAddr(0), len: RAM, host: owner.start };
        let code = Arc::new(CodeMap::new((RAM >> PAGE_SHIFT) as usize));
        // SAFETY: `owner` holds the pages, hands out no reference to them, and lives as
        // long as the memory.
        let memory = unsafe { PhysMemory::new(&[region], code, Arc::clone(&owner) as _) };
        let memory = memory.expect("one aligned region is a valid layout");
        let shared = SharedRam::new(owner.file(), (RAM >> PAGE_SHIFT) as usize);
        let memory = Arc::new(memory.backed_by(Arc::new(shared)));
        Self::on(memory, Engine::Interpreter, new_stubs())
    }

    /// Another CPU at reset on `memory`.
    fn on(memory: Arc<PhysMemory>, engine: Engine, stubs: Arc<Stubs>) -> Self {
        let devices = DeviceLog::default();
        let vcpu = Vcpu::new(VcpuConfig {
            memory: Arc::clone(&memory),
            cpuid: CpuidTable::for_model(
                CpuModel::best_for_host(),
                Topology { cpus: 1, apic_id: 0 },
            )
            .expect("the best model for this host is one it can run"),
            env: Box::new(NoDevices { log: Arc::clone(&devices), apic_base: APIC_BASE }),
            engine,
            translation: Config::default(),
            code: None,
            stubs,
            handle: VcpuHandle::new(),
        })
        .expect("the host has memory for code");
        Self { vcpu, memory, devices }
    }

    /// The same machine with a translator, which takes a block after `runs` runs.
    ///
    /// # Panics
    /// When the host has no memory for code.
    #[must_use]
    pub fn translating(self, runs: u32) -> Self {
        self.translating_as(runs, Config::default())
    }

    /// The same with another configuration of the translator.
    ///
    /// # Panics
    /// When the host has no memory for code.
    #[must_use]
    pub fn translating_as(mut self, runs: u32, config: Config) -> Self {
        self.vcpu.translate_after(runs, config, None).expect("the host has memory for code");
        self
    }

    /// The same in code memory that it shares with others.
    #[must_use]
    pub fn translating_in(mut self, code: &Arc<CodeCache>, runs: u32, config: Config) -> Self {
        let code = Some(Arc::clone(code));
        self.vcpu.translate_after(runs, config, code).expect("there is memory for code");
        self
    }

    /// The same machine, which translates, with what has run so often translated in `workshop`.
    #[must_use]
    pub fn ordering(mut self, workshop: &Arc<translate::Workshop>) -> Self {
        self.vcpu.order_from(workshop);
        self
    }

    /// The same machine in lockstep, with all code translated that can be.
    #[must_use]
    pub fn in_lockstep(self) -> Self {
        // Its CPU offers less.
        let mut machine = self.another(Engine::Lockstep, new_stubs());
        machine.vcpu.mmu.pdpte = self.vcpu.mmu.pdpte;
        // Tests and fuzzers have no patience for code to become warm.
        machine.vcpu.threshold = 1;
        machine
    }

    /// A second CPU on the same memory, in the same mode and with the same registers.
    #[must_use]
    pub fn sibling(&self) -> Self {
        self.another(Engine::Interpreter, Arc::clone(self.vcpu.native.shared()))
    }

    fn another(&self, engine: Engine, stubs: Arc<Stubs>) -> Self {
        let mut machine = Self::on(Arc::clone(&self.memory), engine, stubs);
        machine.vcpu.state = self.vcpu.state.clone();
        machine.vcpu.state_changed();
        machine
    }

    /// 64-bit mode at CPL 0, the first GiB mapped one to one, every unit switched on.
    #[must_use]
    pub fn long_mode() -> Self {
        let mut machine = Self::new();
        let (l4, l3, l2) = (TABLES, TABLES + PAGE_SIZE, TABLES + 2 * PAGE_SIZE);
        // Present, writable, user, accessed, dirty.
        machine.put(l4, &(l3 | 0x67).to_le_bytes());
        machine.put(l3, &(l2 | 0x67).to_le_bytes());
        for i in 0..512 {
            machine.put(l2 + i * 8, &((i << 21) | 0xe7).to_le_bytes());
        }
        let state = &mut machine.vcpu.state;
        state.cr3 = l4;
        state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG;
        state.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
        state.efer = Efer::LME | Efer::LMA;
        state.xcr0 = 7;
        // Linux's __KERNEL_CS and __KERNEL_DS.
        machine.segments(Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff));
        machine
    }

    /// 32-bit protected mode at CPL 0, flat, without paging, every unit switched on.
    #[must_use]
    pub fn protected_mode() -> Self {
        let mut machine = Self::new();
        let state = &mut machine.vcpu.state;
        state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE;
        state.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
        state.xcr0 = 7;
        machine.segments(Segment::from_descriptor(0x10, 0x00cf_9b00_0000_ffff));
        machine
    }

    fn segments(&mut self, code: Segment) {
        let data = Segment::from_descriptor(0x18, 0x00cf_9300_0000_ffff);
        let state = &mut self.vcpu.state;
        for reg in [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            *state.segment_mut(reg) = data;
        }
        *state.segment_mut(SegReg::Cs) = code;
        state.rip = 0x1000;
        self.vcpu.state_changed();
    }

    /// All `code`, which is to be translated at once.
    pub fn batch_of(&mut self, code: Range<u64>) -> Batch {
        Batch::of(&mut self.vcpu, code)
    }

    /// Stores `data` at a physical address, as a device would.
    ///
    /// # Panics
    /// When that is not RAM.
    pub fn put(&self, addr: u64, data: &[u8]) {
        assert!(self.memory.write(GuestPhysAddr(addr), data), "{addr:#x} is not RAM");
    }

    /// Loads `len` bytes from a physical address.
    ///
    /// # Panics
    /// When that is not RAM.
    #[must_use]
    pub fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        assert!(self.memory.read(GuestPhysAddr(addr), &mut data), "{addr:#x} is not RAM");
        data
    }

    /// Makes the 4 KiB page at `addr` (below 2 MiB) absent, or present again. Only in
    /// [`TestMachine::long_mode`]; the first call cuts the large page there into small ones.
    pub fn set_present(&mut self, addr: u64, present: bool) {
        let (l2, l1) = (TABLES + 2 * PAGE_SIZE, TABLES + 3 * PAGE_SIZE);
        if self.get(l2, 8) != (l1 | 0x67).to_le_bytes() {
            for i in 0..512 {
                self.put(l1 + i * 8, &((i << 12) | 0x67).to_le_bytes());
            }
            self.put(l2, &(l1 | 0x67).to_le_bytes());
        }
        let page = addr & !(PAGE_SIZE - 1);
        self.put(l1 + (addr >> 12) * 8, &(page | 0x66 | u64::from(present)).to_le_bytes());
        self.vcpu.state_changed();
    }
}

fn new_stubs() -> Arc<Stubs> {
    Arc::new(Stubs::new().expect("the host has memory for code"))
}

/// Has `former` handle a fault of the host that is not the caller's: see sigaction(2).
pub fn pass_on_fault(
    former: Option<&libc::sigaction>,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    translate::pass_on_fault(former, signal, info, context);
}

impl Default for TestMachine {
    fn default() -> Self {
        Self::new()
    }
}

/// Zeroed, page-aligned host memory between pages that nobody may touch: what strays off
/// the guest's RAM does not go unnoticed.
#[derive(Debug)]
struct Pages {
    start: *mut u8,
    len: usize,
    file: OwnedFd,
}

/// Bytes before and after [`Pages`] that are not accessible.
const GUARD: usize = 1 << 20;

// SAFETY: just memory; access to it is the business of `PhysMemory`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(len: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh file, and a fresh mapping, in the middle of which that is then mapped.
        unsafe {
            let file = libc::memfd_create(c"RAM".as_ptr(), libc::MFD_CLOEXEC);
            assert!(file >= 0 && libc::ftruncate(file, len as i64) == 0, "the host has no memory");
            let all =
                libc::mmap(std::ptr::null_mut(), len + 2 * GUARD, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(all, libc::MAP_FAILED, "the host has no memory");
            let start = all.byte_add(GUARD);
            let (access, how) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
            assert_eq!(libc::mmap(start, len, access, how, file, 0), start);
            Self { start: start.cast(), len, file: OwnedFd::from_raw_fd(file) }
        }
    }

    /// The file that they are.
    fn file(&self) -> OwnedFd {
        self.file.try_clone().expect("the host has another number for a file")
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nothing uses any more.
        unsafe { libc::munmap(self.start.byte_sub(GUARD).cast(), self.len + 2 * GUARD) };
    }
}

/// `IA32_APIC_BASE`, and its value after reset on the first CPU.
const IA32_APIC_BASE: u32 = 0x1b;
const APIC_BASE: u64 = 0xfee0_0900;

struct NoDevices {
    log: DeviceLog,
    apic_base: u64,
}

impl Environment for NoDevices {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&mut self, _port: u16, _data: &[u8]) {}

    fn mmio_read(&mut self, addr: GuestPhysAddr, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = !(addr.0 as u8).wrapping_add(i as u8);
        }
    }

    fn mmio_write(&mut self, addr: GuestPhysAddr, data: &[u8]) {
        lock(&self.log).push((addr, data.to_vec()));
    }

    fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        if index == IA32_APIC_BASE { Ok(self.apic_base) } else { Err(MsrRefused) }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        if index != IA32_APIC_BASE {
            return Err(MsrRefused);
        }
        self.apic_base = value;
        Ok(())
    }
}

/// A small generator of random numbers (Marsaglia's xorshift*): tests must be the same every
/// time.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it has no end to tell of")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of `from`, which is not empty.
    #[expect(clippy::indexing_slicing, reason = "below its length")]
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
