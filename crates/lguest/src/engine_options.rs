//! The options of `lguest run` that look at the engine or tune it. They have a help of their
//! own, `lguest run --help-engine`: the other one is full.

use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Command};
use softcpu::translate::{Config, Invalidate};

use crate::{Error, size};

/// The order of `lguest run --help-engine`.
const HELP: &str = "\
{about}: {usage}

{options}{after-help}";

/// Its last lines.
const NOTES: &str = "\
With --stats, what it has come to so far is said by Ctrl-A s and SIGUSR1, too.
perf report finds --perf-map by itself; a --jitdump is for perf record -k mono,
then perf inject --jit. All of it is about --engine soft, which auto stands for.";

/// Look at the engine, and tune it
#[derive(Args, Clone, Debug)]
#[command(help_template = HELP, after_help = NOTES)]
pub(crate) struct EngineOptions {
    /// Say on stderr, at the end, what the engine did
    #[arg(long, hide = true)]
    pub(crate) stats: bool,
    /// Write what every vCPU does to a file (slow).
    #[arg(long, value_name = "FILE", hide = true)]
    #[arg(help = "Write all that vCPUs do (slow): FILE[,translations]")]
    pub(crate) trace: Option<TraceChoice>,
    /// Name translated code for perf: /tmp/perf-PID.map
    #[arg(long, hide = true)]
    pub(crate) perf_map: bool,
    /// The same with the code itself: /tmp/jit-PID.dump
    #[arg(long, hide = true)]
    pub(crate) jitdump: bool,
    /// For names: a vmlinux with symbols, or System.map
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) symbols: Option<PathBuf>,
    /// Code memory in all, 256K to 1G
    #[arg(long, value_name = "SIZE", hide = true, default_value = "128M", value_parser = size::parse)]
    pub(crate) code_cache: u64,
    /// Translate on the vCPUs' own threads only
    #[arg(long, hide = true)]
    pub(crate) translate_inline: bool,
    /// Look at every translation before it may run
    #[arg(long, hide = true)]
    pub(crate) verify_translations: bool,
    /// Take code for changed at random, every N entries or so.
    #[arg(long, value_name = "N", hide = true, value_parser = parse_invalidate)]
    #[arg(help = "Take code for changed now and then: N[,SEED]")]
    pub(crate) invalidate: Option<Invalidate>,
}

/// What is traced, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceChoice {
    pub(crate) path: PathBuf,
    /// Blocks that are translated, rather than those that run.
    pub(crate) translations: bool,
}

impl FromStr for TraceChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (path, translations) = match text.strip_suffix(",translations") {
            Some(path) => (path, true),
            None => (text, false),
        };
        Ok(Self { path: path.into(), translations })
    }
}

impl EngineOptions {
    /// How code is to be translated.
    ///
    /// # Errors
    /// A code cache of a size that cannot be.
    pub(crate) fn translation(&self) -> Result<Config, Error> {
        let code_cache = usize::try_from(self.code_cache)
            .ok()
            .filter(|bytes| (Config::SMALLEST..=Config::LARGEST).contains(bytes))
            .ok_or_else(|| {
                Error::Input(format!(
                    "--code-cache {} is out of range: give a size from 256K to 1G",
                    size::display(self.code_cache)
                ))
            })?;
        let (verify, invalidate) = (self.verify_translations, self.invalidate);
        let beside = !self.translate_inline;
        Ok(Config { code_cache, verify, beside, invalidate, ..Config::default() })
    }
}

/// A number from 1, and behind a comma a seed, which is 0 without.
fn parse_invalidate(text: &str) -> Result<Invalidate, String> {
    let (every, seed) = text.split_once(',').unwrap_or((text, "0"));
    match (every.parse(), seed.parse()) {
        (Ok(every), Ok(seed)) => Ok(Invalidate { every, seed }),
        _ => Err("give a number from 1, or two: 1000 or 1000,7".to_owned()),
    }
}

/// The options' help, whether the other help hides them or not.
pub(crate) fn help() -> String {
    let command = Command::new("lguest run").disable_help_flag(true);
    EngineOptions::augment_args(command).mut_args(|arg| arg.hide(false)).render_help().to_string()
}

/// Prints it on stdout.
pub(crate) fn print_help() {
    // A closed stdout is no failure.
    let _ = io::stdout().write_all(help().as_bytes());
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::status::Status;
    use clap::Parser;

    fn options(words: &[&str]) -> EngineOptions {
        match Cli::try_parse_from(["lguest", "run"].iter().chain(words)).unwrap().command {
            Command::Run(options) => options.engine_options,
            _ => panic!("that was `run`"),
        }
    }

    #[test]
    fn the_help_has_every_option_and_fits_a_screen() {
        let help = help();
        assert!(help.lines().count() <= 24, "{help}");
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "wider than 80 columns: {line}");
        }
        let names = ["stats", "trace", "perf-map", "jitdump", "symbols", "code-cache"];
        for name in names.iter().chain(&["verify-translations", "invalidate"]) {
            assert!(help.contains(&format!("--{name}")), "{name}:\n{help}");
        }
    }

    #[test]
    fn a_code_cache_has_bounds_and_a_default() {
        assert_eq!(options(&[]).translation().unwrap(), Config::default());
        let config = options(&["--code-cache", "128M", "--verify-translations"]).translation();
        assert_eq!(
            config.unwrap(),
            Config { code_cache: 128 << 20, verify: true, ..Config::default() }
        );
        for size in ["255K", "0M", "1025M", "99999T"] {
            let error = options(&["--code-cache", size]).translation().unwrap_err();
            assert!(error.to_string().contains("256K to 1G"), "{size}: {error}");
            assert_eq!(error.status(), Status::BadInput);
        }
        assert!(options(&["--code-cache", "256K"]).translation().is_ok());
    }

    #[test]
    fn code_is_taken_for_changed_by_a_number_and_a_seed() {
        let invalidate = |text| options(&["--invalidate", text]).translation().unwrap().invalidate;
        let wanted =
            |every, seed| Some(Invalidate { every: NonZeroU32::new(every).unwrap(), seed });
        assert_eq!(invalidate("1000"), wanted(1000, 0));
        assert_eq!(invalidate("1,7"), wanted(1, 7));
        for bad in ["0", "", ",", "1,", "-1", "1,2,3", "4294967296"] {
            let words = ["lguest", "run", "--invalidate", bad];
            assert!(Cli::try_parse_from(words).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_trace_may_be_one_of_translations() {
        let choice = |text| options(&["--trace", text]).trace.unwrap();
        assert_eq!(choice("a,b"), TraceChoice { path: "a,b".into(), translations: false });
        let translations = TraceChoice { path: "a".into(), translations: true };
        assert_eq!(choice("a,translations"), translations);
    }
}
