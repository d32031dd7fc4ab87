//! What the machine and the host's clock answered, to be answered again.
//!
//! The translator runs first, and what it asks of the [`Environment`] is done. The
//! interpreter asks the same afterwards and is answered from the tape: nothing is done
//! twice, and both know the same. A question other than the recorded one is a difference.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::addr::GuestPhysAddr;
use crate::env::{Environment, Hypercall, MsrRefused};
use crate::handle::{Event, VcpuHandle};
use crate::sync::lock;
use crate::system::tsc::host_tsc;

/// Calls after which a stretch should end.
const LONG: usize = 1 << 14;

/// Something asked, with the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Time(u64),
    PortRead { port: u16, data: Vec<u8> },
    PortWrite { port: u16, data: Vec<u8> },
    MmioRead { addr: GuestPhysAddr, data: Vec<u8> },
    MmioWrite { addr: GuestPhysAddr, data: Vec<u8> },
    ReadMsr { index: u32, answer: Result<u64, MsrRefused> },
    WriteMsr { index: u32, value: u64, answer: Result<(), MsrRefused> },
    TaskPriority(u8),
    SetTaskPriority(u8),
    Hypercall { call: Hypercall, answer: u64 },
    TscOffset(u64),
}

/// A tape, as one who records or reads it has it.
#[derive(Clone, Debug)]
pub(crate) struct Tape {
    calls: Arc<Mutex<Vec<Call>>>,
    /// How many have been read, if this one reads.
    read: Option<Arc<AtomicUsize>>,
    /// The first question that was not the recorded one.
    lost: Arc<Mutex<Option<String>>>,
    /// A store to a device is held back.
    holds: Arc<AtomicBool>,
    /// Who is told that the stretch should end.
    handle: VcpuHandle,
}

impl Tape {
    /// An empty tape, to be recorded on the thread of `handle`'s vCPU.
    pub(super) fn blank(handle: VcpuHandle) -> Self {
        Self {
            calls: Arc::default(),
            read: None,
            lost: Arc::default(),
            holds: Arc::default(),
            handle,
        }
    }

    /// The same tape, to be read from its start.
    pub(super) fn reader(&self) -> Self {
        Self { read: Some(Arc::default()), lost: Arc::default(), ..self.clone() }
    }

    /// Empties it.
    pub(super) fn erase(&self) {
        lock(&self.calls).clear();
    }

    /// Reads from the start again.
    pub(super) fn rewind(&self) {
        if let Some(read) = &self.read {
            read.store(0, Relaxed);
        }
        *lock(&self.lost) = None;
    }

    /// How many calls have been recorded, or read.
    pub(super) fn position(&self) -> usize {
        self.read.as_ref().map_or_else(|| lock(&self.calls).len(), |read| read.load(Relaxed))
    }

    /// Whether the stretch should end: there is much on it, or a device waits.
    pub(super) fn should_end(&self) -> bool {
        self.holds.load(Relaxed) || lock(&self.calls).len() >= LONG
    }

    /// The first question that was not the recorded one.
    pub(super) fn lost(&self) -> Option<String> {
        lock(&self.lost).clone()
    }

    /// The host's time-stamp counter, then or now.
    pub(crate) fn time(&self) -> u64 {
        let replayed = self.replay("the time", |call| match call {
            Call::Time(time) => Some(*time),
            _ => None,
        });
        match replayed {
            Replayed::Answer(time) => time,
            Replayed::Lost => 0,
            Replayed::Ask => {
                let time = host_tsc();
                self.record(Call::Time(time));
                time
            }
        }
    }

    fn record(&self, call: Call) {
        let mut calls = lock(&self.calls);
        calls.push(call);
        if calls.len() == LONG {
            // Translated code looks up.
            self.handle.raise(Event::CODE_CHANGED);
        }
    }

    /// The next answer on the tape, if this one reads.
    fn replay<T>(
        &self,
        question: impl Display,
        answer: impl FnOnce(&Call) -> Option<T>,
    ) -> Replayed<T> {
        let Some(read) = &self.read else { return Replayed::Ask };
        let calls = lock(&self.calls);
        let at = read.load(Relaxed);
        let next = calls.get(at);
        if let Some(answer) = next.and_then(answer) {
            read.store(at.saturating_add(1), Relaxed);
            return Replayed::Answer(answer);
        }
        lock(&self.lost).get_or_insert_with(|| match next {
            Some(next) => format!("{question}, where the other had {next:x?}"),
            None => format!("{question}, where the other had nothing more"),
        });
        Replayed::Lost
    }
}

enum Replayed<T> {
    Answer(T),
    /// Another question than the recorded one.
    Lost,
    /// This tape is being recorded.
    Ask,
}

/// A machine with a tape: the real one while it is recorded, none while it is read.
///
/// Stores to devices are held back until the stretch is over, or a device is asked something:
/// what a device does to memory when it is told to go would otherwise come between the two
/// runs. The guest cannot tell that from a bus that takes its time.
pub(super) struct Taped {
    tape: Tape,
    machine: Option<Box<dyn Environment>>,
    held: Vec<Call>,
}

impl Taped {
    /// For the vCPU that has `tape`.
    pub(super) fn new(tape: Tape, machine: Option<Box<dyn Environment>>) -> Self {
        Self { tape, machine, held: Vec::new() }
    }

