//! The parser of site records against any bytes, the sites of this very program against
//! its disassembly, and misuse: typed errors, and the text as it was.

use proptest::prelude::*;
use pvops::engine::{State, Subject, rewrite};
use pvops::family::OpInfo;
use pvops::plan::original;
use pvops::{
    CallKind, Erased, PatchError, RegSet, Site, Sites, Spans, Template, Text, TextError, Why, Width,
};

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..200), base: u64) {
        match sites_at(&bytes, base) {
            Err(_) => prop_assert!(bytes.len() % 12 != 0 || base % 4 != 0),
            Ok(sites) => {
                prop_assert_eq!(sites.iter().count(), sites.len());
                for site in sites.iter().flatten() {
                    prop_assert!((6..=64).contains(&site.len));
                    prop_assert!(site.address.checked_add(u64::from(site.len)).is_some());
                }
            }
        }
    }

    #[test]
    fn what_is_encoded_is_decoded(
        base in (1u64 << 40..1 << 41).prop_map(|b| b & !3),
        sites in prop::collection::vec(
            (any::<i32>(), any::<i32>(), 6u8..=64, 0u8..3, any::<u16>()), 0..20),
    ) {
        let mut bytes = vec![];
        let mut expected = vec![];
        for (i, (address, slot, len, kind, clobbers)) in sites.into_iter().enumerate() {
            let at = base + i as u64 * 12;
            bytes.extend(address.to_le_bytes());
            bytes.extend(slot.to_le_bytes());
            bytes.extend([len, kind]);
            bytes.extend(clobbers.to_le_bytes());
            expected.push(Site {
                address: at.wrapping_add_signed(address.into()),
                slot: (at + 4).wrapping_add_signed(slot.into()),
                len,
                kind: CallKind::from_u8(kind).expect("0 to 2"),
                clobbers: RegSet::from_bits(clobbers),
            });
        }
        let parsed: Result<Vec<_>, _> = sites_at(&bytes, base).expect("whole").iter().collect();
        prop_assert_eq!(parsed, Ok(expected));
    }

    /// Random records over random text: never written unless all of it fits.
    #[test]
    fn rewriting_is_all_or_nothing(
        records in prop::collection::vec((0i32..120, 6u8..20, prop::bool::weighted(0.9)), 1..6),
        fail in 0usize..8,
    ) {
        let mut text = Buffer { bytes: vec![0xcc; 128], writes_left: fail };
        let mut bytes = vec![];
        for (i, (offset, len, good)) in records.iter().enumerate() {
            let at = 0x2000 + i as i32 * 12;
            bytes.extend((TEXT as i32 + offset - at).to_le_bytes());
            bytes.extend((SLOT as i32 - at - 4).to_le_bytes());
            bytes.extend([*len, 1]);
            bytes.extend(1u16.to_le_bytes());
            let site = site(TEXT + *offset as u64, *len);
            let plan = original(&site, Width::Bits64, Why::Unpatched);
            if *good {
                let start = *offset as usize;
                let end = (start + usize::from(*len)).min(128);
                text.bytes[start..end].copy_from_slice(&plan.bytes()[..end - start]);
            }
        }
        let before = text.bytes.clone();
        let sites = sites_at(&bytes, 0x2000).expect("whole");
        match patch(sites, &mut text) {
            Ok(report) => prop_assert_eq!(report.sites(), records.len()),
            Err(_) => prop_assert_eq!(&text.bytes, &before),
        }
    }
}

/// Records that nobody wrote.
fn sites_at(bytes: &[u8], base: u64) -> Result<Sites<'_>, pvops::site::RecordError> {
    // SAFETY: they are only ever applied to buffers that nobody executes.
    unsafe { Sites::new(bytes, base) }
}

const TEXT: u64 = 0x1000;
const SLOT: u64 = 0x3000;

struct Buffer {
    bytes: Vec<u8>,
    /// After so many writes the next fails, once: what is put back succeeds.
    writes_left: usize,
}

// SAFETY: nobody executes it.
unsafe impl Text for Buffer {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        let start = address.checked_sub(TEXT).ok_or(TextError::OutsideWindow)?;
        let fits = start + len as u64 <= self.bytes.len() as u64;
        if fits { Ok(()) } else { Err(TextError::OutsideWindow) }
    }
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        let start = (address - TEXT) as usize;
        bytes.copy_from_slice(&self.bytes[start..start + bytes.len()]);
        Ok(())
    }
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        if self.writes_left == 0 {
            self.writes_left = usize::MAX;
            return Err(TextError::Refused { call: "write", errno: 5 });
        }
        self.writes_left -= 1;
        let start = (address - TEXT) as usize;
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn stop(&mut self, _: Spans<'_>) -> Result<(), TextError> {
        Ok(())
    }
}

