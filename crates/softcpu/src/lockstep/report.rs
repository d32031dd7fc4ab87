//! The report of a difference: where, the guest's code, the host's, and what each made of it.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};

use super::Ended;
use super::chase::Caught;
use super::compare::{self, Bytes};
use super::replay::Step;
use crate::decode::build::MAX_INSTRUCTION;
use crate::memory::access;
use crate::memory::overlay::Before;
use crate::state::regs::Gpr;
use crate::state::{CodeSize, VcpuState};
use crate::vcpu::Vcpu;

/// Blocks of host code that are shown.
const MOST_BLOCKS: usize = 4;

/// The report of `step`, with pages as they were when the stretch started in `before`.
pub(super) fn write(step: &Step<'_>, before: &Before) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "translator and interpreter differ, from rip {:#x} (cpl {}, {:?}) on",
        step.before.state.rip,
        step.before.state.cpl(),
        step.before.state.code_size(),
    );
    let _ = writeln!(text, "  translator:  {}", end(step.leader, step.leader_ended));
    let _ = writeln!(text, "  interpreter: {}", caught(step));
    guest_code(&mut text, step);
    host_code(&mut text, step);
    match &step.notes.nearest {
        Some(nearest) => {
            registers(&mut text, step, &nearest.state);
            memory(&mut text, &nearest.memory);
        }
        None => {
            registers(&mut text, step, &step.follower.state);
            memory(&mut text, &compare::memory(step.follower, step.leader, before));
        }
    }
    text
}

/// How a vCPU ended.
fn end(cpu: &Vcpu, ended: Ended) -> String {
    let rip = cpu.state.rip;
    match ended {
        Ended::Between => format!("goes on at {rip:#x}"),
        Ended::Fault => format!("{:?} at {rip:#x}", cpu.fault),
        Ended::Exit => format!("exit {:?} at {rip:#x}", cpu.exit),
    }
}

fn caught(step: &Step<'_>) -> String {
    if step.notes.nearest.is_some() && step.leader_ended == Ended::Between {
        return format!("is at {:#x} with another state", step.leader.state.rip);
    }
    let lost = step.follower.tape.as_ref().and_then(super::tape::Tape::lost);
    match (step.caught, lost) {
        (Caught::Asked, Some(question)) => format!("asks the machine for {question}"),
        (Caught::Ended(ended), _) => end(step.follower, ended),
        (Caught::Nowhere | Caught::Asked, _) => "does not get there".to_owned(),
        (Caught::Agrees, _) => end(step.follower, Ended::Between),
    }
}

/// The instructions that the follower ran.
fn path<'a>(step: &Step<'a>) -> &'a [u64] {
    let path = step.notes.path.as_slice();
    let taken = step.notes.nearest.as_ref().map_or(path.len(), |nearest| nearest.taken);
    path.get(..taken).unwrap_or(path)
}

fn guest_code(text: &mut String, step: &Step<'_>) {
    let _ = writeln!(text, "guest code, as interpreted:");
    for rip in path(step) {
        let code = step.follower.peek_code(*rip, MAX_INSTRUCTION);
        line(text, &code, *rip, step.follower.state.code_size());
    }
}

/// The code that the leader ran: of the blocks that begin where the follower has been.
fn host_code(text: &mut String, step: &Step<'_>) {
    let Some(translator) = &step.leader.translator else { return };
    let mut seen: Vec<u64> = Vec::new();
    let starts = std::iter::once(&step.before.state.rip).chain(path(step));
    for rip in starts {
        if seen.len() >= MOST_BLOCKS || seen.contains(rip) {
            continue;
        }
        let Some((address, len)) = translator.listing(*rip) else { continue };
        seen.push(*rip);
        let mut code = vec![0; len];
        // SAFETY: the translator has just said that this many bytes of its code are there.
        unsafe { access::copy(address as *const u8, code.as_mut_ptr(), len) };
        let _ = writeln!(text, "host code of the block at {rip:#x}, {len} bytes:");
        let mut rest = code.as_slice();
        let mut at = address;
        while !rest.is_empty() {
            let used = line(text, rest, at, CodeSize::Bits64).max(1);
            rest = rest.get(used..).unwrap_or_default();
            at = at.wrapping_add(used as u64);
        }
    }
    if seen.is_empty() {
        let _ = writeln!(text, "no host code: the translator left this to the interpreter");
    }
}

