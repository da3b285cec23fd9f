//! Processes as units of systemd, all of a machine in one slice.
//!
//! ```text
//! godwit.slice
//! └─ godwit-NAME.slice
//!    ├─ godwit-machine@NAME.service    core of a declared machine
//!    ├─ godwit-NAME-core.service       or of one that a call has made
//!    └─ godwit-NAME-ID.service         each device
//! ```
//! | module | what |
//! |---|---|
//! | `names` | what units are called |
//! | `settings` | what they are and may do |
//! | `arrivals` | the socket to which their processes come |
//! | `unit` | watching one |
//! | `bus` | systemd's D-Bus interface |
//!
//! A unit starts `godwit-launch`, which comes to the broker for what it becomes; see
//! [`super::hand_over`]. Nothing is used that systemd 252 does not know. The broker restarts
//! processes itself, as only it has their descriptors, so no unit restarts.

mod arrivals;
mod bus;
pub mod names;
pub mod settings;
mod unit;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::Instant;
use zbus::{Connection, Variant};

use self::arrivals::{Arrivals, Expected};
use self::bus::{ManagerProxy, Property};
use self::settings::DOOR;
pub(crate) use self::unit::Unit;
use super::{LaunchError, Program, hand_over};
use crate::process::Process;

/// How long a unit's process may take to come.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often a transient unit is tried again while systemd still has the one before.
const LOOK: Duration = Duration::from_millis(5);

/// Why units cannot be started.
#[derive(Debug, Error)]
pub enum SystemdError {
    /// systemd cannot be reached.
    #[error("systemd cannot be reached on the system bus")]
    Bus(#[from] zbus::Error),
    /// There is no socket for processes of units.
    #[error("no socket for units' processes")]
    Socket(#[from] io::Error),
    /// The template has something that cannot be said over D-Bus.
    #[error(transparent)]
    Setting(#[from] settings::UnknownSetting),
}

/// systemd, on the system bus.
#[derive(Debug)]
pub struct Systemd {
    manager: ManagerProxy<'static>,
    core: Vec<Property<'static>>,
    device: Vec<Property<'static>>,
    stub: PathBuf,
    arrivals: Arc<Arrivals>,
}

impl Systemd {
    /// By `connection`, with a socket in `folder` and `godwit-launch` among `programs`. Units of
    /// machines that somebody else starts are told to `visits`.
    ///
    /// # Errors
    /// The connection is broken, the socket cannot be made, or the template of units has
    /// something that transient ones cannot have.
    pub async fn new(
        connection: &Connection,
        folder: &Path,
        programs: &Path,
        visits: mpsc::UnboundedSender<String>,
    ) -> Result<Self, SystemdError> {
        let door = folder.join("launch");
        Ok(Self {
            core: settings::transient(true, &door)?,
            device: settings::transient(false, &door)?,
            manager: ManagerProxy::new(connection).await?,
            arrivals: Arrivals::listen(&door, visits)?,
            stub: programs.join("godwit-launch"),
        })
    }

    /// Starts a program.
    pub(super) async fn start(&self, program: Program) -> Result<Process, LaunchError> {
        let (name, mut expected) = self.start_unit(&program).await?;
        let refused = |source: zbus::Error| LaunchError::Unit {
            unit: name.clone(),
            source: Box::new(source),
        };
        let unit = Unit::hold(&self.manager, &name).await.map_err(refused)?;
        let arrival = tokio::select! {
            arrival = expected.come() => arrival,
            why = unit.failed() => {
                return Err(LaunchError::Ended { unit: name, why });
            }
            () = tokio::time::sleep(DEADLINE) => None,
        };
        let handed = match arrival {
            Some(arrival) => hand_over::give(&arrival.stream, &program)
                .map(|()| arrival.process.watched_as(unit))
                .map_err(|source| LaunchError::Start {
                    path: program.path,
                    source,
                }),
            None => Err(LaunchError::NoShow {
                unit: name.clone(),
                seconds: DEADLINE.as_secs(),
            }),
        };
        if handed.is_err() {
            // It may have ended by itself.
            let _ = self.manager.stop_unit(&name, "replace").await;
        }
        handed
    }

    /// Starts the unit of a program, whose process is expected from then on.
    async fn start_unit(&self, program: &Program) -> Result<(String, Expected), LaunchError> {
        let properties = self.properties(program);
        let end = Instant::now() + DEADLINE;
        loop {
            for name in names::candidates(program) {
                let expected = self.arrivals.expect(&name);
                if expected.is_here {
                    return Ok((name, expected));
                }
                let started = match names::is_from_template(&name) {
                    // Not "start": systemd may not have noticed that the one before has ended.
                    true => self.manager.restart_unit(&name, "replace").await,
                    false => {
                        let manager = &self.manager;
                        manager
                            .start_transient_unit(&name, "fail", &properties, &[])
                            .await
                    }
                };
                match started {
                    Ok(_) => return Ok((name, expected)),
                    Err(error) if is_still_there(&error) && Instant::now() < end => {}
                    Err(error) => {
                        return Err(LaunchError::Unit {
                            unit: name,
                            source: Box::new(error),
                        });
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn properties(&self, program: &Program) -> Vec<Property<'static>> {
        let stub = self.stub.display().to_string();
        let command = vec![(stub.clone(), vec![stub, DOOR.to_owned()], false)];
        let description = format!("{} of machine {}", program.role, program.machine);
        let settings = match names::is_core(program) {
            true => &self.core,
            false => &self.device,
        };
        let mut properties = settings.clone();
        properties.extend([
            ("Description", description.into()),
            ("Slice", names::slice(&program.machine).into()),
            ("CollectMode", "inactive-or-failed".into()),
            ("ExecStart", command.into()),
        ] as [Property<'static>; 4]);
        if program.pins_memory {
            properties.push(("LimitMEMLOCK", u64::MAX.into()));
        }
        // When the host goes down, the core ends before its devices.
        let anchor = || Variant::from(vec![names::ANCHOR]);
        if names::is_core(program) {
            properties.push(("After", anchor()));
        } else {
            properties.extend([("Wants", anchor()), ("Before", anchor())]);
        }
        properties
    }

    /// Watches a process that a broker before this one started.
    pub(super) async fn watch(&self, process: Process) -> Process {
        match Unit::hold(&self.manager, &process.id().unit).await {
            Ok(unit) => process.watched_as(unit),
            Err(error) => {
                let unit = &process.id().unit;
                tracing::warn!(unit, %error, "it will not be known how its process ends");
                process
            }
        }
    }

    /// Sends the process of a unit away that came unasked.
    pub fn turn_away(&self, unit: &str, why: &str) {
        self.arrivals.turn_away(unit, why);
    }
}

fn is_still_there(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::MethodError(name, ..)
        if name.as_str() == "org.freedesktop.systemd1.UnitExists")
}
