//! What a machine is: a definition, from a TOML file or a D-Bus dictionary.
//!
//! ```text
//! TOML text  ─┐
//!             ├─► node (values with their lines) ─► Definition (typed, checked)
//! dictionary ─┘
//! ```
//! The keys are in [`api::definition`]. Everything that can be known without opening a file
//! is checked here, and an error names key, value and line.

mod boot;
mod device;
mod dictionary;
mod file;
mod node;
mod values;

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use api::definition as keys;
use api::{Dictionary, Error};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

pub use self::boot::Boot;
pub use self::device::{Balloon, Device, DeviceKind, Disk, Net, Vfio, VhostUser};
use self::node::{Fields, Node};
use crate::name::{DeviceId, MachineName};

/// Most devices of a machine: what the PCI bus of a core holds.
const MAX_DEVICES: usize = 31;
/// RAM of a machine that does not say how much, in bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// Least and most RAM, in bytes.
const MEMORY: std::ops::RangeInclusive<u64> = (16 << 20)..=(1 << 40);

/// Keys of a machine.
const KEYS: &[&str] = &[
    keys::KERNEL,
    keys::INITRD,
    keys::CMDLINE,
    keys::FIRMWARE,
    keys::VCPUS,
    keys::CPU,
    keys::MEMORY,
    keys::HUGEPAGES,
    keys::PREFAULT,
    keys::UUID,
    keys::AUTOSTART,
    keys::DISK,
    keys::NET,
    keys::BALLOON,
    keys::VHOST_USER,
    keys::VFIO,
];

/// Why a definition is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{}{}{problem}", line_text(*.line), key_text(.key))]
pub struct DefinitionError {
    /// The key, with those above it, as `disk[0].path`; empty when it is none's fault.
    pub key: String,
    /// Line in the file, from 1.
    pub line: Option<usize>,
    /// What is wrong, with the value.
    pub problem: String,
}

fn line_text(line: Option<usize>) -> String {
    line.map(|line| format!("line {line}: "))
        .unwrap_or_default()
}

fn key_text(key: &str) -> String {
    match key {
        "" => String::new(),
        key => format!("{key}: "),
    }
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// What it starts in.
    #[serde(flatten)]
    pub boot: Boot,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What vCPUs show of the host's processor: `host`, or a level as `x86-64-v2`.
    #[serde(default = "host_cpu")]
    pub cpu: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// `2M` or `1G`.
    pub hugepages: Option<String>,
    /// Make all RAM present before the guest starts.
    pub prefault: bool,
    /// UUID in its usual form.
    pub uuid: String,
    /// Start it with the broker.
    pub autostart: bool,
    /// Devices, in the order of their PCI addresses.
    pub devices: Vec<Device>,
}

/// The `cpu` of a machine that does not say.
fn host_cpu() -> String {
    "host".into()
}

impl Definition {
    /// Of a dictionary that a caller sent.
    ///
    /// # Errors
    /// A key is unknown, missing, or has a value that cannot be.
    pub fn from_dictionary(dictionary: Dictionary) -> Result<Self, DefinitionError> {
        let (definition, autostart) =
            read(dictionary::parse(dictionary), || Uuid::new_v4().to_string())?;
        match autostart {
            None => Ok(definition),
            Some(_) => Err(DefinitionError {
                key: keys::AUTOSTART.into(),
                line: None,
                problem: "possible in files only; use the flag that starts it at once".into(),
            }),
        }
    }

    /// Of a file's text. A UUID that it does not give is made of the machine's name, so that
    /// it is the same at every start of the broker.
    ///
    /// # Errors
    /// As [`Self::from_dictionary`], with the line.
    pub fn from_toml(name: &MachineName, text: &str) -> Result<Self, DefinitionError> {
        let (definition, autostart) = read(file::parse(text)?, || values::uuid_of_name(name))?;
        Ok(Self {
            autostart: autostart.unwrap_or(false),
            ..definition
        })
    }

