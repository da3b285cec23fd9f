//! Object paths of the broker: where each machine, device and job is.
//!
//! A name becomes one element of a path as systemd does it: letters and digits stay, and
//! every other byte is `_` and two hexadecimal digits.

use std::fmt::Write as _;

use zbus::{ObjectPath, OwnedObjectPath};

/// The manager, and the ObjectManager of all that is below it.
pub const MANAGER: &str = "/org/godwit/Vmm1";
/// Where a property of type object path points when there is nothing to point to.
pub const NOTHING: &str = "/";

fn escape(name: &str) -> String {
    let mut element = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() {
            element.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(element, "_{byte:02x}");
        }
    }
    if element.is_empty() {
        "_".into()
    } else {
        element
    }
}

fn owned(path: String) -> OwnedObjectPath {
    // Made of what a path may consist of.
    ObjectPath::from_string_unchecked(path).into()
}

/// Path of a machine.
pub fn machine(name: &str) -> OwnedObjectPath {
    owned(format!("{MANAGER}/machine/{}", escape(name)))
}

/// Path of a machine's device.
pub fn device(machine: &str, id: &str) -> OwnedObjectPath {
    let machine = self::machine(machine);
    owned(format!("{machine}/device/{}", escape(id)))
}

/// Path of a job.
pub fn job(id: u32) -> OwnedObjectPath {
    owned(format!("{MANAGER}/job/{id}"))
}

/// [`NOTHING`] as a path.
pub fn nothing() -> OwnedObjectPath {
    owned(NOTHING.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_kinds_make_valid_paths() {
        for name in ["vm1", "web-1", "a_b", "", "ü/..", "-"] {
            ObjectPath::try_from(machine(name).as_str()).unwrap();
        }
        assert_eq!(
            machine("web-1").as_str(),
            "/org/godwit/Vmm1/machine/web_2d1"
        );
        assert_eq!(
            device("a_b", "disk0").as_str(),
            "/org/godwit/Vmm1/machine/a_5fb/device/disk0"
        );
        assert_ne!(machine("a-b"), machine("a_2db"));
        assert_eq!(job(7).as_str(), "/org/godwit/Vmm1/job/7");
    }
}
