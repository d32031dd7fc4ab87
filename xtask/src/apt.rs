//! Debian packages by download only, through the machine's own apt.
//!
//! apt gets a private state, cache and list of sources under `target/guests/apt/`, so nothing
//! is installed, nothing of the system's is touched, and an ordinary user may do it. The
//! machine's configuration (proxies, certificates, authentication) and its keyring are
//! respected, and its mirror, if it has Debian sources of its own.

use crate::{paths, progress};
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const ARCHIVE: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";
/// How old a list of packages may be before it is fetched again.
const FRESH: Duration = Duration::from_secs(24 * 3600);

/// A release of Debian, as far as apt is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Debian 12.
    Bookworm,
    /// Newer packages rebuilt for Debian 12.
    #[value(skip)]
    BookwormBackports,
    /// Debian 13.
    Trixie,
}

impl Suite {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::BookwormBackports => "bookworm-backports",
            Self::Trixie => "trixie",
        }
    }

    /// Its security updates; backports have none of their own.
    fn security(self) -> Option<&'static str> {
        match self {
            Self::Bookworm => Some("bookworm-security"),
            Self::BookwormBackports => None,
            Self::Trixie => Some("trixie-security"),
        }
    }
}

/// apt with a state of its own for one suite.
#[derive(Debug)]
pub(crate) struct Apt {
    suite: Suite,
    root: PathBuf,
}

