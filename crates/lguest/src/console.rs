//! The guest's serial console on the host's side: what it prints, what is typed to it.
//!
//! The Machine hands over one byte at a time from a vCPU's thread, and a terminal may be
//! slow; so bytes go into a bounded buffer that a thread of its own writes out. On the way
//! each line is looked at: a kernel that panics says so nowhere else, it merely asks for a
//! reset afterwards.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How much output may wait before the guest has to: a few screens full.
const BUFFER: usize = 64 * 1024;
/// How much of a line is remembered for the search.
const LINE: usize = 512;
/// What Linux prints when it panics, followed by the reason.
const PANIC: &str = "Kernel panic - not syncing: ";

/// The guest's output. Clones share the buffer.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes not yet taken by the writing thread.
    waiting: Vec<u8>,
    /// The writing thread has bytes in its hands.
    writing: bool,
    /// Whoever read our output has gone: drop everything from now on.
    broken: bool,
    scan: Scan,
}

impl Output {
    /// Output that ends up in `target`, written by a thread that this starts.
    ///
    /// # Errors
    /// The host refused the thread.
    pub(crate) fn to(mut target: impl Write + Send + 'static) -> io::Result<Self> {
        let output = Self { shared: Arc::default() };
        let writer = output.clone();
        thread::Builder::new().name("serial-out".into()).spawn(move || {
            loop {
                let bytes = writer.take();
                let written = target.write_all(&bytes).and_then(|()| target.flush());
                let mut state = writer.lock();
                state.writing = false;
                if let Err(error) = written {
                    state.broken = true;
                    state.waiting.clear();
                    tracing::warn!(%error, "the console's output is lost from here on");
                }
                drop(state);
                writer.shared.changed.notify_all();
            }
        })?;
        Ok(output)
    }

    /// Waits until everything is written, or `limit` has passed.
    pub(crate) fn finish(&self, limit: Duration) {
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.lock();
        while !state.broken && (state.writing || !state.waiting.is_empty()) {
            let left = deadline.and_then(|end| end.checked_duration_since(Instant::now()));
            let Some(left) = left else { return };
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the kernel said when it panicked, if it did.
    pub(crate) fn panic_message(&self) -> Option<String> {
        self.lock().scan.panic_message()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is waiting; sleeps until there is something.
    fn take(&self) -> Vec<u8> {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        let bytes = std::mem::take(&mut state.waiting);
        drop(state);
        self.shared.changed.notify_all();
        bytes
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        while !state.broken && state.waiting.len() >= BUFFER {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let was_empty = state.waiting.is_empty();
        state.scan.look(bytes);
        if !state.broken {
            state.waiting.extend_from_slice(bytes);
        }
        drop(state);
        if was_empty {
            self.shared.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Looks for the kernel's panic message in a stream of bytes.
#[derive(Debug, Default)]
struct Scan {
    line: Vec<u8>,
    panic: Option<String>,
}

impl Scan {
    fn look(&mut self, bytes: &[u8]) {
        if self.panic.is_some() {
            return;
        }
        for &byte in bytes {
            if byte == b'\n' {
                self.panic = self.panic_message();
                self.line.clear();
            } else if self.line.len() < LINE && byte != b'\r' {
                self.line.push(byte);
            }
        }
    }

    /// The message, also if its line has not ended: the reset may come first.
    fn panic_message(&self) -> Option<String> {
        if self.panic.is_some() {
            return self.panic.clone();
        }
        let line = String::from_utf8_lossy(&self.line);
        let (_, reason) = line.split_once(PANIC)?;
        // The guest wrote this: keep what cannot play tricks on the user's terminal.
        Some(reason.chars().filter(|c| !c.is_control()).collect())
    }
}

/// Reads `input` to its end on a thread of its own and passes on every chunk. The end of
/// the input is not the end of the guest.
///
/// # Errors
/// The host refused the thread.
pub(crate) fn read_input(
    mut input: impl Read + Send + 'static,
    mut pass: impl FnMut(&[u8]) + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name("serial-in".into()).spawn(move || {
        let mut buffer = [0u8; 1024];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(len) => pass(buffer.get(..len).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "no more input for the console");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[derive(Clone, Default)]
    struct Collected(Arc<Mutex<Vec<u8>>>);

    impl Write for Collected {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_comes_out_in_order() {
        let collected = Collected::default();
        let mut output = Output::to(collected.clone()).unwrap();
        let sent: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        for byte in &sent {
            output.write_all(&[*byte]).unwrap();
        }
        output.finish(Duration::from_secs(10));
        assert_eq!(*collected.0.lock().unwrap(), sent);
    }

    /// A reader that has gone, such as the right side of `| head -1`.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_broken_pipe_does_not_hold_the_guest() {
        let mut output = Output::to(Gone).unwrap();
        for _ in 0..10 {
            output.write_all(&[b'x'; BUFFER]).unwrap();
        }
        output.finish(Duration::from_secs(10));
        assert!(output.lock().broken);
    }

    fn message(text: &str) -> Option<String> {
        let mut scan = Scan::default();
        text.bytes().for_each(|byte| scan.look(&[byte]));
        scan.panic_message()
    }

    #[test]
    fn the_panic_message_is_found() {
        let text = "[    1.0] Kernel panic - not syncing: Attempted to kill init!\r\nmore\r\n";
        assert_eq!(message(text).as_deref(), Some("Attempted to kill init!"));
        let cut = "\r\n[    1.0] Kernel panic - not syncing: VFS\x1b[2J";
        assert_eq!(message(cut).as_deref(), Some("VFS[2J"));
        assert_eq!(message("all is well\r\n"), None);
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let mut scan = Scan::default();
        for _ in 0..10_000 {
            scan.look(b"no line feed ");
        }
        assert!(scan.line.len() <= LINE);
    }

    #[test]
    fn input_is_passed_on_to_its_end() {
        let (send, receive) = mpsc::channel();
        read_input(&b"typed"[..], move |bytes| send.send(bytes.to_vec()).unwrap()).unwrap();
        assert_eq!(receive.recv().unwrap(), b"typed");
        assert!(receive.recv().is_err());
    }
}
