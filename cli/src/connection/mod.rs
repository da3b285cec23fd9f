//! The way to the broker.
//!
//! ```text
//!  --bus ADDRESS ─► $GODWIT_BUS ─► system bus, if the service is there ─► embedded broker
//! ```
//! The first that is given counts. A verb that makes or starts a machine starts the embedded
//! broker when nobody answers at a Unix socket; other verbs say that there is none.

mod address;
mod agent;
mod launch;

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use api::device::DeviceProxy;
use api::manager::ManagerProxy;
use api::{Dictionary, SERVICE};
use zbus::connection::Builder;
use zbus::fdo::{DBusProxy, ObjectManagerProxy, PropertiesProxy};
use zbus::names::InterfaceName;
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedObjectPath};

use self::address::Place;
use self::agent::Agent;
use crate::error::{Failure, Result, What as _, is_gone};
use crate::view;

/// How long the broker may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the broker may take to answer a call. Long work is a job, and no call.
const CALL_DEADLINE: Duration = Duration::from_secs(90);

/// Counters by name.
pub type Counters = BTreeMap<String, u64>;

/// What a broker is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To look, as everybody may.
    Look,
    /// To change what there is. On the system bus a person may be asked for a password.
    Change,
    /// The same, and to make something: an embedded broker is started where none answers.
    Make,
}

/// A connection to a broker.
#[derive(Clone, Debug)]
pub struct Broker {
    connection: Connection,
    /// Kept until the broker is not needed any more.
    _agent: Option<Arc<Agent>>,
}

impl Broker {
    /// Finds the broker.
    ///
    /// # Errors
    /// None answers, and none could be started.
    pub async fn find(bus: Option<&str>, purpose: Purpose) -> Result<Self> {
        let place = match Place::given(bus) {
            Some(place) => place,
            None => match system().await {
                Some(connection) => {
                    let agent = match purpose {
                        Purpose::Look => None,
                        Purpose::Change | Purpose::Make => Agent::start().await,
                    };
                    return Ok(Self {
                        connection,
                        _agent: agent.map(Arc::new),
                    });
                }
                None => Place::embedded(),
            },
        };
        let connection = match (connect(&place).await, &place) {
            (Err(Failure::NoBroker { .. }), Place::Socket(socket)) if purpose == Purpose::Make => {
                launch::start(socket, || connect(&place)).await?
            }
            (answer, _) => answer?,
        };
        Ok(Self {
            connection,
            _agent: None,
        })
    }

    /// The connection, for proxies of its objects.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// All machines.
    pub async fn manager(&self) -> Result<ManagerProxy<'static>> {
        ManagerProxy::builder(&self.connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .what("the broker")
    }

    /// The machine of this name.
    pub async fn machine(&self, name: &str) -> Result<Machine> {
        let path = self.manager().await?.get_machine(name).await.what(name)?;
        Machine::at(self, name, path).await
    }

    /// Every machine with its devices, by name.
    pub async fn machines(&self) -> Result<Vec<view::Machine>> {
        let objects = ObjectManagerProxy::builder(&self.connection)
            .destination(SERVICE)
            .path(api::path::MANAGER)
            .build()
            .await
            .what("the broker")?;
        let objects = objects.get_managed_objects().await.what("the machines")?;
        let mut machines = Vec::new();
        for (path, interfaces) in &objects {
            let Some(properties) = interfaces.get("org.godwit.Vmm1.Machine") else {
                continue;
            };
            let mut machine = view::Machine::read(properties).what(path.as_str())?;
            let below = format!("{path}/device/");
            for (device, interfaces) in &objects {
                if let Some(properties) = interfaces.get("org.godwit.Vmm1.Device")
                    && device.as_str().starts_with(&below)
                {
                    let device = view::Device::read(properties).what(device.as_str())?;
                    machine.devices.push(device);
                }
            }
            machine.devices.sort_by(|a, b| a.id.cmp(&b.id));
            machines.push(machine);
        }
        machines.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(machines)
    }

    /// The counters of a machine's core; none of one that is gone.
    pub async fn machine_statistics(&self, name: &str) -> Result<Counters> {
        let machine = Machine::at(self, name, api::path::machine(name)).await?;
        unless_gone(machine.proxy.statistics().await).what(name)
    }

