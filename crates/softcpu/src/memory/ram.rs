//! Guest RAM: which guest-physical addresses are memory, and where on the host.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use super::access::{self, Scalar};
use super::code_map::CodeMap;
use super::overlay::{Before, Overlay};
use super::shared::SharedRam;
use crate::addr::{GuestPhysAddr, PAGE_SHIFT, PAGE_SIZE, room_in_page};

/// One stretch of guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    /// First guest-physical address; page-aligned.
    pub start: GuestPhysAddr,
    /// Length in bytes; a multiple of the page size.
    pub len: u64,
    /// Where it is mapped on the host.
    pub host: *mut u8,
}

#[derive(Clone, Copy, Debug)]
struct Placed {
    region: RamRegion,
    /// The number of RAM frames in the regions before this one.
    first_frame: u64,
}

/// A RAM frame by its place among all RAM frames (not its physical page number):
/// the index of everything kept per frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RamFrame(pub u32);

/// All RAM of one machine, shared by its vCPUs.
pub struct PhysMemory {
    regions: Vec<Placed>,
    code: Arc<CodeMap>,
    /// What stands between this memory and the host's pages, if it lies over another.
    overlay: Option<Overlay>,
    /// The file that it is, if it can be mapped again.
    shared: Option<Arc<SharedRam>>,
    /// Whatever owns the host mapping; dropped last.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the host pointers stay valid as long as `_owner` lives, and all access to
// what they point at goes through `access`, whose operations are single machine
// accesses that threads may race on as the guest's own threads do on hardware.
unsafe impl Send for PhysMemory {}
// SAFETY: as above; the other fields are Sync by themselves.
unsafe impl Sync for PhysMemory {}

impl fmt::Debug for PhysMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|placed| placed.region)).finish()
    }
}

/// Why regions do not make a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A region is empty, or not made of whole pages.
    #[error("RAM at {0:?} is not made of whole pages")]
    Unaligned(GuestPhysAddr),
    /// A region overlaps the one before it, or comes before it.
    #[error("RAM at {0:?} overlaps or precedes the region before it")]
    Order(GuestPhysAddr),
    /// More than 2^32 frames, or not as many as the code map has.
    #[error("more RAM than this CPU can address")]
    TooLarge,
}

