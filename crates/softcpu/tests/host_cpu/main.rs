//! The interpreter against the host CPU: random instructions of every encoding, in 64-,
//! 32- and 16-bit code, run on both from the same state, at the same addresses.
//!
//! Unlike the stubs' own tests this takes the whole path: fetch, decode, addressing,
//! segmentation, paging, execution, faults. The output ends with a table of what was
//! covered and what was refused, and why. Seen with
//! `cargo test -p softcpu --test host_cpu -- --nocapture`. `LGUEST_PROPERTY_ROUNDS=1000` makes it run for
//! longer, `LGUEST_PROPERTY_SEED=...` elsewhere.

mod compare;
mod encode;
mod guest;
mod layout;
mod oracle;
mod prepare;
mod random;
mod segments;
mod sequences;
mod tally;

use std::num::NonZeroU32;

use iced_x86::Code;

use compare::{Bench, Verdict};
use layout::Mode;
use random::Random;
use softcpu::translate::{Config, Counters, Invalidate};
use tally::Tally;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn every_encoding_does_what_the_host_does() {
    let rounds = number("LGUEST_PROPERTY_ROUNDS").unwrap_or(64);
    let seed = number("LGUEST_PROPERTY_SEED").unwrap_or(0x1234_5678_9abc_def1);
    let mut random = Random(seed);
    let mut bench = Bench::new();
    let mut tally = Tally::default();
    let modes = [Mode::Long, Mode::Flat32, Mode::Based32, Mode::Bits16];
    let offered = modes.map(|mode| bench.offers(mode));
    assert!(offered[0], "the host does not even run 64-bit code");
    for code in Code::values() {
        let op_code = code.op_code();
        if !op_code.is_instruction() {
            continue;
        }
        for (mode, offered) in modes.into_iter().zip(offered) {
            let exists = match mode.bitness() {
                64 => op_code.mode64(),
                32 => op_code.mode32(),
                _ => op_code.mode16(),
            };
            if !exists {
                continue;
            }
            if !offered {
                tally.note(
                    mode,
                    code,
                    &Verdict::Refused("the host has no segments for such code".to_owned()),
                );
                continue;
            }
            // Vector instructions are alike in all modes; integers are worth more.
            let vector = compare::is_vector(code);
            let rounds = if vector && mode != Mode::Long {
                rounds / 8
            } else if vector {
                rounds / 2
            } else {
                rounds
            };
            for _ in 0..rounds.max(2) {
                let verdict = bench.compare(code, mode, &mut random);
                tally.note(mode, code, &verdict);
            }
        }
    }
    tally.print(seed);
    println!("\n{:?}", bench.counters());
    tally.check(offered);
}

#[test]
fn rows_of_instructions_are_translated_as_they_are_interpreted() {
    compare_rows(300, &mut guest::Guest::translating(), sequences::compare);
}

#[test]
fn rows_with_jumps_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 2, ..Config::default() };
    let mut translator = guest::Guest::translating_as(3, config);
    let rows = compare_rows(100, &mut translator, sequences::compare_branching);
    assert!(rows.hot > 0, "{rows:?}");
}

#[test]
fn rows_at_other_addresses_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 3, ..Config::default() };
    let mut translator = guest::Guest::translating_as(3, config);
    let rows = compare_rows(50, &mut translator, sequences::compare_elsewhere);
    assert!(rows.moved > rows.translated / 2, "{rows:?}");
}

