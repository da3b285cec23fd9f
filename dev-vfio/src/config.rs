//! Which device it is: the command-line options.

use clap::Args;

/// The option that names a device of the host.
pub(crate) const HOST: &str = "--host";
/// The option that hands over its descriptors.
pub(crate) const HOST_FD: &str = "--host-fd";

/// Options of `godwit-vfio`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) source: Source,

    /// Use the descriptors N and M, which were handed over, in the place of /dev/vfio/vfio and of the
    /// device's group in /dev/vfio
    #[arg(long, value_name = "N,M", conflicts_with = "synthetic", value_parser = host_fds)]
    pub(crate) host_fd: Option<HostFds>,
}

/// Where the device is.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// A device of this computer that is bound to vfio-pci, by its PCI address, as 0000:01:00.0
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) host: Option<String>,

    /// A device made of nothing, for tests and demonstrations: it copies the guest's memory
    #[arg(long)]
    pub(crate) synthetic: bool,
}

/// Descriptors that were handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostFds {
    /// An open `/dev/vfio/vfio`.
    pub(crate) container: i32,
    /// The open group of the device.
    pub(crate) group: i32,
}

fn host_fds(text: &str) -> Result<HostFds, String> {
    let numbers = text.split_once(',').and_then(|(container, group)| {
        Some(HostFds {
            container: container.parse().ok()?,
            group: group.parse().ok()?,
        })
    });
    numbers
        .filter(|fds| fds.container != fds.group)
        .ok_or_else(|| "give two numbers, as 5,6".to_owned())
}

/// It becomes part of a path.
fn address(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
    if text.len() == "0000:00:00.0".len() && text.chars().all(plain) && !text.contains("..") {
        return Ok(text.to_owned());
    }
    Err("give a PCI address, as 0000:01:00.0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_values_are_checked() {
        let fds = HostFds {
            container: 5,
            group: 6,
        };
        assert_eq!(host_fds("5,6"), Ok(fds));
        for bad in ["", "5", "5,", "5,5", "5,6,7", "a,b"] {
            assert!(host_fds(bad).is_err(), "{bad}");
        }
        assert!(address("0000:01:00.0").is_ok());
        for bad in [
            "",
            "01:00.0",
            "../../../etc",
            "0000:01:00/0",
            "0000:01:0..0",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
