//! Structures that know their own fields, so that the document can be held against them.

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
    };
}

pub(crate) use shared;

/// The fields follow each other without holes, and fill the structure.
#[cfg(test)]
pub(crate) fn assert_packed(fields: &[Field], size: usize) {
    let end = fields.iter().fold(0, |end, field| {
        assert_eq!(field.offset, end, "hole before {}", field.name);
        end + field.size
    });
    assert_eq!(end, size, "hole at the end");
}
