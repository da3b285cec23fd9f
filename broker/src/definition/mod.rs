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
mod dictionary;
mod file;
mod node;
mod values;

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use api::Dictionary;
use api::definition as keys;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

pub use self::boot::Boot;
use self::node::{Fields, Node};
use crate::name::{DeviceId, MachineName};

/// Most devices of a machine: what the PCI bus of a core holds.
const MAX_DEVICES: usize = 31;
/// RAM of a machine that does not say how much, in bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// Least and most RAM, in bytes.
const MEMORY: std::ops::RangeInclusive<u64> = (16 << 20)..=(1 << 40);

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

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name in the machine.
    pub id: DeviceId,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A block device of ours.
    Disk(Disk),
    /// A network device of ours.
    Net(Net),
    /// A memory balloon of ours.
    Balloon(Balloon),
    /// A device of somebody else's back-end.
    VhostUser(VhostUser),
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Raw image or block device.
    pub path: String,
    /// Let the guest only read.
    pub read_only: bool,
    /// Virtqueues.
    pub queues: u32,
    /// Serial number.
    pub serial: String,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Name of the tap.
    pub tap: String,
    /// Address of the guest's card.
    pub mac: String,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// MTU that the guest is told.
    pub mtu: Option<u32>,
}

/// A memory balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// MiB that the guest shall give from the beginning.
    pub target_mib: u32,
    /// Seconds between two questions for the guest's statistics; 0: none is asked.
    #[serde(default = "statistics_interval")]
    pub statistics_interval: u32,
}

/// Of a balloon that does not say.
fn statistics_interval() -> u32 {
    5
}

/// A device of somebody else's back-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostUser {
    /// Its type, as `fs`.
    pub kind: String,
    /// Where its back-end listens.
    pub socket: String,
    /// Virtqueues.
    pub queues: Option<u32>,
    /// Tag of a file system.
    pub tag: Option<String>,
}

/// The `cpu` of a machine that does not say.
fn host_cpu() -> String {
    "host".into()
}

impl Device {
    /// Its kind as the core calls it.
    pub fn kind_name(&self) -> &str {
        match &self.kind {
            DeviceKind::Disk(_) => "blk",
            DeviceKind::Net(_) => "net",
            DeviceKind::Balloon(_) => "balloon",
            DeviceKind::VhostUser(other) => &other.kind,
        }
    }

    /// What is behind it.
    pub fn source(&self) -> String {
        match &self.kind {
            DeviceKind::Disk(disk) => disk.path.clone(),
            DeviceKind::Net(net) => format!("tap:{}", net.tap),
            DeviceKind::Balloon(_) => String::new(),
            DeviceKind::VhostUser(other) => other.socket.clone(),
        }
    }
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
    let mut fields = Fields::of(node, "", known_keys(""))?;
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
    for (list, read) in [
        (
            keys::DISK,
            disk as fn(&mut Fields) -> Result<DeviceKind, DefinitionError>,
        ),
        (keys::NET, net),
        (keys::BALLOON, balloon),
        (keys::VHOST_USER, vhost_user),
    ] {
        for (number, mut device) in fields
            .tables(list, known_keys(list))?
            .into_iter()
            .enumerate()
        {
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

fn known_keys(list: &str) -> &'static [&'static str] {
    match list {
        keys::DISK => &[
            keys::ID,
            keys::PATH,
            keys::READ_ONLY,
            keys::QUEUES,
            keys::SERIAL,
        ],
        keys::NET => &[keys::ID, keys::TAP, keys::MAC, keys::QUEUE_PAIRS, keys::MTU],
        keys::BALLOON => &[keys::ID, keys::TARGET, keys::STATISTICS_INTERVAL],
        keys::VHOST_USER => &[keys::ID, keys::TYPE, keys::SOCKET, keys::QUEUES, keys::TAG],
        _ => &[
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
        ],
    }
}

fn disk(fields: &mut Fields) -> Result<DeviceKind, DefinitionError> {
    let path = fields.text(keys::PATH, values::path)?;
    Ok(DeviceKind::Disk(Disk {
        path: fields.required(keys::PATH, path)?,
        read_only: fields.boolean(keys::READ_ONLY)?.unwrap_or(false),
        queues: fields.integer(keys::QUEUES, 1, 64)?.unwrap_or(1),
        serial: fields
            .text(keys::SERIAL, values::serial)?
            .unwrap_or_default(),
    }))
}

fn net(fields: &mut Fields) -> Result<DeviceKind, DefinitionError> {
    let tap = fields.text(keys::TAP, values::interface)?;
    Ok(DeviceKind::Net(Net {
        tap: fields.required(keys::TAP, tap)?,
        mac: fields.text(keys::MAC, values::mac)?.unwrap_or_default(),
        queue_pairs: fields.integer(keys::QUEUE_PAIRS, 1, 32)?.unwrap_or(1),
        mtu: fields.integer(keys::MTU, 68, 65535)?,
    }))
}

fn balloon(fields: &mut Fields) -> Result<DeviceKind, DefinitionError> {
    let target = fields.size(keys::TARGET, values::size)?.unwrap_or(0);
    let whole = target.is_multiple_of(1 << 20) && target <= *MEMORY.end();
    let target_mib = u32::try_from(target >> 20).ok().filter(|_| whole);
    let problem = || format!("{target} bytes: give whole MiB, 1T at most");
    Ok(DeviceKind::Balloon(Balloon {
        target_mib: target_mib.ok_or_else(|| fields.wrong(keys::TARGET, problem()))?,
        statistics_interval: fields
            .integer(keys::STATISTICS_INTERVAL, 0, 3600)?
            .unwrap_or_else(statistics_interval),
    }))
}

fn vhost_user(fields: &mut Fields) -> Result<DeviceKind, DefinitionError> {
    let kind = fields.text(keys::TYPE, values::word)?;
    let socket = fields.text(keys::SOCKET, values::path)?;
    Ok(DeviceKind::VhostUser(VhostUser {
        kind: fields.required(keys::TYPE, kind)?,
        socket: fields.required(keys::SOCKET, socket)?,
        queues: fields.integer(keys::QUEUES, 1, 64)?,
        tag: fields.text(keys::TAG, values::word)?,
    }))
}

#[cfg(test)]
mod tests;
