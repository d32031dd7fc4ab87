//! Where a vCPU's translations come from: there is one already, or one of the same code at another
//! address, or one is made of the way that the guest takes from there.
//!
//! All of it happens in the run loop, where this vCPU runs no translated code.

use super::code_cache::Evicted;
use super::frames::Sought;
use super::maker::Maker;
use super::mode::Mode;
use super::route::{Route, Router};
use super::translations::{Entry, Translations};
use super::translator::Translator;
use super::wishes::Wish;
use crate::decode::cache::{Block, BlockCache, Tail};
use crate::decode::op::Op;
use crate::memory::code_map::CodeMap;
use crate::memory::ram::RamFrame;
use crate::system::tsc::host_tsc;
use crate::trace::{self, Tracer};
use crate::vcpu::Vcpu;

impl Vcpu {
    /// Gives up what has to go for more translations.
    #[cold]
    fn give_up_next(&mut self) {
        let since = host_tsc();
        let Some(Translator { code, observer, maker, .. }) = &mut self.translator else { return };
        if let Some(Evicted { hosts, blocks, .. }) = code.give_up_next(observer) {
            maker.counters.evicted = maker.counters.evicted.wrapping_add(blocks);
            if let Some(tracer) = self.tracer.as_mut().filter(|_| blocks != 0) {
                let len = hosts.end.wrapping_sub(hosts.start);
                tracer.event(trace::Event::Evicted { host: hosts.start, len, blocks });
            }
        }
        self.catch_up();
        self.meter.evicting.add_since(since);
    }

    /// Has `make` make a translation of at most `bytes`, of code in a frame at a version, and maybe
    /// in another. `None` if it does not, or if that has changed, or if other vCPUs have yet to leave
    /// what has to go for it.
    pub(super) fn place_translation(
        &mut self,
        bytes: usize,
        (frame, version, tail): (RamFrame, u32, Option<Tail>),
        make: impl FnOnce(&mut Maker, &mut Translations) -> Option<Entry>,
    ) -> Option<Entry> {
        let Translator { code, observer, .. } = self.translator.as_ref()?;
        if code.with_room(observer, code.lock(), bytes).is_none() {
            self.give_up_next();
        }
        let Translator { code, observer, maker, .. } = self.translator.as_mut()?;
        let mut translations = code.with_room(observer, code.lock(), bytes)?;
        // Whoever closes what is stale has had its turn, or will find this.
        stands(self.memory.code(), frame, version, tail).then_some(())?;
        let entry = make(maker, &mut translations)?;
        tell_of_newest(&mut self.tracer, self.mmu.is_user(), &translations, entry);
        Some(entry)
    }

    /// A translation for `sought`, if there was one of the same code before: this very one, or a
    /// clone of one for another address. Whoever translated that had looked that no other vCPU can
    /// change the code unseen, and as long as the frame's version stands none can.
    pub(crate) fn translated_before(&mut self, sought: Sought) -> Option<Entry> {
        let Sought { rip, version, .. } = sought;
        self.catch_up();
        // What makes room may be what was found, so it is looked for again then.
        for _ in 0..2 {
            let Translator { code, observer, maker, .. } = self.translator.as_mut()?;
            let translations = code.lock();
            let number = translations.find(sought)?;
            if let Some((entry, by)) = translations.entry_at(number, rip) {
                let shared = &mut maker.counters.shared;
                *shared = shared.wrapping_add((by != maker.number).into());
                return Some(entry);
            }
            let room = translations.room_for_clone(number, rip)?;
            if let Some(mut translations) = code.with_room(observer, translations, room) {
                let entry = maker.clone_to(&mut translations, number, version, rip)?;
                tell_of_newest(&mut self.tracer, self.mmu.is_user(), &translations, entry);
                return Some(entry);
            }
            self.give_up_next();
        }
        None
    }

    /// Translates the block in `slot`, and what the guest goes on with from there; or orders
    /// that, and has nothing yet.
    #[cold]
    pub(crate) fn translate(&mut self, blocks: &BlockCache, slot: usize) -> Option<Entry> {
        let head = blocks.get(slot)?;
        let mode = self.translation_mode()?;
        let Block { rip, frame, version, .. } = *head;
        // Other vCPUs could not run it: it is interpreted, and not looked at again at each run.
        if blocks.ops(head).iter().any(Op::names_own_stub) {
            head.set_runs(0);
            return None;
        }
        if head.tail().is_none()
            && let Some(entry) = self.translated_before(Sought { rip, frame, version, mode })
        {
            head.entry.set(Some(entry));
            return Some(entry);
        }
        let mut job = self.job_to_do(blocks, head, mode)?;
        self.translator.as_mut()?.maker.bench.make(&mut job);
        let entry = self.settle(&mut job);
        self.translator.as_mut()?.keep(job);
        head.set_runs(if entry.is_some() { head.runs() } else { 0 });
        head.entry.set(entry);
        entry
    }

    /// Finds the `route` that begins with `head`, in `mode`, and how it is to be translated. `None`
    /// if its code has changed.
    pub(super) fn find_route(
        &mut self,
        blocks: &BlockCache,
        head: &Block,
        mode: Mode,
        route: &mut Route,
    ) -> Option<Wish> {
        let (host, _) = self.fetch_page(head.linear).ok().flatten()?;
        let tail_host = match head.tail() {
            Some(tail) => Some(self.fetch_page(tail.page).ok().flatten()?.0),
            None => None,
        };
        let code = self.memory.code();
        let shared = &self.translator.as_ref()?.code;
        let wish = shared.lock().wish(head.frame, head.rip, mode);
        Router {
            blocks,
            warm: self.threshold / 4,
            extent: wish.extent(),
            vectors: if self.mmu.is_user() { self.context.allowed as u8 } else { 0 },
            mode,
            segment: self.code_segment(),
            is_there: &|entry| shared.has(entry),
            settled: &|epoch| code.settled(&self.observer, epoch),
        }
        .find(head, (host, tail_host), route);
        // What was copied must be what the blocks were decoded from.
        stands(code, head.frame, head.version, head.tail()).then_some(wish)
    }
}

/// Whether the code in `frame` is what it was at `version`, and that in the second page as well.
fn stands(map: &CodeMap, frame: RamFrame, version: u32, tail: Option<Tail>) -> bool {
    map.version(frame) == version && tail.is_none_or(|tail| map.version(tail.frame) == tail.version)
}

/// Tells `tracer` of the translation that was placed last, for `user` code or the kernel's.
fn tell_of_newest(
    tracer: &mut Option<Box<dyn Tracer>>,
    user: bool,
    translations: &Translations,
    entry: Entry,
) {
    if let Some(tracer) = tracer
        && let Some((newest, code)) = translations.newest()
    {
        tracer.event(trace::Event::Translated {
            rip: newest.rip,
            user,
            instructions: newest.instructions.into(),
            host: entry.address,
            code,
        });
    }
}
