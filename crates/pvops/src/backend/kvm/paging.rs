//! Page tables by hypercall, in batches: KVM's `MMU_OP`.
//!
//! Before hardware walked nested page tables, KVM shadowed the guest's, and each write to
//! them trapped. Guests could queue their writes instead while the kernel was in lazy mode,
//! and hand over many in one hypercall. Hosts stopped offering it once it was slower than
//! the hardware's way; the ops are only bound on hosts that do offer it.

use crate::backend::installed::Installed;
use crate::families::mmu;
use crate::families::types::{Mm, Pgd, Pmd, Pte, Pud};
use crate::{BindError, Binding, Bindings, Plain};

use super::Features;

/// The hypercall's number; its arguments are the length of a buffer in bytes and its
/// physical address. It returns how many bytes it took.
pub const HYPERCALL: u32 = 2;

const WRITE_PTE: u32 = 1;
const FLUSH_TLB: u32 = 2;
const RELEASE_PT: u32 = 3;

/// Bytes in a queue.
const CAPACITY: usize = 1024;

/// One CPU's pending operations.
#[derive(Debug)]
#[repr(C, align(8))]
pub struct Queue {
    bytes: [u8; CAPACITY],
    len: usize,
    lazy: bool,
}

/// The host did not take an operation: page tables are not what the kernel believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Bytes it did not take.
    pub left: usize,
    /// What the hypercall returned.
    pub status: u64,
}

impl Queue {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; CAPACITY], len: 0, lazy: false }
    }

    fn add(&mut self, batches: &Batches, op: u32, words: &[u64]) -> Result<(), Refused> {
        // A header (operation, padding), then the words.
        let len = 8 + 8 * words.len();
        if self.len + len > CAPACITY {
            self.flush(batches)?;
        }
        let Some(space) = self.bytes.get_mut(self.len..self.len + len) else {
            return Err(Refused { left: len, status: 0 });
        };
        for (to, word) in space.chunks_exact_mut(8).zip([&u64::from(op)].into_iter().chain(words)) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.len += len;
        if self.lazy { Ok(()) } else { self.flush(batches) }
    }

    fn flush(&mut self, batches: &Batches) -> Result<(), Refused> {
        let mut done = 0;
        while let Some(rest) = self.bytes.get(done..self.len).filter(|rest| !rest.is_empty()) {
            let status = (batches.hypercall)(rest.len(), (batches.physical)(rest.as_ptr().cast()));
            let taken = usize::try_from(status).unwrap_or(usize::MAX);
            // Nothing, too much, or an error number: it will not get better.
            if taken == 0 || taken > rest.len() {
                return Err(Refused { left: rest.len(), status });
            }
            done += taken;
        }
        self.len = 0;
        Ok(())
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self::new()
    }
}

/// What the ops need of the kernel.
#[derive(Debug)]
pub struct Batches {
    /// This CPU's queue. The ops use it for their own time only; the kernel calls them
    /// where nothing else runs on the CPU that would (preemption off, none from
    /// interrupts), as it does natively.
    pub queue: fn() -> *mut Queue,
    /// The physical address of an entry or of a queue's bytes.
    pub physical: fn(*const ()) -> u64,
    /// Makes [`HYPERCALL`]: length, physical address; bytes taken.
    pub hypercall: fn(usize, u64) -> u64,
    /// Gives up: the host refused a write the kernel relies on.
    pub refused: fn(Refused) -> !,
}

static BATCHES: Installed<Batches> = Installed::empty();

