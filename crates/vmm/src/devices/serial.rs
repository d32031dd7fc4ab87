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
    /// No more input will be taken: the machine has ended.
    closed: bool,
    /// The output has failed once; it is said once, not once per byte.
    output_failed: bool,
}

impl Port {
    /// Moves as much of the queue into the FIFO as fits.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.queue.len());
        if room == 0 {
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
        let port = Port { uart, queue: VecDeque::new(), closed: false, output_failed: false };
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
        let value = port.uart.read(offset);
        if offset == 0 && !port.queue.is_empty() {
            port.refill();
            drop(port);
            self.shared.room.notify_all();
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
        if !port.queue.is_empty() {
            port.refill();
            drop(port);
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

    const RBR: u8 = 0;
    const IER: u8 = 1;
    const LSR: u8 = 5;

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
                got.push(port.read(RBR));
            }
        }
        assert_eq!(sender.join().unwrap(), sent.len());
        assert!(got == sent);
        assert!(lines.0.lock().unwrap().starts_with(&[(4, true), (4, false)]));
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
