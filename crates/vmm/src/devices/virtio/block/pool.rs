//! The threads of a disk that wait for the host's I/O.
//!
//! As many requests are in flight at the host as there are threads; the rest waits in
//! line, which is no longer than the queues.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::served_queue::{Served, ServedQueue};
use super::service::Service;
use crate::devices::virtio::chain::Chain;

/// A request to serve, and where it came from.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chain: Chain,
    pub(super) queue: Arc<ServedQueue>,
}

impl Job {
    /// Serves the request and gives it back.
    pub(super) fn run(self, service: &Service) {
        let Self { chain, queue } = self;
        let written = service.serve(&chain);
        queue.complete([Served { chain, written }]);
    }
}

#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

/// The line of requests that wait for a thread.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    line: Mutex<Line>,
    changed: Condvar,
}

impl Jobs {
    /// Puts requests in line.
    pub(super) fn add(&self, jobs: impl Iterator<Item = Job>) {
        // Collected first: making a job may take a while.
        let jobs: Vec<Job> = jobs.collect();
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.waiting.extend(jobs);
        let wake = line.waiting.len().min(line.idle);
        drop(line);
        for _ in 0..wake {
            self.changed.notify_one();
        }
    }

    /// Waits for the next request. `None`: there will be none.
    fn next(&self) -> Option<Job> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = line.waiting.pop_front() {
                return Some(job);
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

    fn close(&self) {
        self.line.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

/// The threads of one activated disk.
#[derive(Debug)]
pub(super) struct Pool {
    jobs: Arc<Jobs>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// The host refuses one.
    pub(super) fn start(count: usize, service: &Arc<Service>) -> io::Result<Self> {
        let mut pool = Self { jobs: Arc::default(), threads: Vec::new() };
        for n in 0..count {
            let (jobs, service) = (Arc::clone(&pool.jobs), Arc::clone(service));
            let thread = std::thread::Builder::new().name(format!("disk{n}"));
            pool.threads.push(thread.spawn(move || {
                while let Some(job) = jobs.next() {
                    job.run(&service);
                }
            })?);
        }
        Ok(pool)
    }

    /// The line to put requests in.
    pub(super) const fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
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
