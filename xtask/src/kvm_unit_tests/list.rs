//! The tree the tests were built in, and its list of what to run how.
//!
//! `config.mak`, written when the tree was configured, says for which architecture and where
//! the sources are; `x86/unittests.cfg` among those lists the tests in sections.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// What the tests were built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    I386,
    X86_64,
}

impl Architecture {
    /// As kvm-unit-tests calls it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::I386 => "i386",
            Self::X86_64 => "x86_64",
        }
    }

    /// What QEMU's program for it takes when no CPU is asked for.
    pub(super) const fn qemu_cpu(self) -> &'static str {
        match self {
            Self::I386 => "qemu32",
            Self::X86_64 => "qemu64",
        }
    }
}

/// A kvm-unit-tests tree in which everything is built.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) architecture: Architecture,
    kernels: PathBuf,
    list: PathBuf,
}

impl Tree {
    /// Finds its way in the tree configured in `dir`.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let config = dir.join("config.mak");
        let text = fs::read_to_string(&config).with_context(|| {
            format!("{}: give --dir a kvm-unit-tests tree, configured and built", config.display())
        })?;
        let value = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_default()
        };
        let architecture = match value("ARCH") {
            "x86_64" => Architecture::X86_64,
            "i386" => Architecture::I386,
            other => bail!("{}: the tree is for {other:?}, not for x86", config.display()),
        };
        let list = dir.join(value("SRCDIR")).join("x86/unittests.cfg");
        Ok(Self { architecture, kernels: dir.join("x86"), list })
    }

    /// The tests for this architecture, in the list's order.
    pub(super) fn tests(&self) -> Result<Vec<Test>> {
        let text =
            fs::read_to_string(&self.list).with_context(|| format!("{}", self.list.display()))?;
        let mut tests = parse(&text).with_context(|| format!("{}", self.list.display()))?;
        tests.retain(|test| test.architecture.is_none_or(|name| name == self.architecture));
        Ok(tests)
    }

    /// The test's kernel, if it was built: some exist for one architecture only.
    pub(super) fn kernel(&self, test: &Test) -> Option<PathBuf> {
        let path = self.kernels.join(&test.file);
        path.is_file().then_some(path)
    }
}

/// One section of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) name: String,
    /// Its kernel's file name.
    pub(super) file: String,
    pub(super) cpus: u32,
    /// RAM, MiB, where it needs a certain amount.
    pub(super) memory_mib: Option<u32>,
    /// Seconds the list grants it; 0 where it says nothing.
    pub(super) timeout: u64,
    /// Whether the list keeps it out of an ordinary run.
    pub(super) only_on_request: bool,
    /// The CPU the list asks QEMU for.
    pub(super) qemu_cpu: Option<String>,
    architecture: Option<Architecture>,
    arguments: String,
    groups: Vec<String>,
}

