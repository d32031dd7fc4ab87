//! Watching a vCPU run: for guests that do not boot, and for lockstep comparison.
//!
//! A [`Tracer`] is told of every block before it runs, of every exception and every
//! interrupt, and of what the translator makes and drops. Without one the cost is a single
//! test per block.

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};

use crate::decode::build::MAX_INSTRUCTION;
use crate::exception::Exception;
use crate::memory::PhysMemory;
use crate::mmu::{Access, View};
use crate::state::segment::SegReg;
use crate::state::{CodeSize, VcpuState};
use crate::vcpu::Vcpu;

/// What a [`Tracer`] is told.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A block of `instructions` instructions is about to run; the state is that at its
    /// first one.
    Block {
        /// The registers.
        state: &'a VcpuState,
        /// How many instructions the block holds.
        instructions: usize,
    },
    /// `exception` is about to be delivered; RIP is that of the instruction that raised it.
    Exception {
        /// The registers.
        state: &'a VcpuState,
        /// What was raised.
        exception: Exception,
    },
    /// An external interrupt is about to be delivered.
    Interrupt {
        /// The registers.
        state: &'a VcpuState,
        /// Its vector.
        vector: u8,
    },
    /// The thunks of the vCPU's translated code, told of once.
    Thunks {
        /// Where they are executed.
        host: u64,
        /// What they are.
        code: &'a [u8],
    },
    /// A block has been translated.
    Translated {
        /// RIP of its first instruction.
        rip: u64,
        /// Whether it is user mode's.
        user: bool,
        /// How many instructions it holds.
        instructions: usize,
        /// Where it is executed.
        host: u64,
        /// What it has become.
        code: &'a [u8],
    },
    /// The code of the translated block at `rip` has changed: it is not entered any more.
    Dropped {
        /// RIP of its first instruction.
        rip: u64,
    },
    /// There was no room for more: none of the translated blocks there is there any more.
    Evicted {
        /// Where the memory that they were executed in begins.
        host: u64,
        /// How many bytes it has.
        len: u64,
        /// How many there were.
        blocks: u64,
    },
}

/// Somebody who watches.
pub trait Tracer: Send {
    /// Called on the vCPU's thread; must not block for long.
    fn event(&mut self, event: Event<'_>);

    /// Whether [`Event::Block`] is wanted, for which everything is interpreted.
    fn wants_blocks(&self) -> bool {
        true
    }
}

impl Vcpu {
    /// Puts a tracer in place, or takes it away.
    pub fn set_tracer(&mut self, tracer: Option<Box<dyn Tracer>>) {
        self.tracer = tracer;
        if let (Some(tracer), Some(translator)) = (&mut self.tracer, &self.translator) {
            let (host, code) = translator.thunk_code();
            tracer.event(Event::Thunks { host, code: &code });
        }
    }

    /// Disassembles up to `count` instructions at RIP, one line each, without
    /// disturbing the guest: what is not mapped is left out.
    #[must_use]
    pub fn disassemble(&self, count: usize) -> Vec<String> {
        let state = &self.state;
        let bytes = self.peek_code(state.rip, count.saturating_mul(MAX_INSTRUCTION));
        let mut decoder =
            Decoder::with_ip(state.code_size() as u32, &bytes, state.rip, DecoderOptions::NONE);
        let mut formatter = NasmFormatter::new();
        let mut instruction = Instruction::default();
        let mut lines = Vec::new();
        while decoder.can_decode() && lines.len() < count {
            decoder.decode_out(&mut instruction);
            let mut text = format!("{:#x}: ", instruction.ip());
            formatter.format(&instruction, &mut text);
            lines.push(text);
        }
        lines
    }

    /// Up to `len` bytes of code at `rip`, as far as they are mapped RAM. For monitors.
    pub(crate) fn peek_code(&self, rip: u64, len: usize) -> Vec<u8> {
        let linear = match self.state.code_size() {
            CodeSize::Bits64 => rip,
            _ => self.state.segment(SegReg::Cs).base.wrapping_add(rip) & 0xffff_ffff,
        };
        (0..len as u64).map_while(|at| self.peek_byte(linear.wrapping_add(at))).collect()
    }

    /// One byte of guest memory by linear address, as the kernel would see it, if it
    /// is mapped RAM. For monitors; may set accessed bits, as any look does.
    fn peek_byte(&self, addr: u64) -> Option<u8> {
        let memory: &PhysMemory = &self.memory;
        let addr = crate::addr::GuestVirtAddr(addr);
        let view = if self.state.cpl() == 3 { View::User } else { View::KernelOverUser };
        let found = self.mmu.walk(memory, addr, view, Access::Read).ok()?;
        memory.load::<u8>(found.addr)
    }
}
