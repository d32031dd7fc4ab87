//! Structures that know their own fields: so the document can be held against them, and
//! they can be written to guest memory and read from it as bytes.

use crate::bytes::{get, put};

/// What has a form in memory that host and guest share: little-endian, and the same on
/// every machine.
pub trait Wire: Copy {
    /// Everything zero.
    const ZERO: Self;

    /// Reads the value that these bytes begin with. `None` if they are too few.
    fn read(bytes: &[u8]) -> Option<Self>;

    /// Writes the value over the first of these bytes. `None` if they are too few; some may
    /// be written then.
    fn write(&self, bytes: &mut [u8]) -> Option<()>;
}

macro_rules! integer {
    ($($type:ty),*) => {$(
        impl Wire for $type {
            const ZERO: Self = 0;

            fn read(bytes: &[u8]) -> Option<Self> {
                get(bytes, 0).map(<$type>::from_le_bytes)
            }

            fn write(&self, bytes: &mut [u8]) -> Option<()> {
                put(bytes, 0, &self.to_le_bytes())
            }
        }
    )*};
}

integer!(u8, i8, u16, u32, u64);

impl<T: Wire, const N: usize> Wire for [T; N] {
    const ZERO: Self = [T::ZERO; N];

    fn read(bytes: &[u8]) -> Option<Self> {
        let mut all = Self::ZERO;
        let mut rest = bytes;
        for item in &mut all {
            let (first, behind) = rest.split_at_checked(size_of::<T>())?;
            *item = T::read(first)?;
            rest = behind;
        }
        Some(all)
    }

    fn write(&self, bytes: &mut [u8]) -> Option<()> {
        let mut rest = bytes;
        for item in self {
            let (first, behind) = rest.split_at_mut_checked(size_of::<T>())?;
            item.write(first)?;
            rest = behind;
        }
        Some(())
    }
}

/// A field of a shared structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// As in the structure.
    pub name: &'static str,
    /// Bytes from its start.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// Declares a `repr(C)` structure and lists its fields in `FIELDS`.
macro_rules! shared {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// The fields in order, with their places.
            pub const FIELDS: &'static [$crate::long::Field] = &[$($crate::long::Field {
                name: stringify!($field),
                offset: core::mem::offset_of!($name, $field),
                size: size_of::<$type>(),
            }),*];
        }

        impl $crate::long::Wire for $name {
            const ZERO: Self = $name { $($field: <$type as $crate::long::Wire>::ZERO,)* };

            fn read(bytes: &[u8]) -> Option<Self> {
                Some($name { $($field: $crate::long::Wire::read(
                    bytes.get(core::mem::offset_of!($name, $field)..)?,
                )?,)* })
            }

            fn write(&self, bytes: &mut [u8]) -> Option<()> {
                $($crate::long::Wire::write(
                    &self.$field,
                    bytes.get_mut(core::mem::offset_of!($name, $field)..)?,
                )?;)*
                Some(())
            }
        }
    };
}

pub(crate) use shared;

/// Any bytes are some value, which writes itself as the same bytes; and one byte fewer is
/// none. Together with [`assert_packed`] this is all that reading and writing promise.
#[cfg(test)]
pub(crate) fn assert_wire<T: Wire + PartialEq + core::fmt::Debug>() {
    let bytes: Vec<u8> = (1..=size_of::<T>()).map(|n| (n % 251) as u8).collect();
    let value = T::read(&bytes).unwrap();
    let mut written = vec![0; bytes.len()];
    value.write(&mut written).unwrap();
    assert_eq!(written, bytes);
    assert_eq!(T::read(&bytes[1..]), None);
    assert_eq!(value.write(&mut written[1..]), None);
    T::ZERO.write(&mut written).unwrap();
    assert!(written.iter().all(|&b| b == 0));
}

/// The fields follow each other without holes, and fill the structure.
#[cfg(test)]
pub(crate) fn assert_packed(fields: &[Field], size: usize) {
    let end = fields.iter().fold(0, |end, field| {
        assert_eq!(field.offset, end, "hole before {}", field.name);
        end + field.size
    });
    assert_eq!(end, size, "hole at the end");
}
