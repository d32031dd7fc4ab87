//! How text is read and written: the part that belongs to the kernel or program.

use crate::error::TextError;

/// Where sites may be, for [`Text::stop`]: no CPU may rest strictly inside one.
#[derive(Clone, Copy)]
pub struct Spans<'a> {
    inside: &'a dyn Fn(u64) -> bool,
}

impl<'a> Spans<'a> {
    pub(crate) fn new(inside: &'a dyn Fn(u64) -> bool) -> Self {
        Self { inside }
    }

    /// Whether code resuming at `address` would resume in the middle of a site that is
    /// about to change. At its first byte it would not, nor behind its last.
    #[must_use]
    pub fn inside(&self, address: u64) -> bool {
        (self.inside)(address)
    }
}

impl core::fmt::Debug for Spans<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Spans").finish_non_exhaustive()
    }
}

/// Access to program text.
///
/// The patcher calls `covers` and `read` at any time, `write` only between `stop` and
/// `resume`, and runs nothing else of the program in between.
///
/// # Safety
/// From a successful `stop` to `resume` no other CPU or thread may execute, and none may
/// resume strictly inside a site (see [`Spans`]), unless the implementation's maker has
/// it from its user that nobody else runs these sites. After `resume` every CPU must
/// fetch the new bytes: serialization is this trait's business.
pub unsafe trait Text {
    /// Whether the bytes can be written.
    ///
    /// # Errors
    /// [`TextError::OutsideWindow`], or whatever else is in the way.
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError>;

    /// Reads text. Called only for what `covers` accepts.
    ///
    /// # Errors
    /// When it cannot.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError>;

    /// Writes text. Called only for what `covers` accepts.
    ///
    /// # Errors
    /// When it cannot; nothing is written then.
    ///
    /// # Safety
    /// The bytes must be instructions that do at this address what whoever runs them
    /// relies on, and nobody else may be running there: only between `stop` and `resume`.
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError>;

    /// Brings everybody else to a halt, outside `spans`.
    ///
    /// # Errors
    /// When that is not possible; everybody runs on then.
    fn stop(&mut self, spans: Spans<'_>) -> Result<(), TextError> {
        let _ = spans;
        Ok(())
    }

    /// Lets them go on, serialized.
    fn resume(&mut self) {}
}
