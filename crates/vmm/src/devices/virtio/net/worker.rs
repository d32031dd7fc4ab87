//! What serves queue pairs: a handler on an I/O thread, with one backend.
//!
//! A tap interface with several queues has a worker for each; a socket has one, which
//! serves all pairs. Whatever happens, all there is to do is done: sending first, because
//! that frees the driver's memory, then receiving. If the driver has no buffers, nothing
//! is read, and frames wait where the host keeps them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::backends::{Backend, FIRST_FREE_TOKEN, Incoming};
use super::fault::Fault;
use super::packet::ETHERNET_HEADER;
use super::rx::{Delivery, RxQueue};
use super::shared::{Shared, SharedBackend, lock};
use super::steering::Steering;
use super::tx::TxQueue;

/// Frames received before other work has its turn.
const BUDGET: u32 = 256;

/// A receive queue and the transmit queue beside it.
#[derive(Debug)]
pub(super) struct Pair {
    pub rx: RxQueue,
    pub tx: TxQueue,
}

impl Pair {
    fn kicks(&self) -> [&Arc<vmm_sys_util::eventfd::EventFd>; 2] {
        [self.rx.queue().kick(), self.tx.queue().kick()]
    }
}

/// The handler.
#[derive(Debug)]
pub(super) struct Worker {
    backend: SharedBackend,
    pairs: Vec<Pair>,
    shared: Arc<Shared>,
    steering: Steering,
}

impl Worker {
    pub(super) fn new(backend: SharedBackend, pairs: Vec<Pair>, shared: Arc<Shared>) -> Self {
        Self { backend, pairs, shared, steering: Steering::new() }
    }

    /// Does what there is to do, until everybody has to wait for somebody else.
    ///
    /// # Errors
    /// [`Fault`]: the driver broke a rule.
    pub(super) fn serve(&mut self, backend: &mut dyn Backend) -> Result<(), Fault> {
        let several = self.pairs.len() > 1;
        for (pair, n) in self.pairs.iter_mut().zip(0_u8..) {
            pair.tx.transmit(backend, |frame| {
                if several {
                    self.steering.sent(frame, n);
                }
            })?;
        }
        self.receive(backend)
    }

    fn receive(&mut self, backend: &mut dyn Backend) -> Result<(), Fault> {
        let filter = lock(&self.shared.filter);
        let pairs = u16::try_from(self.pairs.len()).unwrap_or(u16::MAX);
        let active = self.shared.active_pairs.load(Ordering::SeqCst).min(pairs);
        let mut budget = BUDGET;
        while let Some(Incoming { header, frame }) = backend.peek() {
            let Some(less) = budget.checked_sub(1) else {
                let kick = self.pairs.first().map(|pair| pair.rx.queue().kick());
                kick.map(|kick| kick.write(1));
                break;
            };
            budget = less;
            if frame.len() >= ETHERNET_HEADER && filter.passes(frame) {
                let n = self.steering.pair_for(frame, active);
                let Some(pair) = self.pairs.get_mut(n) else { break };
                if pair.rx.deliver(&header, frame)? == Delivery::NoBuffers {
                    break;
                }
            }
            backend.consume();
        }
        for pair in &mut self.pairs {
            pair.rx.notify()?;
        }
        Ok(())
    }

    /// Serves, and takes the link's comings and goings into account.
    fn run(&mut self, ops: &mut EventOps<'_>) {
        let backend = Arc::clone(&self.backend);
        let mut backend = lock(&backend);
        loop {
            let was_up = backend.is_up();
            if !self.shared.is_broken()
                && let Err(fault) = self.serve(backend.as_mut())
            {
                self.shared.break_down(&fault);
            }
            backend.settle(ops);
            let is_up = backend.is_up();
            self.shared.set_up(is_up);
            // What waited for a link that went down may go; so once more.
            if was_up == is_up {
                return;
            }
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data().checked_sub(FIRST_FREE_TOKEN) {
            None => lock(&self.backend).event(events.data(), events.event_set()),
            Some(_) => {
                let kicks = self.pairs.iter().flat_map(Pair::kicks);
                for kick in kicks.filter(|kick| kick_fd(kick) == events.fd()) {
                    // Only to make it unreadable.
                    let _ = kick.read();
                }
            }
        }
        self.run(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for kick in self.pairs.iter().flat_map(Pair::kicks) {
            let events = Events::with_data(kick.as_ref(), FIRST_FREE_TOKEN, EventSet::IN);
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "net: the host will not watch a queue");
            }
        }
        lock(&self.backend).register(ops);
        self.run(ops);
    }
}

fn kick_fd(kick: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::RawFd {
    use std::os::fd::AsRawFd;
    kick.as_raw_fd()
}
