//! What a second CPU is worth: the same loop once, and twice at the same time.

use std::thread;
use std::time::Instant;

use crate::compute::{shuffled, sort};

/// Words that each loop sorts; they stay in a core's own caches.
const WORDS: usize = 1 << 15;
/// Sorts of each loop: long enough for the threads' start and a scheduler's tick not to show.
const SORTS: usize = 15;
/// Turns, of which the best counts.
const TURNS: usize = 5;

fn work() {
    let words = shuffled(WORDS);
    for _ in 0..SORTS {
        sort(&mut words.clone());
    }
}

/// How many times as much two threads do in the same time as one: 2 at best.
pub(crate) fn two_loops(name: &str) {
    let once = |threads: usize| {
        let start = Instant::now();
        thread::scope(|scope| (0..threads).for_each(|_| _ = scope.spawn(work)));
        start.elapsed().as_secs_f64()
    };
    let mut fastest = [f64::INFINITY; 2];
    for _ in 0..TURNS {
        for (threads, fastest) in (1..).zip(&mut fastest) {
            *fastest = fastest.min(once(threads));
        }
    }
    let [one, two] = fastest;
    println!("measured {name} {:.2} times", 2.0 * one / two);
}
