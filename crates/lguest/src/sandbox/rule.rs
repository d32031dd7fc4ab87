//! A rule of a filter: a system call, which arguments of it, and why.
//!
//! Rules are data (`lists`), turned into BPF by `seccompiler`. A call that no rule names is a
//! violation; one that a rule refuses gets an error, as from a host that does not have
//! what was looked for. A filter sees an argument's value, never what it points to.

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use syscalls::Sysno;

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    /// These of its lower 32 bits, as the masked bits have it.
    Bits { mask: u32, are: u32 },
    /// All 64 bits zero: a null pointer.
    Null,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    /// Answered with EACCES.
    Refused,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    call: Sysno,
    /// Number of the argument, and what it must be; all of them.
    tests: Vec<(u8, Test)>,
    verdict: Verdict,
    why: &'static str,
}

/// `call` is allowed, because of `why`.
pub(super) const fn allow(call: Sysno, why: &'static str) -> Rule {
    Rule { call, tests: Vec::new(), verdict: Verdict::Allowed, why }
}

/// `call` fails, and that is no violation: whoever makes it can do without, as `why` says.
pub(super) const fn refuse(call: Sysno, why: &'static str) -> Rule {
    Rule { call, tests: Vec::new(), verdict: Verdict::Refused, why }
}

impl Rule {
    /// Only if the lower 32 bits of argument `index` (from 0) are `value`: numbers, requests,
    /// process IDs.
    pub(super) fn only(self, index: u8, value: u32) -> Self {
        self.bits(index, u32::MAX, value)
    }

    /// Only if argument `index` has all of `flags`.
    pub(super) fn with(self, index: u8, flags: u32) -> Self {
        self.bits(index, flags, flags)
    }

    /// Only if argument `index` has none of `flags`.
    pub(super) fn without(self, index: u8, flags: u32) -> Self {
        self.bits(index, flags, 0)
    }

    /// Only if argument `index` is a null pointer.
    pub(super) fn null(mut self, index: u8) -> Self {
        self.tests.push((index, Test::Null));
        self
    }

    fn bits(mut self, index: u8, mask: u32, are: u32) -> Self {
        self.tests.push((index, Test::Bits { mask, are }));
        self
    }

    #[cfg(test)]
    pub(super) fn call(&self) -> Sysno {
        self.call
    }

    #[cfg(test)]
    pub(super) fn is_unconditional(&self) -> bool {
        self.tests.is_empty()
    }

    #[cfg(test)]
    pub(super) fn why(&self) -> &'static str {
        self.why
    }

    fn compile(&self) -> Result<SeccompRule, BackendError> {
        let conditions = self.tests.iter().map(|(index, test)| {
            let (width, compare, value) = match *test {
                Test::Bits { mask: u32::MAX, are } => {
                    (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, are)
                }
                Test::Bits { mask, are } => {
                    (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask.into()), are)
                }
                Test::Null => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
            };
            SeccompCondition::new(*index, width, compare, value.into())
        });
        SeccompRule::new(conditions.collect::<Result<_, _>>()?)
    }
}

/// A filter that lets pass what `rules` allow or refuse; `otherwise` is for the rest.
///
/// # Errors
/// More rules than a BPF program has room for.
pub(super) fn compile_allowed(
    rules: &[Rule],
    otherwise: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    compile(rules.iter(), SeccompAction::Allow, otherwise)
}

/// A filter that answers what `rules` refuse, and lets the rest pass: the stricter of two
/// filters counts.
///
/// # Errors
/// As for [`compile_allowed`].
pub(super) fn compile_refused(rules: &[Rule]) -> Result<BpfProgram, BackendError> {
    let refused = rules.iter().filter(|rule| rule.verdict == Verdict::Refused);
    compile(refused, SeccompAction::Errno(libc::EACCES as u32), SeccompAction::Allow)
}

fn compile<'r>(
    rules: impl Iterator<Item = &'r Rule>,
    matched: SeccompAction,
    otherwise: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut whole = Vec::new();
    for rule in rules {
        let call = i64::from(rule.call.id());
        let ways = calls.entry(call).or_default();
        if rule.tests.is_empty() {
            whole.push(call);
        } else {
            ways.push(rule.compile()?);
        }
    }
    // A call with no conditions is one that passes whatever its arguments.
    for call in whole {
        calls.insert(call, Vec::new());
    }
    SeccompFilter::new(calls, otherwise, matched, TargetArch::x86_64)?.try_into()
}

/// The same rules, but for those that only refuse.
pub(super) fn allowed_only(rules: Vec<Rule>) -> Vec<Rule> {
    rules.into_iter().filter(|rule| rule.verdict == Verdict::Allowed).collect()
}
