//! COM1: a 16550A, its output, and the queue in front of its receive FIFO.
//!
//! The registers are `vm-superio`'s. What is added here is back-pressure: whoever feeds
//! the console may hand over more than the FIFO holds, and waits ([`SerialInput::send`])
//! when the queue is full too, so that a pasted page reaches the guest complete.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use super::InterruptLine;

/// Bytes that may wait in front of the FIFO before a sender has to.
const QUEUE: usize = 4096;

/// Registers that are looked at on their way to the UART.
const DATA: u8 = 0;
const IER: u8 = 1;
const LCR: u8 = 3;
const LSR: u8 = 5;
/// IER: interrupt when data was received.
const IER_RECEIVED: u8 = 1 << 0;
/// LCR: registers 0 and 1 are the divisor.
const LCR_DIVISOR: u8 = 1 << 7;
/// Who reads the line status so often without sending anything waits for input.
const POLLS: u8 = 64;

/// The UART's interrupt output is a level by the data sheet, but ISA's IRQ 4 is
/// edge-triggered: every new reason for an interrupt is one pulse.
impl Trigger for InterruptLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.pulse();
        Ok(())
    }
}

struct Port {
    uart: Serial<InterruptLine, NoEvents, Box<dyn Write + Send>>,
    queue: VecDeque<u8>,
    listener: Listener,
    /// No more input will be taken: the machine has ended.
    closed: bool,
    /// The output has failed once; it is said once, not once per byte.
    output_failed: bool,
}

/// Whether somebody listens to the receiver.
///
/// A kernel's driver empties the FIFO when it finds and when it opens the port, and what
/// was typed (or piped in) before would be lost. So the queue is held back until the
/// guest wants receive interrupts, or polls as only one does who waits for input.
#[derive(Debug, Default)]
struct Listener {
    divisor: bool,
    wants_interrupts: bool,
    polls: u8,
}

impl Listener {
    fn read(&mut self, offset: u8) {
        if offset == LSR {
            self.polls = self.polls.saturating_add(1);
        }
    }

    fn write(&mut self, offset: u8, value: u8) {
        match offset {
            DATA => self.polls = 0,
            IER if !self.divisor => self.wants_interrupts = value & IER_RECEIVED != 0,
            LCR => self.divisor = value & LCR_DIVISOR != 0,
            _ => {}
        }
    }

    const fn is_there(&self) -> bool {
        self.wants_interrupts || self.polls >= POLLS
    }
}

impl Port {
    /// Moves as much of the queue into the FIFO as fits.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.queue.len());
        if room == 0 || !self.listener.is_there() {
            return;
        }
        let (front, back) = self.queue.as_slices();
        let chunk: Vec<u8> = front.iter().chain(back).copied().take(room).collect();
        // In loopback mode the UART takes nothing from outside; the rest stays queued.
        let taken = self.uart.enqueue_raw_bytes(&chunk).unwrap_or(0);
        self.queue.drain(..taken.min(room));
    }
}

struct Shared {
    port: Mutex<Port>,
    /// There is room in the queue again, or it is closed.
    room: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's side: the registers.
#[derive(Clone)]
pub struct SerialPort {
    shared: Arc<Shared>,
}

/// The outside: where input comes in. Cheap to clone.
#[derive(Clone)]
pub struct SerialInput {
    shared: Arc<Shared>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl fmt::Debug for SerialInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialInput").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that writes to `output` and interrupts by `line`.
    #[must_use]
    pub fn new(line: InterruptLine, output: Box<dyn Write + Send>) -> Self {
        let uart = Serial::new(line, output);
        let port = Port {
            uart,
            queue: VecDeque::new(),
            listener: Listener::default(),
            closed: false,
            output_failed: false,
        };
        Self { shared: Arc::new(Shared { port: Mutex::new(port), room: Condvar::new() }) }
    }

    /// The other side.
    #[must_use]
    pub fn input(&self) -> SerialInput {
        SerialInput { shared: Arc::clone(&self.shared) }
    }

    /// A byte read from register `offset` (0 to 7).
    #[must_use]
    pub fn read(&self, offset: u8) -> u8 {
        let mut port = self.shared.lock();
        port.listener.read(offset);
        // Before the read: line status is to tell of what comes in by it.
        self.feed(&mut port);
        let value = port.uart.read(offset);
        if offset == DATA {
            self.feed(&mut port);
        }
        value
    }

