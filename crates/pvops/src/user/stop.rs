//! Stopping every other thread of the process, outside the sites.
//!
//! Each thread gets a signal; its handler notes where the thread was and waits. When all
//! wait and none was strictly inside a site, the text may change. A thread caught inside
//! (between two instructions of an inlined body) is let go and asked again.
//!
//! Nothing here allocates or takes a lock that a stopped thread might hold.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::sys;
use crate::error::TextError;
use crate::text::Spans;

/// The most threads a process may have for this.
const MAX_THREADS: usize = 512;
/// How often a thread may be caught inside a site before giving up.
const TRIES: usize = 10_000;
/// How long to wait for a thread's handler, in steps of [`STEP_NS`].
const PATIENCE: usize = 100_000;
const STEP_NS: u64 = 20_000;

/// Whether somebody is stopping the world; one at a time.
static BUSY: AtomicBool = AtomicBool::new(false);
/// Number of the stop in progress; threads wait for it to change.
static ROUND: AtomicU32 = AtomicU32::new(0);
/// The round that a handler may take part in, or 0: late signals of past rounds pass.
static OPEN: AtomicU32 = AtomicU32::new(0);
/// Threads that arrived in this round.
static ARRIVED: AtomicU32 = AtomicU32::new(0);
/// Where each of them was: instruction pointers.
static PLACES: [AtomicU64; MAX_THREADS] = [const { AtomicU64::new(0) }; MAX_THREADS];
/// Threads inside the handler.
static INSIDE: AtomicU32 = AtomicU32::new(0);

/// The ability to stop the process's other threads.
#[derive(Debug)]
pub(super) struct World {
    signal: i32,
    stopped: bool,
}

/// `struct kernel_sigaction` of x86-64.
#[repr(C)]
struct KernelSigaction {
    handler: unsafe extern "C" fn(i32, *const u8, *const u8),
    flags: u64,
    restorer: unsafe extern "C" fn(),
    mask: u64,
}

const SA_SIGINFO: u64 = 4;
const SA_RESTORER: u64 = 0x0400_0000;
const SA_RESTART: u64 = 0x1000_0000;

/// Offset of RIP in `ucontext_t`: flags and link, the signal stack, then REG_RIP (16)
/// among the general registers.
const UCONTEXT_RIP: usize = 8 + 8 + 24 + 16 * 8;

#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    naked_asm!("mov eax, {number}", "syscall", number = const sys::RT_SIGRETURN)
}

/// Notes where the thread was and waits for the round to end.
unsafe extern "C" fn handler(_signal: i32, _info: *const u8, context: *const u8) {
    INSIDE.fetch_add(1, Ordering::SeqCst);
    let round = OPEN.load(Ordering::SeqCst);
    if round != 0 && round == ROUND.load(Ordering::SeqCst) {
        // SAFETY: the kernel passes a whole ucontext, and RIP lies at this offset.
        let rip = unsafe { context.add(UCONTEXT_RIP).cast::<u64>().read() };
        let mine = ARRIVED.fetch_add(1, Ordering::SeqCst) as usize;
        if let Some(place) = PLACES.get(mine) {
            place.store(rip, Ordering::SeqCst);
        }
        while ROUND.load(Ordering::SeqCst) == round {
            let address = ROUND.as_ptr().addr();
            let wait = [address, sys::FUTEX_WAIT_PRIVATE, round as usize, 0, 0, 0];
            // SAFETY: waits on our own word.
            let _ = unsafe { sys::call(sys::FUTEX, wait) };
        }
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
}

impl World {
    /// Installs the handler.
    pub(super) fn new(signal: i32) -> Result<Self, TextError> {
        let action = KernelSigaction {
            handler,
            flags: SA_SIGINFO | SA_RESTORER | SA_RESTART,
            restorer,
            // All signals: a handler of the program must not run a site meanwhile.
            mask: !0,
        };
        let args = [signal as usize, (&raw const action).addr(), 0, 8, 0, 0];
        // SAFETY: a whole, valid action; the handler is safe to run anywhere.
        unsafe { sys::ask("rt_sigaction", sys::RT_SIGACTION, args)? };
        Ok(Self { signal, stopped: false })
    }

    /// Stops all others. On success they are, until `resume`.
    pub(super) fn stop(&mut self, spans: Spans<'_>) -> Result<(), TextError> {
        acquire();
        for _ in 0..TRIES {
            let stopped = self.stop_once();
            let inside = || {
                let arrived = ARRIVED.load(Ordering::SeqCst) as usize;
                PLACES.iter().take(arrived).any(|p| spans.inside(p.load(Ordering::SeqCst)))
            };
            match stopped {
                Ok(()) if !inside() => {
                    self.stopped = true;
                    return Ok(());
                }
                Ok(()) => release(),
                Err(error) => {
                    release();
                    BUSY.store(false, Ordering::SeqCst);
                    return Err(error);
                }
            }
        }
        BUSY.store(false, Ordering::SeqCst);
        Err(TextError::NotStopped)
    }

    /// Lets them go on.
    pub(super) fn resume(&mut self) {
        if core::mem::take(&mut self.stopped) {
            release();
            BUSY.store(false, Ordering::SeqCst);
        }
    }

    /// One round: signals every thread until no new one turns up.
    fn stop_once(&self) -> Result<(), TextError> {
        ARRIVED.store(0, Ordering::SeqCst);
        let round = ROUND.load(Ordering::SeqCst).wrapping_add(1).max(1);
        ROUND.store(round, Ordering::SeqCst);
        OPEN.store(round, Ordering::SeqCst);

        let mut asked = [0u32; MAX_THREADS];
        let mut count = 0;
        loop {
            let before = count;
            let mut full = false;
            each_thread(|tid| {
                if asked[..count].contains(&tid) {
                    return;
                }
                if count == MAX_THREADS {
                    full = true;
                } else if signal(tid, self.signal) {
                    asked[count] = tid;
                    count += 1;
                }
            })?;
            if full {
                return Err(TextError::TooManyThreads);
            }
            // A thread may end before its signal arrives: count those that are left.
            wait_until(|| {
                let gone = asked[..count].iter().filter(|tid| !signal(**tid, 0)).count();
                ARRIVED.load(Ordering::SeqCst) as usize + gone >= count
            })?;
            // All known ones are stopped; whom they started before that, if anyone, is
            // new. When nobody is, nobody is left to start more.
            if count == before {
                return Ok(());
            }
        }
    }
}

/// Ends the round and waits until every handler is about to return, so that none of them
/// takes the next round for its own.
fn release() {
    OPEN.store(0, Ordering::SeqCst);
    let round = ROUND.load(Ordering::SeqCst).wrapping_add(1).max(1);
    ROUND.store(round, Ordering::SeqCst);
    let wake = [ROUND.as_ptr().addr(), sys::FUTEX_WAKE_PRIVATE, i32::MAX as usize, 0, 0, 0];
    // SAFETY: wakes waiters of our own word.
    let _ = unsafe { sys::call(sys::FUTEX, wake) };
    let _ = wait_until(|| INSIDE.load(Ordering::SeqCst) == 0);
}

/// Takes the right to stop the world, or to change the text otherwise.
fn acquire() {
    while BUSY.swap(true, Ordering::SeqCst) {
        // The one who is busy may stop this very thread here, and then goes on.
        yield_now();
    }
}

/// Keeps everybody else from stopping the world until it is dropped.
pub(super) struct Exclusive(());

/// See [`Exclusive`].
pub(super) fn exclusive() -> Exclusive {
    acquire();
    Exclusive(())
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        BUSY.store(false, Ordering::SeqCst);
    }
}