/// Writes the instruction that `code`, at `rip`, begins with, and says how long it is.
fn line(text: &mut String, code: &[u8], rip: u64, size: CodeSize) -> usize {
    let mut decoder = Decoder::with_ip(size as u32, code, rip, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut words = String::new();
    if decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        NasmFormatter::new().format(&instruction, &mut words);
    } else {
        words.push_str("(not there)");
    }
    let bytes = code.get(..instruction.len()).unwrap_or(code);
    let bytes: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let _ = writeln!(text, "  {rip:016x}  {bytes:<24} {words}");
    instruction.len()
}

/// Registers and what they are, general-purpose ones first.
fn named(state: &VcpuState) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut put = |name: &str, value: String| all.push((name.to_owned(), value));
    for (name, value) in Gpr::NAMES.iter().zip(&state.gpr) {
        put(name, format!("{value:016x}"));
    }
    put("rip", format!("{:016x}", state.rip));
    put("rflags", format!("{:016x}", state.rflags.bits()));
    for (n, value) in state.vec.iter().enumerate() {
        put(&format!("ymm{n}"), format!("{value:?}"));
    }
    put("mxcsr", format!("{:08x}", state.mxcsr));
    for (n, row) in state.fpu.fxsave.chunks(16).enumerate() {
        let bytes: String = row.iter().map(|byte| format!("{byte:02x}")).collect();
        put(&format!("x87+{:#x}", n.saturating_mul(16)), bytes);
    }
    for (name, segment) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&state.seg) {
        put(name, format!("{segment:x?}"));
    }
    put("ldtr", format!("{:x?}", state.ldtr));
    put("tr", format!("{:x?}", state.tr));
    put("gdtr", format!("{:x?}", state.gdtr));
    put("idtr", format!("{:x?}", state.idtr));
    put("cr0", format!("{:?}", state.cr0));
    put("cr2", format!("{:016x}", state.cr2));
    put("cr3", format!("{:016x}", state.cr3));
    put("cr4", format!("{:?}", state.cr4));
    put("xcr0", format!("{:x}", state.xcr0));
    put("efer", format!("{:?}", state.efer));
    put("dr", format!("{:x?} {:x} {:x}", state.dr, state.dr6, state.dr7));
    put("msrs", format!("{:x?}", state.msr));
    all
}

/// The flags that `a` and `b` differ in.
fn flags(a: &VcpuState, b: &VcpuState) -> String {
    let differ = a.rflags ^ b.rflags;
    format!("{:?}", differ.iter_names().map(|(name, _)| name).collect::<Vec<_>>())
}

fn registers(text: &mut String, step: &Step<'_>, ours: &VcpuState) {
    let theirs = &step.leader.state;
    let before = named(&step.before.state);
    let rows = before.into_iter().zip(named(ours)).zip(named(theirs));
    let _ = writeln!(text, "registers (before, interpreter, translator; * differs):");
    for (n, (((name, before), (_, ours)), (_, theirs))) in rows.enumerate() {
        let differs = ours != theirs;
        if !differs && n >= Gpr::NAMES.len().saturating_add(2) {
            continue;
        }
        let mark = if differs { '*' } else { ' ' };
        if before.len() <= 16 {
            let _ = writeln!(text, "{mark} {name:<7} {before:<16}  {ours:<16}  {theirs}");
        } else {
            for value in [before, ours, theirs] {
                let _ = writeln!(text, "{mark} {name:<7} {value}");
            }
        }
    }
    if ours.rflags != theirs.rflags {
        let _ = writeln!(text, "flags that differ: {}", flags(ours, theirs));
    }
    let (a, b) = (step.follower, step.leader);
    if a.shadow != b.shadow || a.nmi_blocked != b.nmi_blocked || a.system != b.system {
        let _ = writeln!(
            text,
            "at last: {:?} {} {:x?}, {:?} {} {:x?}",
            a.shadow, a.nmi_blocked, a.system, b.shadow, b.nmi_blocked, b.system
        );
    }
}

fn memory(text: &mut String, places: &[Bytes]) {
    if places.is_empty() {
        let _ = writeln!(text, "memory is the same");
        return;
    }
    let _ = writeln!(text, "memory that differs (guest-physical: interpreter, translator):");
    let bytes = |bytes: &[u8]| -> String {
        let shown = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>();
        if bytes.len() > 16 { format!("{shown}... ({} bytes)", bytes.len()) } else { shown }
    };
    for place in places {
        let _ = writeln!(text, "* {:#x}: {}  {}", place.addr.0, bytes(&place.a), bytes(&place.b));
    }
}
