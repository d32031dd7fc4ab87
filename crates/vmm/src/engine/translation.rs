//! How a machine's vCPUs have their code translated: by themselves, or by a thread beside them
//! where the host has a processor to spare. And what they share for it.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;

use softcpu::translate::{Config, Workshop};
use softcpu::{Stubs, Vcpu};

use crate::machine::MachineError;
use crate::machine::start_line::Place;
use crate::platform::pc::timers::set_timer_slack;
use crate::sandbox::ThreadKind;

/// What vCPUs have made for each other takes one part in so many of a vCPU's code memory.
const SHELF: usize = 4;

/// See the module's words.
#[derive(Clone, Debug)]
pub(crate) struct Translation {
    /// What each vCPU's translator is.
    pub(crate) config: Config,
    /// What is generated for all of them.
    pub(crate) stubs: Arc<Stubs>,
    workshop: Option<Arc<Workshop>>,
}

impl Translation {
    /// For `cpus` vCPUs of `engine`.
    ///
    /// # Errors
    /// When the host refuses memory for generated code.
    pub(crate) fn new(
        engine: softcpu::Engine,
        config: Config,
        cpus: u32,
    ) -> Result<Self, MachineError> {
        let stubs = Arc::new(Stubs::new().map_err(MachineError::Vcpu)?);
        // Lockstep wants every run of an engine to be like the last.
        let beside = engine == softcpu::Engine::Translator && config.beside;
        let spare = || available_parallelism().is_ok_and(|all| all > NonZeroUsize::MIN);
        let workshop = (beside && spare()).then(|| match cpus {
            1 => Workshop::default(),
            _ => Workshop::with_shelf(config.code_cache / SHELF),
        });
        Ok(Self { config, stubs, workshop: workshop.map(Arc::new) })
    }

    /// Has `vcpu` use the workshop, if there is one.
    pub(crate) fn attach(&self, vcpu: &mut Vcpu) {
        if let Some(workshop) = &self.workshop {
            vcpu.order_from(workshop);
        }
    }

    /// Who is to work beside the vCPUs.
    pub(crate) fn workshop(&self) -> Option<Arc<Workshop>> {
        self.workshop.clone()
    }
}

/// The body of the thread that works in `workshop`, until that is closed.
pub(crate) fn work(workshop: &Workshop, place: Place) {
    set_timer_slack();
    place.cross(ThreadKind::Translator);
    workshop.work();
}
