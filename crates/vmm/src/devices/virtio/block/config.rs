//! What the user says of a disk: `PATH[,readonly][,format=raw|qcow2][,serial=NAME][,direct]`.
//!
//! Parsed from the command line, printed in the same words. A path may hold anything but a
//! comma.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest serial number a guest can ask for (virtio 1.2, 5.2.6.1), in bytes.
pub const MAX_SERIAL: usize = 20;

/// How an image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskFormat {
    /// The disk's bytes and nothing else: a plain file or a block device.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// A disk, as the user asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// The guest may only read.
    pub readonly: bool,
    /// How the image is laid out; without it, the image's first bytes say.
    ///
    /// A guest writes what it likes to a raw image, also what begins like qcow2, and
    /// would then choose what file is read behind it next time. So a guest cannot write
    /// the beginning of a qcow2 image to the beginning of one that was *found* to be raw:
    /// that write fails. Whoever says `format=raw` has no such limit.
    pub format: Option<DiskFormat>,
    /// What the guest is told when it asks for the serial number.
    pub serial: Option<String>,
    /// Past the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// What is wrong with a description of a disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskConfigError {
    /// No path.
    #[error("--disk {0:?} names no image: begin with its path (--disk disk.img)")]
    NoPath(String),
    /// An option nobody knows.
    #[error(
        "--disk does not know {0:?}: it takes PATH[,readonly][,format=raw|qcow2][,serial=NAME][,direct], and a path cannot hold a comma (name the image by a link without one)"
    )]
    UnknownOption(String),
    /// A format nobody knows.
    #[error(
        "--disk does not know the format {0:?}: give format=raw or format=qcow2 (qemu-img convert makes qcow2 of others)"
    )]
    UnknownFormat(String),
    /// An option given twice.
    #[error("--disk has {0:?} twice: give it once")]
    Twice(&'static str),
    /// The guest could not read all of it.
    #[error("the serial number {0:?} is too long: give at most {MAX_SERIAL} bytes")]
    LongSerial(String),
    /// A serial number that is none.
    #[error("serial= names nothing: give a serial number, or leave the option out")]
    EmptySerial,
}

impl FromStr for DiskConfig {
    type Err = DiskConfigError;

    fn from_str(text: &str) -> Result<Self, DiskConfigError> {
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(DiskConfigError::NoPath(text.to_owned()));
        }
        let mut config =
            Self { path: path.into(), readonly: false, format: None, serial: None, direct: false };
        for part in parts {
            match part.split_once('=') {
                None if part == "readonly" => set_flag(&mut config.readonly, "readonly")?,
                None if part == "direct" => set_flag(&mut config.direct, "direct")?,
                Some(("format", value)) => {
                    let format = match value {
                        "raw" => DiskFormat::Raw,
                        "qcow2" => DiskFormat::Qcow2,
                        _ => return Err(DiskConfigError::UnknownFormat(value.to_owned())),
                    };
                    set_once(&mut config.format, format, "format")?;
                }
                Some(("serial", "")) => return Err(DiskConfigError::EmptySerial),
                Some(("serial", value)) if value.len() > MAX_SERIAL => {
                    return Err(DiskConfigError::LongSerial(value.to_owned()));
                }
                Some(("serial", value)) => {
                    set_once(&mut config.serial, value.to_owned(), "serial")?;
                }
                _ => return Err(DiskConfigError::UnknownOption(part.to_owned())),
            }
        }
        Ok(config)
    }
}

fn set_flag(flag: &mut bool, name: &'static str) -> Result<(), DiskConfigError> {
    if std::mem::replace(flag, true) { Err(DiskConfigError::Twice(name)) } else { Ok(()) }
}

fn set_once<T>(
    option: &mut Option<T>,
    value: T,
    name: &'static str,
) -> Result<(), DiskConfigError> {
    if option.replace(value).is_some() { Err(DiskConfigError::Twice(name)) } else { Ok(()) }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if self.readonly {
            f.write_str(",readonly")?;
        }
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ",serial={serial}")?;
        }
        if self.direct {
            f.write_str(",direct")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(text: &str) -> String {
        let message = text.parse::<DiskConfig>().unwrap_err().to_string();
        assert!(!message.contains('\n'));
        message
    }

    #[test]
    fn what_makes_no_sense_names_the_remedy() {
        assert!(refused("").contains("--disk disk.img"));
        assert!(refused(",readonly").contains("--disk disk.img"));
        assert!(refused("a,ro").contains("[,readonly]"));
        assert!(refused("a,readonly=on").contains("[,readonly]"));
        assert!(refused("a,,direct").contains("[,direct]"));
        assert!(refused("a,format=vmdk").contains("qemu-img convert"));
        assert!(refused("a,serial=").contains("leave the option out"));
        assert!(refused("a,serial=123456789012345678901").contains("at most 20 bytes"));
        assert!(refused("a,direct,direct").contains("give it once"));
        assert!(refused("a,format=raw,format=raw").contains("give it once"));
    }

    proptest! {
        #[test]
        fn what_is_printed_means_the_same(
            path in "[^,]{1,40}",
            readonly: bool,
            format in prop::option::of(prop::sample::select(vec![DiskFormat::Raw, DiskFormat::Qcow2])),
            serial in prop::option::of("[a-zA-Z0-9=_-]{1,20}"),
            direct: bool,
        ) {
            let config = DiskConfig { path: path.into(), readonly, format, serial, direct };
            prop_assert_eq!(config.to_string().parse(), Ok(config));
        }

        #[test]
        fn any_text_is_a_disk_or_one_line(text in "[^\n]*") {
            if let Err(error) = text.parse::<DiskConfig>() {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
