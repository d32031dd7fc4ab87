//! What vCPUs do, as text: for guests that do not boot.
//!
//! A line for every block before it runs, every exception and every interrupt. Long and
//! slow, and usually the last thousand lines tell the story. Two traces of the same
//! guest under different engines or builds can be compared line by line. For that all code
//! is interpreted; the other kind of trace leaves it to the translator, and has a line for
//! each block that is translated or dropped in the place of those that run.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use softcpu::state::segment::SegReg;
use softcpu::state::{CodeSize, VcpuState};
use softcpu::trace::{Event, Tracer};

use super::watch::Watcher;

/// Where traces go, shared by all vCPUs of a machine. What is buffered is written out
/// when the machine is dropped.
#[derive(Clone)]
pub struct TraceOutput {
    to: Arc<Mutex<dyn Write + Send>>,
    blocks: TracedBlocks,
}

/// Which blocks are traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TracedBlocks {
    /// Each at each run; all code is interpreted.
    Run,
    /// Each that is translated, and each that is dropped.
    Translated,
}

impl TraceOutput {
    /// Traces to `output`, which should buffer.
    pub fn new(output: impl Write + Send + 'static, blocks: TracedBlocks) -> Self {
        Self { to: Arc::new(Mutex::new(output)), blocks }
    }
}

impl Watcher for TraceOutput {
    fn tracer(&self, vcpu: usize) -> Option<Box<dyn Tracer>> {
        Some(Box::new(TextTracer { vcpu, output: self.clone() }))
    }
}

impl fmt::Debug for TraceOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TraceOutput")
    }
}

/// Writes one vCPU's events.
struct TextTracer {
    vcpu: usize,
    output: TraceOutput,
}

impl TextTracer {
    /// A line about translated code, which is about no moment of the guest's.
    fn about(&self, what: fmt::Arguments<'_>) {
        let mut output = self.output.to.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(output, "{} {what}", self.vcpu);
    }

    fn line(&self, state: &VcpuState, what: fmt::Arguments<'_>) {
        let mut output = self.output.to.lock().unwrap_or_else(PoisonError::into_inner);
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, ..] = state.gpr;
        // A full disk must not end the guest; what is missing shows by itself.
        let _ = writeln!(
            output,
            "{} {:04x}:{:016x} {} ring {} {what} rax {rax:x} rbx {rbx:x} rcx {rcx:x} rdx {rdx:x} \
             rsi {rsi:x} rdi {rdi:x} rbp {rbp:x} rsp {rsp:x} flags {:x}",
            self.vcpu,
            state.segment(SegReg::Cs).selector,
            state.rip,
            match state.code_size() {
                CodeSize::Bits16 => 16,
                CodeSize::Bits32 => 32,
                CodeSize::Bits64 => 64,
            },
            state.cpl(),
            state.rflags.bits(),
        );
    }
}

impl Tracer for TextTracer {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Block { state, instructions } => {
                self.line(state, format_args!("block {instructions}"));
            }
            Event::Exception { state, exception } => {
                let code = exception.error_code.unwrap_or(0);
                let (vector, payload) = (exception.vector, exception.payload);
                self.line(state, format_args!("exception {vector:?} code {code:x} at {payload:x}"));
            }
            Event::Interrupt { state, vector } => {
                self.line(state, format_args!("interrupt {vector:02x}"));
            }
            Event::Thunks { host, code } => {
                self.about(format_args!("thunks {} bytes at host {host:x}", code.len()));
            }
            Event::Translated { rip, user, instructions, host, code } => self.about(format_args!(
                "translated {rip:016x} ring {} instructions {instructions} to {} bytes at host \
                 {host:x}",
                if user { 3 } else { 0 },
                code.len()
            )),
            Event::Dropped { rip } => self.about(format_args!("dropped {rip:016x}")),
            Event::Evicted { host, len, blocks } => self
                .about(format_args!("evicted {blocks} blocks from {len} bytes at host {host:x}")),
        }
    }

    fn wants_blocks(&self) -> bool {
        self.output.blocks == TracedBlocks::Run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_where_and_what() {
        let sink: Arc<Mutex<Vec<u8>>> = Arc::default();
        let to: Arc<Mutex<dyn Write + Send>> = sink.clone();
        let output = TraceOutput { to, blocks: TracedBlocks::Translated };
        let mut tracer = TextTracer { vcpu: 3, output };
        assert!(!tracer.wants_blocks());
        let state = VcpuState::at_reset();
        tracer.event(Event::Interrupt { state: &state, vector: 0x30 });
        tracer.event(Event::Block { state: &state, instructions: 2 });
        let code = &[1, 2, 3];
        tracer.event(Event::Translated {
            rip: 0x1000,
            user: true,
            instructions: 2,
            host: 0x7f,
            code,
        });
        tracer.event(Event::Dropped { rip: 0x1000 });
        tracer.event(Event::Evicted { host: 0x7f, len: 3, blocks: 1 });
        let text = String::from_utf8(sink.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("3 f000:000000000000fff0 16 ring 0 interrupt 30 rax 0"));
        assert!(lines[1].contains("block 2"));
        let translated =
            "3 translated 0000000000001000 ring 3 instructions 2 to 3 bytes at host 7f";
        assert_eq!(
            lines[2..],
            [
                translated,
                "3 dropped 0000000000001000",
                "3 evicted 1 blocks from 3 bytes at host 7f"
            ]
        );
    }
}
