//! The shell: a line, its first word a command.

use alloc::string::String;

use lguest_guest::{console, frames, power, print, println, time};

use crate::{bench, file, programs, threads};

/// How often the keys are looked at while there are none, in nanoseconds.
const LOOK: u64 = 10_000_000;

const HELP: &str = "\
run NAME    run a program: hello, dig, fetch, bite
ps          threads
mem         memory
time        since the start
write TEXT  write a file
cat         show it
bench       measure
panic       give up
reboot      start again
exit        power off";

/// Talks, until told to end.
pub(crate) fn run() -> ! {
    println!("\"help\" says what I can do; \"exit\" powers off.");
    loop {
        print!("puppy# ");
        console::flush();
        let line = line();
        let line = line.trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        obey(command, rest);
    }
}

/// Reads a line, with an echo.
fn line() -> String {
    let mut line = String::new();
    loop {
        let Some(key) = console::key() else {
            threads::sleep(LOOK);
            continue;
        };
        match key {
            b'\r' | b'\n' => {
                println!();
                return line;
            }
            8 | 127 if line.pop().is_some() => print!("\x08 \x08"),
            b' '..=b'~' => {
                line.push(char::from(key));
                print!("{}", char::from(key));
            }
            _ => {}
        }
        console::flush();
    }
}

fn obey(command: &str, rest: &str) {
    match command {
        "" => {}
        "help" => HELP.lines().for_each(|line| println!("{line}")),
        "run" => match programs::find(rest.trim()).map(|program| program.start(1000)) {
            Some(Ok(id)) => println!("thread {id} ended with {}", threads::join(id)),
            Some(Err(error)) => println!("{error}"),
            None => println!("no such program: hello, dig, fetch or bite"),
        },
        "ps" => {
            for (id, name, ready) in threads::list() {
                println!("{id:3} {name:8} {}", if ready { "ready" } else { "waits" });
            }
        }
        "mem" => println!("{} KiB were never used", frames::untouched() >> 10),
        "time" => {
            let millis = time::now() / 1_000_000;
            println!("{}.{:03} s, {} ticks", millis / 1000, millis % 1000, time::tick_count());
        }
        "write" => match file::write(rest.as_bytes()) {
            Ok(()) => println!("{} bytes", rest.len()),
            Err(error) => println!("{error}"),
        },
        "cat" => match file::read() {
            Ok(data) => println!("{}", String::from_utf8_lossy(&data)),
            Err(error) => println!("{error}"),
        },
        "bench" => bench::print_all(),
        "panic" => panic!("you told me to"),
        "reboot" => power::reboot(),
        "exit" => power::off(),
        _ => println!("{command}: I do not know that; \"help\" says what I do"),
    }
}