impl PhysMemory {
    /// Builds the memory from its regions, which are in ascending order. `code` has room
    /// for all their frames, and is shared with whoever else writes to this memory.
    ///
    /// # Safety
    /// Each region's `host..host+len` is mapped readable and writable for as long as
    /// `owner` is alive, is covered by no Rust reference meanwhile, and overlaps no other's.
    ///
    /// # Errors
    /// [`LayoutError`] when the regions do not make sense.
    pub unsafe fn new(
        regions: &[RamRegion],
        code: Arc<CodeMap>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, LayoutError> {
        let mut placed: Vec<Placed> = Vec::with_capacity(regions.len());
        let mut frames = 0_u64;
        let mut end = 0;
        for region in regions {
            let unaligned = region.start.0 % PAGE_SIZE != 0 || region.len % PAGE_SIZE != 0;
            if unaligned
                || region.len == 0
                || !(region.host as usize).is_multiple_of(PAGE_SIZE as usize)
            {
                return Err(LayoutError::Unaligned(region.start));
            }
            if region.start.0 < end {
                return Err(LayoutError::Order(region.start));
            }
            end = region.start.0.checked_add(region.len).ok_or(LayoutError::TooLarge)?;
            placed.push(Placed { region: *region, first_frame: frames });
            // Cannot overflow: the regions do not overlap, so all of them fit in 2^64 bytes.
            frames = frames.saturating_add(region.len >> PAGE_SHIFT);
        }
        if frames > u64::from(u32::MAX) || end > 1 << 52 || code.frames() as u64 != frames {
            return Err(LayoutError::TooLarge);
        }
        Ok(Self { regions: placed, code, overlay: None, shared: None, _owner: owner })
    }

    /// The same memory, which is `shared`.
    #[must_use]
    pub fn backed_by(self, shared: Arc<SharedRam>) -> Self {
        Self { shared: Some(shared), ..self }
    }

    /// The file that can be mapped elsewhere to show the same memory.
    #[must_use]
    pub fn shared(&self) -> Option<&Arc<SharedRam>> {
        self.shared.as_ref()
    }

    /// A memory over `below`, which stores to it leave as it is. It shows what is in
    /// `before` instead of the pages below; with `frozen`, whatever is looked at goes there.
    pub(crate) fn over(
        below: &Arc<Self>,
        code: Arc<CodeMap>,
        before: Before,
        frozen: bool,
    ) -> Self {
        let overlay = Some(Overlay::new(before, frozen));
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(below) as _;
        Self { regions: below.regions.clone(), code, overlay, shared: None, _owner: owner }
    }

    /// What has been decoded as code, to be shared.
    pub(crate) fn code_map(&self) -> &Arc<CodeMap> {
        &self.code
    }

    /// Whether this memory lies over another.
    pub(crate) fn is_overlay(&self) -> bool {
        self.overlay.is_some()
    }

    /// Forgets what was stored to an overlay.
    pub(crate) fn take_back(&self) {
        if let Some(overlay) = &self.overlay {
            overlay.clear();
        }
    }

    /// The frames that have been stored to in an overlay; `None` if this is none.
    pub(crate) fn stored_frames(&self) -> Option<Vec<RamFrame>> {
        self.overlay.as_ref().map(Overlay::stored)
    }

    /// What has been decoded as code.
    #[inline]
    #[must_use]
    pub fn code(&self) -> &CodeMap {
        &self.code
    }

    /// The host address of the page that holds `addr` and its frame, if it is RAM.
    #[inline]
    #[must_use]
    pub fn page(&self, addr: GuestPhysAddr) -> Option<(*mut u8, RamFrame)> {
        let (host, frame) = self.page_below(addr)?;
        let Some(overlay) = &self.overlay else { return Some((host, frame)) };
        // SAFETY: `host` is a mapped page of RAM.
        let (page, _) = unsafe { overlay.page(host, frame, false) };
        Some((page, frame))
    }

    /// The same for who may store there (`stores`) or would like to later. Says whether
    /// that is allowed.
    #[inline]
    pub(crate) fn page_for(
        &self,
        addr: GuestPhysAddr,
        stores: bool,
    ) -> Option<(*mut u8, RamFrame, bool)> {
        let (host, frame) = self.page_below(addr)?;
        let Some(overlay) = &self.overlay else { return Some((host, frame, true)) };
        // SAFETY: `host` is a mapped page of RAM.
        let (page, storable) = unsafe { overlay.page(host, frame, stores) };
        Some((page, frame, storable))
    }

    /// The guest gets at `frame`, which is at `host`.
    #[inline]
    pub(crate) fn used(&self, frame: RamFrame, host: *mut u8) {
        if let Some(shared) = &self.shared {
            shared.used(frame, host);
        }
    }

    /// `addr` is about to be filled by whoever makes the machine: where the host makes a large
    /// page of small ones it copies them, so it is asked for it beforehand.
    pub fn about_to_fill(&self, addr: GuestPhysAddr) {
        if let Some((host, frame)) = self.page_below(addr) {
            self.used(frame, host);
        }
    }

    /// Has the host make large pages of RAM ahead of the guest, until that is
    /// [closed](SharedRam::close_ahead): for a thread that has nothing else to do.
    pub fn work_ahead(&self) {
        if let Some(shared) = &self.shared {
            shared.work_ahead(|frame| self.place(frame).map(|(_, host)| host.cast_mut()));
        }
    }

    /// The bytes of `frame` now: a mapped page, if there is such a frame.
    pub(crate) fn shown(&self, frame: RamFrame) -> Option<*const u8> {
        let shown = self.overlay.as_ref().and_then(|overlay| overlay.shown(frame));
        shown.or_else(|| self.place(frame).map(|(_, host)| host))
    }

    /// Where `frame` is for the guest.
    pub(crate) fn address_of(&self, frame: RamFrame) -> Option<GuestPhysAddr> {
        self.place(frame).map(|(addr, _)| addr)
    }

    /// Where `frame` is for the guest and on the host.
    fn place(&self, frame: RamFrame) -> Option<(GuestPhysAddr, *const u8)> {
        self.regions.iter().find_map(|placed| {
            let within = u64::from(frame.0).checked_sub(placed.first_frame)?;
            let offset = within.checked_mul(PAGE_SIZE)?;
            (offset < placed.region.len).then(|| {
                let host = placed.region.host.wrapping_add(offset as usize).cast_const();
                (placed.region.start.wrapping_add(offset), host)
            })
        })
    }

    #[inline]
    fn page_below(&self, addr: GuestPhysAddr) -> Option<(*mut u8, RamFrame)> {
        let page = addr.page().0;
        self.regions.iter().find_map(|placed| {
            let offset = page.checked_sub(placed.region.start.0)?;
            (offset < placed.region.len).then(|| {
                let frame = placed.first_frame.wrapping_add(offset >> PAGE_SHIFT);
                // `offset` is inside the region, so the pointer stays in its mapping.
                (placed.region.host.wrapping_add(offset as usize), RamFrame(frame as u32))
            })
        })
    }

    /// Loads a value that lies within one page of RAM.
    #[must_use]
    pub fn load<T: Scalar>(&self, addr: GuestPhysAddr) -> Option<T> {
        let (page, _) = self.page(addr)?;
        if u64::from(T::SIZE) > room_in_page(addr.0) {
            return None;
        }
        // SAFETY: `page` is a mapped page of RAM and the value lies within it.
        Some(unsafe { T::load(page.wrapping_add(addr.offset() as usize)) })
    }

    /// Stores a value that lies within one page of RAM; says whether it was RAM.
    pub fn store<T: Scalar>(&self, addr: GuestPhysAddr, value: T) -> bool {
        let Some((page, frame, _)) = self.page_for(addr, true) else { return false };
        if u64::from(T::SIZE) > room_in_page(addr.0) {
            return false;
        }
        // SAFETY: `page` is a mapped page of RAM and the value lies within it.
        unsafe { T::store(page.wrapping_add(addr.offset() as usize), value) };
        self.code.written_from_outside(frame, addr.offset(), u64::from(T::SIZE));
        true
    }

    /// Copies RAM out into `data`; false if any of it is not RAM.
    pub fn read(&self, addr: GuestPhysAddr, data: &mut [u8]) -> bool {
        let mut addr = addr;
        for chunk in pages_of(addr, data) {
            let Some((page, _)) = self.page(addr) else { return false };
            // SAFETY: the chunk lies within this mapped page; `chunk` is ours alone.
            unsafe {
                access::copy(
                    page.wrapping_add(addr.offset() as usize),
                    chunk.as_mut_ptr(),
                    chunk.len(),
                );
            }
            addr = addr.wrapping_add(chunk.len() as u64);
        }
        true
    }

    /// Copies `data` into RAM, as a device's DMA would; false if any of it is not RAM
    /// (what lies before that point has been written).
    pub fn write(&self, addr: GuestPhysAddr, data: &[u8]) -> bool {
        let (mut addr, mut rest) = (addr, data);
        while !rest.is_empty() {
            let Some((page, frame, _)) = self.page_for(addr, true) else { return false };
            let (chunk, after) = rest.split_at(rest.len().min(room_in_page(addr.0) as usize));
            // SAFETY: the chunk lies within this mapped page.
            unsafe {
                access::copy(
                    chunk.as_ptr(),
                    page.wrapping_add(addr.offset() as usize),
                    chunk.len(),
                );
            }
            self.code.written_from_outside(frame, addr.offset(), chunk.len() as u64);
            addr = addr.wrapping_add(chunk.len() as u64);
            rest = after;
        }
        true
    }

    /// Atomically replaces a naturally aligned 32- or 64-bit value: the page walker's
    /// accessed and dirty bits. Returns whether `old` was there.
    #[must_use]
    pub fn compare_exchange<T: Exchange>(&self, addr: GuestPhysAddr, old: T, new: T) -> bool {
        if !addr.0.is_multiple_of(u64::from(T::SIZE)) {
            return false;
        }
        let Some((mut page, frame)) = self.page_below(addr) else { return false };
        if let Some(overlay) = &self.overlay {
            // SAFETY: `page` is a mapped page of RAM.
            match unsafe { overlay.page_to_mark(page, frame) } {
                Some(own) => page = own,
                None => return true,
            }
        }
        // SAFETY: mapped RAM, naturally aligned, so within the page.
        let done =
            unsafe { T::compare_exchange(page.wrapping_add(addr.offset() as usize), old, new) };
        if done {
            self.code.written(frame, addr.offset(), u64::from(T::SIZE));
        }
        done
    }
}

/// A scalar that the page walker swaps atomically.
pub trait Exchange: Scalar {
    /// `lock cmpxchg`.
    ///
    /// # Safety
    /// `ptr` is naturally aligned and mapped writable.
    unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> bool;
}

macro_rules! exchange {
    ($t:ty, $atomic:ty) => {
        impl Exchange for $t {
            #[inline]
            unsafe fn compare_exchange(ptr: *mut u8, old: Self, new: Self) -> bool {
                use std::sync::atomic::Ordering::SeqCst;
                // SAFETY: aligned and mapped says the caller; atomics may be raced on.
                let cell = unsafe { <$atomic>::from_ptr(ptr.cast()) };
                cell.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
            }
        }
    };
}
exchange!(u32, std::sync::atomic::AtomicU32);
exchange!(u64, std::sync::atomic::AtomicU64);

/// Splits `data`, which starts at `addr`, at page boundaries.
fn pages_of(addr: GuestPhysAddr, data: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    let first = data.len().min(room_in_page(addr.0) as usize);
    let (head, tail) = data.split_at_mut(first);
    std::iter::once(head)
        .chain(tail.chunks_mut(PAGE_SIZE as usize))
        .filter(|chunk| !chunk.is_empty())
}
