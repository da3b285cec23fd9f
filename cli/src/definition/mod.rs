//! The definition of a machine, from options or a file, as the broker takes it.

mod file;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use api::Dictionary;
use api::definition as key;
use zbus::{OwnedVariant, Variant};

use crate::error::{Failure, Result};
use crate::options::Define;
use crate::value::{Disk, Net, Vfio, VfioSource, VhostUser};

pub use self::file::DefinitionFile;

/// A dictionary of one device.
type Device = HashMap<&'static str, Variant<'static>>;

/// What the options define. The broker checks it, and has the defaults.
///
/// # Errors
/// A path is not UTF-8, or this process has no working folder.
pub fn of_options(define: &Define) -> Result<Dictionary> {
    let mut definition = Entries(Dictionary::new());
    definition.path(key::KERNEL, define.kernel.as_deref())?;
    definition.path(key::INITRD, define.initrd.as_deref())?;
    definition.put(key::CMDLINE, define.cmdline.clone());
    definition.path(key::FIRMWARE, define.firmware.as_deref())?;
    definition.put(key::VCPUS, define.cpus);
    definition.put(key::CPU, define.cpu.clone());
    definition.put(key::MEMORY, define.memory.map(|size| size.0));
    definition.put(key::HUGEPAGES, define.hugepages.map(|size| size.as_str()));
    definition.put(key::PREFAULT, define.prefault.then_some(true));
    definition.list(key::DISK, &define.disk, disk)?;
    definition.list(key::NET, &define.net, net)?;
    let balloon: Vec<_> = define.balloon.iter().collect();
    definition.list(key::BALLOON, &balloon, |target| {
        Ok(Device::from([(key::TARGET, target.0.into())]))
    })?;
    definition.list(key::VHOST_USER, &define.vhost_user, vhost_user)?;
    definition.list(key::VFIO, &define.vfio, vfio)?;
    Ok(definition.0)
}

fn disk(disk: &Disk) -> Result<Device> {
    let mut device = Device::from([(key::PATH, absolute(&disk.path)?.into())]);
    if disk.read_only {
        device.insert(key::READ_ONLY, true.into());
    }
    add(&mut device, key::QUEUES, disk.queues.map(u32::from));
    add(&mut device, key::SERIAL, disk.serial.clone());
    add(&mut device, key::ID, disk.id.clone());
    Ok(device)
}

fn net(net: &Net) -> Result<Device> {
    let mut device = Device::from([(key::TAP, net.tap.clone().into())]);
    add(&mut device, key::MAC, net.mac.clone());
    add(
        &mut device,
        key::QUEUE_PAIRS,
        net.queue_pairs.map(u32::from),
    );
    add(&mut device, key::MTU, net.mtu.map(u32::from));
    add(&mut device, key::ID, net.id.clone());
    Ok(device)
}

fn vhost_user(foreign: &VhostUser) -> Result<Device> {
    let mut device = Device::from([
        (key::TYPE, foreign.kind.clone().into()),
        (key::SOCKET, absolute(&foreign.socket)?.into()),
    ]);
    add(&mut device, key::QUEUES, foreign.queues.map(u32::from));
    add(&mut device, key::TAG, foreign.tag.clone());
    add(&mut device, key::ID, foreign.id.clone());
    Ok(device)
}

fn vfio(vfio: &Vfio) -> Result<Device> {
    let mut device = Device::from([match &vfio.source {
        VfioSource::Host(address) => (key::HOST, address.clone().into()),
        VfioSource::Synthetic => (key::SYNTHETIC, true.into()),
        VfioSource::Socket(path) => (key::SOCKET, absolute(path)?.into()),
    }]);
    add(&mut device, key::ID, vfio.id.clone());
    Ok(device)
}

fn add(device: &mut Device, key: &'static str, value: Option<impl Into<Variant<'static>>>) {
    if let Some(value) = value {
        device.insert(key, value.into());
    }
}

struct Entries(Dictionary);

impl Entries {
    fn put(&mut self, key: &str, value: Option<impl Into<Variant<'static>>>) {
        // Only descriptors can fail to become owned, and there are none here.
        let owned = value.and_then(|value| OwnedVariant::try_from(value.into()).ok());
        if let Some(value) = owned {
            self.0.insert(key.into(), value);
        }
    }

    fn path(&mut self, key: &str, path: Option<&Path>) -> Result<()> {
        if let Some(path) = path {
            self.put(key, Some(absolute(path)?));
        }
        Ok(())
    }

    fn list<T>(
        &mut self,
        key: &str,
        devices: &[T],
        convert: impl Fn(&T) -> Result<Device>,
    ) -> Result<()> {
        if !devices.is_empty() {
            let list = devices.iter().map(convert).collect::<Result<Vec<_>>>()?;
            self.put(key, Some(list));
        }
        Ok(())
    }
}

/// The path as the broker, which has another working folder, finds it.
///
/// # Errors
/// It is not UTF-8, or this process has no working folder.
pub fn absolute(path: &Path) -> Result<String> {
    let absolute: PathBuf = std::path::absolute(path).map_err(Failure::io(format!(
        "{} has no absolute path",
        path.display()
    )))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| Failure::PathNotUtf8 { path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::json_object;

    #[test]
    fn options_become_what_the_broker_takes() {
        let define = Define {
            kernel: Some("/k".into()),
            cmdline: Some("-- x".into()),
            cpus: Some(2),
            memory: Some("1G".parse().unwrap()),
            disk: vec![
                "/d,read-only,queues=4".parse().unwrap(),
                "/e".parse().unwrap(),
            ],
            net: vec!["tap:t0,queue-pairs=2".parse().unwrap()],
            vhost_user: vec!["fs,socket=/s,tag=share".parse().unwrap()],
            vfio: vec![
                "host=0000:01:00.0".parse().unwrap(),
                "synthetic,id=x".parse().unwrap(),
                "socket=/v".parse().unwrap(),
            ],
            ..Define::default()
        };
        let expected = serde_json::json!({
            "kernel": "/k", "cmdline": "-- x", "vcpus": 2, "memory": 1u64 << 30,
            "disk": [{"path": "/d", "read-only": true, "queues": 4}, {"path": "/e"}],
            "net": [{"tap": "t0", "queue-pairs": 2}],
            "vhost-user": [{"type": "fs", "socket": "/s", "tag": "share"}],
            "vfio": [{"host": "0000:01:00.0"}, {"synthetic": true, "id": "x"}, {"socket": "/v"}],
        });
        let definition = of_options(&define).unwrap();
        assert_eq!(json_object(&definition), expected);
        let signature = definition["disk"].value_signature().to_string();
        assert_eq!(signature, "aa{sv}");
    }

    #[test]
    fn what_is_not_given_is_left_to_the_broker() {
        let define = Define {
            kernel: Some("k".into()),
            ..Define::default()
        };
        let definition = of_options(&define).unwrap();
        assert_eq!(definition.len(), 1);
        let kernel = <&str>::try_from(&definition["kernel"]).unwrap();
        assert!(kernel.starts_with('/'), "{kernel}");
    }

    #[test]
    fn a_path_that_is_not_utf8_is_refused() {
        use std::os::unix::ffi::OsStrExt as _;
        let path = Path::new(std::ffi::OsStr::from_bytes(b"/a\xff"));
        assert!(matches!(absolute(path), Err(Failure::PathNotUtf8 { .. })));
    }
}
