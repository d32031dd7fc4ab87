//! The console: [`print!`](crate::print!) and [`println!`](crate::println!), and keys.
//!
//! Text goes to the host by hypercall, or to a PC's serial port, until a virtio console is
//! found ([`virtio::start`]).

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::boot::phys_of;
use crate::hypercall::{self, Call, Phys};
use crate::irq::Masked;
use crate::{pc, trap, virtio};

/// Lines are collected here: a call for each would do, but one for each word is dear.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

static LINE: Masked<Line> = Masked::new(Line { bytes: [0; 256], len: 0 });
/// A kernel that panics trusts no driver.
static PLAIN: AtomicBool = AtomicBool::new(false);

impl Line {
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
        if byte == b'\n' || self.len == self.bytes.len() {
            self.send();
        }
    }

    fn send(&mut self) {
        let bytes = &self.bytes[..self.len];
        if !bytes.is_empty() && (PLAIN.load(Ordering::Relaxed) || !virtio::console_send(bytes)) {
            if trap::is_lguest() {
                let text = Phys(phys_of(bytes.as_ptr()));
                hypercall::call(Call::Console { text, len: bytes.len() as u64 });
            } else {
                bytes.iter().for_each(|byte| pc::serial::put(*byte));
            }
        }
        self.len = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.push(b'\r');
            }
            self.push(byte);
        }
        Ok(())
    }
}

/// For [`print!`](crate::print!).
pub fn write(arguments: fmt::Arguments<'_>) {
    LINE.with(|line| {
        let _ = line.write_fmt(arguments);
    });
}

/// Shows what no end of a line has shown yet.
pub fn flush() {
    LINE.with(Line::send);
}

pub(crate) fn panicking() {
    PLAIN.store(true, Ordering::Relaxed);
}

/// The next key, if one was pressed.
pub fn key() -> Option<u8> {
    virtio::console_key().or_else(|| if trap::is_lguest() { None } else { pc::serial::get() })
}

/// Prints, as std's does.
#[macro_export]
macro_rules! print {
    ($($arguments:tt)*) => { $crate::console::write(format_args!($($arguments)*)) };
}

/// Prints a line, as std's does.
#[macro_export]
macro_rules! println {
    () => { $crate::console::write(format_args!("\n")) };
    ($($arguments:tt)*) => {
        $crate::console::write(format_args!("{}\n", format_args!($($arguments)*)))
    };
}
