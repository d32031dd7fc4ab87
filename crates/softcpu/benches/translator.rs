//! How fast code is translated, in bytes of guest code per second on one core.
//!
//! The code is this program's own: what a compiler makes, thousands of blocks of it, each
//! translated with what it goes on with, once a round. So the translator finds no code that it
//! has just seen, as it does not in a guest.
//!
//! `cargo bench -p softcpu --bench translator`

use std::fs;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use softcpu::testing::TestMachine;

/// Where the code is loaded.
const CODE: u64 = 0x10_0000;
/// Most bytes of it.
const MOST: usize = 0x2_0000;

/// The code of this program.
fn own_code() -> Vec<u8> {
    let maps = fs::read_to_string("/proc/self/maps").expect("every Linux has this file");
    let line = maps.lines().find(|line| line.contains(" r-xp ")).expect("a program has code");
    let mut fields = line.split_whitespace();
    let range = fields.next().and_then(|range| range.split_once('-')).expect("a range");
    let [start, end] = [range.0, range.1].map(|end| usize::from_str_radix(end, 16).expect("hex"));
    let offset = fields.nth(1).expect("an offset");
    let offset = usize::from_str_radix(offset, 16).expect("hex");
    let file = fs::read("/proc/self/exe").expect("this program's file is there");
    file.iter().copied().skip(offset).take((end - start).min(MOST)).collect()
}

fn translating(c: &mut Criterion) {
    let code = own_code();
    let mut machine = TestMachine::long_mode().translating(1);
    machine.put(CODE, &code);
    let mut batch = machine.batch_of(CODE..CODE + code.len() as u64);
    let (guest, host) = batch.make();
    assert!(guest > code.len() as u64 / 2, "{guest} bytes of {} were translated", code.len());
    assert!(host > guest, "{host} bytes stand for {guest}");
    let mut group = c.benchmark_group("translator");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Bytes(guest));
    group.bench_function("own_code", |b| b.iter(|| black_box(batch.make())));
    group.finish();
}

criterion_group!(benches, translating);
criterion_main!(benches);
