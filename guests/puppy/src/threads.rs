//! Threads: each has a stack, some have a user's address space. They take turns; the timer
//! sees to it that nobody keeps the CPU.
//!
//! There is one CPU, so everything here is done with interrupts off, and that is the lock.

use alloc::boxed::Box;
use alloc::vec::Vec;

use lguest_guest::irq::{self, Masked};
use lguest_guest::paging::{self, AddressSpace};
use lguest_guest::task::{Task, switch};
use lguest_guest::time;
use lguest_guest::trap::{self, vector};

/// A thread's number.
pub(crate) type Id = usize;

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    /// Until this time, in nanoseconds.
    Asleep(u64),
    /// For that thread's end.
    Joining(Id),
    /// For nothing any more; this was its result.
    Ended(i64),
}

struct Thread {
    id: Id,
    name: &'static str,
    task: Task,
    state: State,
    space: Option<AddressSpace>,
    /// What it runs, until it does.
    body: Option<Box<dyn FnOnce() -> i64 + Send>>,
}

struct Threads {
    #[allow(clippy::vec_box, reason = "a thread stays where it is while it is switched to")]
    all: Vec<Box<Thread>>,
    /// The index of the one that runs.
    current: usize,
    next_id: Id,
    /// Nobody is ready; the CPU waits on the current one's stack.
    idle: bool,
    switches: u64,
}

static THREADS: Masked<Option<Threads>> = Masked::new(None);

fn with<R>(work: impl FnOnce(&mut Threads) -> R) -> R {
    THREADS.with(|threads| work(threads.as_mut().expect("threads have been started")))
}

/// Makes what runs the first thread, and has the timer preempt.
pub(crate) fn start() {
    let first = Thread {
        id: 0,
        name: "kernel",
        task: Task::running(),
        state: State::Ready,
        space: None,
        body: None,
    };
    let all = alloc::vec![Box::new(first)];
    let threads = Threads { all, current: 0, next_id: 1, idle: false, switches: 0 };
    THREADS.with(|slot| *slot = Some(threads));
    trap::handle(vector::TIMER, |_| preempt());
}

impl Threads {
    fn is_ready(&self, index: usize) -> bool {
        match self.all[index].state {
            State::Ready => true,
            State::Asleep(until) => until <= time::now(),
            State::Joining(id) => self.result(id).is_some(),
            State::Ended(_) => false,
        }
    }

    /// A thread's result, if it has ended. One that is not there has, with nothing.
    fn result(&self, id: Id) -> Option<i64> {
        match self.all.iter().find(|thread| thread.id == id) {
            Some(thread) => match thread.state {
                State::Ended(result) => Some(result),
                _ => None,
            },
            None => Some(0),
        }
    }

    /// Whose turn it is: the next one after the current that is ready.
    fn next(&self) -> Option<usize> {
        let count = self.all.len();
        (1..=count).map(|step| (self.current + step) % count).find(|index| self.is_ready(*index))
    }

    /// Makes `next` the current one; the two to switch between, if they are two.
    fn turn(&mut self, next: usize) -> Option<(*mut Task, *const Task)> {
        let old = core::mem::replace(&mut self.current, next);
        self.all[next].state = State::Ready;
        if old == next {
            return None;
        }
        self.switches += 1;
        let thread = &self.all[next];
        match &thread.space {
            Some(space) => {
                space.activate();
                paging::set_kernel_stack(thread.task.stack_top());
            }
            None if self.all[old].space.is_some() => paging::kernel_only(),
            None => {}
        }
        Some((&raw mut self.all[old].task, &raw const self.all[next].task))
    }
}

/// Lets somebody else run. Interrupts are off.
fn reschedule() {
    loop {
        let next = with(|threads| {
            let next = threads.next();
            threads.idle = next.is_none();
            next
        });
        if let Some(next) = next {
            if let Some((from, to)) = with(|threads| threads.turn(next)) {
                // SAFETY: interrupts are off, and these are the two; their boxes stay where
                // they are while they are threads.
                unsafe { switch(from, to) };
            }
            return;
        }
        irq::wait();
        irq::disable();
    }
}

fn change_and_yield(state: State) {
    irq::without(|| {
        with(|threads| {
            let current = threads.current;
            threads.all[current].state = state;
        });
        reschedule();
    });
}

/// Lets the others run.
pub(crate) fn yield_now() {
    change_and_yield(State::Ready);
}

/// The timer's doing.
fn preempt() {
    // Somebody who waits in `reschedule` looks for himself.
    if !with(|threads| threads.idle) {
        yield_now();
    }
}

/// Sleeps for so many nanoseconds, or a little more.
pub(crate) fn sleep(nanoseconds: u64) {
    change_and_yield(State::Asleep(time::now() + nanoseconds));
}

/// Starts a thread.
pub(crate) fn spawn(
    name: &'static str,
    space: Option<AddressSpace>,
    body: impl FnOnce() -> i64 + Send + 'static,
) -> Id {
    let body: Option<Box<dyn FnOnce() -> i64 + Send>> = Some(Box::new(body));
    with(|threads| {
        let id = threads.next_id;
        threads.next_id += 1;
        let task = Task::new(begin, id);
        threads.all.push(Box::new(Thread { id, name, task, state: State::Ready, space, body }));
        id
    })
}

/// A thread's first function. Interrupts are off.
extern "sysv64" fn begin(_: usize) -> ! {
    let body = with(|threads| {
        let current = threads.current;
        threads.all[current].body.take()
    });
    irq::enable();
    exit(body.map_or(0, |body| body()))
}

/// Ends the thread that runs.
pub(crate) fn exit(result: i64) -> ! {
    change_and_yield(State::Ended(result));
    unreachable!("a thread that has ended is not ready")
}

/// Waits for a thread's end, clears it away, and returns its result.
pub(crate) fn join(id: Id) -> i64 {
    loop {
        let ended = with(|threads| {
            let result = threads.result(id)?;
            let place = threads.all.iter().position(|thread| thread.id == id);
            let gone = place.map(|index| {
                // What stands behind it moves up.
                threads.current -= usize::from(index < threads.current);
                threads.all.remove(index)
            });
            Some((result, gone))
        });
        // Its stack and memory go here, where nobody waits for it.
        if let Some((result, _gone)) = ended {
            return result;
        }
        change_and_yield(State::Joining(id));
    }
}

/// The number of the thread that runs.
pub(crate) fn current() -> Id {
    with(|threads| threads.all[threads.current].id)
}

/// Uses the address space of the thread that runs. `None`: it has no user.
pub(crate) fn with_space<R>(work: impl FnOnce(&AddressSpace) -> R) -> Option<R> {
    with(|threads| threads.all[threads.current].space.as_ref().map(work))
}

/// How often one thread has followed another.
pub(crate) fn switches() -> u64 {
    with(|threads| threads.switches)
}

/// For `ps`: numbers, names, and whether they could run.
pub(crate) fn list() -> Vec<(Id, &'static str, bool)> {
    with(|threads| {
        let ready = |index| threads.is_ready(index);
        threads.all.iter().enumerate().map(|(n, it)| (it.id, it.name, ready(n))).collect()
    })
}
