//! Much code, translated at once, to see how long that takes: for the benchmark, which cannot
//! tell from a guest's run, whose translations are made one by one between other things.

use std::ops::Range;

use super::making::{Job, Order};
use super::route::Route;
use super::workbench::Workbench;
use crate::decode::cache::BlockCache;
use crate::vcpu::Vcpu;

/// Runs of a block: enough to be followed by others.
const RUNS: u32 = 1 << 16;
/// Jobs that are done in turn, in whose memory: as many as a vCPU keeps.
const TURNS: usize = 64;

/// What is to be translated, and with what.
#[derive(Debug)]
#[doc(hidden)]
pub struct Batch {
    bench: Workbench,
    wanted: Vec<(Route, Order)>,
    jobs: Vec<Job>,
}

impl Batch {
    /// All `code`, block by block, each with what it goes on with in the same page, as `vcpu`, which
    /// translates, would have it if it had run all of it.
    pub(crate) fn of(vcpu: &mut Vcpu, code: Range<u64>) -> Self {
        let wanted: Vec<(Route, Order)> = vcpu.with_blocks(|vcpu, blocks| {
            let begins = decode_all(vcpu, blocks, code);
            let jobs = begins.into_iter().filter_map(|rip| job(vcpu, blocks, rip));
            jobs.map(|job| (job.route, job.order)).collect()
        });
        let jobs = wanted.iter().take(TURNS).map(|(_, order)| Job::new(*order)).collect();
        Self { bench: Workbench::new(), wanted, jobs }
    }

    /// Makes all translations. Says of how many bytes of guest code, and how many bytes they have.
    pub fn make(&mut self) -> (u64, u64) {
        let (mut guest, mut host) = (0_u64, 0_u64);
        for wanted in self.wanted.chunks_mut(TURNS) {
            for ((route, order), job) in wanted.iter_mut().zip(&mut self.jobs) {
                std::mem::swap(route, &mut job.route);
                job.order = *order;
                self.bench.make(job);
                std::mem::swap(route, &mut job.route);
                let of = job.made.as_ref().map_or(0, |made| made.guest_bytes);
                guest = guest.saturating_add(of);
                host = host.saturating_add(job.len() as u64);
            }
        }
        (guest, host)
    }
}

/// Decodes all blocks of `code` into `blocks`, and says where they begin.
fn decode_all(vcpu: &mut Vcpu, blocks: &mut BlockCache, code: Range<u64>) -> Vec<u64> {
    let mut begins = Vec::new();
    let mut rip = code.start;
    while rip < code.end {
        let Ok(Some((host, frame))) = vcpu.fetch_page(rip) else { break };
        let Ok(block) = vcpu.build_block(blocks, rip, rip, host, frame) else { break };
        block.set_runs(RUNS);
        let slot = BlockCache::slot(rip);
        blocks.put(slot, block);
        let len: u64 = blocks
            .get(slot)
            .map_or(0, |block| blocks.ops(block).iter().map(|op| u64::from(op.len)).sum());
        begins.push(rip);
        rip = rip.saturating_add(len.max(1));
    }
    begins
}

/// What is to be made of the block at `rip`.
fn job(vcpu: &mut Vcpu, blocks: &BlockCache, rip: u64) -> Option<Job> {
    let head = blocks.get(BlockCache::slot(rip)).filter(|block| block.linear == rip)?;
    let mode = vcpu.translation_mode()?;
    vcpu.job_to_do(blocks, head, mode)
}
