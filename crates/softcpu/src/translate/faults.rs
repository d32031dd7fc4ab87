//! Faults of the host in translated code: accesses through the mirror.
//!
//! The kernel tells of them by SIGSEGV, on the thread that runs the vCPU and at the very
//! instruction, so the handler is as good as a call from there: translated code holds no lock
//! and no borrow. It shows the page, if the guest may have it, and has the instruction tried
//! again; or it goes on in the code where that access lands. Any other fault is whoever's it was
//! before.

use std::cell::{Cell, OnceCell};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::vcpu::Vcpu;

/// Bytes of the stack that handlers run on: a walk of page tables, and the host's registers.
const STACK: usize = 256 << 10;

/// The vCPU whose translated code this thread runs, and where that is.
#[derive(Clone, Copy)]
struct Running {
    cpu: *mut Vcpu,
    start: u64,
    end: u64,
}

const NOBODY: Running = Running { cpu: ptr::null_mut(), start: 0, end: 0 };

thread_local! {
    static RUNNING: Cell<Running> = const { Cell::new(NOBODY) };
}

/// Who handled the signal before.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();

/// Says, until it is dropped, that this thread runs translated code of a vCPU.
pub(super) struct Guard;

impl Guard {
    /// For `cpu`, whose code memory is executed from `start` to `end`.
    pub(super) fn new(cpu: *mut Vcpu, start: u64, end: u64) -> Self {
        RUNNING.set(Running { cpu, start, end });
        Self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RUNNING.set(NOBODY);
    }
}

/// Where all code memory lies that this process has ever had: what faults elsewhere is not
/// looked at any closer, for which this thread's own data would have to be at hand.
static START: AtomicU64 = AtomicU64::new(u64::MAX);
static END: AtomicU64 = AtomicU64::new(0);

/// Has this process's faults come by here, those in the code from `start` to `end` among them.
pub(super) fn handle(start: u64, end: u64) {
    START.fetch_min(start, Relaxed);
    END.fetch_max(end, Relaxed);
    FORMER.get_or_init(|| {
        let mut former = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: zeroes are a `sigaction`.
        let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: a handler of the form that the flags say, which does nothing but what it may:
        // see there. What is filled in is a `sigaction` again.
        unsafe {
            libc::sigaction(libc::SIGSEGV, &raw const action, former.as_mut_ptr());
            former.assume_init()
        }
    });
}

/// A stack for a thread's handlers, which has room for what ours does.
struct HandlerStack(Box<[MaybeUninit<u8>]>);

thread_local! {
    static HANDLER_STACK: OnceCell<HandlerStack> = const { OnceCell::new() };
}

/// Has this thread's handlers run on a stack that is large enough.
pub(super) fn prepare_thread() {
    HANDLER_STACK.with(|stack| {
        stack.get_or_init(|| {
            let mut memory = Box::new_uninit_slice(STACK);
            let ss_sp = memory.as_mut_ptr().cast();
            let stack = libc::stack_t { ss_sp, ss_flags: 0, ss_size: STACK };
            // SAFETY: memory of this size that nothing else uses, as long as it is in use.
            unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) };
            HandlerStack(memory)
        });
    });
}

impl Drop for HandlerStack {
    fn drop(&mut self) {
        let ss_sp = self.0.as_mut_ptr().cast();
        let none = libc::stack_t { ss_sp, ss_flags: libc::SS_DISABLE, ss_size: STACK };
        // SAFETY: the thread ends, and has no handler of its own any more.
        unsafe { libc::sigaltstack(&raw const none, ptr::null_mut()) };
    }
}

/// Bit of a page fault's error code: it was a store.
const STORES: i64 = 1 << 1;

/// The handler.
extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel has made both, for this handler.
    let (registers, address) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        (&mut context.uc_mcontext.gregs, (*info).si_addr() as u64)
    };
    let [rip, error] = [libc::REG_RIP, libc::REG_ERR]
        .map(|register| registers.get(register as usize).copied().unwrap_or_default());
    let ours = (START.load(Relaxed)..END.load(Relaxed)).contains(&(rip as u64));
    let running = if ours { RUNNING.get() } else { NOBODY };
    if (running.start..running.end).contains(&(rip as u64)) {
        // SAFETY: `run_translated` has said so, and its borrow waits for the code that was
        // interrupted, which has none itself: so this is the only one in use.
        let cpu = unsafe { &mut *running.cpu };
        if let Some(goes_on) = cpu.faulted_in_translated(rip as u64, address, error & STORES != 0)
            && let Some(rip) = registers.get_mut(libc::REG_RIP as usize)
        {
            *rip = goes_on as i64;
            return;
        }
    }
    pass_on(FORMER.get(), signal, info, context);
}

/// What has nothing to do with a handler goes where it went before, to `former`.
pub(crate) fn pass_on(
    former: Option<&libc::sigaction>,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    match former {
        Some(former)
            if former.sa_flags & libc::SA_SIGINFO != 0
                && !matches!(former.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) =>
        {
            // SAFETY: it was installed as a handler of this form.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(former.sa_sigaction) };
            handler(signal, info, context);
        }
        _ => {
            // The instruction is tried again, and this time it is fatal.
            // SAFETY: the default is always there.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

impl Vcpu {
    /// The instruction of translated code at `at` may not access `address`. Says where it goes
    /// on: there once more, or where it lands. `None` for one that never faults.
    fn faulted_in_translated(&mut self, at: u64, address: u64, stores: bool) -> Option<u64> {
        let landing = self.translator.as_ref()?.code.lock().regions.landing(at)?;
        // What faults again where it has just been shown a page does so for another reason.
        let again = std::mem::replace(&mut self.context.mirror_fault, (at, address));
        let retry = again != (at, address) && self.show_in_mirror(address, stores);
        if !retry {
            self.context.mirror_fault = (0, 0);
        }
        Some(if retry { at } else { landing })
    }
}
