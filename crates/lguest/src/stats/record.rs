//! The form of a run's statistics in its file: a header and a row of numbers per vCPU.
//!
//! Written by `lguest run`, read by `lguest top`, perhaps of another build. Whatever is in a
//! file, reading it yields rows or a word on what is wrong with it: lengths are looked at
//! before anything else, and text is only taken if a terminal would not obey it.

use softcpu::Stats;
use std::time::Duration;

/// What a file begins with.
const MAGIC: [u8; 8] = *b"lgstats\n";
/// Counts up with every change of the form.
const VERSION: u64 = 2;
/// Bytes of a guest's name.
const NAME: usize = 64;
/// Bytes of a header: five words and the name.
pub(super) const HEADER: usize = 5 * 8 + NAME;
/// More vCPUs than any run has are a mistake.
const MOST_VCPUS: u64 = 1024;
/// Longest file that makes sense.
pub(super) const LONGEST: u64 = HEADER as u64 + MOST_VCPUS * ROW as u64;

/// What is kept of each vCPU, in this order, a word each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// Nanoseconds: since the vCPU came to be, and of those halted.
    Elapsed,
    Halted,
    Decoding,
    Translating,
    /// The time in translated code, if it is measured.
    Translated,
    /// Blocks.
    Decoded,
    Blocks,
    Dropped,
    /// Bytes of code memory.
    CodeUsed,
    CodeSize,
    /// Blocks that had to make room.
    Evicted,
    /// Entries of translated code, and what it has interpreted.
    Entered,
    CalledBack,
    /// Page walks for data and code.
    Walks,
    Exceptions,
    Interrupts,
}

/// How many there are.
pub(super) const FIELDS: usize = Field::Interrupts as usize + 1;
/// Bytes of a vCPU's row.
pub(super) const ROW: usize = FIELDS * 8;

/// A vCPU's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Row(pub(super) [u64; FIELDS]);

impl Row {
    /// One of them.
    pub(super) fn get(&self, field: Field) -> u64 {
        self.0[field as usize]
    }

    /// Those of `stats`.
    pub(super) fn of(stats: &Stats) -> Self {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let (time, engine, translator) = (&stats.time, &stats.engine, &stats.translator);
        let mut row = Self::default();
        for (field, value) in [
            (Field::Elapsed, nanos(stats.elapsed)),
            (Field::Halted, nanos(time.halted)),
            (Field::Decoding, nanos(time.decoding)),
            (Field::Translating, nanos(time.translating)),
            (Field::Translated, time.detail.map_or(0, |detail| nanos(detail.translated))),
            (Field::Decoded, engine.decoded),
            (Field::Blocks, translator.translated),
            (Field::Dropped, translator.invalidated),
            (Field::CodeUsed, translator.used),
            (Field::CodeSize, translator.capacity),
            (Field::Evicted, translator.evicted),
            (Field::Entered, translator.entered),
            (Field::CalledBack, translator.interpreted),
            (Field::Walks, engine.walks.saturating_add(engine.fetch_walks)),
            (Field::Exceptions, engine.exceptions),
            (Field::Interrupts, engine.interrupts),
        ] {
            row.0[field as usize] = value;
        }
        row
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// What a file says of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The kernel's name.
    pub(super) name: String,
    pub(super) vcpus: u64,
    /// Guest RAM, bytes.
    pub(super) memory: u64,
}

impl Header {
    pub(super) fn new(name: &str, vcpus: u32, memory: u64) -> Self {
        // Paths are long, and lines are not.
        let name = name.rsplit('/').next().unwrap_or(name);
        Self { name: printable(name.as_bytes()), vcpus: vcpus.into(), memory }
    }

    /// Where the row of `vcpu` is.
    pub(super) fn place(vcpu: usize) -> u64 {
        (vcpu as u64).saturating_mul(ROW as u64).saturating_add(HEADER as u64)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let words = [VERSION, ROW as u64, self.vcpus, self.memory];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(self.name.bytes().take(NAME));
        bytes.resize(HEADER, 0);
        bytes
    }
}

/// Why a file says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadFile {
    /// Something else, or the beginning of something.
    #[error("no statistics of a run")]
    Foreign,
    /// Another build's.
    #[error("written by another version of lguest")]
    OtherVersion,
}

/// What a file holds. Rows that it does not have whole are zeroes.
///
/// # Errors
/// [`BadFile`].
pub(super) fn read(bytes: &[u8]) -> Result<(Header, Vec<Row>), BadFile> {
    let (header, rows) = bytes.split_at_checked(HEADER).ok_or(BadFile::Foreign)?;
    let (words, name) = header.split_at(HEADER - NAME);
    let [magic, version, row, vcpus, memory] = words_of(words);
    if magic.to_le_bytes() != MAGIC {
        return Err(BadFile::Foreign);
    }
    if version != VERSION || row != ROW as u64 {
        return Err(BadFile::OtherVersion);
    }
    if vcpus > MOST_VCPUS {
        return Err(BadFile::Foreign);
    }
    let mut whole = rows.chunks_exact(ROW).map(|row| Row(words_of(row)));
    let rows = (0..vcpus).map(|_| whole.next().unwrap_or_default()).collect();
    Ok((Header { name: printable(name), vcpus, memory }, rows))
}

/// The words in `bytes`; zeroes for those that are not there.
fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    std::array::from_fn(|_| words.next().unwrap_or(0))
}

/// The text in `bytes` up to the first zero, of what a terminal shows and nothing else.
fn printable(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let show = |byte: &u8| if matches!(byte, b' '..=b'~') { char::from(*byte) } else { '?' };
    text.iter().take(NAME).map(show).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(vcpus: u32, rows: &[Row]) -> Vec<u8> {
        let mut bytes = Header::new("vmlinuz", vcpus, 512 << 20).to_bytes();
        rows.iter().for_each(|row| bytes.extend(row.to_bytes()));
        bytes
    }

    #[test]
    fn what_was_written_is_read() {
        let mut stats = Stats { elapsed: Duration::from_micros(7), ..Stats::default() };
        stats.engine.interrupts = 9;
        let row = Row::of(&stats);
        assert_eq!((row.get(Field::Elapsed), row.get(Field::Interrupts)), (7000, 9));
        let (header, rows) = read(&file(2, &[Row::default(), row])).unwrap();
        assert_eq!((header.name.as_str(), header.memory), ("vmlinuz", 512 << 20));
        assert_eq!(rows, [Row::default(), row]);
        assert_eq!(Header::place(1), (HEADER + ROW) as u64);
    }

    #[test]
    fn every_beginning_of_a_file_is_read_or_refused() {
        let bytes = file(2, &[Row([1; FIELDS]), Row([2; FIELDS])]);
        for len in 0..=bytes.len() {
            match read(&bytes[..len]) {
                Ok((_, rows)) => assert_eq!(rows.len(), 2, "{len}"),
                Err(error) => assert!(len < HEADER && error == BadFile::Foreign),
            }
        }
    }

    #[test]
    fn hostile_files_are_refused_or_harmless() {
        let mut many = file(1, &[]);
        many[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(read(&many), Err(BadFile::Foreign));
        let mut newer = file(1, &[]);
        newer[8] = 3;
        assert_eq!(read(&newer), Err(BadFile::OtherVersion));
        assert_eq!(read(&[0xff; 4096]), Err(BadFile::Foreign));
        let mut escape = file(1, &[]);
        escape[40..44].copy_from_slice(b"\x1b[2J");
        assert!(read(&escape).unwrap().0.name.starts_with("?[2J"));
    }
}
