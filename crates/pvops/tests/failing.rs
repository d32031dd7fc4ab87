//! A text that fails on schedule: at any write, and again at any write of the rollback.
//! Either nothing has changed, or the error names what has, the family refuses to go on,
//! and repairing it brings it back.

use pvops::{
    BindError, Binding, Bindings, Cause, Family, PatchError, Patched, Sites, Spans, Text,
    TextError, Unpatched, callee_save,
};
use std::sync::{Mutex, MutexGuard};

pvops::family! {
    mod ops {
        use super::{one, two};
        callee_save fn first(a: u64) -> u64 = pvops::Binding::call(one::CALLEE_SAVE);
        callee_save(room = 9) fn second(a: u64) -> u64 = pvops::Binding::call(two::CALLEE_SAVE);
    }
}

#[callee_save]
fn one(a: u64) -> u64 {
    a + 1
}

#[callee_save]
fn two(a: u64) -> u64 {
    a + 2
}

/// Six sites.
#[inline(never)]
fn sites_are_here(a: u64) -> u64 {
    ops::first(a)
        + ops::second(a)
        + ops::first(a + 1)
        + ops::second(a + 1)
        + ops::first(a + 2)
        + ops::second(a + 2)
}

/// A copy of this program's text that nobody executes.
#[derive(Clone)]
struct Copy {
    base: u64,
    bytes: Vec<u8>,
    writes: usize,
    /// Writes that fail, by number; `stuck` ones from then on.
    fail: Vec<usize>,
    stopped: bool,
}

const REFUSED: TextError = TextError::Refused { call: "write", errno: 5 };

impl Copy {
    fn new() -> Self {
        let sites: Vec<_> = Sites::of_program().iter().collect::<Result<_, _>>().expect("ours");
        assert!(sites.len() >= 6, "{sites:x?}");
        let base = sites.iter().map(|s| s.address).min().expect("some");
        let end = sites.iter().map(|s| s.address + u64::from(s.len)).max().expect("some");
        // SAFETY: text of this program.
        let bytes = unsafe {
            std::slice::from_raw_parts(
                std::ptr::with_exposed_provenance::<u8>(base as usize),
                (end - base) as usize,
            )
        };
        Self { base, bytes: bytes.to_vec(), writes: 0, fail: vec![], stopped: false }
    }

    /// From now on: these writes fail.
    fn fail(&mut self, fail: &[usize]) {
        self.writes = 0;
        self.fail = fail.to_vec();
    }

    /// Sites whose bytes are not those of another text.
    fn differ(&self, other: &Self) -> Vec<u64> {
        Sites::of_program()
            .iter()
            .flatten()
            .filter(|site| {
                let start = (site.address - self.base) as usize;
                let range = start..start + usize::from(site.len);
                self.bytes[range.clone()] != other.bytes[range]
            })
            .map(|site| site.address)
            .collect()
    }
}

// SAFETY: nobody executes it.
unsafe impl Text for Copy {
    fn covers(&self, _: u64, _: usize) -> Result<(), TextError> {
        Ok(())
    }
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        let start = (address - self.base) as usize;
        bytes.copy_from_slice(&self.bytes[start..start + bytes.len()]);
        Ok(())
    }
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        assert!(self.stopped);
        self.writes += 1;
        if self.fail.contains(&(self.writes - 1)) {
            return Err(REFUSED);
        }
        let start = (address - self.base) as usize;
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn stop(&mut self, _: Spans<'_>) -> Result<(), TextError> {
        assert!(!std::mem::replace(&mut self.stopped, true));
        Ok(())
    }
    fn resume(&mut self) {
        assert!(std::mem::replace(&mut self.stopped, false));
    }
}

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// What a change that fails at write `n` leaves, when rollback writes fail as told.
fn check(error: PatchError, now: &Copy, before: &Copy, n: usize) -> bool {
    let left = now.differ(before);
    let PatchError::HalfDone(half) = error else {
        assert_eq!(left, [0u64; 0], "{error}");
        assert!(error.to_string().ends_with("write failed with error 5"), "{error}");
        return false;
    };
    assert_eq!((half.cause, half.count), (Cause::Text(REFUSED), left.len()), "{error}");
    assert_eq!(half.left, left[0]);
    assert!(half.count <= n && half.family == "ops");
    let text = error.to_string();
    assert!(text.contains(&format!("{} changed before", left.len())), "{text}");
    assert!(text.contains(&format!("{:#x} of ops.{}", half.left, half.left_op)), "{text}");
    true
}

/// Rollback writes that fail: the `m`-th, once (the second try succeeds), or for good; or
/// all of them.
fn schedules(n: usize) -> Vec<(Vec<usize>, bool)> {
    let mut all = vec![(vec![n], false), ((n..100).collect(), n > 0)];
    for m in 0..n {
        all.push((vec![n, n + 1 + m], false));
        all.push((vec![n, n + 1 + m, n + 2 + m], true));
    }
    all
}

