//! Boot Loader Specification entries, type #1: a small text file per kernel, as Fedora and
//! its relatives have them (uapi-group.org, "Boot Loader Specification").

use std::cmp::Ordering;

use super::selection::Choice;
use super::version;

/// The entry that a boot loader shows first: the newest version, and of one version the
/// greatest file name. `entries` are file names and contents.
pub(super) fn newest(entries: &[(String, String)]) -> Option<Choice> {
    let mut best: Option<(&str, Entry<'_>)> = None;
    for (name, text) in entries {
        let Some(entry) = Entry::parse(text) else { continue };
        let newer = best.as_ref().is_none_or(|(best_name, best)| {
            version::compare(entry.version, best.version)
                .then_with(|| version::compare(name, best_name))
                == Ordering::Greater
        });
        if newer {
            best = Some((name, entry));
        }
    }
    best.map(|(_, entry)| entry.choice)
}

struct Entry<'t> {
    version: &'t str,
    choice: Choice,
}

impl<'t> Entry<'t> {
    /// `None` without a kernel, for another architecture, and for rescue images.
    fn parse(text: &'t str) -> Option<Self> {
        let mut entry = Self { version: "", choice: Choice::default() };
        let mut rescue = false;
        for line in text.lines() {
            let (key, value) = line.trim().split_once([' ', '\t']).unwrap_or((line, ""));
            let value = value.trim();
            // Values of grub's variables are not known here.
            let plain = value.split_whitespace().filter(|word| !word.contains(['$', '\0']));
            match key {
                "version" => entry.version = value,
                "title" => rescue = value.to_ascii_lowercase().contains("rescue"),
                "linux" => entry.choice.kernel = absolute(value),
                "initrd" => entry.choice.initrds.extend(plain.map(absolute)),
                "options" => entry.choice.words.extend(plain.map(str::to_owned)),
                "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
                _ => {}
            }
        }
        (!rescue && !entry.choice.kernel.is_empty()).then_some(entry)
    }
}

/// Paths are meant from the root of the file system the entries are on.
fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(version: &str, extra: &str) -> (String, String) {
        let text = format!(
            "title Linux ({version})\nversion {version}\n# a comment\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img $tuned_initrd\noptions root=UUID=12 ro $kernelopts\n\
             options rhgb\n{extra}"
        );
        (format!("id-{version}.conf"), text)
    }

    #[test]
    fn the_newest_entry_is_taken() {
        let entries = [entry("6.9.4", ""), entry("6.12.1", ""), entry("6.2.0", "")];
        let choice = newest(&entries).unwrap();
        assert_eq!(choice.kernel, "/vmlinuz-6.12.1");
        assert_eq!(choice.initrds, ["/initramfs-6.12.1.img"]);
        assert_eq!(choice.words.join(" "), "root=UUID=12 ro rhgb");
    }

    #[test]
    fn rescue_and_other_architectures_are_passed_over() {
        let rescue = ("z".to_owned(), "title Rescue\nversion 9\nlinux /r\n".to_owned());
        let entries = [entry("1", ""), entry("2", "architecture aa64\n"), rescue];
        assert_eq!(newest(&entries).unwrap().kernel, "/vmlinuz-1");
        assert_eq!(newest(&[]), None);
    }
}
