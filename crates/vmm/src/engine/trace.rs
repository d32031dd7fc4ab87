//! What vCPUs do, as text: for guests that do not boot.
//!
//! A line for every block before it runs, every exception and every interrupt. Long and
//! slow, and usually the last thousand lines tell the story. Two traces of the same
//! guest under different engines or builds can be compared line by line.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use softcpu::state::segment::SegReg;
use softcpu::state::{CodeSize, VcpuState};
use softcpu::trace::{Event, Tracer};

/// Where traces go, shared by all vCPUs of a machine. What is buffered is written out
/// when the machine is dropped.
#[derive(Clone)]
pub struct TraceOutput(Arc<Mutex<dyn Write + Send>>);

impl TraceOutput {
    /// Traces to `output`, which should buffer.
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(output)))
    }
}

impl fmt::Debug for TraceOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TraceOutput")
    }
}

/// Writes one vCPU's events.
pub(crate) struct TextTracer {
    vcpu: usize,
    output: TraceOutput,
}

impl TextTracer {
    pub(crate) fn new(vcpu: usize, output: TraceOutput) -> Self {
        Self { vcpu, output }
    }

    fn line(&self, state: &VcpuState, what: fmt::Arguments<'_>) {
        let mut output = self.output.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_where_and_what() {
        let sink: Arc<Mutex<Vec<u8>>> = Arc::default();
        let mut tracer = TextTracer::new(3, TraceOutput(sink.clone()));
        let state = VcpuState::at_reset();
        tracer.event(Event::Interrupt { state: &state, vector: 0x30 });
        tracer.event(Event::Block { state: &state, instructions: 2 });
        let text = String::from_utf8(sink.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("3 f000:000000000000fff0 16 ring 0 interrupt 30 rax 0"));
        assert!(lines[1].contains("block 2") && lines.len() == 2);
    }
}
