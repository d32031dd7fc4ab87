//! Replays the loader's fuzz corpora, then mutates each for two seconds, always in the same
//! way: a bounded stand-in for `cargo fuzz` that runs with every test run.

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use vmm::loader::fuzz::{fuzz_disk_boot, fuzz_loader};

/// How long mutations go on.
const BUDGET: Duration = Duration::from_secs(2);
/// No single input may take longer than this (debug builds and busy machines included).
const LIMIT: Duration = Duration::from_secs(5);

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_corpus").join(target);
    let mut seeds: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect();
    seeds.sort();
    seeds
}

fn run(target: fn(&[u8]), name: &str, data: &[u8]) {
    let started = Instant::now();
    target(data);
    assert!(started.elapsed() < LIMIT, "{name} took {:?}", started.elapsed());
}

fn mutate(rng: &mut TestRng, data: &mut Vec<u8>, other: &[u8]) {
    if data.is_empty() {
        data.push(0);
    }
    let at = rng.next_u64() as usize % data.len();
    match rng.next_u32() % 6 {
        0 => data[at] ^= 1 << (rng.next_u32() % 8),
        1 => data[at] = rng.next_u32() as u8,
        2 => data.truncate(at),
        3 => {
            // Interesting numbers, as wide as fields are.
            let value =
                [0, u64::MAX, 0x7fff_ffff, 0x8000_0000, 1 << 32][rng.next_u32() as usize % 5];
            let width = [2, 4, 8][rng.next_u32() as usize % 3].min(data.len() - at);
            data[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        4 => {
            let tail = other.get(at..).unwrap_or_default().to_vec();
            data.splice(at.., tail);
        }
        _ => data.insert(at, rng.next_u32() as u8),
    }
}

#[test]
fn the_corpus_and_its_mutations_end_in_a_guest_or_an_error() {
    mutate_all(fuzz_loader, &corpus("loader"));
}

#[test]
fn disks_and_their_mutations_end_in_a_kernel_or_an_error() {
    mutate_all(fuzz_disk_boot, &corpus("disk_boot"));
}

fn mutate_all(target: fn(&[u8]), seeds: &[(String, Vec<u8>)]) {
    assert!(seeds.len() > 5, "the corpus is missing");
    for (name, data) in seeds {
        run(target, name, data);
    }
    let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed() < BUDGET {
        let (name, seed) = &seeds[runs % seeds.len()];
        let (_, other) = &seeds[rng.next_u32() as usize % seeds.len()];
        let mut data = seed.clone();
        for _ in 0..1 + rng.next_u32() % 4 {
            mutate(&mut rng, &mut data, other);
        }
        run(target, name, &data);
        runs += 1;
    }
    eprintln!("{runs} mutations");
}
