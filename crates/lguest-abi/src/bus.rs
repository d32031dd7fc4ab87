//! The lguest bus of V1 to V5: one page of device descriptors, just above RAM.
//!
//! Entries are packed and unaligned; one of type 0, or the page's end, ends them. The host
//! writes them once; the guest writes `status` and the features it accepts, and says so with
//! NOTIFY. 2.6.24 had another form, with everything behind the header as tagged
//! fields: [`tagged`].

use crate::bytes::{get, get_u16, get_u32, put};

/// How a device's entry in the page is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Everything behind the header has a tag: 2.6.24. See [`tagged`].
    Tagged,
    /// One part behind the other, as a [`DeviceDesc`] says: from 2.6.25 on.
    Packed,
}

impl Form {
    /// Where in an entry its status byte is.
    pub const fn status_at(self) -> usize {
        match self {
            Form::Tagged => tagged::STATUS_AT,
            Form::Packed => STATUS_AT,
        }
    }
}

/// Size of the page.
pub const PAGE_BYTES: usize = 4096;
/// Most pages of descriptors and rings together.
pub const PAGES_MAX: u32 = 256;
/// Rings are aligned to this, and their used half begins at a multiple of it.
pub const VRING_ALIGN: u32 = 4096;
/// Entries of a ring until 2.6.26, which has two pages then.
pub const VRING_NUM_OLD: u16 = 128;
/// Entries of a ring from 2.6.27 on, which has three.
pub const VRING_NUM: u16 = 256;
/// Most bytes of configuration.
pub const CONFIG_MAX: usize = 255;
/// Most bytes of an early console string, with its NUL.
pub const EARLY_STRING_BYTES: usize = 17;

/// Types of devices: virtio's own ids.
#[allow(missing_docs)]
pub mod device {
    /// Ends the page.
    pub const NONE: u8 = 0;
    pub const NET: u8 = 1;
    pub const BLOCK: u8 = 2;
    pub const CONSOLE: u8 = 3;
    pub const ENTROPY: u8 = 4;
}

/// Bits of a device's status (virtio 1.2, 2.1). Writing 0 resets.
#[allow(missing_docs)]
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FAILED: u8 = 0x80;
}

/// An entry's header, from 2.6.25 on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct DeviceDesc {
    /// See [`device`].
    pub kind: u8,
    /// Virtqueues.
    pub num_vq: u8,
    /// Bytes of features, twice: the host's and those that the guest accepts.
    pub feature_len: u8,
    /// Bytes of configuration.
    pub config_len: u8,
    /// See [`status`]. The guest writes.
    pub status: u8,
}

/// Offset of the status byte in an entry.
pub const STATUS_AT: usize = core::mem::offset_of!(DeviceDesc, status);

/// Where one of a device's rings is. Eight bytes, in an entry of any alignment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct VqConfig {
    /// Entries, a power of two.
    pub num: u16,
    /// IRQ.
    pub irq: u16,
    /// Frame. NOTIFY with this times 4096 is a kick.
    pub pfn: u32,
}

impl VqConfig {
    /// As in the page.
    pub fn to_bytes(self) -> [u8; 8] {
        let [a, b] = self.num.to_le_bytes();
        let [c, d] = self.irq.to_le_bytes();
        let [e, f, g, h] = self.pfn.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// From the page. `None` if it ends before.
    pub fn from_bytes(bytes: &[u8]) -> Option<VqConfig> {
        Some(VqConfig { num: get_u16(bytes, 0)?, irq: get_u16(bytes, 2)?, pfn: get_u32(bytes, 4)? })
    }

    /// Pages that a ring of so many entries takes, with the used half on its own page.
    pub const fn ring_pages(num: u16) -> u32 {
        let num = num as u32;
        let align = VRING_ALIGN;
        // Descriptors of 16 bytes; flags, idx and entries of 2; flags, idx and entries of 8.
        let avail_end = num.saturating_mul(18).saturating_add(4);
        let used = num.saturating_mul(8).saturating_add(4);
        avail_end.div_ceil(align).saturating_add(used.div_ceil(align))
    }
}

impl DeviceDesc {
    /// The header at the start of these bytes. `None` if they are too few.
    pub fn from_bytes(bytes: &[u8]) -> Option<DeviceDesc> {
        let [kind, num_vq, feature_len, config_len, status] = get(bytes, 0)?;
        Some(DeviceDesc { kind, num_vq, feature_len, config_len, status })
    }