fn site(address: u64, len: u8) -> Site {
    let clobbers = RegSet::from_bits(1);
    Site { address, slot: SLOT, len, kind: CallKind::CalleeSave, clobbers }
}

fn patch(sites: Sites<'_>, text: &mut Buffer) -> Result<pvops::Report, PatchError> {
    const OPS: &[OpInfo] =
        &[OpInfo { name: "op", sites: Some(CallKind::CalleeSave), args: 0, returns: false }];
    let subject = Subject {
        family: "test",
        ops: OPS,
        width: Width::Bits64,
        index_of: |slot| (slot == SLOT).then_some(0),
    };
    let bound = Erased { target: core::ptr::without_provenance(0x5000), template: Template::Call };
    // SAFETY: nobody executes the buffer.
    unsafe { rewrite(&subject, sites, text, |_| State::Original, |_| State::Bound(bound), |_| ()) }
}

/// One record of a site at `offset`, with this kind of call.
fn record(offset: i32, len: u8, kind: u8) -> Vec<u8> {
    let mut bytes = (TEXT as i32 + offset - 0x2000).to_le_bytes().to_vec();
    bytes.extend((SLOT as i32 - 0x2004).to_le_bytes());
    bytes.extend([len, kind, 1, 0]);
    bytes
}

#[test]
fn misuse_is_named_and_changes_nothing() {
    let fresh = || {
        let mut text = Buffer { bytes: vec![0xcc; 64], writes_left: usize::MAX };
        let plan = original(&site(TEXT, 6), Width::Bits64, Why::Unpatched);
        text.bytes[..6].copy_from_slice(plan.bytes());
        text
    };
    let try_with = |bytes: &[u8], mut text: Buffer| {
        let before = text.bytes.clone();
        let error = patch(sites_at(bytes, 0x2000).expect("whole"), &mut text).unwrap_err();
        assert_eq!(text.bytes, before);
        error.to_string()
    };
    assert_eq!(
        try_with(&record(60, 6, 1), fresh()),
        "site 0x103c of test.op: it lies outside the writable window"
    );
    assert_eq!(
        try_with(&record(0, 6, 0), fresh()),
        "site 0x1000: its record is not one of a call of test.op"
    );
    assert_eq!(
        try_with(&record(1, 6, 1), fresh()),
        "site 0x1001 of test.op: the text was changed by somebody else"
    );
    let mut greedy = record(0, 6, 1);
    greedy[10] = 3;
    assert_eq!(
        try_with(&greedy, fresh()),
        "site 0x1000: its record is not one of a call of test.op"
    );
    assert_eq!(try_with(&record(0, 5, 1), fresh()), "site record 0: a site of 5 bytes cannot be");
    assert_eq!(try_with(&record(0, 6, 7), fresh()), "site record 0: no call kind 7");
    let mut refusing = fresh();
    refusing.writes_left = 0;
    assert_eq!(
        try_with(&record(0, 6, 1), refusing),
        "site 0x1000 of test.op: write failed with error 5"
    );
    let unaligned = sites_at(&record(0, 6, 1), 0x2001).unwrap_err();
    assert_eq!(unaligned.to_string(), "site records at 0x2001 are not aligned");
    let page = pvops::user::DualMapping::around(
        sites_at(&[], 0).expect("no records"),
        pvops::user::Threads::stop(42),
    );
    assert_eq!(page.map(|_| ()), Err(TextError::OutsideWindow));
    // SAFETY: refused before anything is done.
    let odd =
        unsafe { pvops::user::DualMapping::new(0x1001, 0x2000, pvops::user::Threads::stop(42)) };
    assert_eq!(odd.map(|_| ()), Err(TextError::Unaligned { address: 0x1001 }));
}

pvops::family! {
    mod sample {
        callee_save fn one(a: u64) -> u64 = pvops::Binding::<pvops::CalleeSave<_>>::identity();
        callee_save(room = 12) fn two(a: u64) -> u64 = pvops::Binding::<pvops::CalleeSave<_>>::identity();
    }
}

