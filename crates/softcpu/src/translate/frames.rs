//! Translations by the RAM frame that their code is in: what becomes stale together, and
//! where the same code at another address looks for one to clone.

use std::collections::VecDeque;

use foldhash::HashMap;

use super::mode::Mode;
use super::regions::is_in;
use crate::addr::PAGE_OFFSET;
use crate::memory::ram::RamFrame;

/// Code in a frame: where it begins, and the mode it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Code(u16, Mode);

impl Code {
    /// The code at `rip`, in `mode`.
    pub(super) fn at(rip: u64, mode: Mode) -> Self {
        Self((rip & PAGE_OFFSET) as u16, mode)
    }
}

/// Code that a translation is sought for: at `rip`, in `mode`, and in `frame` at `version`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sought {
    pub(crate) rip: u64,
    pub(crate) frame: RamFrame,
    pub(crate) version: u32,
    pub(crate) mode: Mode,
}

/// The translations of one frame's code.
#[derive(Debug)]
struct Frame {
    /// The version of the frame that they hold for.
    version: u32,
    /// Their numbers, in the order they were placed.
    blocks: VecDeque<u32>,
    /// The one that was placed last for some code, at whichever address. In order.
    codes: Vec<(Code, u32)>,
}

/// Those of all frames.
#[derive(Debug, Default)]
pub(super) struct Frames(HashMap<RamFrame, Frame>);

impl Frames {
    /// The translation that was placed last of some code in `frame`, at whichever address.
    pub(super) fn newest(&self, frame: RamFrame, code: Code) -> Option<u32> {
        let codes = &self.0.get(&frame)?.codes;
        let place = codes.binary_search_by_key(&code, |(code, _)| *code).ok()?;
        codes.get(place).map(|(_, number)| *number)
    }

    /// The version that the translations of `frame` hold for, if it has any.
    pub(super) fn version(&self, frame: RamFrame) -> Option<u32> {
        self.0.get(&frame).map(|frame| frame.version)
    }

    /// The translation `number` depends on `frame` at `version`, and stands for `code` in it if
    /// none of it is elsewhere. `None` if others are there, which are stale.
    pub(super) fn add(
        &mut self,
        frame: RamFrame,
        version: u32,
        number: u32,
        code: Option<Code>,
    ) -> Option<()> {
        let frame = self.0.entry(frame).or_insert_with(|| Frame {
            version,
            blocks: VecDeque::new(),
            codes: Vec::new(),
        });
        if frame.version != version {
            return None;
        }
        frame.blocks.push_back(number);
        let Some(code) = code else { return Some(()) };
        match frame.codes.binary_search_by_key(&code, |(code, _)| *code) {
            Ok(known) => frame.codes.get_mut(known)?.1 = number,
            Err(place) => frame.codes.insert(place, (code, number)),
        }
        Some(())
    }

    /// The oldest translation of `frame` is gone, if it is one in `region`, and with it those in
    /// that region that are as old; `code` is what it stood for.
    pub(super) fn evict(&mut self, frame: RamFrame, region: usize, code: Option<Code>) {
        let Some(known) = self.0.get_mut(&frame) else { return };
        while known.blocks.front().is_some_and(|number| is_in(*number, region)) {
            known.blocks.pop_front();
        }
        if let Some(code) = code
            && let Ok(place) = known.codes.binary_search_by_key(&code, |(code, _)| *code)
            && known.codes.get(place).is_some_and(|(_, number)| is_in(*number, region))
        {
            known.codes.remove(place);
        }
        if known.blocks.is_empty() {
            self.0.remove(&frame);
        }
    }

    /// Takes out the translations of `frame`, unless they hold for `version`.
    pub(super) fn take_stale(
        &mut self,
        frame: RamFrame,
        version: u32,
    ) -> impl Iterator<Item = u32> + use<> {
        let stale = self.0.get(&frame).is_some_and(|known| known.version != version);
        let stale = if stale { self.0.remove(&frame) } else { None };
        stale.into_iter().flat_map(|frame| frame.blocks)
    }

    /// The frames there are.
    pub(super) fn all(&self) -> impl Iterator<Item = RamFrame> {
        self.0.keys().copied()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number in a region.
    fn number(region: u32, within: u32) -> u32 {
        region << 22 | within
    }

    #[test]
    fn code_is_found_by_where_it_is_in_the_frame_until_it_is_evicted() {
        let (mut frames, frame) = (Frames::default(), RamFrame(3));
        let code = |rip| Code::at(rip, Mode::LONG);
        for (rip, number) in
            [(0x5010, number(0, 0)), (0x5000, number(0, 1)), (0x6010, number(1, 0))]
        {
            assert!(frames.add(frame, 7, number, Some(code(rip))).is_some());
        }
        assert_eq!(frames.newest(frame, code(0x9010)), Some(number(1, 0)), "at another address");
        assert_eq!(frames.newest(frame, Code::at(0x10, Mode::FLAT32)), None);
        assert_eq!((frames.version(frame), frames.version(RamFrame(4))), (Some(7), None));
        for rip in [0x5010, 0x5000] {
            frames.evict(frame, 0, Some(code(rip)));
        }
        assert_eq!(frames.newest(frame, code(0x5010)), Some(number(1, 0)), "what came later stays");
        assert_eq!(frames.newest(frame, code(0x5000)), None);
        frames.evict(frame, 1, Some(code(0x6010)));
        assert_eq!(frames.all().count(), 0);
    }

    #[test]
    fn translations_of_an_older_version_are_stale_together() {
        let (mut frames, frame) = (Frames::default(), RamFrame(3));
        let code = Some(Code::at(0, Mode::LONG));
        assert!(frames.add(frame, 7, 0, code).is_some());
        assert!(frames.add(frame, 7, 1, code).is_some());
        assert!(frames.add(frame, 8, 2, code).is_none(), "the others must go first");
        assert_eq!(frames.take_stale(frame, 7).count(), 0);
        assert_eq!(frames.take_stale(frame, 8).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(frames.take_stale(frame, 8).count(), 0);
        assert!(frames.add(frame, 8, 2, code).is_some());
    }
}