    /// The header's bytes.
    pub const fn to_bytes(self) -> [u8; 5] {
        [self.kind, self.num_vq, self.feature_len, self.config_len, self.status]
    }

    /// Where in the entry a queue's [`VqConfig`] is. `None` if it has not so many.
    pub const fn vq_at(&self, queue: u8) -> Option<usize> {
        if queue >= self.num_vq {
            return None;
        }
        Some(size_of::<DeviceDesc>().wrapping_add((queue as usize).wrapping_mul(8)))
    }

    /// Where the host's features are. Feature n is bit n % 8 of byte n / 8.
    pub const fn host_features_at(&self) -> usize {
        size_of::<DeviceDesc>().wrapping_add((self.num_vq as usize).wrapping_mul(8))
    }

    /// Where the features are that the guest has accepted.
    pub const fn guest_features_at(&self) -> usize {
        self.host_features_at().wrapping_add(self.feature_len as usize)
    }

    /// Where the configuration is.
    pub const fn config_at(&self) -> usize {
        self.guest_features_at().wrapping_add(self.feature_len as usize)
    }

    /// The whole entry.
    pub const fn total(&self) -> usize {
        self.config_at().wrapping_add(self.config_len as usize)
    }
}

/// A device's entry in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Where in the page. Added to the page's address, NOTIFY means this device's status.
    pub at: usize,
    /// Its header.
    pub desc: DeviceDesc,
    /// All of its bytes.
    pub bytes: &'a [u8],
}

impl<'a> Entry<'a> {
    /// A queue's ring.
    pub fn vq(&self, queue: u8) -> Option<VqConfig> {
        VqConfig::from_bytes(self.bytes.get(self.desc.vq_at(queue)?..)?)
    }

    /// The first 64 features the host offers.
    pub fn host_features(&self) -> u64 {
        features(self.part(self.desc.host_features_at(), self.desc.feature_len))
    }

    /// The first 64 features the guest accepts.
    pub fn guest_features(&self) -> u64 {
        features(self.part(self.desc.guest_features_at(), self.desc.feature_len))
    }

    /// The configuration.
    pub fn config(&self) -> &'a [u8] {
        self.part(self.desc.config_at(), self.desc.config_len)
    }

    fn part(&self, at: usize, len: u8) -> &'a [u8] {
        self.bytes.get(at..).and_then(|rest| rest.get(..usize::from(len))).unwrap_or_default()
    }
}

fn features(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    for (to, from) in all.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(all)
}

/// The devices in a page, until type 0, the page's end, or an entry that runs over it.
pub fn entries(page: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    let mut at = 0usize;
    core::iter::from_fn(move || {
        let rest = page.get(at..)?;
        let desc = DeviceDesc::from_bytes(rest).filter(|d| d.kind != device::NONE)?;
        let entry = Entry { at, desc, bytes: rest.get(..desc.total())? };
        at = at.checked_add(desc.total())?;
        Some(entry)
    })
}

