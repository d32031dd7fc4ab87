//! A short run of the devices' fuzz targets: every committed seed, then a second of
//! mutated ones, from a fixed start so that a failure can be had again.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmm::devices::fuzz::TARGETS;

/// Time spent on each target.
const BUDGET: Duration = Duration::from_millis(170);
/// The longest input tried.
const LONGEST: usize = 512;

/// Marsaglia's xorshift: all the randomness a mutation needs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz_corpus/devices").join(target);
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].clone();
    let other = &corpus[random.below(corpus.len())];
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        match random.below(4) {
            0 if at < input.len() => input[at] = random.next() as u8,
            1 => input.insert(at, random.next() as u8),
            2 if at < input.len() => {
                input.remove(at);
            }
            _ => {
                let from = random.below(other.len() + 1);
                input.splice(at..at, other[from..].iter().copied().take(64));
            }
        }
    }
    input.truncate(LONGEST);
    input
}

#[test]
fn seeds_and_their_mutations_are_survived() {
    for (name, target) in TARGETS {
        let corpus = seeds(name);
        assert!(!corpus.is_empty(), "{name} has no seeds");
        for seed in &corpus {
            target(seed);
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let end = Instant::now() + BUDGET;
        let mut runs = 0_u64;
        while Instant::now() < end {
            let input = mutate(&mut random, &corpus);
            let start = Instant::now();
            target(&input);
            assert!(start.elapsed() < Duration::from_secs(2), "{name} hangs on {input:02x?}");
            runs += 1;
        }
        println!("{name}: {} seeds, {runs} mutations", corpus.len());
        assert!(runs > 50, "{name}: only {runs} runs");
    }
}
