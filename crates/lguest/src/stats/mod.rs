//! What the engine does, for people: `lguest run --stats` and `lguest top`.
//!
//! A run keeps what its vCPUs published last on a [`Board`], and in a file of its own for
//! `lguest top` to read (`publish`), which has the form that `record` gives it.

mod publish;
mod record;
mod report;
pub(crate) mod top;

use std::sync::{Arc, Mutex, PoisonError};

use softcpu::{Stats, StatsSink};
use vmm::engine::watch::Watcher;

use publish::Published;
use record::Header;

/// What the vCPUs of a run published last.
#[derive(Debug)]
pub(crate) struct Board {
    latest: Mutex<Vec<Stats>>,
    published: Option<Published>,
    /// A report will be wanted.
    report: bool,
}

impl Board {
    /// For a run of `vcpus` vCPUs. With `report`, time is measured for one.
    pub(crate) fn new(name: &str, vcpus: u32, memory: u64, report: bool) -> Arc<Self> {
        let header = Header::new(name, vcpus, memory);
        let published = Published::create(&header)
            .inspect_err(|error| tracing::debug!(%error, "lguest top will not see this run"));
        let latest = Mutex::new(vec![Stats::default(); vcpus as usize]);
        Arc::new(Self { latest, published: published.ok(), report })
    }

    /// The run is over, whoever still holds the board.
    pub(crate) fn close(&self) {
        self.published.iter().for_each(Published::remove);
    }

    /// A report of what was done so far; none if nobody wants it.
    pub(crate) fn report(&self) -> Option<String> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        self.report.then(|| report::report(&latest))
    }
}

/// A board as the machine sees it.
pub(crate) struct OnBoard(pub(crate) Arc<Board>);

impl Watcher for OnBoard {
    fn stats(&self, vcpu: usize) -> Option<Box<dyn StatsSink>> {
        Some(Box::new(Place { board: Arc::clone(&self.0), vcpu }))
    }

    fn wants_detail(&self) -> bool {
        self.0.report
    }
}

/// A vCPU's place on a board.
struct Place {
    board: Arc<Board>,
    vcpu: usize,
}

impl StatsSink for Place {
    fn publish(&mut self, stats: &Stats) {
        if let Some(published) = &self.board.published {
            published.update(self.vcpu, stats);
        }
        let mut latest = self.board.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = latest.get_mut(self.vcpu) {
            place.clone_from(stats);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_a_vcpu_publishes_is_in_the_report() {
        let board = Board::new("kernel", 2, 1 << 20, true);
        let watcher = OnBoard(Arc::clone(&board));
        assert!(watcher.wants_detail());
        let stats = Stats { elapsed: Duration::from_millis(2500), ..Stats::default() };
        watcher.stats(1).unwrap().publish(&stats);
        watcher.stats(9).unwrap().publish(&stats);
        let report = board.report().unwrap();
        assert!(report.contains("vCPU 1") && report.contains("2.50"), "{report}");
        assert!(Board::new("kernel", 1, 1 << 20, false).report().is_none());
    }
}
