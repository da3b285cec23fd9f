//! Structures of numbers, as they lie in a message.

/// A structure of numbers without gaps.
pub(crate) trait Layout: Sized {
    /// Bytes.
    const SIZE: usize;

    /// Its bytes.
    fn bytes(&self) -> Vec<u8>;

    /// The structure at the beginning of `bytes`, and what follows it; nothing if there is less.
    fn split(bytes: &[u8]) -> Option<(Self, &[u8])>;

    /// The structure that `bytes` are; nothing if they are more or less.
    fn whole(bytes: &[u8]) -> Option<Self> {
        Self::split(bytes).and_then(|(it, rest)| rest.is_empty().then_some(it))
    }

    /// Bytes, as messages have it.
    fn size() -> u32 {
        // No layout has a hundred.
        u32::try_from(Self::SIZE).unwrap_or(u32::MAX)
    }
}

/// Structures, each with its fields in their order.
macro_rules! layout {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $number:ty),+ })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(crate) struct $name {
            $(pub(crate) $field: $number),+
        }

        impl $crate::wire::Layout for $name {
            const SIZE: usize = 0 $(+ size_of::<$number>())+;

            fn bytes(&self) -> Vec<u8> {
                let mut bytes = Vec::with_capacity(Self::SIZE);
                $(bytes.extend(self.$field.to_le_bytes());)+
                bytes
            }

            fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
                $(
                    let ($field, bytes) = bytes.split_first_chunk()?;
                    let $field = <$number>::from_le_bytes(*$field);
                )+
                Some((Self { $($field),+ }, bytes))
            }
        }
    )+};
}

pub(crate) use layout;