#[test]
fn rows_that_somebody_else_translates_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 3, verify: true, ..Config::default() };
    for compare in
        [sequences::compare_branching, sequences::compare_elsewhere, sequences::compare_pointing]
    {
        let mut translator = guest::Guest::translating_as(2, config).ordering();
        let rows = compare_rows(60, &mut translator, compare);
        // The others are hot, or take another's place.
        assert!(rows.beside > rows.translated / 3, "{rows:?}");
    }
    let invalidate = Some(Invalidate { every: NonZeroU32::new(7).expect("not zero"), seed: 1 });
    for config in
        [Config { code_cache: Config::SMALLEST, ..config }, Config { invalidate, ..config }]
    {
        let mut translator = guest::Guest::translating_as(2, config).ordering();
        let rows = compare_rows(30, &mut translator, sequences::compare_branching);
        assert!(rows.beside > 0 && rows.evicted + rows.invalidated > 0, "{rows:?}");
    }
    for mode in [Mode::Flat32, Mode::Based32, Mode::Bits16] {
        let mut translator = guest::Guest::translating_as(2, config).ordering();
        let rows = compare_rows_in(mode, 30, &mut translator, sequences::compare_branching);
        assert!(rows.beside > rows.translated / 2, "{rows:?}");
    }
}

#[test]
fn rows_that_share_checks_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 2, verify: true, ..Config::default() };
    let mut translator = guest::Guest::translating_as(0, config);
    let rows = compare_rows(300, &mut translator, sequences::compare_pointing);
    assert!(rows.split > 0, "{rows:?}");
}

#[test]
fn rows_that_look_into_the_mirror_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 1, verify: true, mirror_after: Some(1), ..Config::default() };
    for compare in [sequences::compare_pointing, sequences::compare, sequences::compare_branching] {
        let mut translator = guest::Guest::translating_as(0, config);
        let rows = compare_rows(80, &mut translator, compare);
        assert!(rows.hot > 0 && rows.mirrored > 0 && rows.mirror_refused > 0, "{rows:?}");
    }
}

#[test]
fn rows_in_code_memory_that_is_filled_again_and_again_are_translated_as_they_are_interpreted() {
    let config =
        Config { code_cache: Config::SMALLEST, verify: true, turns: 5, ..Config::default() };
    let mut translator = guest::Guest::translating_as(0, config);
    let rows = compare_rows(50, &mut translator, sequences::compare);
    assert!(rows.evicted > 0, "{rows:?}");
    let mut translator = guest::Guest::translating_as(3, config);
    let rows = compare_rows(50, &mut translator, sequences::compare_branching);
    assert!(rows.evicted > 0, "{rows:?}");
}

#[test]
fn rows_of_32_bit_code_are_translated_as_they_are_interpreted() {
    let config = Config { verify: true, ..Config::default() };
    let mut translator = guest::Guest::translating_as(0, config);
    let rows = compare_rows_in(Mode::Flat32, 150, &mut translator, sequences::compare);
    assert!(rows.interpreted < 4 * rows.translated, "{rows:?}");
    let mut translator = guest::Guest::translating_as(3, config);
    compare_rows_in(Mode::Flat32, 100, &mut translator, sequences::compare_branching);
    let mut translator = guest::Guest::translating_as(0, config);
    let rows = compare_rows_in(Mode::Flat32, 150, &mut translator, sequences::compare_pointing);
    assert!(rows.split > 0, "{rows:?}");
}

#[test]
fn rows_of_code_in_segments_of_its_own_are_translated_as_they_are_interpreted() {
    for mode in [Mode::Based32, Mode::Bits16] {
        let config = Config { verify: true, turns: 2, ..Config::default() };
        let mut translator = guest::Guest::translating_as(0, config);
        let rows = compare_rows_in(mode, 60, &mut translator, sequences::compare);
        assert!(rows.interpreted < 8 * rows.translated, "{rows:?}");
        let mut translator = guest::Guest::translating_as(3, config);
        let rows = compare_rows_in(mode, 60, &mut translator, sequences::compare_branching);
        assert!(rows.hot > 0, "{rows:?}");
    }
}

