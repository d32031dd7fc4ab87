//! How a machine's vCPUs have their code translated: by themselves, or by a thread beside them
//! where the host has a processor to spare. And what they share for it.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;

use softcpu::translate::{CodeCache, Config, Workshop};
use softcpu::{Engine, Stubs, Vcpu};

use crate::machine::MachineError;
use crate::machine::start_line::Place;
use crate::platform::pc::timers::set_timer_slack;
use crate::sandbox::ThreadKind;

/// See the module's words.
#[derive(Clone, Debug)]
pub(crate) struct Translation {
    /// What each vCPU's translator is.
    pub(crate) config: Config,
    /// What is generated for all of them, and what is translated.
    pub(crate) stubs: Arc<Stubs>,
    pub(crate) code: Option<Arc<CodeCache>>,
    workshop: Option<Arc<Workshop>>,
}

impl Translation {
    /// For the vCPUs of a machine, of `engine`.
    ///
    /// # Errors
    /// When the host refuses memory for generated code.
    pub(crate) fn new(engine: Engine, config: Config) -> Result<Self, MachineError> {
        let stubs = Arc::new(Stubs::new().map_err(MachineError::Vcpu)?);
        let code = match engine {
            Engine::Interpreter => None,
            Engine::Translator | Engine::Lockstep => {
                let code = CodeCache::new(config.code_cache, &stubs);
                Some(Arc::new(code.map_err(MachineError::Vcpu)?))
            }
        };
        // Lockstep wants every run of an engine to be like the last.
        let beside = engine == Engine::Translator && config.beside;
        let workshop = (beside && can_spare()).then(Arc::default);
        Ok(Self { config, stubs, code, workshop })
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

/// Whether the host has a processor for what is done beside the vCPUs.
pub(crate) fn can_spare() -> bool {
    available_parallelism().is_ok_and(|all| all > NonZeroUsize::MIN)
}

/// The body of the thread that works in `workshop`, until that is closed.
pub(crate) fn work(workshop: &Workshop, place: Place) {
    set_timer_slack();
    place.cross(ThreadKind::Translator);
    workshop.work();
}
