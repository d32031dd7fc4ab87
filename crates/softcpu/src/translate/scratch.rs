//! Memory that translations are made in, one after the other. Most are small, and allocating
//! anew took a third of the time that they are made in.

use std::collections::VecDeque;

use super::assembler::{Assembler, Label};
use super::block::Apart;
use super::effects::Effects;
use super::heads::Heads;
use super::sharing::{Grouping, Groups, Share};

/// See the module's words. What is in it is of no use to the next one.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) code: Assembler,
    pub(super) cold: VecDeque<Apart>,
    pub(super) effects: Vec<Effects>,
    pub(super) heads: Heads,
    pub(super) grouping: Grouping,
    pub(super) shares: Vec<Share>,
    pub(super) groups: Groups,
    pub(super) landings: Vec<(usize, Label)>,
}
