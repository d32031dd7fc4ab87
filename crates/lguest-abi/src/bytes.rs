//! Little-endian words at offsets that may lie outside.

pub(crate) fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> Option<u32> {
    get(bytes, at).map(u32::from_le_bytes)
}

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> Option<u16> {
    get(bytes, at).map(u16::from_le_bytes)
}

/// `None`, and nothing written, if it does not fit.
pub(crate) fn put(bytes: &mut [u8], at: usize, what: &[u8]) -> Option<()> {
    let end = at.checked_add(what.len())?;
    bytes.get_mut(at..end)?.copy_from_slice(what);
    Some(())
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, word: u32) -> Option<()> {
    put(bytes, at, &word.to_le_bytes())
}
