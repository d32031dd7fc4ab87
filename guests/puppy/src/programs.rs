//! User mode: programs in address spaces of their own, and the system calls they have.
//!
//! A system call's number is in RAX, its arguments in RDI and RSI; the result comes back in
//! RAX, and -1 means that it made no sense.

use core::arch::global_asm;

use lguest_guest::boot::direct;
use lguest_guest::frames::{self, PAGE};
use lguest_guest::paging::{self, Access, AddressSpace, OutOfMemory};
use lguest_guest::trap::{self, Context, vector};
use lguest_guest::{irq, print, println, time, user};

use crate::threads;

/// Where programs and their stacks lie.
const CODE: u64 = 0x40_0000;
const STACK: u64 = 0x7fff_0000;
const STACK_PAGES: u64 = 4;
/// The most that is printed at once.
const TEXT_MAX: u64 = 4096;
const MILLISECOND: u64 = 1_000_000;
/// What becomes of a program that does what it must not.
pub(crate) const KILLED: i64 = -9;

/// System calls.
mod call {
    /// End, with a result.
    pub(super) const EXIT: u64 = 0;
    /// Print: address, length.
    pub(super) const WRITE: u64 = 1;
    /// Let others run.
    pub(super) const YIELD: u64 = 2;
    /// Sleep for milliseconds.
    pub(super) const SLEEP: u64 = 3;
    /// The thread's number.
    pub(super) const ID: u64 = 4;
    /// A page of memory at an address.
    pub(super) const MAP: u64 = 5;
    /// Nanoseconds since the start.
    pub(super) const TIME: u64 = 6;
}

/// A program.
#[derive(Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// Where its code begins and ends, here in the kernel.
    bounds: fn() -> (*const u8, *const u8),
}

/// Programs are assembler, to be copied to where users have their code.
macro_rules! programs {
    ($($name:ident: $($line:literal)*;)*) => {
        $(global_asm!(
            ".pushsection .rodata.programs, \"a\"",
            concat!("program_", stringify!($name), ":"),
            $($line,)*
            concat!("program_", stringify!($name), "_end:"),
            ".popsection",
        );)*

        /// All there are.
        pub(crate) const ALL: &[Program] = &[$(Program {
            name: stringify!($name),
            bounds: || {
                let (start, end);
                // SAFETY: two addresses.
                unsafe {
                    core::arch::asm!(
                        concat!("lea {}, [rip + program_", stringify!($name), "]"),
                        concat!("lea {}, [rip + program_", stringify!($name), "_end]"),
                        out(reg) start, out(reg) end, options(nomem, nostack),
                    );
                }
                (start, end)
            },
        }),*];
    };
}

programs! {
    // Says hello three times, with a nap in between; returns its number.
    hello:
        "mov ebx, 3"
        "2: lea rdi, [rip + 3f]"
        "lea rsi, [rip + 4f]"
        "sub rsi, rdi"
        "mov eax, 1"
        "syscall"
        "mov edi, 20"
        "mov eax, 3"
        "syscall"
        "dec ebx"
        "jnz 2b"
        "mov eax, 4"
        "syscall"
        "mov rdi, rax"
        "mov eax, 0"
        "syscall"
        "3: .ascii \"woof, says a program\\n\""
        "4:";
    // Computes for a while without ever asking for anything: the sum of a billion's tail.
    dig:
        "mov ecx, 3000000"
        "xor edi, edi"
        "2: add rdi, rcx"
        "dec ecx"
        "jnz 2b"
        "and edi, 0x7fffffff"
        "mov eax, 0"
        "syscall";
    // Takes a page, uses it and its registers, and looks whether anybody else did.
    fetch:
        "mov rdi, 0x10000000"
        "mov eax, 5"
        "syscall"
        "test rax, rax"
        "jnz 3f"
        "mov eax, 4"
        "syscall"
        "mov rbx, rax"
        "cvtsi2sd xmm7, rax"
        "mov r12d, 50"
        "2: mov [0x10000000], rbx"
        "mov eax, 2"
        "syscall"
        "cmp [0x10000000], rbx"
        "jne 3f"
        "cvtsd2si rcx, xmm7"
        "cmp rcx, rbx"
        "jne 3f"
        "dec r12d"
        "jnz 2b"
        "xor edi, edi"
        "4: mov eax, 0"
        "syscall"
        "3: mov edi, 1"
        "jmp 4b";
    // Reaches for the kernel, which is the end of it.
    bite:
        "mov rax, 0xffffffff80100000"
        "mov rax, [rax]"
        "xor edi, edi"
        "mov eax, 0"
        "syscall";
    // Stays for as many system calls as its argument says.
    beg:
        "mov rbx, rdi"
        "2: mov eax, 4"
        "syscall"
        "dec rbx"
        "jnz 2b"
        "xor edi, edi"
        "mov eax, 0"
        "syscall";
}

