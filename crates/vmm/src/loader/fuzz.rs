//! The loader's fuzz targets. Arbitrary bytes as a kernel, with arbitrary bytes as initrd and
//! command line: whatever they are, loading ends soon, in a guest or an error. And arbitrary
//! bytes as a disk to find a kernel on.

use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::OnceLock;

use super::disk_boot::{self, ImageRead};
use super::{BootSource, Image, load};
use crate::memory::{GuestRam, MIN_RAM};

/// Loads `data` into a small RAM.
///
/// The first byte chooses what else there is: an initrd of that many pages, and for odd
/// ones a command line taken from the data as well; the rest is the kernel. All runs
/// share one RAM, which is not cleared in between: nothing the loader decides depends on
/// what RAM holds.
#[doc(hidden)]
pub fn fuzz_loader(data: &[u8]) {
    static RAM: OnceLock<Option<GuestRam>> = OnceLock::new();
    let Some(ram) = RAM.get_or_init(|| GuestRam::new(MIN_RAM).ok()) else { return };
    let Some((&choice, kernel)) = data.split_first() else { return };
    let initrds = [
        Image::from_bytes("initrd", vec![choice; usize::from(choice).saturating_mul(4096)]),
        Image::from_bytes(
            "second initrd",
            kernel.get(..usize::from(choice)).unwrap_or_default().to_vec(),
        ),
    ];
    let line = if choice & 1 == 0 {
        "console=ttyS0".into()
    } else {
        String::from_utf8_lossy(kernel.get(..64).unwrap_or_default())
    };
    let kernel = Image::from_bytes("kernel", kernel.to_vec());
    let source = BootSource {
        kernel: &kernel,
        initrds: &initrds,
        command_line: &line,
        cpus: NonZeroU32::MIN,
    };
    match load(ram, &source) {
        Ok(guest) => {
            let _ = guest.entry.vcpu_state();
        }
        Err(error) => {
            let _ = error.to_string();
        }
    }
}

/// Looks for a kernel on a disk of which `data` is all there is.
#[doc(hidden)]
pub fn fuzz_disk_boot(data: &[u8]) {
    let image: Rc<dyn ImageRead> = Rc::new(data.to_vec());
    match disk_boot::find(&image, "disk") {
        Ok(files) => {
            let _ = (files.kernel.len(), files.command_line.len());
        }
        Err(error) => {
            let _ = error.to_string();
        }
    }
}
