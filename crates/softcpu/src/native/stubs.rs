//! The stubs that all vCPUs of a machine share.
//!
//! A vCPU's ops may be run by another, so an op that names a stub must mean the same to each
//! of them. So nothing here is ever forgotten: when there is no room left, which takes a guest
//! that tries out what it can encode, a vCPU has stubs of its own ([`super::NativeCache`]).

use std::fmt;
use std::io;
use std::sync::{Mutex, OnceLock};

use foldhash::HashMap;
use iced_x86::{Instruction, InstructionInfoFactory};

use super::arena::Arena;
use super::classify::{self, Needs, Plan, Refused};
use super::features::FeatureSet;
use super::{Stub, emit};
use crate::sync::lock;

/// Bytes of stubs. Pages are only taken from the host as they fill; a distribution's boot and
/// user space need a few thousand stubs of about 100 bytes.
const ROOM: usize = 4 << 20;
/// Refusals are remembered too; a guest that tries them all must not fill the host's
/// memory with them.
const MOST_KNOWN: usize = 1 << 14;
/// Stubs that get memory together.
const CHUNK: usize = 1 << 8;

/// What makes stubs, and knows those that it has made.
pub(super) struct Maker {
    arena: Arena,
    known: HashMap<Instruction, Result<u32, Refused>>,
    factory: InstructionInfoFactory,
    /// How many it has made.
    made: u32,
}

impl Maker {
    /// One for `room` bytes of stubs.
    pub(super) fn new(room: usize) -> io::Result<Self> {
        Ok(Self {
            arena: Arena::new(room)?,
            known: HashMap::default(),
            factory: InstructionInfoFactory::new(),
            made: 0,
        })
    }

    /// How many it has made.
    pub(super) const fn made(&self) -> u32 {
        self.made
    }

    /// The number of the stub for `key`, a normalised instruction. `keep` gets one that is new,
    /// with its number: they have those from zero on.
    pub(super) fn number(
        &mut self,
        key: &Instruction,
        features: &FeatureSet,
        keep: impl FnOnce(u32, Stub),
    ) -> Result<u32, Refused> {
        if let Some(known) = self.known.get(key) {
            return *known;
        }
        if self.known.len() >= MOST_KNOWN {
            return Err(Refused::Full);
        }
        let made = classify::plan(key, features, &mut self.factory)
            .and_then(|plan| self.generate(&plan))
            .map(|stub| {
                let number = self.made;
                keep(number, stub);
                self.made = number.saturating_add(1);
                number
            });
        if made != Err(Refused::Full) {
            self.known.insert(*key, made);
        }
        made
    }

    fn generate(&mut self, plan: &Plan) -> Result<Stub, Refused> {
        let code = emit::stub(plan)?;
        // SAFETY: `emit` writes leaf functions of this convention; `classify` lets only
        // instructions through that touch nothing but their operands, all of which the
        // stub takes from the state and the memory operand.
        let entry = unsafe { self.arena.push(&code) }.map_err(|_| Refused::Full)?;
        Ok(Stub {
            entry,
            needs: Needs::of(plan.traits),
            traits: plan.traits,
            size: plan.size as u16,
            align_mask: (plan.alignment as u16).saturating_sub(1),
        })
    }

    /// Forgets every stub. The caller does, too.
    pub(super) fn clear(&mut self) {
        self.arena.clear();
        self.known.clear();
        self.made = 0;
    }
}

type Chunk = Box<[OnceLock<Stub>; CHUNK]>;

/// See the module's words. vCPUs that share them offer their guest the same features.
pub struct Stubs {
    maker: Mutex<Maker>,
    /// What those vCPUs offer.
    features: OnceLock<FeatureSet>,
    /// What it has made, by number: read without a lock.
    chunks: [OnceLock<Chunk>; MOST_KNOWN / CHUNK],
}

impl fmt::Debug for Stubs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stubs").field("made", &lock(&self.maker).made()).finish_non_exhaustive()
    }
}

impl Stubs {
    /// None yet, with code memory reserved for them.
    ///
    /// # Errors
    /// The host's, when it refuses the memory.
    pub fn new() -> io::Result<Self> {
        Self::with_room(ROOM)
    }

    /// The same, with so many bytes of code memory.
    pub(crate) fn with_room(bytes: usize) -> io::Result<Self> {
        Ok(Self {
            maker: Mutex::new(Maker::new(bytes)?),
            features: OnceLock::new(),
            chunks: [const { OnceLock::new() }; MOST_KNOWN / CHUNK],
        })
    }

    /// Whether a vCPU that offers its guest `features` may share them.
    pub(crate) fn serve(&self, features: &FeatureSet) -> bool {
        self.features.get_or_init(|| *features) == features
    }

    /// The stub of that number.
    #[inline(always)]
    pub(super) fn get(&self, number: u32) -> Option<&Stub> {
        let number = number as usize;
        self.chunks.get(number / CHUNK)?.get()?.get(number % CHUNK)?.get()
    }

    /// The number of the stub for `key`, a normalised instruction: the same for each vCPU.
    pub(super) fn number(&self, key: &Instruction, features: &FeatureSet) -> Result<u32, Refused> {
        lock(&self.maker).number(key, features, |number, stub| self.publish(number, stub))
    }

    /// Lets all vCPUs have `stub`. Its code is where none has been before, so whoever finds it
    /// here has not fetched anything else from there.
    fn publish(&self, number: u32, stub: Stub) {
        let number = number as usize;
        let Some(chunk) = self.chunks.get(number / CHUNK) else { return };
        let chunk = chunk.get_or_init(|| Box::new([const { OnceLock::new() }; CHUNK]));
        if let Some(place) = chunk.get(number % CHUNK) {
            let new = place.set(stub).is_ok();
            debug_assert!(new, "each number is given once");
        }
    }
}