/// Inlined in several callers, unrolled by the compiler, and dropped from one.
#[inline(always)]
fn both(a: u64) -> u64 {
    sample::one(a) + sample::two(a)
}

#[inline(never)]
fn loops(n: u64) -> u64 {
    (0..4).map(|i| both(n + i)).sum()
}

#[inline(never)]
fn once(n: u64) -> u64 {
    if false { both(n) } else { both(n) + sample::one(3) }
}

/// Every indirect call through a slot that disassembly finds has a record, and each
/// record a call: whatever the compiler duplicated or dropped.
#[test]
fn records_are_the_calls_that_the_disassembly_shows() {
    assert_eq!(loops(1) + once(1), 20 + 5);
    let sites: Vec<Site> =
        Sites::of_program().iter().collect::<Result<_, _>>().expect("the macros' own");
    let slots: std::collections::BTreeSet<u64> = sites.iter().map(|s| s.slot).collect();
    // The call is the site's end.
    let recorded: std::collections::BTreeSet<u64> =
        sites.iter().map(|s| s.address + u64::from(s.len) - 6).collect();
    assert_eq!(recorded.len(), sites.len());

    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let here = loops as *const () as u64;
    let range = maps.lines().find_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(rest.split_once(' ')?.0, 16).ok()?;
        (start..end).contains(&here).then_some((start, end))
    });
    let (start, end) = range.expect("this function is mapped");
    // SAFETY: mapped text.
    let text = unsafe {
        std::slice::from_raw_parts(
            std::ptr::with_exposed_provenance::<u8>(start as usize),
            (end - start) as usize,
        )
    };
    // Every offset is tried, so data between functions cannot derail the search.
    let mut found = std::collections::BTreeSet::new();
    for (offset, window) in text.windows(6).enumerate() {
        if window[0] == 0xff && (window[1] == 0x15 || window[1] == 0x25) {
            let address = start + offset as u64;
            let mut decoder = iced_x86::Decoder::with_ip(64, window, address, 0);
            let instruction = decoder.decode();
            if instruction.is_ip_rel_memory_operand()
                && slots.contains(&instruction.ip_rel_memory_address())
            {
                found.insert(address);
            }
        }
    }
    assert!(found.len() >= 4, "{found:x?}");
    assert_eq!(found, recorded);
}

/// What the thunk writer emits for vector sets, by a disassembler's reading.
#[test]
fn thunks_for_vectors_disassemble_to_saves_and_loads() {
    use pvops::dynamic::{DynamicThunk, SaveSet, Vectors};
    for (vectors, store, count) in [
        (Vectors::Xmm, "movups [rsp", 16),
        (Vectors::Ymm, "vmovups [rsp", 16),
        (Vectors::Zmm, "vmovups [rsp", 32),
    ] {
        let saves = SaveSet { vectors, ..SaveSet::callee_save(Width::Bits64) };
        let thunk = DynamicThunk { width: Width::Bits64, saves, target: 0x9_0000 };
        let mut memory = [0; DynamicThunk::MAX];
        let len = thunk.write(&mut memory, 0x1000).expect("written");
        let decoder = iced_x86::Decoder::with_ip(64, &memory[..len], 0x1000, 0);
        let mut formatter = iced_x86::NasmFormatter::new();
        let lines: Vec<String> = decoder
            .into_iter()
            .map(|i| {
                let mut line = String::new();
                iced_x86::Formatter::format(&mut formatter, &i, &mut line);
                line
            })
            .collect();
        assert!(!lines.iter().any(|l| l.contains("bad")), "{lines:#?}");
        let stores: Vec<_> = lines.iter().filter(|l| l.starts_with(store)).collect();
        assert_eq!(stores.len(), count, "{lines:#?}");
        // Each register once, and each load from where its store went.
        for line in &stores {
            let (place, register) = line.split_once(' ').unwrap().1.split_once(',').unwrap();
            let load = format!("{} {register},{place}", line.split_once(' ').unwrap().0);
            assert!(lines.contains(&load), "{load} in {lines:#?}");
        }
        let masks = lines.iter().filter(|l| l.starts_with("kmovq")).count();
        assert_eq!(masks, if vectors == Vectors::Zmm { 16 } else { 0 });
        assert!(lines.contains(&"call 0000000000090000h".to_owned()), "{lines:#?}");
    }
}
