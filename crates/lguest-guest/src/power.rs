//! Ways to end.

use core::fmt::Write;
use core::panic::PanicInfo;

use crate::boot::phys_of;
use crate::hypercall::{self, Call, Phys, ShutdownReason};
use crate::{irq, pc, println, trap};

/// Bytes of a panic's text.
const TEXT: usize = 1024;

struct Text {
    bytes: [u8; TEXT],
    len: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for (slot, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *slot = byte;
            self.len += 1;
        }
        Ok(())
    }
}

fn shut_down(text: &[u8], reason: ShutdownReason) -> ! {
    let len = text.len() as u64;
    // A text is in memory that has a physical address: not on a task's stack by accident.
    hypercall::call(Call::Shutdown { text: Phys(phys_of(text.as_ptr())), len, reason });
    loop {
        core::hint::spin_loop();
    }
}

/// A text that outlives everything.
static LAST_WORDS: irq::Masked<Text> = irq::Masked::new(Text { bytes: [0; TEXT], len: 0 });

fn end(reason: ShutdownReason) -> ! {
    crate::console::flush();
    if trap::is_lguest() {
        LAST_WORDS.with(|text| shut_down(&text.bytes[..text.len], reason));
    }
    pc::power::end(reason)
}

/// Switches the machine off.
pub fn off() -> ! {
    end(ShutdownReason::PowerOff)
}

/// Asks for a new start.
pub fn reboot() -> ! {
    end(ShutdownReason::Restart)
}

/// Ends the run as a program does, with an exit status. On a PC, which knows only on and off,
/// 0 is off, and others go to the debug-exit port (`lguest run --debug-exit`), by which N
/// becomes the status 2N + 1.
pub fn exit(status: u8) -> ! {
    match status {
        0 => off(),
        status => end(ShutdownReason::Exit(status)),
    }
}

/// The end of a kernel that cannot go on: [`main!`](crate::main) makes it the panic handler.
pub fn panic(info: &PanicInfo<'_>) -> ! {
    irq::disable();
    crate::console::panicking();
    LAST_WORDS.with(|text| {
        text.len = 0;
        let _ = write!(text, "{info}");
    });
    if !trap::is_lguest() {
        println!("kernel panic: {info}");
    }
    end(ShutdownReason::Panic)
}
