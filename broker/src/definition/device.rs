//! The devices of a definition: what each kind has, and how it is read.

use api::definition as keys;
use serde::{Deserialize, Serialize};

use super::{DefinitionError, Fields, MEMORY, values};
use crate::name::DeviceId;

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
    /// A PCI device over vfio-user.
    Vfio(Vfio),
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

/// Whose a PCI device is that the machine is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vfio {
    /// The host's, at this address, as `0000:01:00.0`.
    Host(String),
    /// Nobody's: one for tests and demonstrations.
    Synthetic,
    /// That of somebody else's vfio-user server, which listens here.
    Socket(String),
}

impl Device {
    /// Its kind as the core calls it.
    pub fn kind_name(&self) -> &str {
        match &self.kind {
            DeviceKind::Disk(_) => "blk",
            DeviceKind::Net(_) => "net",
            DeviceKind::Balloon(_) => "balloon",
            DeviceKind::VhostUser(other) => &other.kind,
            DeviceKind::Vfio(_) => "vfio",
        }
    }

    /// Where somebody else serves it, if somebody else does.
    pub fn foreign_socket(&self) -> Option<&str> {
        match &self.kind {
            DeviceKind::VhostUser(VhostUser { socket, .. })
            | DeviceKind::Vfio(Vfio::Socket(socket)) => Some(socket),
            _ => None,
        }
    }

    /// What is behind it.
    pub fn source(&self) -> String {
        match &self.kind {
            DeviceKind::Disk(disk) => disk.path.clone(),
            DeviceKind::Net(net) => format!("tap:{}", net.tap),
            DeviceKind::Balloon(_) => String::new(),
            DeviceKind::VhostUser(other) => other.socket.clone(),
            DeviceKind::Vfio(Vfio::Host(address)) => address.clone(),
            DeviceKind::Vfio(Vfio::Synthetic) => "synthetic".into(),
            DeviceKind::Vfio(Vfio::Socket(socket)) => socket.clone(),
        }
    }
}

/// Reads the device of a list.
type Read = fn(&mut Fields) -> Result<DeviceKind, DefinitionError>;

/// The lists of devices, in the order of their PCI addresses: key, keys within, and how one is read.
pub(super) const LISTS: &[(&str, &[&str], Read)] = &[
    (
        keys::DISK,
        &[
            keys::ID,
            keys::PATH,
            keys::READ_ONLY,
            keys::QUEUES,
            keys::SERIAL,
        ],
        disk,
    ),
    (
        keys::NET,
        &[keys::ID, keys::TAP, keys::MAC, keys::QUEUE_PAIRS, keys::MTU],
        net,
    ),
    (
        keys::BALLOON,
        &[keys::ID, keys::TARGET, keys::STATISTICS_INTERVAL],
        balloon,
    ),
    (
        keys::VHOST_USER,
        &[keys::ID, keys::TYPE, keys::SOCKET, keys::QUEUES, keys::TAG],
        vhost_user,
    ),
    (
        keys::VFIO,
        &[keys::ID, keys::HOST, keys::SYNTHETIC, keys::SOCKET],
        vfio,
    ),
];

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

fn vfio(fields: &mut Fields) -> Result<DeviceKind, DefinitionError> {
    let host = fields.text(keys::HOST, values::pci_address)?;
    let synthetic = fields.boolean(keys::SYNTHETIC)?.unwrap_or(false);
    let socket = fields.text(keys::SOCKET, values::path)?;
    Ok(DeviceKind::Vfio(match (host, synthetic, socket) {
        (Some(address), false, None) => Vfio::Host(address),
        (None, true, None) => Vfio::Synthetic,
        (None, false, Some(socket)) => Vfio::Socket(socket),
        _ => {
            let problem = "give one of host, socket and synthetic = true";
            return Err(fields.wrong(keys::HOST, problem));
        }
    }))
}