fn other() -> Bindings<ops::Family> {
    let mut other = Bindings::new("other");
    other.bind(ops::op::First, Binding::call(two::CALLEE_SAVE)).expect("once");
    other.bind(ops::op::Second, Binding::<pvops::CalleeSave<_>>::identity()).expect("once");
    other
}

const HALF: BindError = BindError::HalfDone { family: "ops" };

fn refuses_unpatched(
    mut family: Unpatched<ops::Family>,
    text: &mut Copy,
) -> Unpatched<ops::Family> {
    let sites = Sites::of_program();
    assert_eq!(family.bind(&other()), Err(HALF));
    let (family, error) = family.apply(sites, text, |_| ()).expect_err("half changed");
    assert_eq!(error, PatchError::Bind(HALF));
    family
}

fn refuses_patched(mut family: Patched<ops::Family>, text: &mut Copy) -> Patched<ops::Family> {
    let sites = Sites::of_program();
    let error = family.rebind(&other(), sites, text, |_| ()).expect_err("half changed");
    assert_eq!(error, PatchError::Bind(HALF));
    let error = family.apply_late(sites, text, |_| ()).expect_err("half changed");
    assert_eq!(error, PatchError::Bind(HALF));
    let (family, error) = family.undo(sites, text).expect_err("half changed");
    assert_eq!(error, PatchError::Bind(HALF));
    family
}

#[test]
fn a_failure_anywhere_is_undone_or_named() {
    let _turn = turn();
    assert_eq!(sites_are_here(1), 6 + 3 * 3 + 2 * 3);
    let sites = Sites::of_program();
    let original = Copy::new();
    let mut text = original.clone();
    let count = sites.len();
    let mut family = ops::Family::claim().expect("nobody has it");
    let (mut halves, mut wholes) = (0, 0);
    for n in 0..count {
        for (fail, half) in schedules(n) {
            // Apply.
            text.fail(&fail);
            let (unpatched, error) = family.apply(sites, &mut text, |_| ()).expect_err("fails");
            assert_eq!(check(error, &text, &original, n), half, "{fail:?}");
            family = unpatched;
            text.fail(&[]);
            if half {
                family = refuses_unpatched(family, &mut text);
                // Repairing may fail as well, and then goes on where it was.
                text.fail(&[0]);
                assert!(family.repair(sites, &mut text).is_err());
                text.fail(&[]);
                assert!(family.repair(sites, &mut text).expect("repaired") > 0);
            }
            assert_eq!(text.differ(&original), [0u64; 0]);

            // Rebind and undo, from patched.
            let applied = family.apply(sites, &mut text, |_| ());
            let (mut patched, _) = applied.map_err(|e| e.1).expect("nothing fails");
            let bound = text.clone();
            text.fail(&fail);
            let error = patched.rebind(&other(), sites, &mut text, |_| ()).expect_err("fails");
            assert_eq!(check(error, &text, &bound, n), half, "{fail:?}");
            text.fail(&[]);
            if half {
                patched = refuses_patched(patched, &mut text);
                assert!(patched.repair(sites, &mut text).expect("repaired") > 0);
            }
            assert_eq!(text.differ(&bound), [0u64; 0]);
            text.fail(&fail);
            let (back, error) = patched.undo(sites, &mut text).expect_err("fails");
            assert_eq!(check(error, &text, &bound, n), half, "{fail:?}");
            patched = back;
            text.fail(&[]);
            if half {
                patched = refuses_patched(patched, &mut text);
                assert!(patched.repair(sites, &mut text).expect("repaired") > 0);
            }
            assert_eq!(text.differ(&bound), [0u64; 0]);
            family = patched.undo(sites, &mut text).map_err(|e| e.1).expect("nothing fails");
            assert_eq!(text.differ(&original), [0u64; 0]);
            *(if half { &mut halves } else { &mut wholes }) += 1;
        }
    }
    assert!(halves > 10 && wholes > 10, "{halves} {wholes}");
    family.release();
}

/// Somebody else's bytes are never written over, not even by a repair.
#[test]
fn repair_leaves_strangers_alone() {
    let _turn = turn();
    let sites = Sites::of_program();
    let mut text = Copy::new();
    text.fail(&(2..100).collect::<Vec<_>>());
    let family = ops::Family::claim().expect("nobody has it");
    let (mut family, error) = family.apply(sites, &mut text, |_| ()).expect_err("fails");
    let PatchError::HalfDone(half) = error else { panic!("{error}") };
    text.fail(&[]);
    let start = (half.left - text.base) as usize;
    let stray = text.bytes[start];
    text.bytes[start] = 0xcc;
    let changed = text.clone();
    let error = family.repair(sites, &mut text).expect_err("changed");
    assert!(error.to_string().ends_with("the text was changed by somebody else"), "{error}");
    assert_eq!(text.differ(&changed), [0u64; 0]);
    text.bytes[start] = stray;
    assert_eq!(family.repair(sites, &mut text), Ok(half.count));
    family.release();
}
