//! Signals: frames pushed on user stacks by the kernel and popped again by `sigreturn`, with
//! the whole register and vector state in them.

use crate::memory::{Mapping, PAGE};
use crate::{Outcome, ensure};
use std::arch::asm;
use std::hint::black_box;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs `handler` for `signal`; the previous action comes back when this is dropped.
struct Installed {
    signal: i32,
    before: libc::sigaction,
}

impl Installed {
    fn new(signal: i32, handler: Handler, flags: i32) -> Result<Self, String> {
        // SAFETY: zero is a valid sigaction; every field that matters is set below.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | flags;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: both point to live sigactions; the handlers here only touch atomics and
        // the context they are given.
        let result = unsafe { libc::sigaction(signal, &action, &mut before) };
        ensure!(result == 0, "sigaction({signal}): {}", io::Error::last_os_error());
        Ok(Self { signal, before })
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // SAFETY: `before` came from sigaction.
        unsafe { libc::sigaction(self.signal, &self.before, ptr::null_mut()) };
    }
}

static COUNT: AtomicU32 = AtomicU32::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicU32 = AtomicU32::new(0);

/// Notes address and code, and makes the page accessible so that the access succeeds when
/// the handler returns.
extern "C" fn on_segv(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO: the kernel passes a valid siginfo.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    ADDRESS.store(address, Ordering::SeqCst);
    CODE.store(code as u32, Ordering::SeqCst);
    COUNT.fetch_add(1, Ordering::SeqCst);
    let page = (address & !(PAGE - 1)) as *mut libc::c_void;
    // SAFETY: the faulting page belongs to the mapping of the check below. If it does not,
    // the fault repeats, which the count shows.
    unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    if COUNT.load(Ordering::SeqCst) > 10_000 {
        std::process::abort();
    }
}

/// Faults on inaccessible pages, with the right address and code in `siginfo`, and the
/// faulting instruction restarted.
pub fn segv_with_info() -> Outcome {
    const PAGES: usize = 64;
    COUNT.store(0, Ordering::SeqCst);
    let _handler = Installed::new(libc::SIGSEGV, on_segv, 0)?;
    let memory = Mapping::new(PAGES, libc::PROT_NONE)?;
    for page in 0..PAGES {
        // SAFETY: within the mapping; the handler makes it accessible.
        unsafe {
            let byte = memory.start().add(page * PAGE + page);
            byte.write_volatile(page as u8);
            ensure!(
                ADDRESS.load(Ordering::SeqCst) == byte as usize,
                "si_addr is {:#x}, not {byte:?}",
                ADDRESS.load(Ordering::SeqCst)
            );
            ensure!(byte.read_volatile() == page as u8, "the restarted store was lost");
        }
    }
    let count = COUNT.load(Ordering::SeqCst);
    ensure!(count == PAGES as u32, "{count} faults for {PAGES} pages");
    // SEGV_ACCERR: mapped, but not allowed.
    ensure!(CODE.load(Ordering::SeqCst) == 2, "si_code is {}", CODE.load(Ordering::SeqCst));

    // A store over a page boundary whose second half faults must happen whole or not at all.
    memory.protect(libc::PROT_NONE)?;
    // SAFETY: within the mapping; both pages fault in turn.
    let got = unsafe {
        let place = memory.start().add(PAGE - 3).cast::<u64>();
        place.write_unaligned(0x1122_3344_5566_7788);
        black_box(place).read_unaligned()
    };
    ensure!(got == 0x1122_3344_5566_7788, "a store across two faulting pages gave {got:#x}");
    Ok(())
}

/// Steps over the two-byte `div ecx` and notes the code.
extern "C" fn on_fpe(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // SAFETY: SA_SIGINFO: both pointers are valid; moving RIP past the faulting instruction
    // is what this handler is for.
    unsafe {
        CODE.store((*info).si_code as u32, Ordering::SeqCst);
        let context = &mut *context.cast::<libc::ucontext_t>();
        context.uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = 1234;
    }
}

/// A divide error, handled by changing registers in the signal frame.
pub fn divide_error() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    let _handler = Installed::new(libc::SIGFPE, on_fpe, 0)?;
    let result: u64;
    // SAFETY: the handler skips `div ecx` (F7 F1) and sets RAX.
    unsafe {
        asm!("div ecx", inout("rax") 1u64 => result, inout("rdx") 0u64 => _, inout("rcx") 0u64 => _);
    }
    ensure!(COUNT.load(Ordering::SeqCst) == 1, "{} SIGFPEs", COUNT.load(Ordering::SeqCst));
    ensure!(CODE.load(Ordering::SeqCst) == 1, "si_code is not FPE_INTDIV");
    ensure!(result == 1234, "the register set in the signal frame is {result}");
    Ok(())
}