impl Apt {
    /// Prepares the private state and brings its lists of packages up to date.
    pub(crate) fn new(suite: Suite) -> Result<Self> {
        let apt = Self { suite, root: paths::guests().join("apt").join(suite.name()) };
        for directory in ["state/lists/partial", "cache/archives/partial", "debs"] {
            let path = apt.root.join(directory);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        apt.configure()?;
        if !apt.is_fresh() {
            let what = format!("asking Debian for {}'s list of packages", suite.name());
            progress::step(&what, || apt.run("apt-get", &["update", "-qq"]))?;
            fs::write(apt.stamp(), "")?;
        }
        Ok(apt)
    }

    /// Where a suite's packages come from, as lines of a sources.list.
    pub(crate) fn sources(suite: Suite) -> Result<String> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install the package debian-archive-keyring");
        }
        let mirrors = Mirrors::of_this_machine();
        let line = |uri: &str, suite: &str| {
            format!("deb [arch=amd64 signed-by={KEYRING}] {uri} {suite} main\n")
        };
        let mut sources = line(&mirrors.archive, suite.name());
        if let Some(security) = suite.security() {
            sources.push_str(&line(&mirrors.security, security));
        }
        Ok(sources)
    }

    /// What a metapackage such as `linux-image-amd64` stands for now.
    pub(crate) fn depends_on(&self, package: &str, prefix: &str) -> Result<String> {
        let text = self.run("apt-cache", &["show", "--no-all-versions", package])?;
        text.lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .and_then(|list| {
                list.split([',', '|', ' ']).find(|word| word.starts_with(prefix)).map(String::from)
            })
            .with_context(|| format!("{package} in {} depends on no {prefix}*", self.suite.name()))
    }

    /// Downloads a package and returns the path of its `.deb`.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf> {
        let what = format!("downloading {package} ({})", self.suite.name());
        let debs = self.root.join("debs");
        progress::step(&what, || self.run_in(&debs, "apt-get", &["download", "-qq", package]))?;
        let start = format!("{package}_");
        let mut found: Vec<PathBuf> = fs::read_dir(&debs)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&start) && name.ends_with(".deb")
            })
            .collect();
        // Of several versions the one just fetched was written last.
        found.sort_by_key(|path| path.metadata().and_then(|m| m.modified()).ok());
        found.pop().with_context(|| format!("apt-get downloaded no {package}"))
    }

    /// Downloads packages with everything they need that this machine has not installed.
    pub(crate) fn download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        // With the machine's own record of what is installed, only the rest is fetched. A
        // copy, because apt keeps its locks beside it.
        fs::copy("/var/lib/dpkg/status", self.status())?;
        let archives = self.root.join("cache/archives");
        // What lies there from another time would be taken for part of these.
        self.run("apt-get", &["clean"])?;
        let mut arguments =
            vec!["install", "-qq", "-y", "--download-only", "--no-install-recommends"];
        arguments.extend(packages);
        let what = format!("downloading {} with its libraries", packages.join(" "));
        let done = progress::step(&what, || self.run("apt-get", &arguments));
        fs::write(self.status(), "")?;
        done?;
        Ok(fs::read_dir(archives)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect())
    }

    fn status(&self) -> PathBuf {
        self.root.join("state/status")
    }

    fn stamp(&self) -> PathBuf {
        self.root.join("updated")
    }

    fn is_fresh(&self) -> bool {
        let modified = fs::metadata(self.stamp()).and_then(|meta| meta.modified());
        modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age < FRESH))
    }

    /// Writes the private configuration and sources.
    fn configure(&self) -> Result<()> {
        fs::write(self.root.join("sources.list"), Self::sources(self.suite)?)?;
        if !self.status().exists() {
            fs::write(self.status(), "")?;
        }
        let root = self.root.display();
        // Hooks of the machine's would touch the machine; and apt's own user could not
        // write under a private checkout anyway.
        let configuration = format!(
            "#clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear DPkg::Post-Invoke;\n\
             #clear Acquire::IndexTargets::deb::DEP-11;\n\
             Dir::State \"{root}/state\";\n\
             Dir::State::status \"{root}/state/status\";\n\
             Dir::Cache \"{root}/cache\";\n\
             Dir::Etc::sourcelist \"{root}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\n\
             APT::Architecture \"amd64\";\n\
             APT::Sandbox::User \"root\";\n\
             APT::Keep-Downloaded-Packages \"true\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n"
        );
        fs::write(self.root.join("apt.conf"), configuration)?;
        Ok(())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_in(&self.root, program, arguments)
    }

    fn run_in(&self, directory: &Path, program: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new(program)
            .arg("-c")
            .arg(self.root.join("apt.conf"))
            .args(arguments)
            .current_dir(directory)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .output()
            .with_context(|| {
                format!("cannot run {program}: this needs a Debian machine, or --kernel FILE")
            })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let why: Vec<&str> = said.lines().filter(|line| line.starts_with("E:")).collect();
            let why = if why.is_empty() { said.trim().to_owned() } else { why.join("; ") };
            return Err(anyhow!("{program} {}: {why}", arguments.join(" ")));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Where the machine gets its Debian packages from.
#[derive(Debug)]
struct Mirrors {
    archive: String,
    security: String,
}

impl Mirrors {
    fn of_this_machine() -> Self {
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
            .output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        Self::among(&text.unwrap_or_default())
    }

    /// Picks Debian's two archives among all of the machine's repositories by the ends of
    /// their names, which mirrors keep.
    fn among(uris: &str) -> Self {
        let pick = |end: &str, default: &str| {
            uris.lines()
                .map(|line| line.trim().trim_end_matches('/'))
                .find(|uri| uri.ends_with(end))
                .unwrap_or(default)
                .to_owned()
        };
        Self { archive: pick("/debian", ARCHIVE), security: pick("/debian-security", SECURITY) }
    }
}

#[cfg(test)]
mod tests {
    use super::{ARCHIVE, Mirrors, SECURITY};

    #[test]
    fn a_mirror_is_used_if_there_is_one() {
        let mirrors = Mirrors::among(
            "https://packages.example.org/tools/\nhttp://mirror.example.net/debian/\n\
             http://mirror.example.net/debian-security/\n",
        );
        assert_eq!(mirrors.archive, "http://mirror.example.net/debian");
        assert_eq!(mirrors.security, "http://mirror.example.net/debian-security");
    }

    #[test]
    fn other_distributions_get_debian_from_debian() {
        let mirrors = Mirrors::among("http://archive.ubuntu.com/ubuntu/\n");
        assert_eq!((mirrors.archive.as_str(), mirrors.security.as_str()), (ARCHIVE, SECURITY));
    }
}