/// Writes a device's entry at `at` and returns where the next one begins. The guest's
/// features and the status are 0. `None`, and nothing written, if it does not fit in the
/// page or one of its parts in a byte's count.
pub fn write_entry(
    page: &mut [u8],
    at: usize,
    kind: u8,
    queues: &[VqConfig],
    features: &[u8],
    config: &[u8],
) -> Option<usize> {
    let desc = DeviceDesc {
        kind,
        num_vq: u8::try_from(queues.len()).ok()?,
        feature_len: u8::try_from(features.len()).ok()?,
        config_len: u8::try_from(config.len()).ok()?,
        status: 0,
    };
    let end = at.checked_add(desc.total())?;
    let entry = page.get_mut(at..end)?;
    entry.fill(0);
    put(entry, 0, &desc.to_bytes())?;
    for (queue, vq) in (0..).zip(queues) {
        put(entry, desc.vq_at(queue)?, &vq.to_bytes())?;
    }
    put(entry, desc.host_features_at(), features)?;
    put(entry, desc.config_at(), config)?;
    Some(end)
}

/// 2.6.24's entries: type, length of the rest, status, and tagged fields. No word is said of a
/// status that has changed; a device works from its first kick on.
pub mod tagged {
    /// Bytes of the header in front of a frame: flags, type of segmentation, and three words
    /// (segment, start and place of the checksum). Later ones have a word in between.
    pub const NET_HEADER_BYTES: usize = 8;
    /// Bytes of the header of a block request: as later, and 8 that mean nothing.
    pub const BLOCK_HEADER_BYTES: usize = 24;
    /// Size of the header: type, config_len, status.
    pub const HEADER_BYTES: usize = 3;
    /// Where the status is in it.
    pub const STATUS_AT: usize = 2;
    /// A field's tag: a [`VqConfig`](super::VqConfig).
    pub const VIRTQUEUE: u8 = 2;
    /// Feature bits, of any device.
    pub const FEATURES: u8 = 0x40;
    /// Of a network device: its address.
    pub const NET_MAC: u8 = 0x41;
    /// Of a block device: sectors, u64.
    pub const BLOCK_CAPACITY: u8 = 0x41;
    /// Of a block device: most bytes in a segment, u32.
    pub const BLOCK_SIZE_MAX: u8 = 0x42;
    /// Of a block device: most segments, u32.
    pub const BLOCK_SEG_MAX: u8 = 0x43;
    /// Set by the guest in the tag of a field it has dealt with.
    pub const USED: u8 = 0x80;

