//! The escape key: what the user types for the Launcher among what is for the guest.
//!
//! As in screen(1) and QEMU, Ctrl-A starts a command. The machine below sees bytes one at a
//! time, so a command may be split between two reads.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What the keys mean, for Ctrl-A ?.
pub(crate) const HELP: &str = "\
Ctrl-A x   quit: end the guest at once
Ctrl-A s   show where each vCPU is
Ctrl-A a   send Ctrl-A to the guest
Ctrl-A ?   this list
";

/// What one typed byte amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// For the guest.
    Guest(u8),
    /// Nothing yet: a command has begun.
    Pending,
    /// End the guest.
    Quit,
    /// Show the vCPUs' state.
    Show,
    /// List the keys.
    Help,
}

/// Tells keys for the Launcher from keys for the guest.
#[derive(Debug, Default)]
pub(crate) struct EscapeKeys {
    begun: bool,
}

impl EscapeKeys {
    /// Takes the next typed byte.
    pub(crate) fn press(&mut self, byte: u8) -> Key {
        if !self.begun {
            if byte == ESCAPE {
                self.begun = true;
                return Key::Pending;
            }
            return Key::Guest(byte);
        }
        self.begun = false;
        match byte {
            b'x' | b'X' => Key::Quit,
            b's' | b'S' => Key::Show,
            b'a' | b'A' | ESCAPE => Key::Guest(ESCAPE),
            // An unknown command gets the list: a user who pressed Ctrl-A by accident
            // learns what it does.
            _ => Key::Help,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{EscapeKeys, Key};

    fn typed(bytes: &[u8]) -> Vec<Key> {
        let mut keys = EscapeKeys::default();
        bytes.iter().map(|&b| keys.press(b)).filter(|&k| k != Key::Pending).collect()
    }

    #[test]
    fn ordinary_bytes_pass() {
        assert_eq!(typed(b"x\x03\xff"), [Key::Guest(b'x'), Key::Guest(3), Key::Guest(0xff)]);
    }

    #[test]
    fn commands_need_the_escape_before_them() {
        assert_eq!(typed(b"\x01x"), [Key::Quit]);
        assert_eq!(typed(b"\x01sx"), [Key::Show, Key::Guest(b'x')]);
        assert_eq!(typed(b"\x01?"), [Key::Help]);
        assert_eq!(typed(b"\x01q"), [Key::Help]);
    }

    #[test]
    fn control_a_can_be_sent() {
        assert_eq!(typed(b"\x01a"), [Key::Guest(1)]);
        assert_eq!(typed(b"\x01\x01x"), [Key::Guest(1), Key::Guest(b'x')]);
    }
}
