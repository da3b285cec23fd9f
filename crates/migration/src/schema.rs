//! Saved-state schemas: which bytes a program accepts as the state of which unit.
//!
//! A schema is a kind and a number. Within a number fields are only added, each with a sound
//! default, so that older bytes of the same number load. A change that this cannot express takes
//! the next number, and [`Schema::from_old`] converts what earlier programs wrote. A number that
//! nobody knows is an error that names it: state is never guessed.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Longest kind, in bytes of ASCII.
pub const MAX_KIND: usize = 16;
/// Longest unit id, in bytes of ASCII.
pub const MAX_UNIT_ID: usize = 64;

/// The state of one kind of unit, as it travels and as it is stored.
///
/// Types that implement this are never the types that run: they live in `saved_state.rs`, carry
/// what the unit was *doing* and nothing of what it *is*, and are checked by the unit that takes
/// them over, since the bytes come from another program and maybe from another host.
pub trait Schema: Serialize + DeserializeOwned + Send + 'static {
    /// The kind of unit, at most [`MAX_KIND`] bytes of lower-case ASCII: `"blk"`.
    const KIND: &'static str;
    /// The number that this program writes; the first one is 1.
    const NUMBER: u32;

    /// Converts what a program with an earlier schema wrote.
    ///
    /// `payload` is the whole structured part (MessagePack with named fields); `number` is never
    /// [`Schema::NUMBER`]. A schema without a past returns [`SchemaError::unknown`], one with a
    /// past reads with [`decode_as`].
    fn from_old(number: u32, payload: &[u8]) -> Result<Self, SchemaError>;

    /// Decodes the structured part written under the schema number `number`.
    fn decode(number: u32, payload: &[u8]) -> Result<Self, SchemaError> {
        if number == Self::NUMBER {
            decode_as::<Self, Self>(number, payload)
        } else {
            Self::from_old(number, payload)
        }
    }

    /// Encodes the structured part, under [`Schema::NUMBER`].
    fn encode(&self) -> Result<Vec<u8>, SchemaError> {
        rmp_serde::to_vec_named(self).map_err(|source| SchemaError::Encode {
            kind: Self::KIND,
            number: Self::NUMBER,
            source,
        })
    }
}

/// Decodes what was written under the schema number `number` of `S` as `T`: what that schema had.
pub fn decode_as<S: Schema, T: DeserializeOwned>(
    number: u32,
    payload: &[u8],
) -> Result<T, SchemaError> {
    rmp_serde::from_slice(payload).map_err(|source| SchemaError::Decode {
        kind: S::KIND,
        number,
        source,
    })
}

/// Why a structured part was not understood or could not be written.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// Written under a number that this program has no conversion for.
    #[error("schema {number} of {kind} is unknown here, the newest known is {newest}")]
    Unknown {
        /// The kind of unit.
        kind: &'static str,
        /// The number found.
        number: u32,
        /// The number that this program writes.
        newest: u32,
    },
    /// The bytes do not fit the schema that they claim.
    #[error("state of {kind} does not fit its schema {number}")]
    Decode {
        /// The kind of unit.
        kind: &'static str,
        /// The number claimed.
        number: u32,
        /// What the decoder met.
        source: rmp_serde::decode::Error,
    },
    /// The state could not be encoded.
    #[error("state of {kind} cannot be written under schema {number}")]
    Encode {
        /// The kind of unit.
        kind: &'static str,
        /// The number written.
        number: u32,
        /// What the encoder met.
        source: rmp_serde::encode::Error,
    },
}

impl SchemaError {
    /// The error of a schema without a conversion from `number`.
    pub fn unknown<S: Schema>(number: u32) -> Self {
        SchemaError::Unknown {
            kind: S::KIND,
            number,
            newest: S::NUMBER,
        }
    }
}

/// Names one unit of a machine (a device, a vCPU set): the same on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(String);

impl UnitId {
    /// Checks and takes over a name: 1 to [`MAX_UNIT_ID`] bytes of `[A-Za-z0-9._-]`.
    pub fn new(name: impl Into<String>) -> Result<Self, UnitIdError> {
        let name = name.into();
        let fits = (1..=MAX_UNIT_ID).contains(&name.len());
        let plain = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if fits && plain {
            Ok(UnitId(name))
        } else {
            Err(UnitIdError { name })
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for UnitId {
    type Err = UnitIdError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        UnitId::new(name)
    }
}

/// A name that cannot be a unit's.
#[derive(Debug, Error)]
#[error("unit id {name:?} is not 1 to {MAX_UNIT_ID} characters of A-Z a-z 0-9 . _ -")]
pub struct UnitIdError {
    /// The name that was refused.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Lamp {
        lit: bool,
        #[serde(default)]
        colour: u8,
    }

    #[derive(Serialize, Deserialize)]
    struct LampV1 {
        lit: u8,
    }

    impl Schema for Lamp {
        const KIND: &'static str = "lamp";
        const NUMBER: u32 = 2;

        fn from_old(number: u32, payload: &[u8]) -> Result<Self, SchemaError> {
            match number {
                1 => {
                    let old: LampV1 =
                        rmp_serde::from_slice(payload).map_err(|source| SchemaError::Decode {
                            kind: Self::KIND,
                            number,
                            source,
                        })?;
                    Ok(Lamp {
                        lit: old.lit != 0,
                        colour: 0,
                    })
                }
                _ => Err(SchemaError::unknown::<Self>(number)),
            }
        }
    }

    #[test]
    fn an_old_number_is_converted_and_an_unknown_one_is_named() {
        let old = rmp_serde::to_vec_named(&LampV1 { lit: 1 }).unwrap();
        let lamp = Lamp::decode(1, &old).unwrap();
        assert_eq!(
            lamp,
            Lamp {
                lit: true,
                colour: 0
            }
        );
        let error = Lamp::decode(7, &old).unwrap_err().to_string();
        assert_eq!(
            error,
            "schema 7 of lamp is unknown here, the newest known is 2"
        );
    }

    #[test]
    fn bytes_of_the_same_number_without_a_newer_field_load() {
        #[derive(Serialize)]
        struct Earlier {
            lit: bool,
        }
        let bytes = rmp_serde::to_vec_named(&Earlier { lit: true }).unwrap();
        assert_eq!(
            Lamp::decode(2, &bytes).unwrap(),
            Lamp {
                lit: true,
                colour: 0
            }
        );
    }

    #[test]
    fn a_unit_id_has_no_room_for_path_tricks() {
        assert_eq!(UnitId::new("disk0").unwrap().as_str(), "disk0");
        for bad in ["", "a/b", "a b", "\u{e9}", &"x".repeat(MAX_UNIT_ID + 1)] {
            assert!(UnitId::new(bad).is_err(), "{bad:?}");
        }
    }
}
