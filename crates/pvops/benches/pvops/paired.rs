//! Comparing two loops by less than the noise of a shared machine.
//!
//! Both loops are copied to pages of their own, at the same offset in each, so that
//! alignment and everything that hangs on low address bits is the same for both; which of
//! the two pages is whose, and the offset, change from layout to layout. Each sample is
//! four short runs on the same data, in the order ABBA or BAAB as a coin decides: whatever
//! drifts evenly cancels. The estimate is the median over the samples of a layout, which
//! interruptions do not move, averaged over the layouts. Its interval is a bootstrap's that
//! draws layouts as well as samples: where things lie in memory matters as much as noise.

use super::disasm;
use super::measure::now;
use iced_x86::FlowControl;

/// Bytes in a page, and in what a loop may have of it.
const PAGE: usize = 4096;
/// Offsets in the pages: every place that code may begin at in a cache line of 64 bytes.
const OFFSETS: [usize; 4] = [0, 16, 32, 48];
/// Bootstrap samples.
const RESAMPLES: usize = 1000;
/// How often everything is done again in fresh pages.
const STAGES: usize = 3;

/// An overhead in percent, with the ends of its 95 % interval.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Overhead {
    pub(crate) percent: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// Ticks a run of the first loop takes: the median.
    pub(crate) ticks: f64,
    /// Samples it rests on.
    pub(crate) samples: usize,
}

impl std::fmt::Display for Overhead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:+.3} % | {:+.3} to {:+.3} %", self.percent, self.low, self.high)
    }
}

/// A small generator of random numbers (xorshift), for coins and resampling.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// Two executable pages.
struct Stage(*mut u8);

impl Stage {
    fn new() -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: fresh memory.
        let pages = unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, prot, flags, -1, 0) };
        assert_ne!(pages, libc::MAP_FAILED);
        Self(pages.cast())
    }

    /// Puts two loops in place; `swapped`: the first into the second page.
    fn load(&self, loops: [&[u8]; 2], offset: usize, swapped: bool) -> [*const u8; 2] {
        let protect = |prot| {
            // SAFETY: our own pages, of which nothing runs.
            assert_eq!(unsafe { libc::mprotect(self.0.cast(), 2 * PAGE, prot) }, 0);
        };
        protect(libc::PROT_READ | libc::PROT_WRITE);
        let mut places = [std::ptr::null(); 2];
        for (i, code) in loops.into_iter().enumerate() {
            let page = if swapped { 1 - i } else { i };
            assert!(offset + code.len() <= PAGE);
            // SAFETY: inside the pages, as checked.
            unsafe {
                let place = self.0.add(page * PAGE + offset);
                place.copy_from_nonoverlapping(code.as_ptr(), code.len());
                places[i] = place.cast_const();
            }
        }
        // The change of protection serializes this CPU before the pages are run.
        protect(libc::PROT_READ | libc::PROT_EXEC);
        places
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: our own pages, of which nothing runs any more.
        unsafe { libc::munmap(self.0.cast(), 2 * PAGE) };
    }
}

/// The bytes of a function that can run anywhere: without calls, and without operands or
/// branches that leave it.
fn movable(start: *const ()) -> &'static [u8] {
    let code = disasm::function(start);
    let len: usize = code.iter().map(iced_x86::Instruction::len).sum();
    let range = start.addr() as u64..(start.addr() + len) as u64;
    for instruction in &code {
        assert!(!instruction.is_ip_rel_memory_operand(), "{instruction:?}");
        match instruction.flow_control() {
            FlowControl::Next | FlowControl::Return => {}
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                assert!(range.contains(&instruction.near_branch_target()), "{instruction:?}");
            }
            _ => panic!("{instruction:?} would not run elsewhere"),
        }
    }
    // SAFETY: text of this program, decoded just now.
    unsafe { std::slice::from_raw_parts(start.cast(), len) }
}

/// Keeps this thread on the CPU it is on.
pub(crate) fn pin() {
    // SAFETY: a set of our own, of the size given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

fn median(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// How much longer `loops[1]` takes than `loops[0]`. `run` runs one, given its place and
/// the sample's number.
pub(crate) fn overhead(
    loops: [*const (); 2],
    samples: usize,
    mut run: impl FnMut(*const u8, usize),
) -> Overhead {
    let code = loops.map(movable);
    let stages: [Stage; STAGES] = std::array::from_fn(|_| Stage::new());
    let mut random = Random::new();
    let (mut layouts, mut ticks) = (vec![], vec![]);
    for stage in &stages {
        for (offset, swapped) in OFFSETS.into_iter().flat_map(|o| [(o, false), (o, true)]) {
            let places = stage.load(code, offset, swapped);
            let mut differences = Vec::with_capacity(samples);
            let mut firsts = Vec::with_capacity(2 * samples);
            for sample in 0..samples {
                let mut time = |which: usize| {
                    let start = now();
                    run(places[which], layouts.len() * samples + sample);
                    (now() - start) as f64
                };
                // Brings data and code in.
                time(sample & 1);
                let flip = random.below(2);
                let times = [flip, 1 - flip, 1 - flip, flip].map(&mut time);
                let (outer, inner) = (times[0] + times[3], times[1] + times[2]);
                let difference = if flip == 0 { inner - outer } else { outer - inner };
                differences.push(difference / 2.0);
                firsts.push(if flip == 0 { outer / 2.0 } else { inner / 2.0 });
            }
            ticks.push(median(&mut firsts));
            layouts.push(differences);
        }
    }
    let ticks = ticks.iter().sum::<f64>() / ticks.len() as f64;
    let mean_of_medians = |mut pick: Option<&mut Random>| {
        let mut sum = 0.0;
        for i in 0..layouts.len() {
            let layout = pick.as_mut().map_or(i, |random| random.below(layouts.len()));
            let differences: &Vec<f64> = &layouts[layout];
            let mut drawn: Vec<f64> = match &mut pick {
                None => differences.clone(),
                Some(random) => {
                    let n = differences.len();
                    (0..n).map(|_| differences[random.below(n)]).collect()
                }
            };
            sum += median(&mut drawn);
        }
        sum / layouts.len() as f64 / ticks * 100.0
    };
    let percent = mean_of_medians(None);
    let mut drawn: Vec<f64> = (0..RESAMPLES).map(|_| mean_of_medians(Some(&mut random))).collect();
    drawn.sort_by(f64::total_cmp);
    let (low, high) = (drawn[RESAMPLES / 40], drawn[RESAMPLES - 1 - RESAMPLES / 40]);
    Overhead { percent, low, high, ticks, samples: samples * layouts.len() }
}
