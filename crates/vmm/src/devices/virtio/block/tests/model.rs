//! Any sequence of requests does to a disk what it does to an array.

use super::*;
use proptest::prelude::*;

const SECTORS: u64 = 256;

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: u64, byte: u8, cut: usize },
    Read { sector: u64, sectors: u64, cut: u32 },
    WriteZeroes { sector: u64, sectors: u64, unmap: bool },
    Discard { sector: u64, sectors: u64 },
    Flush,
    Restart,
    Reopen,
}

fn stretch() -> impl Strategy<Value = (u64, u64)> {
    (0..SECTORS, 1..40_u64).prop_map(|(sector, len)| (sector, len.min(SECTORS - sector)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (stretch(), 1_u8.., 1..512_usize).prop_map(|((sector, sectors), byte, cut)| {
            Step::Write { sector, sectors, byte, cut }
        }),
        5 => (stretch(), 1..512_u32)
            .prop_map(|((sector, sectors), cut)| Step::Read { sector, sectors, cut }),
        2 => (stretch(), any::<bool>())
            .prop_map(|((sector, sectors), unmap)| Step::WriteZeroes { sector, sectors, unmap }),
        1 => stretch().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
        1 => Just(Step::Restart),
        1 => Just(Step::Reopen),
    ]
}

/// `None`: anything.
type Model = Vec<Option<u8>>;

fn check(model: &Model, first: u64, data: &[u8]) {
    for (n, sector) in data.chunks(512).enumerate() {
        if let Some(byte) = model[first as usize + n] {
            assert!(sector.iter().all(|found| *found == byte), "sector {}", first as usize + n);
        }
    }
}

fn run(format: DiskFormat, options: &str, steps: &[Step]) {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), format, SECTORS * 512);
    let mut guest = Guest::boot(&path, options);
    let mut model: Model = vec![Some(0); SECTORS as usize];
    let mut set = |sector: u64, sectors: u64, value| {
        model[sector as usize..(sector + sectors) as usize].fill(value);
        model.clone()
    };
    let mut now = set(0, 0, None);
    for step in steps {
        match *step {
            Step::Write { sector, sectors, byte, cut } => {
                let data = vec![byte; sectors as usize * 512];
                let (head, tail) = data.split_at(cut);
                let parts = [Part::Read(head), Part::Read(tail)];
                assert_eq!(guest.request(OUT, sector, &parts).0, OK);
                now = set(sector, sectors, Some(byte));
            }
            Step::Read { sector, sectors, cut } => {
                let parts = [Part::Write(cut), Part::Write(sectors as u32 * 512 - cut)];
                let (status, data) = guest.request(IN, sector, &parts);
                assert_eq!(status, OK);
                check(&now, sector, &data);
            }
            Step::WriteZeroes { sector, sectors, unmap } => {
                let segment = (sector, sectors as u32, u32::from(unmap));
                assert_eq!(guest.segments(WRITE_ZEROES, &[segment]), OK);
                now = set(sector, sectors, Some(0));
            }
            Step::Discard { sector, sectors } => {
                assert_eq!(guest.segments(DISCARD, &[(sector, sectors as u32, 0)]), OK);
                now = set(sector, sectors, None);
            }
            Step::Flush => guest.flush(),
            Step::Restart => guest = guest.restart(),
            Step::Reopen => {
                drop(guest);
                guest = Guest::boot(&path, options);
            }
        }
    }
    check(&now, 0, &guest.read(0, SECTORS as usize * 512));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_raw_disk_is_an_array(steps in prop::collection::vec(step(), 1..40)) {
        run(DiskFormat::Raw, "", &steps);
    }

    #[test]
    fn a_qcow2_disk_is_an_array(steps in prop::collection::vec(step(), 1..40)) {
        run(DiskFormat::Qcow2, "", &steps);
    }
}

/// What one of many requests at once does to its own half of a cluster.
#[derive(Clone, Copy, Debug)]
enum Half {
    Write(u8),
    Zero { unmap: bool },
    Discard,
    Read,
}

fn half() -> impl Strategy<Value = Half> {
    prop_oneof![
        3 => (1_u8..).prop_map(Half::Write),
        2 => any::<bool>().prop_map(|unmap| Half::Zero { unmap }),
        1 => Just(Half::Discard),
        2 => Just(Half::Read),
    ]
}

/// Half a cluster of the images made here, in sectors.
const HALF: u64 = 4;

fn run_at_once(format: DiskFormat, rounds: &[Vec<Half>]) {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), format, SECTORS * 512);
    let mut guest = Guest::boot(&path, "");
    let mut model: Vec<Option<u8>> = vec![Some(0); (SECTORS / HALF) as usize];
    for round in rounds {
        let mut offered = Vec::new();
        for (at, half) in (0..).step_by(HALF as usize).zip(round) {
            let segment = |flags: u32| RawSegment {
                sector: at.into(),
                sectors: (HALF as u32).into(),
                flags: flags.into(),
            };
            offered.push(match *half {
                Half::Write(byte) => guest.begin(OUT, at, &[Part::Read(&[byte; 2048])]),
                Half::Read => guest.begin(IN, at, &[Part::Write(2048)]),
                Half::Zero { unmap } => {
                    guest.begin(WRITE_ZEROES, 0, &[Part::Read(segment(unmap.into()).as_bytes())])
                }
                Half::Discard => guest.begin(DISCARD, 0, &[Part::Read(segment(0).as_bytes())]),
            });
        }
        guest.ring.notify();
        for _ in &offered {
            guest.ring.wait_used();
        }
        for ((known, half), offered) in model.iter_mut().zip(round).zip(&offered) {
            let mut answer = guest.ring.answer(offered);
            assert_eq!(answer.pop(), Some(OK));
            match *half {
                Half::Write(byte) => *known = Some(byte),
                Half::Zero { .. } => *known = Some(0),
                Half::Discard => *known = None,
                Half::Read => {
                    if let Some(byte) = known {
                        assert!(answer.iter().all(|found| found == byte));
                    }
                }
            }
        }
    }
    drop(guest);
    let found = Guest::boot(&path, "").read(0, SECTORS as usize * 512);
    for (n, (found, known)) in found.chunks(2048).zip(&model).enumerate() {
        if let Some(byte) = known {
            assert!(found.iter().all(|found| found == byte), "half {n}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn neighbours_at_once_do_not_disturb_each_other(
        rounds in prop::collection::vec(prop::collection::vec(half(), 1..=64), 1..6),
    ) {
        for format in BOTH {
            run_at_once(format, &rounds);
        }
    }
}
