//! Where a broker is.

use std::env;
use std::fmt;
use std::path::PathBuf;

/// The variable that names the broker.
const VARIABLE: &str = "GODWIT_BUS";

/// Where a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A Unix socket, on which an embedded broker can be started.
    Socket(PathBuf),
    /// Any other D-Bus address.
    Address(String),
}

impl Place {
    /// What the option or the variable names.
    pub fn given(option: Option<&str>) -> Option<Self> {
        let variable = env::var(VARIABLE).ok().filter(|text| !text.is_empty());
        option
            .map(Self::parse)
            .or_else(|| variable.as_deref().map(Self::parse))
    }

    /// Where the embedded broker of this user is.
    pub fn embedded() -> Self {
        let folder = env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
        let folder = folder.map_or_else(|| PathBuf::from("/run"), PathBuf::from);
        Self::Socket(folder.join("godwit").join("bus"))
    }

    /// An address, or a path that stands for one.
    fn parse(text: &str) -> Self {
        if text.contains('/') && !text.contains([':', '=']) {
            // The broker that may be started has another working folder.
            let path = std::path::absolute(text).unwrap_or_else(|_| text.into());
            return Self::Socket(path);
        }
        let path = text
            .strip_prefix("unix:path=")
            .filter(|path| !path.contains([',', ';', '%']));
        match path {
            Some(path) => Self::Socket(path.into()),
            None => Self::Address(text.into()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Address(address) => f.write_str(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_addresses() {
        let socket = |path: &str| Place::Socket(path.into());
        assert_eq!(Place::parse("/run/x/bus"), socket("/run/x/bus"));
        assert_eq!(Place::parse("unix:path=/run/x/bus"), socket("/run/x/bus"));
        for other in [
            "unix:abstract=x",
            "unix:path=/a,guid=0",
            "tcp:host=h,port=1",
            "bus",
        ] {
            assert_eq!(Place::parse(other), Place::Address(other.into()));
        }
        let Place::Socket(path) = Place::parse("./bus") else {
            panic!("a path is no socket")
        };
        assert!(path.is_absolute());
    }
}
