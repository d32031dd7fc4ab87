//! Writes a `newc` cpio archive, the format of initial RAM disks.
//!
//! Described in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`:
//! per file a header of 8-digit hexadecimal fields, the name, the contents, each padded to
//! four bytes; at the end an entry called `TRAILER!!!`. Written here rather than by cpio(1)
//! because device nodes can then be made by any user, and the bytes never vary.

/// What an entry is; the numbers are the file type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const SYMBOLIC_LINK: u32 = 0o120_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory.
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) {
        self.entry(name, DIRECTORY | permissions, (0, 0), &[]);
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entry(name, REGULAR | permissions, (0, 0), contents);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, name: &str, target: &str) {
        self.entry(name, SYMBOLIC_LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, name: &str, permissions: u32, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE | permissions, (major, minor), &[]);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        // The kernel reads on in units of 512 where cpio(1) wrote the archive; padding to
        // that also keeps a second archive, appended to this one, aligned.
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.entries, // inode number
            mode,
            0, // user
            0, // group
            links,
            0, // modification time
            contents.len() as u32,
            0, // device it lies on
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // checksum: none in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.directory("dev", 0o755);
        archive.device("dev/console", 0o600, 5, 1);
        archive.file("hello", 0o644, b"hi!");
        archive.link("ciao", "hello");
        archive.finish()
    }

    #[test]
    fn the_header_is_110_bytes_of_hexadecimal() {
        let bytes = sample();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        // The first entry: 110 bytes of header, "dev\0", padded to a multiple of four.
        assert_eq!(&bytes[110..114], b"dev\0");
        assert_eq!(&bytes[116..122], b"070701");
    }

    /// The real thing as the oracle, where it is installed.
    #[test]
    fn busybox_or_cpio_lists_what_was_put_in() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let Ok(mut child) = Command::new("cpio")
            .arg("-t")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        else {
            eprintln!("no cpio(1) on this machine: not compared");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(listed, "dev\ndev/console\nhello\nciao\n");
    }
}
