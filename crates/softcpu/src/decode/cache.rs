//! Placeholder until the block cache is written.
/// Decoded blocks.
#[derive(Debug)]
pub(crate) struct BlockCache;
impl BlockCache {
    pub(crate) fn new() -> Self { Self }
}