impl Test {
    /// What the test needs that is not for this machine to have: other hypervisors' work.
    pub(super) fn lacking(&self) -> Option<&'static str> {
        match self.file.as_str() {
            "vmx.flat" => Some("VMX: guests in guests are not offered"),
            "svm.flat" | "svm_npt.flat" => Some("SVM: guests in guests are not offered"),
            "intel-iommu.flat" => Some("an IOMMU"),
            "vmware_backdoors.flat" => Some("VMware's interface"),
            _ if self.groups.iter().any(|group| group == "hyperv") => Some("Hyper-V's interface"),
            _ => None,
        }
    }

    /// The words the test is given; some lists ask the shell for the time, `now`.
    pub(super) fn arguments(&self, now: u64) -> String {
        self.arguments.replace("`date +%s`", &now.to_string())
    }

    /// The file a test takes its environment from, which it is given as an initrd: what it
    /// would otherwise ask QEMU's firmware interface for.
    pub(super) fn environment(&self, default_mib: u32) -> String {
        let memory = self.memory_mib.unwrap_or(default_mib);
        format!(
            "NR_CPUS={}\nMEMSIZE={memory}\nMEMLIMIT=0\nTEST_DEVICE=1\nBOOTLOADER=0\n",
            self.cpus
        )
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "file" => self.file = value.to_owned(),
            "smp" => self.cpus = value.parse().with_context(|| format!("smp = {value}"))?,
            "timeout" => {
                self.timeout = value.parse().with_context(|| format!("timeout = {value}"))?
            }
            "test_args" => self.arguments = value.trim_matches(['"', '\'']).to_owned(),
            "groups" => {
                self.groups = value.split_whitespace().map(str::to_owned).collect();
                self.only_on_request = self.groups.iter().any(|group| group == "nodefault");
            }
            "arch" => {
                let known = [Architecture::I386, Architecture::X86_64];
                let found = known.into_iter().find(|known| known.name() == value);
                self.architecture = Some(found.with_context(|| format!("arch = {value}"))?);
            }
            "qemu_params" | "extra_params" => self.set_machine(value)?,
            // What KVM's module must be configured like, and which accelerator QEMU needs,
            // say nothing here.
            _ => {}
        }
        Ok(())
    }

    /// Takes from QEMU's options what any machine has.
    fn set_machine(&mut self, options: &str) -> Result<()> {
        let mut words = options.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                "-m" => self.memory_mib = Some(mebibytes(words.next().unwrap_or_default())?),
                "-cpu" => {
                    let cpu = words.next().unwrap_or_default();
                    let host = cpu == "host" || cpu.starts_with("host,");
                    self.qemu_cpu = Some(if host { "max" } else { cpu }.to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// QEMU's way to write an amount of memory: MiB, or with a unit.
fn mebibytes(text: &str) -> Result<u32> {
    let (digits, factor) = match text.strip_suffix(['g', 'G']) {
        Some(digits) => (digits, 1024),
        None => (text.trim_end_matches(['m', 'M']), 1),
    };
    let number: Option<u32> = digits.parse().ok();
    number.and_then(|n| n.checked_mul(factor)).with_context(|| format!("-m {text}"))
}

/// Reads the list.
fn parse(text: &str) -> Result<Vec<Test>> {
    let mut tests: Vec<Test> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            tests.push(Test { name: name.to_owned(), cpus: 1, ..Test::default() });
            continue;
        }
        let (key, value) =
            line.split_once('=').with_context(|| format!("line {number}: {line}"))?;
        let test = tests.last_mut().with_context(|| format!("line {number} is in no section"))?;
        test.set(key.trim(), value.trim()).with_context(|| format!("line {number}"))?;
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
# a comment
[clock]
file = clock.flat
smp = 2
test_args = \"10 `date +%s`\"
qemu_params = -cpu host,migratable=no -m 2g

[nested]
file = svm.flat
arch = x86_64
groups = svm nodefault
timeout = 240
";

    #[test]
    fn a_section_becomes_a_test() {
        let tests = parse(LIST).unwrap();
        let [clock, nested] = tests.as_slice() else { panic!("{tests:?}") };
        assert_eq!(
            (clock.name.as_str(), clock.file.as_str(), clock.cpus),
            ("clock", "clock.flat", 2)
        );
        assert_eq!((clock.arguments(77), clock.memory_mib), ("10 77".to_owned(), Some(2048)));
        assert_eq!((clock.qemu_cpu.as_deref(), clock.architecture), (Some("max"), None));
        assert!(!clock.only_on_request && clock.lacking().is_none());
        assert!(clock.environment(128).starts_with("NR_CPUS=2\nMEMSIZE=2048\n"));
        assert_eq!((nested.cpus, nested.timeout, nested.memory_mib), (1, 240, None));
        assert_eq!(nested.architecture, Some(Architecture::X86_64));
        assert!(nested.only_on_request && nested.lacking().is_some());
    }

    #[test]
    fn a_broken_list_is_refused_by_line() {
        for (text, place) in
            [("x = 1", "line 1"), ("[a]\nword", "line 2"), ("[a]\nsmp = many", "line 2")]
        {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(place), "{error}");
        }
        assert!(parse("[a]\nqemu_params = -m lots").is_err());
    }

    #[test]
    fn a_tree_knows_its_architecture_and_sources() {
        let dir = std::env::temp_dir().join(format!("lguest-kut-tree-{}", std::process::id()));
        fs::create_dir_all(dir.join("src/x86")).unwrap();
        assert!(Tree::open(&dir).is_err(), "not configured");
        fs::write(dir.join("config.mak"), "SRCDIR=src\nARCH=i386\nARCH_NAME=i386\n").unwrap();
        fs::write(dir.join("src/x86/unittests.cfg"), LIST).unwrap();
        let tree = Tree::open(&dir).unwrap();
        assert_eq!(tree.architecture, Architecture::I386);
        let tests = tree.tests().unwrap();
        assert_eq!(tests.len(), 1, "the other one is for 64 bit");
        assert_eq!(tree.kernel(&tests[0]), None, "not built");
        fs::write(dir.join("config.mak"), "SRCDIR=src\nARCH=arm64\n").unwrap();
        assert!(Tree::open(&dir).is_err());
        fs::remove_dir_all(dir).unwrap();
    }
}
