//! What translations are made with, one after the other: the shapes of instructions that are
//! known, and the memory of the last one.
//!
//! Whoever makes some has one: a vCPU, and each thread beside those ([`super::workshop`]).

use super::assembler::NotCopied;
use super::block::{self, Site, Translated};
use super::manner::Manner;
use super::ops::Ops;
use super::route::Route;
use super::scratch::Scratch;
use super::shapes::Shapes;
use super::trace::Trace;
use crate::native::features::FeatureSet;

/// See the module's words.
#[derive(Debug)]
pub(super) struct Workbench {
    shapes: Shapes,
    /// What those are for.
    features: FeatureSet,
    /// The last trace, for the memory it has.
    spare: Trace,
    scratch: Scratch,
    /// What a test has done to each instruction before it is translated.
    #[cfg(test)]
    pub(super) mistake: Option<super::Mistake>,
    /// What one has put in front of every translation.
    #[cfg(test)]
    pub(super) smuggled: Vec<u8>,
}

impl Workbench {
    /// One that knows nothing yet.
    pub(super) fn new() -> Self {
        Self {
            shapes: Shapes::new(),
            features: FeatureSet::default(),
            spare: Trace::default(),
            scratch: Scratch::default(),
            #[cfg(test)]
            mistake: None,
            #[cfg(test)]
            smuggled: Vec::new(),
        }
    }

    /// The shapes of instructions for a CPU that has `features`.
    fn shapes(&mut self, features: &FeatureSet) -> &mut Shapes {
        if self.features != *features {
            (self.shapes, self.features) = (Shapes::new(), *features);
        }
        &mut self.shapes
    }

    /// The trace that `route` becomes for a CPU that has `features`. `None` if its code was
    /// changing when it was copied.
    pub(super) fn trace_of(&mut self, route: &Route, features: &FeatureSet) -> Option<Trace> {
        let spare = std::mem::take(&mut self.spare);
        let trace = Trace::of(route, self.shapes(features), features, spare);
        #[cfg(test)]
        let trace = trace.map(|trace| self.plant_mistake(trace, features));
        trace
    }

    #[cfg(test)]
    fn plant_mistake(&mut self, mut trace: Trace, features: &FeatureSet) -> Trace {
        if let Some(mistake) = self.mistake {
            for (step, op) in trace.steps.iter_mut().zip(&mut trace.ops) {
                mistake(&mut step.instruction, op);
                step.shape = self.shapes(features).of(&mut step.instruction, features);
            }
        }
        trace
    }

    /// Translates `trace` for `site`, in the memory of `spare`.
    ///
    /// # Errors
    /// As [`block::translate`].
    pub(super) fn translate(
        &mut self,
        trace: &Trace,
        site: Site<'_>,
        kept: &mut Ops,
        manner: Manner,
        spare: Translated,
    ) -> Result<Translated, NotCopied> {
        let made = block::translate(trace, site, kept, manner, &mut self.scratch, spare);
        #[cfg(test)]
        let made = made.map(|made| self.smuggle(made));
        made
    }

    #[cfg(test)]
    fn smuggle(&self, made: Translated) -> Translated {
        if self.smuggled.is_empty() {
            return made;
        }
        let code = [self.smuggled.as_slice(), &made.code].concat();
        let (relocations, landings) = Default::default();
        Translated { code, relocations, landings, movable: false, ..made }
    }

    /// Nobody needs `trace` any more.
    pub(super) fn put_back(&mut self, trace: Trace) {
        self.spare = trace;
    }
}