    /// A device.
    pub async fn device(&self, machine: &str, id: &str) -> Result<DeviceProxy<'static>> {
        DeviceProxy::builder(&self.connection)
            .path(api::path::device(machine, id))
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .what(format!("{machine}/{id}"))
    }

    /// The counters of a device's process; none of one that is gone.
    pub async fn device_statistics(&self, machine: &str, id: &str) -> Result<Counters> {
        let device = self.device(machine, id).await?;
        unless_gone(device.statistics().await).what(format!("{machine}/{id}"))
    }

    /// All properties of one interface of an object.
    pub async fn properties(
        &self,
        what: &str,
        path: &OwnedObjectPath,
        interface: &'static str,
    ) -> Result<Dictionary> {
        let properties = self.properties_of(what, path).await?;
        let interface = InterfaceName::from_static_str(interface).what(what)?;
        properties.get_all(interface).await.what(what)
    }

    /// The properties of an object, and their changes.
    pub async fn properties_of(
        &self,
        what: &str,
        path: &OwnedObjectPath,
    ) -> Result<PropertiesProxy<'static>> {
        PropertiesProxy::builder(&self.connection)
            .destination(SERVICE)
            .path(path.clone())
            .build()
            .await
            .what(what)
    }
}

fn unless_gone(
    counters: std::result::Result<Counters, api::Error>,
) -> std::result::Result<Counters, api::Error> {
    match counters {
        Err(error) if is_gone(&error) => Ok(Counters::new()),
        other => other,
    }
}

/// One machine of a broker.
#[derive(Clone, Debug)]
pub struct Machine {
    pub name: String,
    pub path: OwnedObjectPath,
    pub proxy: api::machine::MachineProxy<'static>,
    broker: Broker,
}

impl Machine {
    /// The machine at this path.
    pub async fn at(broker: &Broker, name: &str, path: OwnedObjectPath) -> Result<Self> {
        let proxy = api::machine::MachineProxy::builder(broker.connection())
            .path(path.clone())
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .what(name)?;
        Ok(Self {
            name: name.into(),
            path,
            proxy,
            broker: broker.clone(),
        })
    }

    /// The state in which it is now.
    pub async fn state(&self) -> Result<String> {
        let state = self.proxy.state().await.what(&self.name)?;
        Ok(state.as_str().to_owned())
    }

    /// Whether it is known to be off, or to be forgotten.
    pub async fn has_ended(&self) -> bool {
        match self.state().await {
            Ok(state) => matches!(state.as_str(), "off" | "failed"),
            Err(Failure::Refused { error, .. }) => is_gone(&error),
            Err(_) => false,
        }
    }

    /// What it is now, with its devices and its definition.
    pub async fn look(&self) -> Result<(view::Machine, Dictionary)> {
        let what = self.name.as_str();
        let properties = self
            .broker
            .properties(what, &self.path, "org.godwit.Vmm1.Machine")
            .await?;
        let mut machine = view::Machine::read(&properties).what(what)?;
        for path in self.proxy.devices().await.what(what)? {
            let device = self
                .broker
                .properties(what, &path, "org.godwit.Vmm1.Device")
                .await?;
            machine
                .devices
                .push(view::Device::read(&device).what(what)?);
        }
        machine.devices.sort_by(|a, b| a.id.cmp(&b.id));
        let definition = self.proxy.definition().await.what(what)?;
        Ok((machine, definition))
    }
}

/// The system bus, if the broker is on it or can be activated there.
async fn system() -> Option<Connection> {
    let look = async {
        let bus = Builder::system()
            .method_timeout(CALL_DEADLINE)
            .build()
            .await?;
        let driver = DBusProxy::new(&bus).await?;
        let is_there = driver.name_has_owner(SERVICE.try_into()?).await?
            || driver
                .list_activatable_names()
                .await?
                .iter()
                .any(|name| name.as_str() == SERVICE);
        zbus::Result::Ok(is_there.then_some(bus))
    };
    tokio::time::timeout(CONNECT_DEADLINE, look)
        .await
        .ok()?
        .ok()?
}

async fn connect(place: &Place) -> Result<Connection> {
    let builder = match place {
        // By hand, since zbus does not decode what is escaped in an address.
        Place::Socket(path) => match UnixStream::connect(path) {
            Ok(stream) => Builder::unix_stream(stream),
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Failure::NotYours {
                    address: place.to_string(),
                });
            }
            Err(source) => return Err(no_broker(place, Some(source.into()))),
        },
        Place::Address(text) => {
            let address: zbus::Address = text.parse().map_err(|source| Failure::BadAddress {
                address: text.clone(),
                source,
            })?;
            Builder::address(address)
        }
    };
    let building = builder.method_timeout(CALL_DEADLINE).build();
    match tokio::time::timeout(CONNECT_DEADLINE, building).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(source)) => Err(no_broker(place, Some(source.into()))),
        Err(_) => Err(no_broker(place, None)),
    }
}

fn no_broker(place: &Place, source: Option<Box<dyn Error + Send + Sync>>) -> Failure {
    Failure::NoBroker {
        address: place.to_string(),
        source,
    }
}