    /// A byte written to register `offset` (0 to 7). Output that the host refuses is
    /// lost, as on a line nobody listens to.
    pub fn write(&self, offset: u8, value: u8) {
        let mut port = self.shared.lock();
        if let Err(error) = port.uart.write(offset, value)
            && !std::mem::replace(&mut port.output_failed, true)
        {
            tracing::warn!("serial output is lost: {error}");
        }
        port.listener.write(offset, value);
        // Not right after a change of the interrupts wanted: drivers try out which of them
        // there are, and forget what comes in meanwhile.
        if offset != IER {
            self.feed(&mut port);
        }
    }

    fn feed(&self, port: &mut Port) {
        if !port.queue.is_empty() {
            port.refill();
            self.shared.room.notify_all();
        }
    }
}

impl SerialInput {
    /// Hands `bytes` to the guest, waiting while the queue is full. Returns how many
    /// were taken: all, unless the machine ended meanwhile.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        let mut port = self.shared.lock();
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            if port.closed {
                break;
            }
            let room = QUEUE.saturating_sub(port.queue.len()).min(rest.len());
            if room == 0 {
                port = self.shared.room.wait(port).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            port.queue.extend(rest.iter().take(room));
            taken = taken.saturating_add(room);
            port.refill();
        }
        taken
    }

    /// Ends all waiting: the machine is gone.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Recorder;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialPort, Sink, Arc<Recorder>) {
        let (sink, lines) = (Sink::default(), Arc::new(Recorder::default()));
        let line = InterruptLine::new(lines.clone(), 4);
        (SerialPort::new(line, Box::new(sink.clone())), sink, lines)
    }

    #[test]
    fn output_goes_out() {
        let (port, sink, _) = port();
        for byte in b"hello" {
            port.write(0, *byte);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn more_input_than_the_queue_holds_arrives_complete_and_in_order() {
        let (port, _, lines) = port();
        port.write(IER, 1);
        let sent: Vec<u8> = (0..3 * QUEUE).map(|n| (n % 251) as u8).collect();
        let input = port.input();
        let copy = sent.clone();
        let sender = std::thread::spawn(move || input.send(&copy));
        let mut got = Vec::new();
        while got.len() < sent.len() {
            if port.read(LSR) & 1 != 0 {
                got.push(port.read(DATA));
            }
        }
        assert_eq!(sender.join().unwrap(), sent.len());
        assert!(got == sent);
        assert!(lines.0.lock().unwrap().starts_with(&[(4, true), (4, false)]));
    }

    #[test]
    fn what_is_typed_before_the_driver_listens_is_kept() {
        let (port, _, lines) = port();
        assert_eq!(port.input().send(b"early"), 5);
        // A driver looks which interrupts there are, then opens the port.
        for (offset, value) in [(IER, 0x0f), (IER, 0x00), (4, 0x08)] {
            port.write(offset, value);
        }
        for offset in [LSR, DATA, 2, 6] {
            assert_eq!(port.read(offset) & (offset == DATA || offset == LSR) as u8, 0);
        }
        lines.0.lock().unwrap().clear();
        port.write(IER, 0x05);
        port.write(4, 0x0b);
        assert!(!lines.0.lock().unwrap().is_empty());
        let got: Vec<u8> = (0..5).map(|_| port.read(DATA)).collect();
        assert_eq!(got, b"early");
    }

    #[test]
    fn one_who_only_polls_is_heard_too() {
        let (port, _, _) = port();
        port.input().send(b"x");
        let polls = (0..1000).find(|_| port.read(LSR) & 1 != 0);
        assert_eq!((polls.is_some(), port.read(DATA)), (true, b'x'));
    }

    #[test]
    fn closing_ends_a_waiting_sender() {
        let (port, _, _) = port();
        let input = port.input();
        let sender = std::thread::spawn(move || input.send(&[7; 2 * QUEUE]));
        std::thread::sleep(std::time::Duration::from_millis(10));
        port.input().close();
        assert!(sender.join().unwrap() < 2 * QUEUE);
    }
}