fn with_queue(act: impl FnOnce(&'static Batches, &mut Queue) -> Result<(), Refused>) {
    if let Some(batches) = BATCHES.get() {
        // SAFETY: this CPU's, and nobody else's meanwhile: `Batches::queue` says so.
        let queue = unsafe { &mut *(batches.queue)() };
        if let Err(refused) = act(batches, queue) {
            (batches.refused)(refused);
        }
    }
}

fn write(entry: *const (), value: u64) {
    with_queue(|batches, queue| queue.add(batches, WRITE_PTE, &[(batches.physical)(entry), value]));
}

unsafe extern "sysv64" fn set_pte(entry: *mut Pte, value: Pte) {
    write(entry.cast(), value.0);
}

unsafe extern "sysv64" fn set_pte_at(_mm: *mut Mm, _address: usize, entry: *mut Pte, value: Pte) {
    write(entry.cast(), value.0);
}

unsafe extern "sysv64" fn set_pmd(entry: *mut Pmd, value: Pmd) {
    write(entry.cast(), value.0);
}

unsafe extern "sysv64" fn set_pud(entry: *mut Pud, value: Pud) {
    write(entry.cast(), value.0);
}

unsafe extern "sysv64" fn set_pgd(entry: *mut Pgd, value: Pgd) {
    write(entry.cast(), value.0);
}

unsafe extern "sysv64" fn pte_clear(_mm: *mut Mm, _address: usize, entry: *mut Pte) {
    write(entry.cast(), 0);
}

unsafe extern "sysv64" fn pmd_clear(entry: *mut Pmd) {
    write(entry.cast(), 0);
}

unsafe extern "sysv64" fn flush_tlb_user() {
    with_queue(|batches, queue| queue.add(batches, FLUSH_TLB, &[]));
}

/// Bits of an address within a frame.
const FRAME_SHIFT: u32 = 12;

unsafe extern "sysv64" fn release(frame: usize) {
    let address = (frame as u64) << FRAME_SHIFT;
    with_queue(|batches, queue| queue.add(batches, RELEASE_PT, &[address]));
}

unsafe extern "sysv64" fn lazy_enter() {
    with_queue(|_, queue| {
        queue.lazy = true;
        Ok(())
    });
}

unsafe extern "sysv64" fn lazy_leave() {
    with_queue(|batches, queue| {
        queue.lazy = false;
        queue.flush(batches)
    });
}

/// Page-table ops by hypercall, if the host takes them.
///
/// # Errors
/// When one is bound already.
pub fn bind_paging(
    bindings: &mut Bindings<mmu::Family>,
    host: Features,
    batches: &'static Batches,
) -> Result<(), BindError> {
    type Set<E> = Plain<unsafe extern "sysv64" fn(*mut E, E)>;
    type SetAt = Plain<unsafe extern "sysv64" fn(*mut Mm, usize, *mut Pte, Pte)>;
    type Clear = Plain<unsafe extern "sysv64" fn(*mut Mm, usize, *mut Pte)>;
    type Nullary = Plain<unsafe extern "sysv64" fn()>;
    if !host.has(Features::MMU_OP) {
        return Ok(());
    }
    let (pte, pmd): (Set<Pte>, Set<Pmd>) = (Plain::new(set_pte), Plain::new(set_pmd));
    let (pud, pgd): (Set<Pud>, Set<Pgd>) = (Plain::new(set_pud), Plain::new(set_pgd));
    let (at, clear): (SetAt, Clear) = (Plain::new(set_pte_at), Plain::new(pte_clear));
    let clear_pmd: Plain<unsafe extern "sysv64" fn(*mut Pmd)> = Plain::new(pmd_clear);
    let free: Plain<unsafe extern "sysv64" fn(usize)> = Plain::new(release);
    let (flush, enter, leave): (Nullary, Nullary, Nullary) =
        (Plain::new(flush_tlb_user), Plain::new(lazy_enter), Plain::new(lazy_leave));
    bindings
        .bind(mmu::op::SetPte, Binding::call(pte))?
        .bind(mmu::op::SetPteAtomic, Binding::call(pte))?
        .bind(mmu::op::SetPteAt, Binding::call(at))?
        .bind(mmu::op::PtepModifyProtCommit, Binding::call(at))?
        .bind(mmu::op::SetPmd, Binding::call(pmd))?
        .bind(mmu::op::SetPud, Binding::call(pud))?
        .bind(mmu::op::SetPgd, Binding::call(pgd))?
        .bind(mmu::op::PteClear, Binding::call(clear))?
        .bind(mmu::op::PmdClear, Binding::call(clear_pmd))?
        .bind(mmu::op::FlushTlbUser, Binding::call(flush))?
        .bind(mmu::op::ReleasePte, Binding::call(free))?
        .bind(mmu::op::ReleasePmd, Binding::call(free))?
        .bind(mmu::op::ReleasePud, Binding::call(free))?
        .bind(mmu::op::LazyEnter, Binding::call(enter))?
        .bind(mmu::op::LazyLeave, Binding::call(leave))?;
    BATCHES.set(batches);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(hypercall: fn(usize, u64) -> u64) -> Batches {
        Batches {
            queue: core::ptr::null_mut,
            physical: |pointer| pointer.addr() as u64,
            hypercall,
            refused: |refused| panic!("{refused:?}"),
        }
    }

    #[test]
    fn a_host_may_take_it_in_parts() {
        let batches = batches(|len, _| len.min(8) as u64);
        let mut queue = Queue { lazy: true, ..Queue::new() };
        queue.add(&batches, WRITE_PTE, &[1, 2]).expect("queued");
        queue.add(&batches, FLUSH_TLB, &[]).expect("queued");
        assert_eq!(queue.len, 32);
        queue.flush(&batches).expect("taken");
        assert_eq!(queue.len, 0);
    }

    #[test]
    fn a_host_that_takes_nothing_or_too_much_is_told_of() {
        for answer in
            [(|_, _| 0) as fn(usize, u64) -> u64, |_, _| u64::MAX, |len, _| len as u64 + 1]
        {
            let batches = batches(answer);
            let refused = Queue::new().add(&batches, WRITE_PTE, &[1, 2]).expect_err("refused");
            assert_eq!((refused.left, refused.status), (24, answer(24, 0)));
        }
    }

    #[test]
    fn a_full_queue_is_handed_over() {
        let batches = batches(|len, _| {
            assert!(len > CAPACITY - 24);
            len as u64
        });
        let mut queue = Queue { lazy: true, ..Queue::new() };
        for i in 0..CAPACITY as u64 {
            queue.add(&batches, WRITE_PTE, &[i, i]).expect("taken");
            assert!(queue.len <= CAPACITY);
        }
    }
}