fn yield_now() {
    // SAFETY: gives up the CPU for a moment.
    let _ = unsafe { sys::call(sys::SCHED_YIELD, [0; 6]) };
}

fn wait_until(done: impl Fn() -> bool) -> Result<(), TextError> {
    for step in 0..PATIENCE {
        if done() {
            return Ok(());
        }
        if step < 100 {
            yield_now();
        } else {
            let time = [0u64, STEP_NS];
            // SAFETY: a timespec of our own.
            let _ = unsafe { sys::call(sys::NANOSLEEP, [time.as_ptr().addr(), 0, 0, 0, 0, 0]) };
        }
    }
    Err(TextError::NotStopped)
}

/// Sends a signal (or, for 0, none) to a thread of this process. False if there is none.
fn signal(tid: u32, signal: i32) -> bool {
    // SAFETY: to our own process; the handler is installed.
    let sent = unsafe {
        let pid = sys::call(sys::GETPID, [0; 6]).unwrap_or(0);
        sys::call(sys::TGKILL, [pid, tid as usize, signal as usize, 0, 0, 0])
    };
    sent != Err(sys::ESRCH)
}

/// Calls `visit` with the number of every other thread.
fn each_thread(mut visit: impl FnMut(u32)) -> Result<(), TextError> {
    const O_DIRECTORY: usize = 0o200_000;
    const O_CLOEXEC: usize = 0o2_000_000;
    let path = c"/proc/self/task".as_ptr().addr();
    // SAFETY: calls on our own memory and descriptor.
    unsafe {
        let me = sys::call(sys::GETTID, [0; 6]).unwrap_or(0) as u32;
        let open = [path, O_DIRECTORY | O_CLOEXEC, 0, 0, 0, 0];
        let fd = sys::ask("open /proc/self/task", sys::OPEN, open)?;
        let mut buffer = [0u8; 2048];
        let read = loop {
            let args = [fd, buffer.as_mut_ptr().addr(), buffer.len(), 0, 0, 0];
            match sys::ask("getdents64", sys::GETDENTS64, args) {
                Ok(0) => break Ok(()),
                Ok(len) => entries(buffer.get(..len).unwrap_or(&[]), |tid| {
                    if tid != me {
                        visit(tid);
                    }
                }),
                Err(error) => break Err(error),
            }
        };
        let _ = sys::call(sys::CLOSE, [fd, 0, 0, 0, 0, 0]);
        read
    }
}

/// The numeric names in a buffer of `struct linux_dirent64`.
fn entries(mut buffer: &[u8], mut visit: impl FnMut(u32)) {
    // Inode and offset, record length, type, then the name.
    const LENGTH: usize = 16;
    const NAME: usize = 19;
    while let Some(&[low, high]) = buffer.get(LENGTH..LENGTH + 2) {
        let len = usize::from(u16::from_le_bytes([low, high]));
        let Some(name) = buffer.get(NAME..len) else { return };
        let digits = name.iter().take_while(|b| **b != 0);
        let number = digits.copied().try_fold(0u32, |number, digit| {
            let digit = digit.is_ascii_digit().then(|| u32::from(digit - b'0'))?;
            number.checked_mul(10)?.checked_add(digit)
        });
        if let Some(number) = number.filter(|n| *n != 0) {
            visit(number);
        }
        buffer = buffer.get(len..).unwrap_or(&[]);
    }
}