    /// A field: its tag without [`USED`], and its data.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Field<'a> {
        /// Tag.
        pub tag: u8,
        /// Whether the guest has dealt with it.
        pub used: bool,
        /// Data.
        pub data: &'a [u8],
    }

    /// The fields of an entry's configuration, which is what lies behind its header.
    pub fn fields(config: &[u8]) -> impl Iterator<Item = Field<'_>> {
        let mut rest = config;
        core::iter::from_fn(move || {
            let (&[tag, len], behind) = rest.split_first_chunk()?;
            let (data, next) = behind.split_at_checked(usize::from(len))?;
            rest = next;
            Some(Field { tag: tag & !USED, used: tag & USED != 0, data })
        })
    }

    /// Writes a device's entry at `at` and returns where the next one begins. `None` if it
    /// does not fit; the page may then have part of it, with a type of 0.
    pub fn write_entry(
        page: &mut [u8],
        at: usize,
        kind: u8,
        fields: &[(u8, &[u8])],
    ) -> Option<usize> {
        let mut end = at.checked_add(HEADER_BYTES)?;
        for (tag, data) in fields {
            super::put(page, end, &[*tag, u8::try_from(data.len()).ok()?])?;
            end = end.checked_add(2)?;
            super::put(page, end, data)?;
            end = end.checked_add(data.len())?;
        }
        let config = end.checked_sub(at)?.checked_sub(HEADER_BYTES)?;
        super::put(page, at, &[kind, u8::try_from(config).ok()?, 0])?;
        Some(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn layouts_are_those_of_the_reference() {
        assert_eq!(size_of::<DeviceDesc>(), 5);
        assert_eq!(size_of::<VqConfig>(), 8);
        assert_eq!(STATUS_AT, 4);
        let desc = DeviceDesc { kind: 2, num_vq: 3, feature_len: 4, config_len: 16, status: 0 };
        assert_eq!(desc.total(), 5 + 8 * 3 + 2 * 4 + 16);
        assert_eq!((desc.vq_at(0), desc.vq_at(2), desc.vq_at(3)), (Some(5), Some(21), None));
        assert_eq!(VqConfig::ring_pages(VRING_NUM_OLD), 2);
        assert_eq!(VqConfig::ring_pages(VRING_NUM), 3);
    }

    #[test]
    fn an_entry_beyond_the_page_is_not_written() {
        let mut page = [0; 64];
        assert_eq!(write_entry(&mut page, 40, 2, &[VqConfig::default()], &[0; 4], &[0; 8]), None);
        assert_eq!(page, [0; 64]);
        assert_eq!(write_entry(&mut page, 0, 2, &[], &[], &[0; 256]), None);
    }

    #[test]
    fn tagged_fields_come_back() {
        let mut page = [0; 64];
        let fields: [(u8, &[u8]); 2] =
            [(tagged::VIRTQUEUE, &[7; 8]), (tagged::BLOCK_CAPACITY, &[1; 8])];
        let end = tagged::write_entry(&mut page, 0, device::BLOCK, &fields).unwrap();
        assert_eq!((end, page[0], page[1], page[2]), (23, 2, 20, 0));
        page[3] |= tagged::USED;
        let read: Vec<_> = tagged::fields(&page[3..23]).collect();
        assert_eq!(read[0], tagged::Field { tag: 2, used: true, data: &[7; 8] });
        assert_eq!(read[1], tagged::Field { tag: 0x41, used: false, data: &[1; 8] });
        assert_eq!(read.len(), 2);
    }

    type Device = (u8, Vec<(u16, u16, u32)>, Vec<u8>, Vec<u8>);

    fn device() -> impl Strategy<Value = Device> {
        (
            1u8..,
            proptest::collection::vec(any::<(u16, u16, u32)>(), 0..4),
            proptest::collection::vec(any::<u8>(), 0..8),
            proptest::collection::vec(any::<u8>(), 0..40),
        )
    }

    proptest! {
        #[test]
        fn devices_come_back(devices in proptest::collection::vec(device(), 0..12)) {
            let mut page = vec![0; PAGE_BYTES];
            let mut at = 0;
            for (kind, queues, features, config) in &devices {
                let queues: Vec<_> =
                    queues.iter().map(|&(num, irq, pfn)| VqConfig { num, irq, pfn }).collect();
                at = write_entry(&mut page, at, *kind, &queues, features, config).unwrap();
            }
            let read: Vec<_> = entries(&page).collect();
            prop_assert_eq!(read.len(), devices.len());
            for (entry, (kind, queues, features, config)) in read.iter().zip(&devices) {
                prop_assert_eq!(entry.desc.kind, *kind);
                for (n, &(num, irq, pfn)) in queues.iter().enumerate() {
                    prop_assert_eq!(entry.vq(n as u8), Some(VqConfig { num, irq, pfn }));
                }
                prop_assert_eq!(entry.vq(queues.len() as u8), None);
                prop_assert_eq!(entry.host_features(), super::features(features));
                prop_assert_eq!(entry.guest_features(), 0);
                prop_assert_eq!(entry.config(), config.as_slice());
            }
        }

        #[test]
        fn any_page_is_read_to_an_end(page in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let mut before = 0;
            for entry in entries(&page) {
                prop_assert!(entry.at == before && entry.bytes.len() == entry.desc.total());
                before = entry.at + entry.bytes.len();
                prop_assert!(before <= page.len());
                let _ = (entry.vq(0), entry.vq(255), entry.config(), entry.guest_features());
            }
            prop_assert!(tagged::fields(&page).count() <= page.len() / 2);
        }
    }
}