/// A program by its name.
pub(crate) fn find(name: &str) -> Option<Program> {
    ALL.iter().find(|program| program.name == name).copied()
}

/// Lets programs' doings in.
pub(crate) fn start() {
    trap::handle(trap::SYSTEM_CALL, system_call);
    for number in
        [vector::DIVIDE, vector::INVALID_OPCODE, vector::GENERAL_PROTECTION, vector::PAGE_FAULT]
    {
        trap::handle(number, fault);
    }
}

impl Program {
    /// Starts it, with an argument, in a thread and address space of its own.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub(crate) fn start(self, argument: u64) -> Result<threads::Id, OutOfMemory> {
        let space = AddressSpace::new()?;
        paging::batch(|| self.load(&space))?;
        let top = STACK + STACK_PAGES * PAGE as u64;
        Ok(threads::spawn(self.name, Some(space), move || user::enter_at(CODE, top, argument)))
    }

    fn load(self, space: &AddressSpace) -> Result<(), OutOfMemory> {
        let (start, end) = (self.bounds)();
        // SAFETY: the program's own bytes, in read-only data.
        let code = unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) };
        for (at, bytes) in (CODE..).step_by(PAGE).zip(code.chunks(PAGE)) {
            let page = frames::take().ok_or(OutOfMemory)?;
            // SAFETY: a page of our own.
            unsafe { direct(page).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            space.map(at, page, Access::Execute)?;
        }
        for n in 0..STACK_PAGES {
            let page = frames::take().ok_or(OutOfMemory)?;
            space.map(STACK + n * PAGE as u64, page, Access::Write)?;
        }
        Ok(())
    }
}

fn system_call(context: &mut Context) {
    let (first, second) = (context.rdi, context.rsi);
    // The flag is off; what the calls do may take its time.
    irq::enable();
    let result = match context.rax {
        call::EXIT => threads::exit(first as i64),
        call::WRITE => write(first, second),
        call::YIELD => {
            threads::yield_now();
            Some(0)
        }
        call::SLEEP => {
            threads::sleep(first.saturating_mul(MILLISECOND));
            Some(0)
        }
        call::ID => Some(threads::current() as i64),
        call::MAP => map(first),
        call::TIME => Some(time::now() as i64),
        _ => None,
    };
    irq::disable();
    context.rax = result.unwrap_or(-1) as u64;
}

/// A user's addresses mean nothing to the kernel until its tables say what is there.
fn write(at: u64, len: u64) -> Option<i64> {
    let end = at.checked_add(len.min(TEXT_MAX))?;
    for address in at..end {
        let (phys, _) = threads::with_space(|space| space.translate(address))??;
        // SAFETY: the user's page, which nobody gives back while its thread is here.
        print!("{}", char::from(unsafe { direct(phys).read() }));
    }
    Some((end - at) as i64)
}

fn map(at: u64) -> Option<i64> {
    let fine = at.is_multiple_of(PAGE as u64) && (CODE..paging::USER_END).contains(&at);
    threads::with_space(|space| {
        if !fine || space.translate(at).is_some() {
            return None;
        }
        space.map(at, frames::take()?, Access::Write).ok()
    })??;
    Some(0)
}

/// A program did what it must not; so did the kernel, if it was the kernel.
fn fault(context: &mut Context) {
    let Context { vector, error, rip, .. } = *context;
    let at = if vector == vector::PAGE_FAULT as u64 { paging::fault_address() } else { 0 };
    assert!(context.is_user(), "trap {vector} ({error:#x}) at {rip:#x}, address {at:#x}");
    irq::enable();
    println!("program {}: trap {vector} at {rip:#x}, address {at:#x}", threads::current());
    threads::exit(KILLED)
}
