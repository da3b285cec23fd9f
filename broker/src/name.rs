//! Names of machines and of their devices.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest name.
pub const MAX_NAME: usize = 64;

/// A name that cannot be one.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{shown:?} is no name of a {what}: give 1 to {MAX_NAME} letters, digits, '-' or '_'")]
pub struct NameError {
    what: &'static str,
    shown: String,
}

fn check(what: &'static str, text: &str) -> Result<String, NameError> {
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if (1..=MAX_NAME).contains(&text.len()) && plain {
        return Ok(text.to_owned());
    }
    Err(NameError {
        what,
        shown: text.chars().take(80).collect(),
    })
}

macro_rules! names {
    ($($(#[$doc:meta])+ $name:ident = $what:literal;)+) => {$(
        $(#[$doc])+
        ///
        /// It is the name of a folder or file too, so it can be no path.
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text`.
            ///
            /// # Errors
            /// It is empty, too long, or has other characters than letters, digits, `-`, `_`.
            pub fn new(text: &str) -> Result<Self, NameError> {
                check($what, text).map(Self)
            }

            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    )+};
}

names! {
    /// Name of a machine, unique on its host.
    MachineName = "machine";
    /// Name of a device, unique in its machine.
    DeviceId = "device";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path() {
        for good in ["a", "web-1", "A_b", &"x".repeat(64)] {
            assert_eq!(MachineName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "ü",
            "a\0",
            &"x".repeat(65),
        ] {
            assert!(MachineName::new(bad).is_err(), "{bad:?}");
        }
        let error = MachineName::new("a/b").unwrap_err().to_string();
        assert!(
            error.starts_with("\"a/b\" is no name of a machine"),
            "{error}"
        );
    }
}