#[test]
fn rows_whose_code_is_taken_for_changed_are_translated_as_they_are_interpreted() {
    let invalidate = Invalidate { every: NonZeroU32::new(7).expect("not zero"), seed: 1 };
    let config = Config { invalidate: Some(invalidate), ..Config::default() };
    let mut translator = guest::Guest::translating_as(0, config);
    let rows = compare_rows(50, &mut translator, sequences::compare_pointing);
    assert!(rows.invalidated > rows.translated / 8, "{rows:?}");
    let mut translator = guest::Guest::translating_as(3, config);
    let rows = compare_rows(50, &mut translator, sequences::compare_branching);
    assert!(rows.invalidated > rows.translated / 8, "{rows:?}");
}

#[test]
fn rows_of_x87_code_are_translated_as_they_are_interpreted() {
    let config = Config { turns: 2, verify: true, ..Config::default() };
    for mode in [Mode::Long, Mode::Flat32] {
        let codes = sequences::Codes::floating(mode);
        let mut translator = guest::Guest::translating_as(0, config);
        let rows = compare_rows_of(&codes, 100, &mut translator, sequences::compare);
        // Not those of environments, and what is not masked.
        assert!(rows.interpreted < 8 * rows.translated, "{rows:?}");
        compare_rows_of(&codes, 100, &mut translator, sequences::compare_pointing);
        let mut translator = guest::Guest::translating_as(3, config);
        compare_rows_of(&codes, 50, &mut translator, sequences::compare_branching);
    }
    let codes = sequences::Codes::floating(Mode::Long);
    let mut translator = guest::Guest::translating_as(3, config);
    let rows = compare_rows_of(&codes, 50, &mut translator, sequences::compare_elsewhere);
    assert!(rows.moved > rows.translated / 2, "{rows:?}");
}

/// Rows hold with nothing between the guest's blocks and the interpreter's, so no two runs can
/// differ for another reason than a bug.
#[test]
fn rows_of_instructions_agree_in_lockstep() {
    for mode in [Mode::Long, Mode::Flat32, Mode::Based32, Mode::Bits16] {
        let mut lockstep = guest::Guest::in_lockstep();
        compare_rows_in(mode, 20, &mut lockstep, sequences::compare);
        let counters = lockstep.lockstep_counters();
        assert!(counters.stretches > 0 && counters.raced == 0, "{counters:?}");
    }
}

/// Compares a row, as the interpreter and the translator run it.
type Compare =
    fn(&sequences::Codes, &mut guest::Guest, &mut guest::Guest, &mut Random) -> Result<(), String>;

/// Compares `times` rows of 64-bit code a round. Says what the translator did.
fn compare_rows(times: u64, translator: &mut guest::Guest, compare: Compare) -> Counters {
    compare_rows_in(Mode::Long, times, translator, compare)
}

/// The same for rows in `mode`.
fn compare_rows_in(
    mode: Mode,
    times: u64,
    translator: &mut guest::Guest,
    compare: Compare,
) -> Counters {
    compare_rows_of(&sequences::Codes::new(mode), times, translator, compare)
}

/// The same for rows of `codes`.
fn compare_rows_of(
    codes: &sequences::Codes,
    times: u64,
    translator: &mut guest::Guest,
    compare: Compare,
) -> Counters {
    let rounds = number("LGUEST_PROPERTY_ROUNDS").unwrap_or(64) * times;
    let mut random = Random(number("LGUEST_PROPERTY_SEED").unwrap_or(0x0fed_cba9_8765_4321));
    let mut interpreter = guest::Guest::new();
    let mut differences = Vec::new();
    for _ in 0..rounds {
        if let Err(what) = compare(codes, &mut interpreter, translator, &mut random) {
            differences.push(what);
        }
    }
    let counters = translator.counters();
    println!("{rounds} rows, {counters:?}");
    for what in differences.iter().take(5) {
        println!("{what}\n");
    }
    assert!(differences.is_empty(), "{} of {rounds} rows differ", differences.len());
    assert!(counters.translated > rounds / 2, "{counters:?}");
    counters
}
