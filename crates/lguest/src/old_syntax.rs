//! The command line that the first lguest had, put into the words of `lguest run`:
//!
//! ```text
//!   lguest [options] MEGABYTES KERNEL [words for the kernel]...
//! ```
//!
//! Options may stand anywhere, as they did then. What they asked for and we have is passed on;
//! what we do not have is one line that names what does the same. Called once, with the
//! arguments as they came.

use std::ffi::OsString;

use crate::{Error, logging};

/// What old options become.
#[derive(Debug, Default)]
struct Found {
    options: Vec<OsString>,
    words: Vec<String>,
}

/// The arguments of `lguest run` that mean the same as `args`, or `args` themselves if they
/// are not of the old form: its first word that is no option is a number.
///
/// # Errors
/// An old option that cannot be had.
pub(crate) fn translate(args: Vec<OsString>) -> Result<Vec<OsString>, Error> {
    let Some(words) = args.iter().skip(1).map(|word| word.to_str()).collect::<Option<Vec<_>>>()
    else {
        return Ok(args);
    };
    if !is_old(&words) {
        return Ok(args);
    }
    let Found { options, words } = read(&words)?;
    let [megabytes, rest @ ..] = words.as_slice() else { return Ok(args) };
    let [kernel, append @ ..] = rest else {
        let remedy = "give lguest MEGABYTES KERNEL, or see \"lguest run --help\"";
        return Err(Error::Input(format!("a kernel is missing: {remedy}")));
    };
    let name = args.first().cloned().unwrap_or_else(|| "lguest".into());
    let mut run = vec![name, "run".into(), format!("--mem={megabytes}M").into()];
    run.push(format!("--kernel={kernel}").into());
    run.extend(options);
    run.push(format!("--append={}", append.join(" ")).into());
    Ok(run)
}

/// Whether an option of then has its value in the next word if not in its own.
fn takes_value(option: &str) -> bool {
    matches!(option, "--block" | "--tunnet" | "--initrd" | "--sharenet" | "--username" | "--chroot")
}

fn is_old(words: &[&str]) -> bool {
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if takes_value(word) {
            words.next();
        } else if !word.starts_with('-') {
            return word.bytes().all(|byte| byte.is_ascii_digit());
        }
    }
    false
}

fn read(args: &[&str]) -> Result<Found, Error> {
    let mut found = Found::default();
    let mut args = args.iter();
    while let Some(word) = args.next() {
        if !word.starts_with('-') {
            found.words.push((*word).to_owned());
            continue;
        }
        let (option, value) = match word.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None if takes_value(word) => (*word, args.next().copied()),
            None => (*word, None),
        };
        let value = || value.ok_or_else(|| Error::Input(format!("{option}: a value is missing")));
        match option {
            "--block" => found.options.push(format!("--disk={}", value()?).into()),
            "--initrd" => found.options.push(format!("--initrd={}", value()?).into()),
            "--tunnet" => found.options.push(format!("--net={}", network(value()?)?).into()),
            // Every guest has a source of entropy.
            "--rng" => {}
            "--verbose" | "-v" => found.options.push("-v".into()),
            "--username" | "--chroot" => {
                return Err(refuse(option, "lguest needs no privileges to drop: leave it out"));
            }
            "--sharenet" => {
                return Err(refuse(option, "to join two guests give both --net unix=PATH"));
            }
            // One of ours, between the old ones.
            _ if option.starts_with("--") => found.options.push((*word).into()),
            _ => return Err(refuse(option, "there is no such option; see \"lguest run --help\"")),
        }
    }
    Ok(found)
}

/// `IP`, which was the host's address on an interface made for the guest, or `bridge:NAME`;
/// both with the card's address behind a colon.
fn network(value: &str) -> Result<String, Error> {
    if value.starts_with("bridge:") {
        let remedy = "put an interface on that bridge (ip tuntap add) and give --net tap=NAME";
        return Err(refuse(&format!("--tunnet={value}"), remedy));
    }
    let (address, mac) = match value.split_once(':') {
        Some((address, mac)) => (address, Some(mac)),
        None => (value, None),
    };
    if address.parse::<std::net::Ipv4Addr>().is_err() {
        return Err(refuse(&format!("--tunnet={value}"), "give an IPv4 address"));
    }
    logging::say(&format!(
        "--tunnet={value}: no interface is made, the guest has the host's network (--net user)"
    ));
    Ok(mac.map_or_else(|| "user".into(), |mac| format!("user,mac={mac}")))
}

fn refuse(option: &str, remedy: &str) -> Error {
    Error::Input(format!("{option}: {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::status::Status;
    use clap::Parser;

    fn translated(line: &str) -> Result<String, Error> {
        let args = line.split(' ').map(OsString::from).collect();
        let words = translate(args)?;
        Ok(words.into_iter().map(|word| word.into_string().unwrap()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn the_old_command_line_is_understood() {
        let old = "lguest 64 vmlinux --block=rootfs.img --tunnet=192.168.19.1 --rng \
                   --initrd=initrd.img root=/dev/vda ro";
        let new = "lguest run --mem=64M --kernel=vmlinux --disk=rootfs.img --net=user \
                   --initrd=initrd.img --append=root=/dev/vda ro";
        assert_eq!(translated(old).unwrap(), new);
        let line = translated("lguest --block a.img --verbose 32 bzImage --block=b.img");
        let new = "lguest run --mem=32M --kernel=bzImage --disk=a.img -v --disk=b.img --append=";
        assert_eq!(line.unwrap(), new);
        let line = translated("lguest --tunnet=10.0.0.1:52:54:00:12:34:56 64 k --timeout=5");
        let new = "--net=user,mac=52:54:00:12:34:56 --timeout=5 --append=";
        assert!(line.unwrap().ends_with(new));
    }

    #[test]
    fn what_it_becomes_is_a_command_line() {
        let args = "lguest 64 vmlinux --block=d.img --rng root=/dev/vda init=/bin/sh";
        let args = translate(args.split(' ').map(OsString::from).collect()).unwrap();
        let Command::Run(options) = Cli::try_parse_from(args).unwrap().command else { panic!() };
        assert_eq!((options.mem, options.disk.len()), (64 << 20, 1));
        assert_eq!(options.append, "root=/dev/vda init=/bin/sh");
    }

    #[test]
    fn other_command_lines_stay_as_they_are() {
        for line in ["lguest run --kernel 64", "lguest check -v", "lguest --version", "lguest"] {
            assert_eq!(translated(line).unwrap(), line);
        }
    }

    #[test]
    fn what_cannot_be_had_is_one_line() {
        for line in [
            "lguest 64",
            "lguest 64 k --sharenet=file",
            "lguest 64 k --username=me",
            "lguest 64 k --tunnet=bridge:lg0",
            "lguest 64 k --tunnet=there",
            "lguest 64 k --block",
            "lguest 64 k -x",
        ] {
            let error = translated(line).unwrap_err();
            assert_eq!(error.status(), Status::BadInput, "{line}");
            assert!(!error.to_string().contains('\n') && error.to_string().contains(": "));
        }
    }
}
