//! The threads of a disk that wait for the host's I/O.
//!
//! As many requests are in flight at the host as there are threads; the rest waits in
//! line, which is no longer than the queues. The threads are there from the disk's opening
//! to its end, whoever drives it meanwhile: none is started once a guest runs.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::served_queue::{Served, ServedQueue};
use super::service::Service;
use crate::devices::virtio::IoThreads;
use crate::devices::virtio::chain::Chain;

/// A request to serve, how, and where it came from.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chain: Chain,
    pub(super) service: Arc<Service>,
    pub(super) queue: Arc<ServedQueue>,
}

impl Job {
    /// Serves the request and gives it back.
    pub(super) fn run(self) {
        let Self { chain, service, queue } = self;
        let written = service.serve(&chain);
        queue.complete([Served { chain, written }]);
    }
}

#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<Job>,
    idle: usize,
    /// Requests in the hands of threads.
    busy: usize,
    closed: bool,
}

/// The line of requests that wait for a thread.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    line: Mutex<Line>,
    changed: Condvar,
    /// The last request in line has been served.
    served: Condvar,
}

/// A request in a thread's hands. However it ends, it is in them no longer.
struct Busy<'l>(&'l Jobs);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut line = self.0.line();
        line.busy = line.busy.saturating_sub(1);
        if line.busy == 0 && line.waiting.is_empty() {
            self.0.served.notify_all();
        }
    }
}

impl Jobs {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts requests in line.
    pub(super) fn add(&self, jobs: impl Iterator<Item = Job>) {
        // Collected first: making a job may take a while.
        let jobs: Vec<Job> = jobs.collect();
        let mut line = self.line();
        line.waiting.extend(jobs);
        let wake = line.waiting.len().min(line.idle);
        drop(line);
        for _ in 0..wake {
            self.changed.notify_one();
        }
    }

    /// Waits for the next request. `None`: there will be none.
    fn next(&self) -> Option<(Job, Busy<'_>)> {
        let mut line = self.line();
        loop {
            if let Some(job) = line.waiting.pop_front() {
                line.busy = line.busy.saturating_add(1);
                return Some((job, Busy(self)));
            }
            if line.closed {
                return None;
            }
            line.idle = line.idle.saturating_add(1);
            line = self.changed.wait(line).unwrap_or_else(PoisonError::into_inner);
            line.idle = line.idle.saturating_sub(1);
        }
    }

    /// How many wait for a thread.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.line.lock().unwrap().waiting.len()
    }

    fn finish(&self) {
        let mut line = self.line();
        while line.busy != 0 || !line.waiting.is_empty() {
            line = self.served.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&self) {
        self.line().closed = true;
        self.changed.notify_all();
    }
}

/// The threads of one disk.
#[derive(Debug, Default)]
pub(super) struct Pool {
    jobs: Arc<Jobs>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `count` threads, which may do what the threads of `io` may.
    ///
    /// # Errors
    /// The host refuses one.
    pub(super) fn start(count: usize, io: &Arc<IoThreads>) -> io::Result<Self> {
        let mut pool = Self::default();
        for n in 0..count {
            let (jobs, sandbox) = (Arc::clone(&pool.jobs), io.sandbox());
            let thread = std::thread::Builder::new().name(format!("disk{n}"));
            pool.threads.push(thread.spawn(move || {
                let mut confined = false;
                while let Some((job, _busy)) = jobs.next() {
                    // The first comes from the guest, so the machine runs.
                    if !std::mem::replace(&mut confined, true) {
                        sandbox.enter();
                    }
                    job.run();
                }
            })?);
        }
        Ok(pool)
    }

    /// The line to put requests in.
    pub(super) const fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// Waits until everything in line is served. Nobody may be adding to it.
    pub(super) fn finish(&self) {
        self.jobs.finish();
    }
}

impl Drop for Pool {
    /// Serves what is in line, and waits for it.
    fn drop(&mut self) {
        self.jobs.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk's thread has panicked; this is a bug in lguest");
            }
        }
    }
}
