//! Counts of what was compared, and the table made of them.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::Code;

use crate::compare::Verdict;
use crate::layout::Mode;

/// What has been seen of one encoding in one mode.
#[derive(Debug, Default)]
struct Seen {
    matched: u64,
    faulted: BTreeSet<u8>,
    refused: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    seen: BTreeMap<(Mode, u32), (Option<Code>, Seen)>,
    mismatches: Vec<String>,
    runs: u64,
}

impl Tally {
    pub(crate) fn note(&mut self, mode: Mode, code: Code, verdict: &Verdict) {
        let (name, seen) = self.seen.entry((mode, code as u32)).or_default();
        *name = Some(code);
        match verdict {
            Verdict::Same => seen.matched += 1,
            Verdict::SameFault(vector) => {
                seen.faulted.insert(*vector);
            }
            Verdict::Refused(why) => {
                seen.refused.get_or_insert_with(|| why.clone());
                return;
            }
            Verdict::Different(what) => self.mismatches.push(what.clone()),
        }
        self.runs += 1;
    }

    /// Encodings compared in `mode`: those that completed, and those that only ever faulted.
    fn covered(&self, mode: Mode) -> (usize, usize) {
        let of = |test: fn(&Seen) -> bool| {
            self.seen.iter().filter(|((m, _), (_, seen))| *m == mode && test(seen)).count()
        };
        (of(|seen| seen.matched > 0), of(|seen| seen.matched == 0 && !seen.faulted.is_empty()))
    }

    pub(crate) fn print(&self, seed: u64) {
        println!(
            "{} instructions run on both, seed {seed:#x}; {} differed\n",
            self.runs,
            self.mismatches.len()
        );
        println!("{:<12} {:>10} {:>12} {:>10}", "code", "completed", "only faults", "refused");
        let mut reasons: BTreeMap<(&str, Mode), usize> = BTreeMap::new();
        let mut families: BTreeMap<String, BTreeMap<Mode, usize>> = BTreeMap::new();
        let mut vectors: BTreeMap<u8, usize> = BTreeMap::new();
        for ((mode, _), (code, seen)) in &self.seen {
            let Some(code) = code else { continue };
            if seen.matched > 0 || !seen.faulted.is_empty() {
                let features: Vec<String> =
                    code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
                *families.entry(features.join("+")).or_default().entry(*mode).or_default() += 1;
                for vector in &seen.faulted {
                    *vectors.entry(*vector).or_default() += 1;
                }
            } else if let Some(why) = &seen.refused {
                *reasons.entry((why, *mode)).or_default() += 1;
            }
        }
        let modes = [Mode::Long, Mode::Flat32, Mode::Based32, Mode::Bits16];
        for mode in modes {
            let (completed, faulted) = self.covered(mode);
            let refused: usize =
                reasons.iter().filter(|((_, m), _)| *m == mode).map(|(_, n)| n).sum();
            println!("{:<12} {completed:>10} {faulted:>12} {refused:>10}", format!("{mode:?}"));
        }
        println!("\nencodings covered, in 64-, flat 32-, based 32- and 16-bit code");
        for (family, counts) in families {
            let row: Vec<String> =
                modes.iter().map(|m| format!("{:>5}", counts.get(m).unwrap_or(&0))).collect();
            println!("{}  {family}", row.join(""));
        }
        println!("\nencodings refused, likewise");
        let names: BTreeSet<&str> = reasons.keys().map(|(why, _)| *why).collect();
        for why in names {
            let row: Vec<String> = modes
                .iter()
                .map(|m| format!("{:>5}", reasons.get(&(why, *m)).unwrap_or(&0)))
                .collect();
            println!("{}  {why}", row.join(""));
        }
        println!("\nencodings that raised the same exception on both, by vector");
        for (vector, count) in vectors {
            println!("{count:>5}  {vector}");
        }
    }

    /// Asserts that everything agreed, and that it was not little.
    pub(crate) fn check(&self, offered: [bool; 4]) {
        // One of each kind says enough.
        let mut kinds = BTreeSet::new();
        for what in &self.mismatches {
            if kinds.insert(what.split(' ').next().unwrap_or_default()) {
                println!("{what}\n");
            }
        }
        assert!(self.mismatches.is_empty(), "{} mismatches: {kinds:?}", self.mismatches.len());
        let wide = std::arch::is_x86_feature_detected!("avx2");
        let least = if wide { [1800, 1650, 1700, 1700] } else { [1000, 1000, 1000, 1000] };
        for ((mode, least), offered) in [Mode::Long, Mode::Flat32, Mode::Based32, Mode::Bits16]
            .into_iter()
            .zip(least)
            .zip(offered)
        {
            let (completed, _) = self.covered(mode);
            assert!(!offered || completed >= least, "{mode:?}: only {completed} encodings");
        }
    }
}
