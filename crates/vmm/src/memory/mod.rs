//! Guest RAM: how much there is at which guest-physical addresses, and its mapping.
//!
//! The mapping is vm-memory's, because the loader and device models of the rust-vmm
//! family speak it; the CPU in software gets the same pages as a
//! [`PhysMemory`] through [`GuestRam::phys_memory`]. The Launcher makes
//! one [`GuestRam`] per machine; the loader fills it before a vCPU runs.

use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use softcpu::addr::PAGE_SIZE;
use softcpu::memory::ram::LayoutError;
use softcpu::memory::{CodeMap, SharedRam};
use softcpu::{GuestPhysAddr, PhysMemory, RamRegion};
use vm_memory::mmap::{FromRangesError, MmapRegion, MmapRegionBuilder};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::layout::{HOLE_END, HOLE_START};

mod filling;
mod pages;
mod watch;

use pages::Pages;
pub use watch::{CodeWatch, CodeWatchSlice};

/// Guest RAM as device models use it. Every write through it is told to the CPU, which
/// may have decoded what stood there.
pub type GuestMemory = GuestMemoryMmap<CodeWatch>;

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// The least RAM a machine has: below this no distribution kernel gets anywhere.
pub const MIN_RAM: u64 = 32 * MIB;
/// The most RAM a machine has: every physical-address width that CPUID may report
/// (40 bits and more) reaches it.
pub const MAX_RAM: u64 = (1 << 40) - (HOLE_END.0 - HOLE_START.0);

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MIN_RAM`].
    #[error("{} MiB of memory is too little for a guest: give --mem {}M or more", .0 / MIB, MIN_RAM / MIB)]
    TooSmall(u64),
    /// More than [`MAX_RAM`].
    #[error("{} MiB of memory is more than a guest can address: give --mem {}M or less", .0 / MIB, MAX_RAM / MIB)]
    TooLarge(u64),
    /// Not whole pages.
    #[error("{0} bytes of memory is not a multiple of 4 KiB: give --mem in MiB (--mem 512M)")]
    Unaligned(u64),
    /// The host would not map that much.
    #[error("this host cannot map {} MiB of guest memory ({reason}): give a smaller --mem", .bytes / MIB)]
    HostRefused {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        reason: FromRangesError,
    },
    /// The CPU's view of the memory could not be built.
    #[error("the CPU cannot use this guest memory: {0}")]
    Cpu(#[from] LayoutError),
}

/// Where RAM of a given size lies: below the hole first, the rest above 4 GiB.
///
/// Each range is start and length in bytes, ascending. The length is not checked here.
#[must_use]
pub fn ram_ranges(bytes: u64) -> Vec<(GuestPhysAddr, u64)> {
    let low = bytes.min(HOLE_START.0);
    let high = bytes.saturating_sub(low);
    [(GuestPhysAddr(0), low), (HOLE_END, high)].into_iter().filter(|(_, len)| *len != 0).collect()
}

/// Maps RAM region by region, each watched from its own first frame on: in `pages`, one for each
/// of them, or else in private memory.
fn map(
    ranges: &[(GuestPhysAddr, u64)],
    code: &Arc<CodeMap>,
    pages: Vec<Pages>,
) -> Result<GuestMemory, FromRangesError> {
    let mut first_frame = 0_u64;
    let mut regions = Vec::new();
    let mut pages = pages.into_iter().map(Arc::new);
    for &(start, len) in ranges {
        let pages = pages.next();
        let watch = CodeWatch::new(Arc::clone(code), first_frame, pages.clone());
        let builder = MmapRegionBuilder::new_with_bitmap(len as usize, watch)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let region: MmapRegion<CodeWatch> = match pages {
            // SAFETY: these pages are as many, and stay mapped as long as the region has its
            // watch.
            Some(pages) => unsafe { builder.with_raw_mmap_pointer(pages.start()) }
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()?,
            None => builder
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
                .build()?,
        };
        let region = GuestRegionMmap::new(region, GuestAddress(start.0))
            .ok_or(FromRangesError::InvalidGuestRegion)?;
        regions.push(region);
        first_frame = first_frame.saturating_add(len / PAGE_SIZE);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// What RAM is made of.
#[derive(Clone, Copy, Debug)]
enum Backing {
    /// Memory of this process alone.
    Private,
    /// What can be mapped again elsewhere, where the host has large pages for it.
    Shared,
}

/// The RAM of one machine, mapped and zeroed. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    mmap: Arc<GuestMemory>,
    code: Arc<CodeMap>,
    /// The file that it is, if it is one.
    shared: Option<Arc<SharedRam>>,
    bytes: u64,
    ranges: Vec<(GuestPhysAddr, u64)>,
}

impl GuestRam {
    /// Maps `bytes` of RAM: private, zeroed, reserved nowhere until touched.
    ///
    /// # Errors
    /// [`MemoryError`] when the size makes no sense or the host refuses it.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::at(bytes, ram_ranges(bytes), Backing::Private)
    }

    /// The same as a file in memory, which can be mapped again elsewhere, if the host has large
    /// pages for that: for a CPU in software that translates.
    ///
    /// # Errors
    /// As for [`GuestRam::new`].
    pub fn shared(bytes: u64) -> Result<Self, MemoryError> {
        Self::at(bytes, ram_ranges(bytes), Backing::Shared)
    }

    /// The same in one stretch from 0, for machines that have no hole below 4 GiB.
    ///
    /// # Errors
    /// As for [`GuestRam::new`].
    pub fn without_hole(bytes: u64) -> Result<Self, MemoryError> {
        Self::at(bytes, vec![(GuestPhysAddr(0), bytes)], Backing::Private)
    }

    fn at(
        bytes: u64,
        ranges: Vec<(GuestPhysAddr, u64)>,
        backing: Backing,
    ) -> Result<Self, MemoryError> {
        if bytes < MIN_RAM {
            return Err(MemoryError::TooSmall(bytes));
        }
        if bytes > MAX_RAM {
            return Err(MemoryError::TooLarge(bytes));
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Unaligned(bytes));
        }
        // usize is 64 bits wide on the only architecture we run on.
        let code = Arc::new(CodeMap::new((bytes / PAGE_SIZE) as usize));
        let refused = |reason| MemoryError::HostRefused { bytes, reason };
        let lens: Vec<u64> = ranges.iter().map(|(_, len)| *len).collect();
        let shared = match backing {
            Backing::Private => None,
            Backing::Shared => Pages::shared(&lens).unwrap_or_else(|error| {
                tracing::debug!(%error, "guest RAM is private: the host has no file for it");
                None
            }),
        };
        let (pages, shared) = shared.unzip();
        let mmap = map(&ranges, &code, pages.unwrap_or_default()).map_err(refused)?;
        let ram = Self { mmap: Arc::new(mmap), code, shared: shared.map(Arc::new), bytes, ranges };
        // A booting kernel touches most small pages it will ever touch once; taking them
        // 512 at a time saves tens of thousands of host page faults, and host TLB misses
        // ever after. Advice only: a host without huge pages loses nothing but speed.
        ram.advise(Advice::LinuxHugepage);
        // What a guest holds in memory has no business in this process's core dump.
        ram.advise(Advice::LinuxDontDump);
        Ok(ram)
    }

    /// How much RAM there is, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is: start and length of each stretch, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<(GuestPhysAddr, u64)> {
        self.ranges.clone()
    }

    /// Where the stretch from 0 ends: below 4 GiB, if there is a hole.
    #[must_use]
    pub fn low_end(&self) -> GuestPhysAddr {
        GuestPhysAddr(self.ranges.first().map_or(0, |(_, len)| *len))
    }

    /// The memory as vm-memory's users (virtio queues, vhost, KVM) want it.
    #[must_use]
    pub fn mmap(&self) -> &Arc<GuestMemory> {
        &self.mmap
    }

    /// The memory as the CPU in software wants it. It keeps the mapping alive.
    ///
    /// # Errors
    /// [`MemoryError::Cpu`] when the CPU cannot address it.
    pub fn phys_memory(&self) -> Result<PhysMemory, MemoryError> {
        let regions: Vec<RamRegion> = self
            .mapped()
            .map(|(start, len, host)| RamRegion { start: GuestPhysAddr(start), len, host })
            .collect();
        // SAFETY: each region is exactly one of vm-memory's mappings: readable, writable,
        // disjoint from the others, and kept mapped by the Arc handed over as owner.
        // vm-memory itself only makes raw and volatile accesses to it, never references.
        let memory = unsafe { PhysMemory::new(&regions, self.code.clone(), self.mmap.clone()) }?;
        Ok(match &self.shared {
            Some(shared) => memory.backed_by(Arc::clone(shared)),
            None => memory,
        })
    }

    /// Makes all RAM zero again and gives its pages back to the host, for a machine that
    /// is loaded anew. No vCPU may be running (they would merely see zeroes, but so
    /// suddenly that nobody could make sense of it).
    pub fn clear(&self) {
        match &self.shared {
            Some(shared) => {
                self.advise(Advice::LinuxRemove);
                shared.cleared();
            }
            None => self.advise(Advice::LinuxDontNeed),
        }
    }

    fn advise(&self, advice: Advice) {
        for (start, len, host) in self.mapped() {
            // SAFETY: the range is one of our own mappings. The advices
            // used here change how pages are backed, or (DONTNEED, REMOVE) make them read as
            // zero, which is a write like a guest's own: no Rust reference covers RAM.
            let done = unsafe { madvise(host.cast(), len as usize, advice) };
            if let Err(error) = done {
                tracing::debug!(start, len, ?advice, %error, "madvise on guest RAM");
            }
        }
    }

    /// Start, length and host address of each mapped stretch.
    fn mapped(&self) -> impl Iterator<Item = (u64, u64, *mut u8)> + '_ {
        self.mmap.iter().filter_map(|region| {
            // The backend always has a host address; one that has none is no RAM of ours.
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
            Some((region.start_addr().0, region.len(), host))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    #[test]
    fn both_views_are_the_same_memory() {
        let ram = GuestRam::new(4096 * MIB).unwrap();
        let cpu = ram.phys_memory().unwrap();
        for addr in [0, 0xbfff_fff8, 0x1_0000_0000, 0x1_3fff_fff8] {
            ram.mmap().write_obj(addr ^ 0x55aa, GuestAddress(addr)).unwrap();
            assert_eq!(cpu.load::<u64>(GuestPhysAddr(addr)), Some(addr ^ 0x55aa));
        }
        assert_eq!(cpu.load::<u64>(HOLE_START), None);
        assert_eq!(cpu.load::<u64>(GuestPhysAddr(0x1_4000_0000)), None);
        ram.clear();
        assert_eq!(cpu.load::<u64>(GuestPhysAddr(0x1_0000_0000)), Some(0));
    }

    #[test]
    fn shared_ram_is_ram() {
        // With a part of a large page at its end, and a part above 4 GiB.
        for bytes in [MIN_RAM, MIN_RAM + 12_288, 3100 * MIB] {
            let ram = GuestRam::shared(bytes).unwrap();
            let cpu = ram.phys_memory().unwrap();
            let last = ram.ranges().last().map(|(start, len)| start.0 + len - 8).unwrap();
            for addr in [0, 0x1f_fff8, last] {
                ram.mmap().write_obj(addr ^ 0x55aa, GuestAddress(addr)).unwrap();
                assert_eq!(cpu.load::<u64>(GuestPhysAddr(addr)), Some(addr ^ 0x55aa));
            }
            ram.clear();
            assert_eq!(cpu.load::<u64>(GuestPhysAddr(last)), Some(0));
            // It lives as long as anybody has it.
            let mmap = ram.mmap().clone();
            drop((ram, cpu));
            mmap.write_obj(7_u64, GuestAddress(last)).unwrap();
        }
    }

    #[test]
    fn a_devices_write_is_told_to_the_cpu() {
        let ram = GuestRam::new(3100 * MIB).unwrap();
        let cpu = ram.phys_memory().unwrap();
        let me = cpu.code().enrol(softcpu::VcpuHandle::new());
        for addr in [0x5000, HOLE_END.0 + 0x3000] {
            let (_, frame) = cpu.page(GuestPhysAddr(addr)).unwrap();
            let ((), version, _) = cpu.code().decode(&me, frame, 64..128, || ());
            ram.mmap().write_slice(&[1; 64], GuestAddress(addr)).unwrap();
            assert_eq!(cpu.code().version(frame), version, "beside the code");
            ram.mmap().write_slice(&[1; 4096], GuestAddress(addr - 4000)).unwrap();
            assert_ne!(cpu.code().version(frame), version, "over the code");
        }
    }

    #[test]
    fn the_cpus_view_keeps_the_mapping() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        let cpu = ram.phys_memory().unwrap();
        drop(ram);
        assert!(cpu.store::<u32>(GuestPhysAddr(MIN_RAM - 4), 7));
    }

    #[test]
    fn sizes_that_make_no_sense_name_the_remedy() {
        let message = |bytes| GuestRam::new(bytes).unwrap_err().to_string();
        assert!(message(MIN_RAM - 1).contains("--mem 32M or more"));
        assert!(message(MIN_RAM + 1).contains("multiple of 4 KiB"));
        assert!(message(u64::MAX).contains("or less"));
    }

    proptest! {
        #[test]
        fn ranges_add_up_and_leave_the_hole(pages in 0..MAX_RAM / PAGE_SIZE) {
            let bytes = pages * PAGE_SIZE;
            let ranges = ram_ranges(bytes);
            prop_assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), bytes);
            for (start, len) in ranges {
                prop_assert!(start.0 + len <= HOLE_START.0 || start >= HOLE_END);
                prop_assert!(len > 0 && len % PAGE_SIZE == 0);
            }
        }
    }
}
