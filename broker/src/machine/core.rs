//! A machine's core: its command line with what it is handed, and the connection to it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use api::core::CoreProxy;
use api::private_bus;

use super::Machine;
use crate::definition::{self, Definition, Device, DeviceKind};
use crate::host::Host;
use crate::launch::Program;
use crate::migration::ends::Incoming;
use crate::resources::{self, ResourceError};

/// How long a call to a core may take, which has a deadline of its own for what it does.
const CALL_DEADLINE: Duration = Duration::from_secs(75);

/// What a core is handed to boot a guest.
#[derive(Debug)]
pub(super) struct Boot {
    kvm: OwnedFd,
    /// By their key in the definition.
    files: Vec<(&'static str, OwnedFd)>,
}

impl Boot {
    /// Opens it.
    pub(super) fn open(definition: &Definition) -> Result<Self, ResourceError> {
        let files = definition.boot.files().into_iter();
        let files = files.map(|(key, path)| Ok((key, resources::readable(key, path)?)));
        Ok(Self {
            kvm: resources::kvm()?,
            files: files.collect::<Result<_, _>>()?,
        })
    }
}

/// The program of a core, which is still to be told its devices and its owner.
pub(super) fn program(
    host: &Host,
    machine: &Machine,
    definition: &Definition,
    boot: Boot,
) -> io::Result<Program> {
    let name = machine.name();
    let mut program = Program {
        machine: name.to_string(),
        declared: machine.from_file,
        beside: false,
        pins_memory: false,
        role: "core".into(),
        path: host.programs.join("godwit-vmm"),
        args: Vec::new(),
        descriptors: Vec::new(),
        log: host.folder.log(name, "core")?,
    };
    program.args(["--name", name.as_str()]);
    for (key, path) in definition.boot.files() {
        program.args([&format!("--{key}"), path]);
    }
    if let definition::Boot::Kernel { cmdline, .. } = &definition.boot {
        program.args(["--cmdline", cmdline]);
    }
    program.args(["--cpus", &definition.vcpus.to_string()]);
    program.args(["--cpu", &definition.cpu]);
    program.args(["--memory", &definition.memory.to_string()]);
    if let Some(size) = &definition.hugepages {
        program.args(["--hugepages", size]);
    }
    if definition.prefault {
        program.args(["--prefault"]);
    }
    program.hand("--kvm-fd", boot.kvm);
    for (key, file) in boot.files {
        program.hand(&format!("--{key}-fd"), file);
    }
    Ok(program)
}

/// Lets the core take a machine over instead of booting one.
pub(super) fn expect(program: &mut Program, incoming: Incoming) {
    let Incoming { from, ends, memory } = incoming;
    let mut text = format!("{}={}", from.key(), program.pass(ends.control));
    for ram in ends.ram {
        text.push_str(&format!(",ram={}", program.pass(ram)));
    }
    for (id, state) in ends.states {
        text.push_str(&format!(",state={id}:{}", program.pass(state)));
    }
    if let Some(memory) = memory {
        text.push_str(&format!(",memory={}", program.pass(memory)));
    }
    program.args(["--incoming", &text]);
}

/// Tells the core of a device, whose back-end is at `endpoint`.
pub(super) fn add_device(program: &mut Program, device: &Device, endpoint: &str) {
    let id = &device.id;
    let mut list = "--vhost-user";
    let option = match &device.kind {
        DeviceKind::Disk(_) => format!("blk,{endpoint},id={id}"),
        DeviceKind::Net(net) => format!("net,{endpoint},id={id},mac={}", net.mac),
        DeviceKind::Balloon(_) => format!("balloon,{endpoint},id={id}"),
        DeviceKind::VhostUser(other) => {
            let mut option = format!("{},{endpoint},id={id}", other.kind);
            if let Some(queues) = other.queues {
                option.push_str(&format!(",queues={queues}"));
            }
            if let Some(tag) = &other.tag {
                option.push_str(&format!(",tag={tag}"));
            }
            option
        }
        DeviceKind::Vfio(_) => {
            list = "--vfio-user";
            format!("id={id},{endpoint}")
        }
    };
    program.args([list, &option]);
}

/// Connects to a core.
pub(super) async fn connect(control: &Path) -> zbus::Result<CoreProxy<'static>> {
    let stream = tokio::net::UnixStream::connect(control).await?;
    let connection = private_bus::dial(stream.into_std()?)?
        .method_timeout(CALL_DEADLINE)
        .build()
        .await?;
    let proxy = CoreProxy::builder(&connection)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?;
    // It answers as soon as the machine is made.
    proxy.state().await?;
    Ok(proxy)
}
