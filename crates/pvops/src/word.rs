//! What fits one register: the types that arguments and results of operations may have.

/// A value that travels in one general register.
///
/// # Safety
/// The `sysv64` convention must pass and return `Self` in one general register (a wrapper
/// of `f64` is one word, but travels elsewhere). `into_word` must give what a function with
/// an argument of this type expects there: a valid value, extended as C extends integers
/// narrower than 32 bits. `from_word` must accept whatever a function returning `Self` leaves in the return
/// register; bits above the size of `Self` are undefined there.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not fit one register",
    label = "not a one-word argument or result",
    note = "operations pass integers of up to 64 bits, `bool`, raw pointers, and types that implement `pvops::Word`"
)]
pub unsafe trait Word: Copy {
    /// The register's content for this value.
    fn into_word(self) -> usize;
    /// The value that the low bits of the register hold.
    fn from_word(word: usize) -> Self;
}

macro_rules! integers {
    ($($ty:ty)*) => {$(
        // SAFETY: every bit pattern is a value; upper bits are cut off.
        unsafe impl Word for $ty {
            #[inline(always)]
            fn into_word(self) -> usize {
                self as usize
            }
            #[inline(always)]
            fn from_word(word: usize) -> Self {
                word as Self
            }
        }
    )*};
}
integers!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize);

// SAFETY: only the low byte is looked at, and any nonzero byte counts as true.
unsafe impl Word for bool {
    #[inline(always)]
    fn into_word(self) -> usize {
        usize::from(self)
    }
    #[inline(always)]
    fn from_word(word: usize) -> Self {
        word as u8 != 0
    }
}

// SAFETY: a thin pointer is one word, and every bit pattern is one.
unsafe impl<T> Word for *const T {
    #[inline(always)]
    fn into_word(self) -> usize {
        self.expose_provenance()
    }
    #[inline(always)]
    fn from_word(word: usize) -> Self {
        core::ptr::with_exposed_provenance(word)
    }
}

// SAFETY: as above.
unsafe impl<T> Word for *mut T {
    #[inline(always)]
    fn into_word(self) -> usize {
        self.expose_provenance()
    }
    #[inline(always)]
    fn from_word(word: usize) -> Self {
        core::ptr::with_exposed_provenance_mut(word)
    }
}
