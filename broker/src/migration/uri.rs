//! Where machines go to and come from: `local:`, `unix:PATH`, `tcp://HOST:PORT`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A way to a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// This one: to other processes of this host.
    Local,
    /// The one that listens on this socket.
    Unix(PathBuf),
    /// The one that listens at this host and port.
    Tcp(String),
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local:"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// Longest URI, in bytes.
const MAX_URI: usize = 300;

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let shown: String = text.chars().take(80).collect();
            format!("{shown:?}: give tcp://HOST:PORT, unix:/PATH or local:")
        };
        if text.len() > MAX_URI || text.chars().any(char::is_control) {
            return Err(wrong());
        }
        if text == "local:" {
            return Ok(Self::Local);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return path
                .is_absolute()
                .then_some(Self::Unix(path))
                .ok_or_else(wrong);
        }
        let address = text.strip_prefix("tcp://").ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(Self::Tcp(address.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "local:",
            "unix:/run/x",
            "tcp://host:4747",
            "tcp://[::1]:4747",
        ] {
            let uri: Uri = text.parse().unwrap();
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn others_are_refused() {
        for text in [
            "",
            "host",
            "tcp://host",
            "tcp://:1",
            "tcp://host:70000",
            "tcp://host/x:1",
            "unix:run",
            "local:x",
            "ssh://host:1",
            "unix:/a\nb",
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert!(error.contains("tcp://HOST:PORT"), "{error}");
        }
    }
}