    /// A call with an answer: `find` finds it on the tape, `ask` asks the machine, `keep`
    /// makes a record of it. `nothing` is the answer to a question that was not recorded.
    fn ask<T>(
        &mut self,
        question: impl Display,
        find: impl FnOnce(&Call) -> Option<T>,
        ask: impl FnOnce(&mut dyn Environment) -> T,
        keep: impl FnOnce(&T) -> Call,
        nothing: T,
    ) -> T {
        let replayed = self.tape.replay(question, find);
        self.settle();
        match (replayed, &mut self.machine) {
            (Replayed::Answer(answer), _) => answer,
            (Replayed::Ask, Some(machine)) => {
                let answer = ask(machine.as_mut());
                self.tape.record(keep(&answer));
                answer
            }
            _ => nothing,
        }
    }

    /// A store to a device.
    fn hold(&mut self, call: Call) {
        let same = |recorded: &Call| (*recorded == call).then_some(());
        if matches!(self.tape.replay(format_args!("{call:x?}"), same), Replayed::Ask) {
            self.tape.record(call.clone());
            self.held.push(call);
            self.tape.holds.store(true, Relaxed);
            self.tape.handle.raise(Event::CODE_CHANGED);
        }
    }

    /// A call that tells the machine something.
    fn tell(&mut self, call: Call, tell: impl FnOnce(&mut dyn Environment)) {
        let call = &call;
        let same = |recorded: &Call| (recorded == call).then_some(());
        self.ask(format_args!("{call:x?}"), same, tell, |()| call.clone(), ());
    }
}

impl Environment for Taped {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        let len = data.len();
        let answer = self.ask(
            format_args!("{len} bytes from port {port:#x}"),
            |call| match call {
                Call::PortRead { port: p, data } if *p == port && data.len() == len => {
                    Some(data.clone())
                }
                _ => None,
            },
            |machine| {
                let mut data = vec![0; len];
                machine.port_read(port, &mut data);
                data
            },
            |data| Call::PortRead { port, data: data.clone() },
            vec![0xff; len],
        );
        data.copy_from_slice(&answer);
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.hold(Call::PortWrite { port, data: data.to_vec() });
    }

    fn mmio_read(&mut self, addr: GuestPhysAddr, data: &mut [u8]) {
        let len = data.len();
        let answer = self.ask(
            format_args!("{len} bytes from {addr:?}"),
            |call| match call {
                Call::MmioRead { addr: a, data } if *a == addr && data.len() == len => {
                    Some(data.clone())
                }
                _ => None,
            },
            |machine| {
                let mut data = vec![0; len];
                machine.mmio_read(addr, &mut data);
                data
            },
            |data| Call::MmioRead { addr, data: data.clone() },
            vec![0xff; len],
        );
        data.copy_from_slice(&answer);
    }

    fn mmio_write(&mut self, addr: GuestPhysAddr, data: &[u8]) {
        self.hold(Call::MmioWrite { addr, data: data.to_vec() });
    }

    fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        self.ask(
            format_args!("MSR {index:#x}"),
            |call| match call {
                Call::ReadMsr { index: i, answer } if *i == index => Some(*answer),
                _ => None,
            },
            |machine| machine.read_msr(index),
            |answer| Call::ReadMsr { index, answer: *answer },
            Err(MsrRefused),
        )
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        self.ask(
            format_args!("{value:#x} to MSR {index:#x}"),
            |call| match call {
                Call::WriteMsr { index: i, value: v, answer } if (*i, *v) == (index, value) => {
                    Some(*answer)
                }
                _ => None,
            },
            |machine| machine.write_msr(index, value),
            |answer| Call::WriteMsr { index, value, answer: *answer },
            Err(MsrRefused),
        )
    }

    /// Only asked between stretches, when nobody replays.
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.machine.as_mut()?.acknowledge_interrupt()
    }

    fn task_priority(&mut self) -> u8 {
        self.ask(
            "CR8",
            |call| match call {
                Call::TaskPriority(class) => Some(*class),
                _ => None,
            },
            |machine| machine.task_priority(),
            |class| Call::TaskPriority(*class),
            0,
        )
    }

    fn set_task_priority(&mut self, class: u8) {
        self.tell(Call::SetTaskPriority(class), |machine| machine.set_task_priority(class));
    }

    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        let asked = *call;
        self.ask(
            format_args!("{call:x?}"),
            |recorded| match recorded {
                Call::Hypercall { call, answer } if *call == asked => Some(*answer),
                _ => None,
            },
            |machine| machine.hypercall(call),
            |answer| Call::Hypercall { call: asked, answer: *answer },
            u64::MAX,
        )
    }

    fn tsc_offset_changed(&mut self, offset: u64) {
        self.tell(Call::TscOffset(offset), |machine| machine.tsc_offset_changed(offset));
    }

    fn settle(&mut self) {
        if self.held.is_empty() {
            return;
        }
        self.tape.holds.store(false, Relaxed);
        let Some(machine) = &mut self.machine else { return };
        for call in self.held.drain(..) {
            match call {
                Call::PortWrite { port, data } => machine.port_write(port, &data),
                Call::MmioWrite { addr, data } => machine.mmio_write(addr, &data),
                // Nothing else is held back.
                _ => {}
            }
        }
    }
}
