//! What became of a test: from its exit status and what it said, to one word and a reason.
//!
//! Both lguest and QEMU turn the value a test writes to the debug-exit port into the exit
//! status `2 * value + 1`. The tests write 0 for success, 1 for failure, and give up with 63.

use std::time::Duration;

/// Success: 0 was written.
const PASSED: i32 = 1;
/// All parts of the test were skipped: 38 was written.
const SKIPPED: i32 = 77;
/// How much of a reason the table shows.
const DETAIL: usize = 100;

/// One word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The test is content.
    Pass,
    /// The test says what it found wrong, or gave up.
    Fail,
    /// The test found nothing here it could try.
    Skip,
    /// It was still running when its time was over.
    Timeout,
    /// The machine ended without a verdict.
    Crash,
    /// Not run: it asks for something this machine does not claim to have.
    LeftOut,
}

impl Verdict {
    /// All of them, in the order they are counted.
    pub(super) const ALL: [Self; 6] =
        [Self::Pass, Self::Fail, Self::Skip, Self::Timeout, Self::Crash, Self::LeftOut];

    /// The word.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::Timeout => "timeout",
            Self::Crash => "crash",
            Self::LeftOut => "left out",
        }
    }

    /// Whether somebody should look into it.
    pub(super) const fn is_bad(self) -> bool {
        matches!(self, Self::Fail | Self::Timeout | Self::Crash)
    }
}

/// A verdict and why.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    pub(super) detail: String,
    pub(super) took: Duration,
}

impl Outcome {
    /// Of a test that was not run.
    pub(super) fn left_out(lacking: &str) -> Self {
        let detail = format!("needs {lacking}");
        Self { verdict: Verdict::LeftOut, detail, took: Duration::ZERO }
    }

    /// Of a run that ended with `code` (`None`: it had to be ended) and `said` all this.
    pub(super) fn judge(code: Option<i32>, said: &str, took: Duration) -> Self {
        let with = |prefix: &'static str| {
            let lines = said.lines().rev().map(str::trim);
            lines.filter_map(move |line| line.strip_prefix(prefix)).map(str::trim)
        };
        let summary = with("SUMMARY:").next();
        // What lguest itself complains of outranks the number: 1 is also its own failure.
        let complaint = with("lguest:").next();
        let (verdict, detail) = match (code, complaint) {
            (None, _) => (Verdict::Timeout, last_line(said)),
            (Some(_), Some(complaint)) => (Verdict::Crash, complaint.to_owned()),
            (Some(PASSED), None) => (Verdict::Pass, summary.unwrap_or_default().to_owned()),
            (Some(SKIPPED), None) => {
                (Verdict::Skip, with("SKIP:").next().unwrap_or_default().to_owned())
            }
            // QEMU ends like this at a triple fault; an even number cannot be a verdict.
            (Some(code), None) if code % 2 == 0 => {
                (Verdict::Crash, format!("status {code}, {}", last_line(said)))
            }
            (Some(_), None) => {
                let first = said.lines().map(str::trim).find(|line| line.starts_with("FAIL:"));
                let gave_up = ["Assert", "ABORT", "Unhandled"];
                let gave_up = || {
                    said.lines()
                        .map(str::trim)
                        .find(|line| gave_up.iter().any(|word| line.contains(word)))
                };
                let why = match (summary, first) {
                    (Some(summary), Some(first)) => format!("{summary}: {first}"),
                    (None, first) => {
                        gave_up().or(first).map_or_else(|| last_line(said), str::to_owned)
                    }
                    (Some(summary), None) => summary.to_owned(),
                };
                (Verdict::Fail, why)
            }
        };
        Self { verdict, detail: presentable(&detail), took }
    }
}

/// The last line that says something.
fn last_line(said: &str) -> String {
    said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

/// Short, and nothing in it that would break the table.
fn presentable(detail: &str) -> String {
    let clean = detail.chars().map(|c| if c.is_control() || c == '|' { ' ' } else { c });
    let mut text: String = clean.clone().take(DETAIL).collect();
    if clean.count() > DETAIL {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(code: Option<i32>, said: &str) -> (Verdict, String) {
        let outcome = Outcome::judge(code, said, Duration::ZERO);
        (outcome.verdict, outcome.detail)
    }

    #[test]
    fn each_way_to_end_has_its_word() {
        let summary =
            "PASS: one\r\nFAIL: two\r\nFAIL: three\r\nSUMMARY: 3 tests, 2 unexpected failures\r\n";
        let expected = "3 tests, 2 unexpected failures: FAIL: two".to_owned();
        assert_eq!(judge(Some(3), summary), (Verdict::Fail, expected));
        assert_eq!(judge(Some(1), "SUMMARY: 3 tests\r\n"), (Verdict::Pass, "3 tests".into()));
        assert_eq!(judge(Some(77), "SKIP: no such CPU\n"), (Verdict::Skip, "no such CPU".into()));
        assert_eq!(judge(None, "starting\r\n\r\n"), (Verdict::Timeout, "starting".into()));
        assert_eq!(judge(Some(0), "x\n").0, Verdict::Crash);
        let gave_up = "PASS: one\nUnhandled exception 13 #GP at ip 00400fb1\nrip=1\n";
        assert_eq!(judge(Some(127), gave_up).1, "Unhandled exception 13 #GP at ip 00400fb1");
    }

    #[test]
    fn a_failure_of_lguest_is_no_pass() {
        let said = "SUMMARY: 1 tests\nlguest: the host refuses a thread\n";
        assert_eq!(judge(Some(1), said), (Verdict::Crash, "the host refuses a thread".into()));
    }

    #[test]
    fn details_fit_a_table() {
        let (_, detail) = judge(None, &format!("a|b\x1b{}", "é".repeat(200)));
        assert!(detail.starts_with("a b é") && detail.chars().count() == DETAIL + 1);
    }
}
