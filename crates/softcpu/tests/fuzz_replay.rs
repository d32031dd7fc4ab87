//! A short run of the CPU's fuzz targets: every committed seed, then some seconds of
//! mutated ones, from a fixed start so that a failure can be had again. A longer one:
//! `LGUEST_FUZZ_SECONDS=60 cargo test -p softcpu --test fuzz_replay`.

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use softcpu::interp::fuzz::{fuzz_decoder, fuzz_interpreter, fuzz_lockstep, fuzz_translator};

/// Time spent on mutations of the interpreter's seeds; the decoder gets a quarter.
const BUDGET: Duration = Duration::from_millis(2400);
/// Mutations of each that are tried however long it takes.
const LEAST: u64 = 50;
/// The longest input tried.
const LONGEST: usize = 640;

/// The body of a fuzz target.
type Target = fn(&[u8]);

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
        ((self.next() >> 8) % n.max(1) as u64) as usize
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz_corpus/interpreter");
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].clone();
    let other = &corpus[random.below(corpus.len())];
    for _ in 0..=random.below(12) {
        let at = random.below(input.len() + 1);
        match random.below(6) {
            0 | 1 if at < input.len() => input[at] = random.next() as u8,
            2 => input.insert(at, random.next() as u8),
            3 if at < input.len() => {
                input.remove(at);
            }
            // Prefixes and opcode maps make instructions of noise.
            4 => {
                let common = [
                    0x0f, 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x48, 0xc4, 0xc5, 0x2e, 0x65, 0xcf, 0xff,
                    0x8e,
                ];
                input.insert(at, common[random.below(common.len())]);
            }
            _ => {
                let from = random.below(other.len() + 1);
                input.splice(at..at, other[from..].iter().copied().take(64));
            }
        }
    }
    if random.below(4) == 0 {
        input.extend((0..random.below(128)).map(|_| random.next() as u8));
    }
    input.truncate(LONGEST);
    input
}

/// Runs one target on one input, which must end soon and well.
fn survive(name: &str, target: Target, input: &[u8]) {
    let start = Instant::now();
    let ended = catch_unwind(|| target(input));
    assert!(ended.is_ok(), "{name} panics on {input:02x?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{name} hangs on {input:02x?}");
}

#[test]
fn seeds_and_their_mutations_are_survived() {
    let budget = std::env::var("LGUEST_FUZZ_SECONDS").map_or(BUDGET, |text| {
        Duration::from_secs(text.parse().expect("LGUEST_FUZZ_SECONDS is a number of seconds"))
    });
    let start = std::env::var("LGUEST_FUZZ_SEED")
        .map_or(0x9e37_79b9_7f4a_7c15, |text| text.parse().expect("a number"));
    let corpus = seeds();
    assert!(corpus.len() >= 8, "only {} seeds", corpus.len());
    let targets: [(&str, Target, Duration); 4] = [
        ("interpreter", fuzz_interpreter, budget),
        ("translator", fuzz_translator, budget),
        ("lockstep", fuzz_lockstep, budget),
        ("decoder", fuzz_decoder, budget / 4),
    ];
    for (name, target, budget) in targets {
        for seed in &corpus {
            survive(name, target, seed);
        }
        let mut random = Random(start);
        let end = Instant::now() + budget;
        let mut runs = 0_u64;
        // A host that has little time for this makes fewer, but not none.
        while Instant::now() < end || runs < LEAST {
            survive(name, target, &mutate(&mut random, &corpus));
            runs += 1;
        }
        println!("{name}: {} seeds, {runs} mutations", corpus.len());
    }
}
