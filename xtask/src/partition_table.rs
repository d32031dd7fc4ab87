//! A GUID partition table with one Linux partition on it, as installers write it.
//!
//! UEFI specification 2.10, section 5.3: a protective MBR, a header and an array of entries
//! in front, and both once more at the end.

use anyhow::{Context, Result, anyhow};
use gpt_disk_io::gpt_disk_types::{
    BlockSize, Crc32, GptHeader, GptPartitionEntry, GptPartitionEntryArray, GptPartitionType, Guid,
    LbaLe, U32Le, guid,
};
use gpt_disk_io::{BlockIoAdapter, Disk};
use std::fs::File;

/// Bytes in front of the partition, and left free behind it: partitions begin at whole
/// megabytes everywhere.
pub(crate) const MARGIN: u64 = 1 << 20;
const BLOCK: u64 = 512;
/// The array's entries are 128 bytes, and there are 128 of them.
const ENTRY_BLOCKS: u64 = 32;

/// "Linux filesystem data", which says nothing of where it is mounted.
const LINUX: GptPartitionType = GptPartitionType(guid!("0fc63daf-8483-4772-8e79-3d69d8477de4"));

/// Writes the table to a file of `size` bytes. The partition takes all of it but [`MARGIN`]
/// at either end.
pub(crate) fn write(file: &mut File, size: u64, disk_id: &str, partition_id: &str) -> Result<()> {
    let id = |text: &str| text.parse::<Guid>().map_err(|error| anyhow!("{text}: {error}"));
    let last = (size / BLOCK).checked_sub(1).context("the image is empty")?;
    let mut header = GptHeader {
        my_lba: LbaLe::from_u64(1),
        alternate_lba: LbaLe::from_u64(last),
        first_usable_lba: LbaLe::from_u64(2 + ENTRY_BLOCKS),
        last_usable_lba: LbaLe::from_u64(last - 1 - ENTRY_BLOCKS),
        disk_guid: id(disk_id)?,
        partition_entry_lba: LbaLe::from_u64(2),
        number_of_partition_entries: U32Le::from_u32(128),
        ..Default::default()
    };
    let layout = header.get_partition_entry_array_layout().map_err(|error| anyhow!("{error}"))?;
    let mut storage = vec![0; (ENTRY_BLOCKS * BLOCK) as usize];
    let mut entries = GptPartitionEntryArray::new(layout, BlockSize::BS_512, &mut storage)
        .map_err(|error| anyhow!("{error}"))?;
    *entries.get_partition_entry_mut(0).context("the partition table has no entries")? =
        GptPartitionEntry {
            partition_type_guid: LINUX,
            unique_partition_guid: id(partition_id)?,
            starting_lba: LbaLe::from_u64(MARGIN / BLOCK),
            ending_lba: LbaLe::from_u64((size - MARGIN) / BLOCK - 1),
            name: "root".parse().map_err(|error| anyhow!("{error}"))?,
            ..Default::default()
        };
    let checksum: Crc32 = entries.calculate_crc32();
    header.partition_entry_array_crc32 = checksum;
    header.update_header_crc32();
    let mut second = GptHeader {
        my_lba: header.alternate_lba,
        alternate_lba: header.my_lba,
        partition_entry_lba: LbaLe::from_u64(last - ENTRY_BLOCKS),
        ..header
    };
    second.update_header_crc32();

    let mut disk = Disk::new(BlockIoAdapter::new(file, BlockSize::BS_512))?;
    let mut block = [0; BLOCK as usize];
    disk.write_protective_mbr(&mut block)?;
    disk.write_primary_gpt_header(&header, &mut block)?;
    disk.write_secondary_gpt_header(&second, &mut block)?;
    disk.write_gpt_partition_entry_array(&entries)?;
    entries.set_start_lba(second.partition_entry_lba.into());
    disk.write_gpt_partition_entry_array(&entries)?;
    disk.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// util-linux' reader of partition tables is the oracle; it is essential on Debian.
    #[test]
    fn blkid_finds_the_table_and_believes_it() {
        let path = std::env::temp_dir().join(format!("lguest-gpt-{}", std::process::id()));
        let mut file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        let size = 16 << 20;
        file.set_len(size).unwrap();
        let (disk, partition) =
            ("6f1e3c50-6b5c-4a8e-8f4b-0d6f6f1f2a01", "6f1e3c50-6b5c-4a8e-8f4b-0d6f6f1f2a02");
        write(&mut file, size, disk, partition).unwrap();
        let probe = || {
            let output = Command::new("/sbin/blkid").arg("-p").arg(&path).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let said = probe();
        assert!(said.contains(disk) && said.contains("PTTYPE=\"gpt\""), "{said}");

        // The second table is good on its own, too.
        let first = vec![0; 33 * BLOCK as usize];
        std::os::unix::fs::FileExt::write_all_at(&file, &first, BLOCK).unwrap();
        let said = probe();
        std::fs::remove_file(&path).unwrap();
        assert!(said.contains(disk), "{said}");
    }
}
