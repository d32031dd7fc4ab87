//! What GRUB would boot: the entry of `grub.cfg` it takes when nobody presses a key.
//!
//! `grub.cfg` is a script, and this is no shell: what is read is what `grub-mkconfig` and
//! installers write, `menuentry` blocks with one `linux` and one `initrd` command each. Words
//! that only a shell could expand are left out (GRUB manual, "Writing full configuration
//! files directly").

use super::selection::Choice;

/// The entry that `set default=NUMBER` means, else the first.
pub(super) fn default_entry(config: &str) -> Option<Choice> {
    let wanted = default_number(config).unwrap_or(0);
    let mut entries = Entries::default();
    for line in config.lines() {
        entries.line(line.trim());
    }
    let mut all = entries.finished;
    let index = if wanted < all.len() { wanted } else { 0 };
    (index < all.len()).then(|| all.swap_remove(index))
}

/// The last default that is a plain number. Menus within menus ("1>0") and names are not
/// followed; they fall back to the first entry, as GRUB does for names it does not find.
fn default_number(config: &str) -> Option<usize> {
    let values = config.lines().rev().filter_map(|line| line.trim().strip_prefix("set default="));
    values.filter_map(|value| value.trim_matches('"').parse().ok()).next()
}

/// Entries while lines are read. A submenu's entries follow the top level's here only when
/// it comes later in the file, which is where `grub-mkconfig` puts it.
#[derive(Default)]
struct Entries {
    finished: Vec<Choice>,
    current: Option<Choice>,
}

impl Entries {
    fn line(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        match (words.next(), &mut self.current) {
            (Some("menuentry"), current) => *current = Some(Choice::default()),
            // "linuxefi" is what distributions called it for a time.
            (Some("linux" | "linuxefi" | "linux16"), Some(entry)) => {
                if let Some(kernel) = words.next() {
                    entry.kernel = plain_path(kernel);
                }
                entry.words = plain_words(words);
            }
            (Some("initrd" | "initrdefi" | "initrd16"), Some(entry)) => {
                entry.initrds = plain_words(words).iter().map(|path| plain_path(path)).collect();
            }
            (Some("}"), current) => {
                self.finished.extend(current.take().filter(|entry| !entry.kernel.is_empty()));
            }
            _ => {}
        }
    }
}

/// A path without the device in front, as in `(hd0,gpt1)/boot/vmlinuz` or `$root/vmlinuz`.
fn plain_path(path: &str) -> String {
    let at = path.find('/').unwrap_or(path.len());
    path.get(at..).unwrap_or_default().to_owned()
}

/// The words a shell would pass on as they are.
fn plain_words<'w>(words: impl Iterator<Item = &'w str>) -> Vec<String> {
    words
        .take_while(|word| !word.starts_with('#'))
        .filter(|word| !word.contains(['$', '`', '\0']))
        .map(|word| word.replace(['"', '\''], ""))
        .collect()
}

/// What /etc/default/grub would have `grub-mkconfig` write behind the root argument.
pub(super) fn default_words(defaults: &str) -> Vec<String> {
    let mut words = Vec::new();
    for key in ["GRUB_CMDLINE_LINUX=", "GRUB_CMDLINE_LINUX_DEFAULT="] {
        let mut values = defaults.lines().rev().filter_map(|line| line.trim().strip_prefix(key));
        if let Some(value) = values.next() {
            words.extend(plain_words(value.trim_matches(['"', '\'']).split_whitespace()));
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shaped as grub-mkconfig writes it.
    const CONFIG: &str = r#"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="0"
fi
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
	load_video
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root 1234
	fi
	linux	/boot/vmlinuz-6.1.0-56 root=UUID=1234 ro  quiet "console=ttyS0" $extra # for later
	initrd	/boot/early.img /boot/initrd.img-6.1.0-56
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced' {
	menuentry 'Debian, recovery mode' {
		linux	(hd0,gpt1)/boot/vmlinuz-6.1.0-50 root=UUID=1234 ro single
		initrd	($root)/boot/initrd.img-6.1.0-50
	}
}
"#;

    #[test]
    fn the_default_entry_is_taken() {
        let entry = default_entry(CONFIG).unwrap();
        assert_eq!(entry.kernel, "/boot/vmlinuz-6.1.0-56");
        assert_eq!(entry.initrds, ["/boot/early.img", "/boot/initrd.img-6.1.0-56"]);
        assert_eq!(entry.words.join(" "), "root=UUID=1234 ro quiet console=ttyS0");
        let second = default_entry(&CONFIG.replace("default=\"0\"", "default=\"1\"")).unwrap();
        assert_eq!(second.kernel, "/boot/vmlinuz-6.1.0-50");
        assert_eq!(second.words.last().unwrap(), "single");
        assert_eq!(default_entry(&CONFIG.replace("\"0\"", "\"99\"")).unwrap(), entry);
    }

    #[test]
    fn a_script_without_entries_chooses_nothing() {
        assert_eq!(default_entry("blscfg\nset default=0\n"), None);
        assert_eq!(default_entry("menuentry 'Memory test' {\n chainloader /m.efi\n}\n"), None);
        assert_eq!(default_entry("linux /vmlinuz\ninitrd /initrd\n}\n"), None);
    }

    #[test]
    fn defaults_are_read_without_what_needs_a_shell() {
        let text = "#GRUB_CMDLINE_LINUX=\"no\"\nGRUB_CMDLINE_LINUX=\"net.ifnames=0 $(x) y\"\n\
                    GRUB_CMDLINE_LINUX_DEFAULT='quiet'\n";
        assert_eq!(default_words(text), ["net.ifnames=0", "y", "quiet"]);
        assert!(default_words("").is_empty());
    }
}