    /// Of a file, whose name gives the machine's.
    ///
    /// # Errors
    /// It cannot be read, or as [`Self::from_toml`].
    pub fn from_file(path: &Path) -> Result<(MachineName, Self), DefinitionError> {
        let plain = |problem: String| DefinitionError {
            key: String::new(),
            line: None,
            problem,
        };
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = MachineName::new(&stem).map_err(|error| plain(error.to_string()))?;
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(file::MAX_FILE + 1).read_to_string(&mut text))
            .map_err(|error| plain(format!("it cannot be read: {error}")))?;
        if text.len() as u64 > file::MAX_FILE {
            return Err(plain(format!("longer than {} bytes", file::MAX_FILE)));
        }
        let definition = Self::from_toml(&name, &text)?;
        Ok((name, definition))
    }

    /// As the text of a file that [`Self::from_toml`] takes, with every default filled in. When
    /// it is started is not in it.
    pub fn to_toml(&self) -> String {
        file::write(self)
    }

    /// As a dictionary, with every default filled in.
    pub fn to_dictionary(&self) -> Dictionary {
        dictionary::show(self)
    }

    /// A device of the host that it has more than once.
    fn host_device_twice(&self) -> Option<&str> {
        let mut seen = HashSet::new();
        let addresses = self.devices.iter().filter_map(|device| match &device.kind {
            DeviceKind::Vfio(Vfio::Host(address)) => Some(address.as_str()),
            _ => None,
        });
        addresses.into_iter().find(|address| !seen.insert(*address))
    }

    /// That nothing keeps its machine, which is called `name`, from moving and from files.
    ///
    /// # Errors
    /// It has a device that cannot move.
    pub fn must_be_movable(&self, name: &MachineName) -> Result<(), Error> {
        let vfio = |device: &&Device| matches!(device.kind, DeviceKind::Vfio(_));
        match self.devices.iter().find(vfio) {
            None => Ok(()),
            Some(device) => Err(Error::NotMigratable(format!(
                "{name} has the PCI device {} ({}), which can neither move nor be written into files: \
                 switch the machine off and start it anew where it is wanted",
                device.id,
                device.source()
            ))),
        }
    }

    /// Makes up addresses of the cards that have none.
    fn fill_in_addresses(&mut self) {
        for device in &mut self.devices {
            if let DeviceKind::Net(net) = &mut device.kind
                && net.mac.is_empty()
            {
                net.mac = values::mac_of(&self.uuid, device.id.as_str());
            }
        }
    }
}

/// Reads all keys; `autostart` apart, which is not possible everywhere.
fn read(
    node: Node,
    new_uuid: impl FnOnce() -> String,
) -> Result<(Definition, Option<bool>), DefinitionError> {
    let mut fields = Fields::of(node, "", KEYS)?;
    let boot = Boot::take(&mut fields)?;
    let memory = fields
        .size(keys::MEMORY, values::size)?
        .unwrap_or(DEFAULT_MEMORY);
    if !MEMORY.contains(&memory) {
        let problem = format!("{memory} bytes: give 16M to 1T");
        return Err(fields.wrong(keys::MEMORY, problem));
    }
    let autostart = fields.boolean(keys::AUTOSTART)?;
    let uuid = fields.text(keys::UUID, values::uuid)?;
    let mut definition = Definition {
        boot,
        vcpus: fields.integer(keys::VCPUS, 1, 32)?.unwrap_or(1),
        cpu: fields
            .text(keys::CPU, values::cpu)?
            .unwrap_or_else(host_cpu),
        memory,
        hugepages: fields.text(keys::HUGEPAGES, values::hugepages)?,
        prefault: fields.boolean(keys::PREFAULT)?.unwrap_or(false),
        uuid: uuid.unwrap_or_else(new_uuid),
        autostart: false,
        devices: Vec::new(),
    };
    for (list, known, read) in device::LISTS {
        for (number, mut device) in fields.tables(list, known)?.into_iter().enumerate() {
            let id = device.text(keys::ID, |id| DeviceId::new(id).map_err(|e| e.to_string()))?;
            let id = match id {
                Some(id) => id,
                None => DeviceId::new(&format!("{list}{number}"))
                    .map_err(|error| device.wrong(keys::ID, error.to_string()))?,
            };
            if definition.devices.iter().any(|other| other.id == id) {
                let problem = format!("{id}: two devices have this name");
                return Err(device.wrong(keys::ID, problem));
            }
            let kind = read(&mut device)?;
            definition.devices.push(Device { id, kind });
        }
    }
    let is_balloon = |device: &&Device| matches!(device.kind, DeviceKind::Balloon(_));
    if definition.devices.iter().filter(is_balloon).count() > 1 {
        return Err(fields.wrong(keys::BALLOON, "a machine has one at most"));
    }
    if let Some(address) = definition.host_device_twice() {
        let problem = format!("{address}: the machine has this device already");
        return Err(fields.wrong(keys::VFIO, problem));
    }
    if definition.devices.len() > MAX_DEVICES {
        let problem = format!(
            "{} devices: at most {MAX_DEVICES} are possible",
            definition.devices.len()
        );
        return Err(fields.wrong("", problem));
    }
    definition.fill_in_addresses();
    Ok((definition, autostart))
}

#[cfg(test)]
mod tests;
