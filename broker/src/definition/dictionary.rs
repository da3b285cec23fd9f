//! A definition in a D-Bus dictionary.

use std::collections::{BTreeMap, HashMap};

use api::Dictionary;
use api::definition as keys;
use zbus::{DynamicType as _, OwnedVariant, Variant};

use super::node::{Node, Value};
use super::{Definition, Device, DeviceKind, Vfio};

fn node(value: Value) -> Node {
    Node { line: None, value }
}

/// What a caller sent.
pub(super) fn parse(dictionary: Dictionary) -> Node {
    let entries: BTreeMap<_, _> = dictionary
        .into_iter()
        .map(|(key, value)| (key, node(value_of(&value))))
        .collect();
    node(Value::Table(entries))
}

fn value_of(value: &Variant<'_>) -> Value {
    match value {
        Variant::Str(text) => Value::Text(text.to_string()),
        Variant::ObjectPath(path) => Value::Text(path.to_string()),
        Variant::Bool(value) => Value::Boolean(*value),
        Variant::U8(number) => Value::Integer((*number).into()),
        Variant::I16(number) => Value::Integer((*number).into()),
        Variant::U16(number) => Value::Integer((*number).into()),
        Variant::I32(number) => Value::Integer((*number).into()),
        Variant::U32(number) => Value::Integer((*number).into()),
        Variant::I64(number) => Value::Integer((*number).into()),
        Variant::U64(number) => Value::Integer((*number).into()),
        Variant::Variant(inner) => value_of(inner),
        Variant::Array(list) => {
            Value::List(list.iter().map(|element| node(value_of(element))).collect())
        }
        Variant::Dict(dict) => {
            let entry = |(key, value): (&Variant<'_>, &Variant<'_>)| match value_of(key) {
                Value::Text(key) => Some((key, node(value_of(value)))),
                _ => None,
            };
            let entries: Option<BTreeMap<_, _>> = dict.iter().map(entry).collect();
            entries.map_or_else(
                || Value::Other("a dictionary whose keys are no strings".into()),
                Value::Table,
            )
        }
        other => Value::Other(format!("a value of type {}", other.signature())),
    }
}

type Entries = HashMap<String, Variant<'static>>;

fn device(device: &Device) -> (&'static str, Entries) {
    let mut entries = Entries::from([(keys::ID.into(), device.id.to_string().into())]);
    let mut put = |key: &str, value: Variant<'static>| {
        entries.insert(key.into(), value);
    };
    let list = match &device.kind {
        DeviceKind::Disk(disk) => {
            put(keys::PATH, disk.path.clone().into());
            put(keys::READ_ONLY, disk.read_only.into());
            put(keys::QUEUES, disk.queues.into());
            put(keys::SERIAL, disk.serial.clone().into());
            keys::DISK
        }
        DeviceKind::Net(net) => {
            put(keys::TAP, net.tap.clone().into());
            put(keys::MAC, net.mac.clone().into());
            put(keys::QUEUE_PAIRS, net.queue_pairs.into());
            if let Some(mtu) = net.mtu {
                put(keys::MTU, mtu.into());
            }
            keys::NET
        }
        DeviceKind::Balloon(balloon) => {
            put(keys::TARGET, (u64::from(balloon.target_mib) << 20).into());
            put(
                keys::STATISTICS_INTERVAL,
                balloon.statistics_interval.into(),
            );
            keys::BALLOON
        }
        DeviceKind::VhostUser(other) => {
            put(keys::TYPE, other.kind.clone().into());
            put(keys::SOCKET, other.socket.clone().into());
            if let Some(queues) = other.queues {
                put(keys::QUEUES, queues.into());
            }
            if let Some(tag) = &other.tag {
                put(keys::TAG, tag.clone().into());
            }
            keys::VHOST_USER
        }
        DeviceKind::Vfio(vfio) => {
            match vfio {
                Vfio::Host(address) => put(keys::HOST, address.clone().into()),
                Vfio::Synthetic => put(keys::SYNTHETIC, true.into()),
                Vfio::Socket(socket) => put(keys::SOCKET, socket.clone().into()),
            }
            keys::VFIO
        }
    };
    (list, entries)
}

/// A definition with every default filled in.
pub(super) fn show(definition: &Definition) -> Dictionary {
    let mut shown = Entries::new();
    let mut put = |key: &str, value: Variant<'static>| {
        shown.insert(key.into(), value);
    };
    for (key, value) in definition.boot.entries() {
        put(key, value.into());
    }
    put(keys::VCPUS, definition.vcpus.into());
    put(keys::CPU, definition.cpu.clone().into());
    put(keys::MEMORY, definition.memory.into());
    if let Some(size) = &definition.hugepages {
        put(keys::HUGEPAGES, size.clone().into());
    }
    put(keys::PREFAULT, definition.prefault.into());
    put(keys::UUID, definition.uuid.clone().into());
    let mut lists: BTreeMap<&str, Vec<Entries>> = BTreeMap::new();
    for (list, entries) in definition.devices.iter().map(device) {
        lists.entry(list).or_default().push(entries);
    }
    for (list, entries) in lists {
        put(list, entries.into());
    }
    shown
        .into_iter()
        // Fails for descriptors only, of which there are none.
        .filter_map(|(key, value)| Some((key, OwnedVariant::try_from(value).ok()?)))
        .collect()
}
