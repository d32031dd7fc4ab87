//! The threads that do devices' work.
//!
//! Each runs a loop over descriptors: queue notifications, sockets, timers. A device's
//! handlers are spread over them in turn and stay where they are put, so a handler needs
//! no locks of its own. Handlers must not block: what does (a disk) has threads of its own
//! for that.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use event_manager::{
    EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};

use crate::sandbox::{DeviceSandbox, Sandbox};

/// What runs on an I/O thread: told of its descriptors' events, in turn with the others.
pub type Handler = Box<dyn MutEventSubscriber + Send>;

/// How many threads `--io` may ask for.
pub const MAX_THREADS: usize = 64;

struct Loop {
    endpoint: RemoteEndpoint<Handler>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The threads of one machine.
#[derive(Debug)]
pub struct IoThreads {
    loops: Vec<Loop>,
    turn: AtomicUsize,
    sandbox: DeviceSandbox,
}

/// A handler at work. Dropping it leaves it there; [`Attached::detach`] takes it back.
#[must_use]
pub struct Attached {
    endpoint: RemoteEndpoint<Handler>,
    id: SubscriberId,
}

impl fmt::Debug for Loop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loop").field("stop", &self.stop).finish_non_exhaustive()
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("id", &self.id).finish_non_exhaustive()
    }
}

impl IoThreads {
    /// Starts `count` threads: 1 at least, [`MAX_THREADS`] at most.
    ///
    /// # Errors
    /// The host refuses a thread or a descriptor.
    pub fn start(count: usize) -> io::Result<Arc<Self>> {
        let loops = (0..count.clamp(1, MAX_THREADS)).map(Loop::start).collect::<Result<_, _>>()?;
        Ok(Arc::new(Self { loops, turn: AtomicUsize::new(0), sandbox: DeviceSandbox::default() }))
    }

    /// Puts a handler to work on the thread whose turn it is.
    ///
    /// # Errors
    /// The threads have been stopped.
    pub fn attach(&self, handler: Handler) -> Result<Attached, event_manager::Error> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let at = turn.checked_rem(self.loops.len()).unwrap_or(0);
        let target = self.loops.get(at).ok_or(event_manager::Error::ChannelSend)?;
        let endpoint = target.endpoint.clone();
        let id = endpoint.call_blocking(move |loop_: &mut dyn SubscriberOps<Subscriber = _>| {
            Ok::<_, event_manager::Error>(loop_.add_subscriber(handler))
        })?;
        Ok(Attached { endpoint, id })
    }

    /// Has all threads enter `sandbox`, and whoever else does devices' work.
    pub(crate) fn confine(&self, sandbox: Arc<dyn Sandbox>) {
        self.sandbox.set(sandbox);
        for each in &self.loops {
            let sandbox = self.sandbox.clone();
            let entered =
                each.endpoint.call_blocking(move |_: &mut dyn SubscriberOps<Subscriber = _>| {
                    sandbox.enter();
                    Ok::<_, event_manager::Error>(())
                });
            if let Err(error) = entered {
                tracing::debug!(%error, "an I/O thread is gone already");
            }
        }
    }

    /// What devices' other threads enter before their first work for a guest.
    pub(crate) fn sandbox(&self) -> DeviceSandbox {
        self.sandbox.clone()
    }

    /// Stops all threads and waits for them. Handlers still attached are dropped.
    pub fn stop(&self) {
        for each in &self.loops {
            each.stop();
        }
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Attached {
    /// Takes the handler away from its thread. When this returns it is not running, and
    /// will not run again.
    ///
    /// Not for handlers themselves: it would wait for its own thread.
    ///
    /// # Errors
    /// The threads have been stopped, and the handler is gone.
    pub fn detach(self) -> Result<Handler, event_manager::Error> {
        let id = self.id;
        self.endpoint.call_blocking(move |loop_: &mut dyn SubscriberOps<Subscriber = _>| {
            loop_.remove_subscriber(id)
        })
    }
}

impl Loop {
    fn start(index: usize) -> io::Result<Self> {
        let mut manager: EventManager<Handler> = EventManager::new().map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(format!("io{index}")).spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "an I/O thread cannot wait for events");
                    return;
                }
            }
        })?;
        Ok(Self { endpoint, stop, thread: Mutex::new(Some(thread)) })
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes it up; if it is gone already, so much the better.
        let _ = self.endpoint.fire(|_| ());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("an I/O thread has panicked; this is a bug in lguest");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventOps, EventSet, Events};
    use std::sync::mpsc::{Sender, channel};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Echo {
        kick: Arc<EventFd>,
        seen: Sender<u64>,
    }

    impl MutEventSubscriber for Echo {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.seen.send(self.kick.read().unwrap()).unwrap();
        }

        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&*self.kick, EventSet::IN)).unwrap();
        }
    }

    #[test]
    fn handlers_run_until_they_are_taken_away() {
        let threads = IoThreads::start(2).unwrap();
        let (seen, heard) = channel();
        let kicks: Vec<_> = (0..3).map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())).collect();
        let mut attached: Vec<_> = kicks
            .iter()
            .map(|kick| {
                let echo = Echo { kick: Arc::clone(kick), seen: seen.clone() };
                threads.attach(Box::new(echo)).unwrap()
            })
            .collect();
        for (kick, n) in kicks.iter().zip(1..) {
            kick.write(n).unwrap();
            assert_eq!(heard.recv().unwrap(), n);
        }
        drop(attached.remove(0).detach().unwrap());
        kicks[0].write(9).unwrap();
        kicks[1].write(5).unwrap();
        assert_eq!(heard.recv().unwrap(), 5);
        threads.stop();
        let refused = threads.attach(Box::new(Echo { kick: kicks[0].clone(), seen }));
        assert!(refused.is_err() || heard.try_recv().is_err());
    }
}
