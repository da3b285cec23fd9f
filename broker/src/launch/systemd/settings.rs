//! What a unit of a machine is and may do: nearly nothing, as everything is handed to it.
//!
//! It stands in one place, the template `packaging/systemd/godwit-machine@.service`. Transient
//! units get the same settings, read from there.

use std::path::Path;

use thiserror::Error;
use zbus::Variant;

use super::bus::Property;

const TEMPLATE: &str = include_str!("../../../../packaging/systemd/godwit-machine@.service");

/// Where a unit's process finds the broker, whatever folder the broker has.
pub(super) const DOOR: &str = "/run/godwit/launch";

/// A line of the template that has no translation.
#[derive(Debug, Error)]
#[error("godwit-machine@.service: {0:?} is not known for transient units")]
pub struct UnknownSetting(String);

/// The settings of a transient unit, whose broker listens at `door`.
pub(super) fn transient(core: bool, door: &Path) -> Result<Vec<Property<'static>>, UnknownSetting> {
    let service = TEMPLATE.split("[Service]\n").nth(1).unwrap_or_default();
    let service = service.split("\n[").next().unwrap_or_default();
    let mut properties = Vec::new();
    for line in service.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let unknown = || UnknownSetting(line.to_owned());
        let (name, value) = line.split_once('=').ok_or_else(unknown)?;
        match name {
            // Of each unit's own.
            "ExecStart" | "Slice" => {}
            // Only a core has a power button.
            "KillSignal" if !core => {}
            "BindReadOnlyPaths" => properties.push((name, binds(value, door))),
            _ => properties.push(translate(name, value).ok_or_else(unknown)?),
        }
    }
    Ok(properties)
}

/// A setting as D-Bus has it (org.freedesktop.systemd1(5)).
fn translate(name: &'static str, value: &'static str) -> Option<Property<'static>> {
    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let value: Variant<'static> = match (name, value) {
        (
            "Type" | "User" | "KeyringMode" | "ProtectHome" | "ProtectProc" | "ProtectSystem"
            | "ProcSubset",
            text,
        ) => text.into(),
        ("LimitNOFILE", number) => number.parse::<u64>().ok()?.into(),
        ("UMask", octal) => u32::from_str_radix(octal, 8).ok()?.into(),
        ("TimeoutStartSec", seconds) => {
            return Some(("TimeoutStartUSec", microseconds(seconds)?.into()));
        }
        ("TimeoutStopSec", seconds) => {
            return Some(("TimeoutStopUSec", microseconds(seconds)?.into()));
        }
        // Sets of what is left.
        ("CapabilityBoundingSet" | "AmbientCapabilities", "") => 0u64.into(),
        ("RestrictNamespaces", "yes") => 0u64.into(),
        ("SystemCallArchitectures", list) => words(list).into(),
        ("SystemCallErrorNumber", "EPERM") => libc::EPERM.into(),
        ("SystemCallFilter" | "RestrictAddressFamilies", list) => match list.strip_prefix('~') {
            Some(refused) => (false, words(refused)).into(),
            None => (true, words(list)).into(),
        },
        ("KillSignal", signal) => {
            let distance: i32 = signal.strip_prefix("SIGRTMIN+")?.parse().ok()?;
            (libc::SIGRTMIN() + distance).into()
        }
        ("IPAddressDeny", "any") => vec![
            (libc::AF_INET, vec![0u8; 4], 0u32),
            (libc::AF_INET6, vec![0u8; 16], 0u32),
        ]
        .into(),
        ("TemporaryFileSystem", mount) => {
            let (folder, options) = mount.split_once(':')?;
            vec![(folder.to_owned(), options.to_owned())].into()
        }
        (_, "yes") => true.into(),
        _ => return None,
    };
    Some((name, value))
}

fn microseconds(seconds: &str) -> Option<u64> {
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000)
}

/// The sockets that a unit sees.
fn binds(list: &str, door: &Path) -> Variant<'static> {
    let bind = |path: &str| {
        let from = if path == DOOR {
            door.display().to_string()
        } else {
            path.to_owned()
        };
        (from, path.to_owned(), false, 0u64)
    };
    list.split(' ').map(bind).collect::<Vec<_>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(core: bool) -> Vec<&'static str> {
        let properties = transient(core, Path::new("/elsewhere/launch")).unwrap();
        properties.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn transient_units_have_what_the_template_has() {
        let core = names(true);
        for wanted in ["User", "SystemCallFilter", "PrivateUsers", "KillSignal"] {
            assert!(core.contains(&wanted), "{core:?}");
        }
        assert!(!names(false).contains(&"KillSignal"));
        assert_eq!(core.len(), names(false).len() + 1);
    }

    #[test]
    fn values_have_the_types_of_the_bus() {
        let value = |name, value| translate(name, value).map(|(_, value)| value);
        assert_eq!(value("UMask", "0077"), Some(0o077u32.into()));
        assert_eq!(value("PrivateUsers", "yes"), Some(true.into()));
        assert_eq!(value("RestrictNamespaces", "yes"), Some(0u64.into()));
        assert_eq!(
            value("SystemCallFilter", "~@a @b"),
            Some((false, vec!["@a".to_owned(), "@b".to_owned()]).into())
        );
        assert_eq!(value("Unheard", "of"), None);
        assert_eq!(value("CapabilityBoundingSet", "CAP_KILL"), None);
    }

    #[test]
    fn a_unit_finds_the_broker_that_started_it() {
        let properties = transient(true, Path::new("/elsewhere/launch")).unwrap();
        let binds = properties
            .iter()
            .find(|(name, _)| *name == "BindReadOnlyPaths");
        let text = format!("{:?}", binds.unwrap().1);
        assert!(
            text.contains("/elsewhere/launch") && text.contains(DOOR),
            "{text}"
        );
    }
}
