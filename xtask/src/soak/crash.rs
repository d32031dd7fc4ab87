//! `soak crash`: lguest is killed at random moments while its guest makes files durable. After
//! each crash the file system must be consistent once its journal has been replayed, and what
//! the guest was told to be durable must be there.

use super::Place;
use super::disks::{Format, disk};
use crate::running::Running;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::Read;
use std::time::{Duration, Instant};

/// Small, so that the journal and the block groups are used over and over.
const SIZE: u64 = 192 << 20;
/// How long a guest may take until it writes.
const LIMIT: Duration = Duration::from_secs(120);
/// It is killed at the latest so long after it has begun to write.
const LONGEST: u64 = 3000;
/// Every so many rounds the moment lies in the recovery from the last crash.
const RECOVERY: u32 = 8;

/// The files that must be there: from the first to the last.
#[derive(Clone, Copy, Debug)]
struct Promised {
    first: u32,
    last: u32,
}

/// `soak crash`: so many rounds on a disk of each kind, or of one.
pub(super) fn crash(place: &Place, rounds: u32, only: Option<Format>) -> Result<()> {
    for format in Format::ALL.into_iter().filter(|format| only.is_none_or(|only| only == *format)) {
        let path = place.path(&format!("crash.{}", format.name()));
        format.create(&path, SIZE)?;
        let all = kill_and_check(place, format, rounds)
            .with_context(|| format!("{} is kept", path.display()))?;
        println!("  {}: {rounds} crashes, {all} durable files", format.name());
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn kill_and_check(place: &Place, format: Format, rounds: u32) -> Result<u32> {
    let initrd = place.job("crash", include_str!("../../../guests/jobs/crash.sh"))?;
    let path = place.path(&format!("crash.{}", format.name()));
    let start = |promised: Promised, more: &str, name: &str| {
        let Promised { first, last } = promised;
        let append = format!("lguest.first={first} lguest.last={last} {more}");
        let mut command = place.run(&initrd, &append);
        place.with_debian(&mut command);
        command.args(["--disk", &disk(&path, format, "scratch")]);
        Running::start(command, name)
    };
    let mut promised = Promised { first: 1, last: 0 };
    let mut all = 0;
    for round in 1..=rounds {
        let name = format!("{} crash {round}/{rounds}", format.name());
        let mut guest = start(promised, "", &name)?;
        let recovering = round % RECOVERY == 0;
        let mark = if recovering { "init: replaying" } else { "init: cleared" };
        guest.wait_for(mark, LIMIT, |line| line.contains(mark).then_some(()))?;
        let longest = if recovering { LONGEST / 4 } else { LONGEST };
        let moment = Instant::now() + Duration::from_millis(random()? % longest);
        while guest.next_line(moment).is_some() {}
        if Instant::now() < moment {
            bail!("{name}: it ended by itself: {:?}", guest.said("").last());
        }
        guest.kill()?;
        if let Some(line) = guest.said("init: FAIL").next() {
            bail!("{name}: {line}: {:?}", guest.said("").collect::<Vec<_>>());
        }
        if guest.said("init: clearing").next().is_some() {
            promised.first = promised.last + 1;
        }
        // The last line may have been cut short, and then has a smaller number.
        let durable = guest.said("init: durable ").filter_map(number);
        let last = durable.max().unwrap_or(0).max(promised.last);
        all += last - promised.last;
        eprintln!("{name}: {} durable files", last - promised.last);
        promised.last = last;
        format.check(&path)?;
    }
    let mut guest = start(promised, "lguest.write=no", "the last check")?;
    guest.finish(LIMIT)?;
    if all == 0 {
        bail!("no file was ever durable: nothing has been proved");
    }
    Ok(all)
}

/// The number of "init: durable NUMBER".
fn number(line: &str) -> Option<u32> {
    line.split_once("init: durable ")?.1.parse().ok()
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
