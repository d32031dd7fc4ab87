//! Those who watch a machine's vCPUs: traces, names for profilers, statistics.
//!
//! The machine's configuration brings them; each vCPU's thread attaches what they have for
//! it before guest code runs.

use std::fmt;
use std::sync::Arc;

use softcpu::trace::{Event, Tracer};
use softcpu::{StatsSink, Vcpu};

/// Somebody who watches all vCPUs of a machine.
pub trait Watcher: Send + Sync {
    /// Whoever is to be told what vCPU number `vcpu` does.
    fn tracer(&self, vcpu: usize) -> Option<Box<dyn Tracer>> {
        let _ = vcpu;
        None
    }

    /// Where its statistics go. The first watcher of a machine that has a place for them
    /// gets them.
    fn stats(&self, vcpu: usize) -> Option<Box<dyn StatsSink>> {
        let _ = vcpu;
        None
    }

    /// Whether they are to tell translated code and the interpreter apart, which takes time.
    fn wants_detail(&self) -> bool {
        false
    }
}

/// The watchers of one machine.
#[derive(Clone, Default)]
pub struct Watchers(Vec<Arc<dyn Watcher>>);

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watchers").field(&self.0.len()).finish()
    }
}

impl FromIterator<Arc<dyn Watcher>> for Watchers {
    fn from_iter<T: IntoIterator<Item = Arc<dyn Watcher>>>(watchers: T) -> Self {
        Self(watchers.into_iter().collect())
    }
}

impl Watchers {
    /// Has them watch `vcpu`, which is number `index`.
    pub(crate) fn attach(&self, vcpu: &mut Vcpu, index: usize) {
        let mut tracers: Vec<_> = self.0.iter().filter_map(|one| one.tracer(index)).collect();
        match tracers.len() {
            0 => {}
            1 => vcpu.set_tracer(tracers.pop()),
            _ => vcpu.set_tracer(Some(Box::new(Several(tracers)))),
        }
        let mut places = self.0.iter().filter_map(|one| Some((one.stats(index)?, one)));
        if let Some((sink, watcher)) = places.next() {
            vcpu.set_stats(sink, watcher.wants_detail());
        }
    }
}

/// Several tracers of one vCPU.
struct Several(Vec<Box<dyn Tracer>>);

impl Tracer for Several {
    fn event(&mut self, event: Event<'_>) {
        for tracer in &mut self.0 {
            tracer.event(event);
        }
    }

    fn wants_blocks(&self) -> bool {
        self.0.iter().any(|tracer| tracer.wants_blocks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Heard(Arc<Mutex<Vec<bool>>>, bool);

    impl Tracer for Heard {
        fn event(&mut self, _: Event<'_>) {
            self.0.lock().unwrap().push(self.1);
        }

        fn wants_blocks(&self) -> bool {
            self.1
        }
    }

    #[test]
    fn each_of_several_is_told_and_one_is_enough_to_want_blocks() {
        let heard: Arc<Mutex<Vec<bool>>> = Arc::default();
        let one = |wants| Box::new(Heard(Arc::clone(&heard), wants)) as Box<dyn Tracer>;
        assert!(!Several(vec![one(false), one(false)]).wants_blocks());
        let mut both = Several(vec![one(false), one(true)]);
        assert!(both.wants_blocks());
        both.event(Event::Dropped { rip: 0 });
        assert_eq!(*heard.lock().unwrap(), [false, true]);
    }
}
