//! How a row is timed and said: the fastest of a few turns, so that one interruption does not
//! show. A slow machine makes fewer turns, so that a row ends in seconds everywhere.

use std::time::Instant;

/// Turns of each row.
const TURNS: usize = 5;
/// Once a row has had this many seconds, the turn it is in is its last.
const ENOUGH: f64 = 1.0;

/// Seconds that the fastest of some turns takes; each begins with what `prepare` makes.
pub(crate) fn best<T>(prepare: impl Fn() -> T, mut turn: impl FnMut(T)) -> f64 {
    let (mut fastest, mut all) = (f64::INFINITY, 0.0);
    for _ in 0..TURNS {
        let given = prepare();
        let start = Instant::now();
        turn(given);
        let took = start.elapsed().as_secs_f64();
        fastest = fastest.min(took);
        all += took;
        if all >= ENOUGH {
            break;
        }
    }
    fastest
}

/// [`best`] of turns that need no preparation.
pub(crate) fn fastest(mut turn: impl FnMut()) -> f64 {
    best(|| (), |()| turn())
}

/// Says what one of `times` took, in ns, us or ms.
pub(crate) fn say(name: &str, seconds: f64, times: usize, unit: &str) {
    let scale = match unit {
        "ns" => 1e9,
        "us" => 1e6,
        _ => 1e3,
    };
    println!("measured {name} {:.2} {unit}", seconds * scale / times as f64);
}

/// Says which of several ways a row goes on this machine.
pub(crate) fn chose(name: &str, what: &str) {
    println!("chose {name} {what}");
}
