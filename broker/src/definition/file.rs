//! A definition in a TOML file.

use std::collections::BTreeMap;
use std::ops::Range;

use api::definition as keys;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table};

use super::node::{Node, Value};
use super::{Definition, DefinitionError, Device, DeviceKind, Vfio};

/// Largest file that is read, in bytes.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// Parses a file's text.
pub(super) fn parse(text: &str) -> Result<Node, DefinitionError> {
    let table = DeTable::parse(text).map_err(|error| DefinitionError {
        key: String::new(),
        line: error.span().map(|span| line_of(text, &span)),
        problem: error.message().to_owned(),
    })?;
    Ok(Node {
        line: None,
        value: table_of(text, table.into_inner()),
    })
}

/// A definition as text that [`parse`] takes, with every default filled in.
pub(super) fn write(definition: &Definition) -> String {
    let mut table = Table::new();
    let mut put = |key: &str, value: toml::Value| {
        table.insert(key.into(), value);
    };
    for (key, value) in definition.boot.entries() {
        put(key, value.into());
    }
    put(keys::VCPUS, i64::from(definition.vcpus).into());
    put(keys::CPU, definition.cpu.clone().into());
    // At most a terabyte.
    let memory = i64::try_from(definition.memory).unwrap_or(i64::MAX);
    put(keys::MEMORY, memory.into());
    if let Some(size) = &definition.hugepages {
        put(keys::HUGEPAGES, size.clone().into());
    }
    put(keys::PREFAULT, definition.prefault.into());
    put(keys::UUID, definition.uuid.clone().into());
    let mut lists: BTreeMap<&str, Vec<toml::Value>> = BTreeMap::new();
    for (list, entries) in definition.devices.iter().map(device) {
        lists.entry(list).or_default().push(entries.into());
    }
    for (list, entries) in lists {
        put(list, entries.into());
    }
    table.to_string()
}

fn device(device: &Device) -> (&'static str, Table) {
    let mut table = Table::new();
    let mut put = |key: &str, value: toml::Value| {
        table.insert(key.into(), value);
    };
    put(keys::ID, device.id.to_string().into());
    let list = match &device.kind {
        DeviceKind::Disk(disk) => {
            put(keys::PATH, disk.path.clone().into());
            put(keys::READ_ONLY, disk.read_only.into());
            put(keys::QUEUES, i64::from(disk.queues).into());
            if !disk.serial.is_empty() {
                put(keys::SERIAL, disk.serial.clone().into());
            }
            keys::DISK
        }
        DeviceKind::Net(net) => {
            put(keys::TAP, net.tap.clone().into());
            put(keys::MAC, net.mac.clone().into());
            put(keys::QUEUE_PAIRS, i64::from(net.queue_pairs).into());
            if let Some(mtu) = net.mtu {
                put(keys::MTU, i64::from(mtu).into());
            }
            keys::NET
        }
        DeviceKind::Balloon(balloon) => {
            put(keys::TARGET, (i64::from(balloon.target_mib) << 20).into());
            let interval = i64::from(balloon.statistics_interval);
            put(keys::STATISTICS_INTERVAL, interval.into());
            keys::BALLOON
        }
        DeviceKind::VhostUser(other) => {
            put(keys::TYPE, other.kind.clone().into());
            put(keys::SOCKET, other.socket.clone().into());
            if let Some(queues) = other.queues {
                put(keys::QUEUES, i64::from(queues).into());
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
    (list, table)
}

/// The line on which `span` begins, from 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.as_bytes().get(..span.start).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn table_of(text: &str, table: DeTable<'_>) -> Value {
    let entries: BTreeMap<_, _> = table
        .into_iter()
        .map(|(key, value)| (key.into_inner().into_owned(), node_of(text, value)))
        .collect();
    Value::Table(entries)
}

fn node_of(text: &str, value: Spanned<DeValue<'_>>) -> Node {
    let line = Some(line_of(text, &value.span()));
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(
                |_| Value::Other(format!("the integer {number}")),
                Value::Integer,
            ),
        DeValue::Boolean(value) => Value::Boolean(value),
        DeValue::Float(_) => Value::Other("a fraction".into()),
        DeValue::Datetime(_) => Value::Other("a time".into()),
        DeValue::Array(list) => Value::List(
            list.into_iter()
                .map(|element| node_of(text, element))
                .collect(),
        ),
        DeValue::Table(table) => table_of(text, table),
    };
    Node { line, value }
}
