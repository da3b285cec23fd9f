//! vfio-user front-end: a PCI device that another process has, given to the guest as it is.
//!
//! For any server that keeps to the specification (QEMU, `docs/interop/vfio-user.rst`) and whose
//! device interrupts by MSI-X or MSI. The device reaches the machine's RAM itself, and its interrupts are
//! irqfds: neither passes through this process.
//!
//! | part | what it is |
//! |---|---|
//! | `config`, `error` | what the definition says; what can go wrong |
//! | `description` | what the device is: BARs, what of them can be mapped |
//! | `interrupts` | how it interrupts |
//! | `process` | the connection, and RAM that the device may reach |
//! | `areas` | parts of BARs that the guest has mapped |
//! | `function` | the device on the PCI bus |
//! | `monitor` | notices when the process goes away |
//!
//! ```text
//!              hang-up, deadline, nonsense
//!   Connected ─────────────────────────────▶ Lost: reads are ones, writes are lost, nothing is mapped
//!       ▲                                      │
//!       └──────────────────────────────────────┘ a socket is handed over, of the same device
//! ```
//!
//! Unlike a vhost-user device, one of these has its state in its process. When that is lost so is the
//! state: the guest finds the device as after a function-level reset, with its BARs, command register
//! and interrupts as they were. And a paused machine's device goes on with what it was told to do.
//!
//! Not shown to the guest: I/O BARs, the expansion ROM, interrupts by pin, MSI beside MSI-X, and
//! extended configuration space. BARs of 64 bits are shown as 32 bits wide, as all are below 4 GiB.

mod areas;
mod config;
mod description;
mod error;
mod function;
mod interrupts;
mod monitor;
mod process;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vfio_user::Client;

pub use config::VfioUserConfig;
pub use error::{Unusable, VfioUserError};

use self::description::Description;
use self::function::Function;
use self::process::Process;
use super::{Endpoint, RemoteDevice};
use crate::memory::{LayoutListener, Memory};
use crate::pci::PciFunction;
use crate::transport::Wiring;

/// A device that was found, and is on no bus yet.
pub struct Found {
    process: Arc<Process>,
    description: Description,
}

impl Found {
    /// Connects to a device's process and asks what it has.
    pub fn connect(config: VfioUserConfig, endpoint: Endpoint) -> Result<Self, VfioUserError> {
        let (stream, _) = endpoint.connect(&config.id, config.deadline)?;
        let (client, description) = open(&config, stream)?;
        let process = Arc::new(Process::new(config, client));
        Ok(Self {
            process,
            description,
        })
    }

    /// What must hear of guest memory.
    pub fn listener(&self) -> Arc<dyn LayoutListener> {
        Arc::clone(&self.process) as _
    }
}

fn open(
    config: &VfioUserConfig,
    stream: UnixStream,
) -> Result<(Client, Description), VfioUserError> {
    let found = Client::new(stream, config.deadline)
        .map_err(Unusable::from)
        .and_then(|client| Ok((Description::of(&client)?, client)));
    match found {
        Ok((description, client)) => Ok((client, description)),
        Err(source) => Err(VfioUserError::Unusable {
            device: config.id.clone(),
            source,
        }),
    }
}

/// A PCI device of another process.
pub struct VfioUserDevice {
    function: Arc<Function>,
    monitor: Option<JoinHandle<()>>,
}

impl VfioUserDevice {
    /// Makes a PCI function of what was found, and watches its process from now on.
    pub fn new(found: Found, wiring: &Wiring, memory: &Arc<Memory>) -> Result<Self, VfioUserError> {
        let Found {
            process,
            description,
        } = found;
        let function = Function::new(process, description, wiring, memory)?;
        let watched = Arc::clone(&function);
        let id = function.process().id();
        let monitor = thread::Builder::new()
            .name(format!("watch-{id}"))
            .spawn(move || monitor::run(&watched))
            .map_err(|source| VfioUserError::System {
                device: id.into(),
                what: "start a thread",
                source,
            })?;
        Ok(Self {
            function,
            monitor: Some(monitor),
        })
    }

    /// Its name.
    pub fn id(&self) -> &str {
        self.function.process().id()
    }

    /// What is on the PCI bus.
    pub fn function(&self) -> Arc<dyn PciFunction> {
        Arc::clone(&self.function) as _
    }

    /// What the machine's owner sees of it.
    pub fn remote(&self) -> Arc<dyn RemoteDevice> {
        Arc::clone(self.function.process()) as _
    }

    /// Gives the device a new process on a connected socket, in the place of the one that it had. It
    /// must have the same device; that one is as new.
    pub fn reconnect_with(&self, socket: OwnedFd) -> Result<(), VfioUserError> {
        self.function.attach(socket)
    }

    /// As after power-on. What the process cannot do is reported.
    pub fn reset(&self) {
        self.function.reset();
    }
}

impl Drop for VfioUserDevice {
    fn drop(&mut self) {
        self.function.end();
        if let Some(monitor) = self.monitor.take()
            && monitor.join().is_err()
        {
            tracing::error!(device = self.id(), "its monitor panicked");
        }
    }
}