extern "C" fn on_count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
}

/// Turns the interval timer off again when dropped.
struct Interval;

impl Interval {
    fn every(period: Duration) -> Self {
        let period = libc::timeval { tv_sec: 0, tv_usec: period.subsec_micros().into() };
        let timer = libc::itimerval { it_interval: period, it_value: period };
        // SAFETY: a valid itimerval; SIGALRM has a handler whenever this is used.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) };
        Self
    }
}

impl Drop for Interval {
    fn drop(&mut self) {
        // SAFETY: zero is a valid itimerval and means off.
        unsafe {
            let off: libc::itimerval = MaybeUninit::zeroed().assume_init();
            libc::setitimer(libc::ITIMER_REAL, &off, ptr::null_mut());
        }
    }
}

/// A timer signal interrupts a computing loop, several times.
pub fn alarm() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    let _handler = Installed::new(libc::SIGALRM, on_count, 0)?;
    let _timer = Interval::every(Duration::from_millis(10));
    let start = Instant::now();
    while COUNT.load(Ordering::SeqCst) < 5 {
        ensure!(start.elapsed() < Duration::from_secs(20), "fewer than 5 alarms in 20 s");
    }
    Ok(())
}

extern "C" fn on_alternate(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let here = 0u8;
    ADDRESS.store(black_box(&here) as *const u8 as usize, Ordering::SeqCst);
}

/// A handler on its own stack really runs there.
pub fn alternate_stack() -> Outcome {
    const PAGES: usize = 16;
    let memory = Mapping::new(PAGES, libc::PROT_READ | libc::PROT_WRITE)?;
    let stack = libc::stack_t { ss_sp: memory.start().cast(), ss_flags: 0, ss_size: PAGES * PAGE };
    // SAFETY: zero is a valid stack_t.
    let mut before: libc::stack_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the stack outlives its use: the old one is put back below.
    let result = unsafe { libc::sigaltstack(&stack, &mut before) };
    ensure!(result == 0, "sigaltstack: {}", io::Error::last_os_error());
    ADDRESS.store(0, Ordering::SeqCst);
    let handler = Installed::new(libc::SIGUSR1, on_alternate, libc::SA_ONSTACK)?;
    // SAFETY: SIGUSR1 has a handler; the previous alternate stack is valid.
    unsafe {
        libc::raise(libc::SIGUSR1);
        libc::sigaltstack(&before, ptr::null_mut());
    }
    drop(handler);
    let address = ADDRESS.load(Ordering::SeqCst);
    let range = memory.start() as usize..memory.start() as usize + PAGES * PAGE;
    ensure!(range.contains(&address), "the handler ran at {address:#x}, outside {range:x?}");
    Ok(())
}

/// Spoils the vector and x87 registers.
extern "C" fn on_spoil(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the registers are declared as clobbered; the x87 stack is emptied again.
    unsafe {
        asm!(
            "pcmpeqd xmm0, xmm0",
            "pcmpeqd xmm7, xmm7",
            "pcmpeqd xmm15, xmm15",
            "fninit",
            out("xmm0") _, out("xmm7") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

/// Vector and x87 registers hold their values while signal handlers use the same ones.
pub fn float_state_survives() -> Outcome {
    COUNT.store(0, Ordering::SeqCst);
    let _handler = Installed::new(libc::SIGALRM, on_spoil, 0)?;
    let _timer = Interval::every(Duration::from_millis(5));
    let start = Instant::now();
    let mut round = 0u64;
    while COUNT.load(Ordering::SeqCst) < 5 {
        ensure!(start.elapsed() < Duration::from_secs(20), "fewer than 5 alarms in 20 s");
        round += 1;
        let (low, high, x87): (u64, u64, u64);
        let mut kept = round;
        // SAFETY: the x87 stack is balanced; operands are live locals.
        unsafe {
            asm!(
                "movq xmm7, {round}",
                "movq xmm15, {round}",
                "fild qword ptr [{kept}]",
                "mov ecx, 3000",
                "2:",
                "dec ecx",
                "jnz 2b",
                "fistp qword ptr [{kept}]",
                "movq {low}, xmm7",
                "movq {high}, xmm15",
                round = in(reg) round,
                kept = in(reg) &mut kept,
                low = lateout(reg) low,
                high = lateout(reg) high,
                out("ecx") _, out("xmm7") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        x87 = kept;
        ensure!(
            (low, high, x87) == (round, round, round),
            "in round {round}: xmm7 {low}, xmm15 {high}, st0 {x87}"
        );
    }
    Ok(())
}
