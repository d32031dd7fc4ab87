//! What the machine boots: a kernel that was given, or the one of the system on a disk.

use std::path::Path;
use std::rc::Rc;

use vmm::devices::virtio::block::DiskContents;
use vmm::loader::disk_boot::{self, ImageRead};
use vmm::loader::{Image, PlatformKind, platform_of};

use crate::cli::{PlatformChoice, RunOptions};
use crate::run::machine_error;
use crate::{Error, ports};

/// What the kernel is told before the user's own words, beside where its consoles are: do
/// not sit there after a panic but reset, which ends the run.
const COMMAND_LINE: &str = "panic=-1";

/// The kernel of `lguest demo` (guests/puppy), which `build.rs` has built.
const PUPPY: &[u8] = include_bytes!(env!("PUPPY"));

/// A kernel, and what goes with it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) kernel: Image,
    pub(crate) initrds: Vec<Image>,
    pub(crate) command_line: String,
}

/// Reads what is to be booted.
///
/// # Errors
/// There is nothing to boot, or it cannot be read.
pub(crate) fn source(
    options: &RunOptions,
    first_disk: Option<(DiskContents, String)>,
) -> Result<Source, Error> {
    if options.demo {
        let kernel = Image::from_bytes("puppy", PUPPY.to_vec());
        let command_line = words(options, platform(options, &kernel)?, "");
        return Ok(Source { kernel, initrds: Vec::new(), command_line });
    }
    if let Some(kernel) = &options.kernel {
        let initrds = options.initrd.iter().map(|path| open(path)).collect::<Result<_, _>>()?;
        let kernel = open(kernel)?;
        let command_line = words(options, platform(options, &kernel)?, "");
        return Ok(Source { kernel, initrds, command_line });
    }
    if !options.initrd.is_empty() {
        return Err(Error::Input("--initrd needs the kernel it belongs to: give --kernel".into()));
    }
    let Some((contents, name)) = first_disk else {
        let remedy = "give --kernel FILE, or --disk IMAGE with a system on it";
        return Err(Error::Input(format!("there is nothing to boot: {remedy}")));
    };
    let contents: Rc<dyn ImageRead> = Rc::new(contents);
    let found =
        disk_boot::find(&contents, &name).map_err(|error| Error::Input(error.to_string()))?;
    let command_line = words(options, platform(options, &found.kernel)?, &found.command_line);
    Ok(Source { kernel: found.kernel, initrds: found.initrds, command_line })
}

fn open(path: &Path) -> Result<Image, Error> {
    Image::open(path).map_err(|error| machine_error(error.into()))
}

/// What the kernel runs on. Whether it can is the machine's to say.
fn platform(options: &RunOptions, kernel: &Image) -> Result<PlatformKind, Error> {
    match options.platform {
        PlatformChoice::Auto => platform_of(kernel).map_err(|error| machine_error(error.into())),
        PlatformChoice::Pc => Ok(PlatformKind::Pc),
        PlatformChoice::Lguest => Ok(PlatformKind::Lguest),
    }
}

/// The command line. Test kernels, which end by the debug-exit port, count their words: they
/// get the user's alone.
fn words(options: &RunOptions, platform: PlatformKind, system: &str) -> String {
    if options.debug_exit {
        return options.append.clone();
    }
    let consoles = match platform {
        PlatformKind::Pc => ports::kernel_consoles(options),
        // There is no serial port there.
        PlatformKind::Lguest => ports::CONSOLE.into(),
        // Not Linux, so none of Linux' words mean anything to it.
        PlatformKind::LguestLong => return [system, &options.append].concat(),
    };
    let parts = [&consoles, COMMAND_LINE, system, &options.append];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::status::Status;
    use clap::Parser;

    fn options(words: &[&str]) -> RunOptions {
        match Cli::try_parse_from(["lguest", "run"].iter().chain(words)).unwrap().command {
            Command::Run(options) => *options,
            _ => panic!("that was `run`"),
        }
    }

    #[test]
    fn test_kernels_get_the_users_words_alone() {
        let line = |given: &[&str], system| words(&options(given), PlatformKind::Pc, system);
        assert_eq!(line(&["--append", "quiet"], ""), "console=ttyS0 panic=-1 quiet");
        assert_eq!(line(&["--append", "a b", "--debug-exit"], "root=x"), "a b");
        assert_eq!(line(&["--console", "stdio"], ""), "console=hvc0 panic=-1");
        let system = line(&["--append", "single"], "root=UUID=1 ro");
        assert_eq!(system, "console=ttyS0 panic=-1 root=UUID=1 ro single");
    }

    #[test]
    fn what_cannot_be_booted_is_one_line_with_a_remedy() {
        for (words, remedy) in
            [(&[][..], "give --kernel FILE"), (&["--initrd", "i"], "give --kernel")]
        {
            let error = source(&options(words), None).unwrap_err();
            assert!(error.to_string().contains(remedy), "{words:?}: {error}");
            assert_eq!(error.status(), Status::BadInput);
        }
    }
}
