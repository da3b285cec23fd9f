//! Processes as transient units of systemd, all of a machine in one slice.
//!
//! A unit starts `godwit-launch`, which comes for its descriptors on a socket that exists
//! for this one start; see [`super::hand_over`]. Nothing is passed that systemd 252 does not
//! know. The broker restarts processes itself, as only it has their descriptors, so no unit
//! restarts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Uid, User};
use tokio::net::UnixListener;
use zbus::{Connection, OwnedObjectPath, Variant};

use super::{LaunchError, Program, hand_over};
use crate::process::Process;

/// How long a unit's process may take to come.
const DEADLINE: Duration = Duration::from_secs(30);
/// Descriptors that a process may have.
const MAX_DESCRIPTORS: u64 = 65536;

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        aux: &[(&str, Vec<(&str, Variant<'_>)>)],
    ) -> zbus::Result<OwnedObjectPath>;

    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
}

/// systemd, on the system bus.
#[derive(Debug)]
pub struct Systemd {
    manager: ManagerProxy<'static>,
    sockets: PathBuf,
    stub: PathBuf,
}

/// Removes a socket that was for one start.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // It is of no use to anybody.
        let _ = fs::remove_file(&self.0);
    }
}

impl Systemd {
    /// By `connection`, with sockets in `folder` and `godwit-launch` among `programs`.
    ///
    /// # Errors
    /// The connection is broken, or the folder cannot be made.
    pub async fn new(
        connection: &Connection,
        folder: &Path,
        programs: &Path,
    ) -> zbus::Result<Self> {
        let sockets = folder.join("launch");
        fs::create_dir_all(&sockets)?;
        Ok(Self {
            manager: ManagerProxy::new(connection).await?,
            sockets,
            stub: programs.join("godwit-launch"),
        })
    }

    /// Starts a program.
    pub(super) async fn start(&self, program: Program) -> Result<Process, LaunchError> {
        let unit = unit_name(&program.machine, &program.role);
        let failed = |source: io::Error| LaunchError::Start {
            path: program.path.clone(),
            source,
        };
        let socket = Socket(self.sockets.join(&unit));
        // One that a killed broker left.
        let _ = fs::remove_file(&socket.0);
        let listener = UnixListener::bind(&socket.0).map_err(failed)?;
        let path = socket.0.display().to_string();
        self.manager
            .start_transient_unit(&unit, "fail", &self.properties(&program, &path), &[])
            .await
            .map_err(|source| LaunchError::Unit {
                unit: unit.clone(),
                source: Box::new(source),
            })?;
        let result = match tokio::time::timeout(DEADLINE, come(&listener, &unit, &program)).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(LaunchError::NoShow {
                unit: unit.clone(),
                seconds: DEADLINE.as_secs(),
            }),
        };
        if result.is_err() {
            // It may have ended by itself.
            let _ = self.manager.stop_unit(&unit, "replace").await;
        }
        result
    }

    /// What the unit is and may do: nearly nothing, as everything is handed to it.
    fn properties<'a>(&'a self, program: &'a Program, socket: &'a str) -> Properties<'a> {
        let stub = self.stub.display().to_string();
        let command = vec![(stub.clone(), vec![stub, socket.to_owned()], false)];
        let description = format!("{} of machine {}", program.role, program.machine);
        let mut properties: Properties<'a> = vec![
            ("Description", description.into()),
            ("Slice", slice_name(&program.machine).into()),
            ("CollectMode", "inactive-or-failed".into()),
            ("Type", "exec".into()),
            ("ExecStart", command.into()),
            ("LimitNOFILE", MAX_DESCRIPTORS.into()),
            ("UMask", 0o077u32.into()),
            ("CapabilityBoundingSet", 0u64.into()),
            ("AmbientCapabilities", 0u64.into()),
            ("RestrictNamespaces", 0u64.into()),
            ("ProtectSystem", "strict".into()),
            // The socket, and programs that are being developed, may be there.
            ("ProtectHome", "read-only".into()),
            ("ProtectProc", "invisible".into()),
            ("ProcSubset", "pid".into()),
            ("SystemCallArchitectures", vec!["native"].into()),
            ("RestrictAddressFamilies", (true, vec!["AF_UNIX"]).into()),
            ("SystemCallFilter", (true, vec!["@system-service"]).into()),
            ("SystemCallFilter", (false, vec!["@privileged"]).into()),
        ];
        for yes in [
            "NoNewPrivileges",
            "PrivateNetwork",
            "PrivateIPC",
            "PrivateTmp",
            "PrivateUsers",
            "PrivateDevices",
            "ProtectKernelTunables",
            "ProtectKernelModules",
            "ProtectKernelLogs",
            "ProtectControlGroups",
            "ProtectClock",
            "ProtectHostname",
            "RestrictRealtime",
            "RestrictSUIDSGID",
            "LockPersonality",
            "MemoryDenyWriteExecute",
        ] {
            properties.push((yes, true.into()));
        }
        let own = Uid::effective();
        if let (false, Ok(Some(user))) = (own.is_root(), User::from_uid(own)) {
            properties.push(("User", user.name.into()));
        }
        properties
    }
}

/// Waits for the unit's process and hands it what it is to become.
async fn come(listener: &UnixListener, unit: &str, program: &Program) -> io::Result<Process> {
    loop {
        let (stream, _) = listener.accept().await?;
        let pid = stream.peer_cred()?.pid();
        let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) else {
            continue;
        };
        let process = Process::new(pid, unit.to_owned())?;
        // Anybody of this user can connect; only the unit's process gets anything.
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if !groups
            .lines()
            .any(|line| line.ends_with(&format!("/{unit}")))
        {
            tracing::warn!(
                pid,
                unit,
                "a process that is not the unit's came for its descriptors"
            );
            continue;
        }
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        hand_over::give(&stream, program)?;
        return Ok(process);
    }
}

/// A part of a unit's name, as systemd.unit(5) escapes it.
fn escape(text: &str) -> String {
    text.replace('-', "\\x2d")
}

fn slice_name(machine: &str) -> String {
    format!("godwit-{}.slice", escape(machine))
}

fn unit_name(machine: &str, role: &str) -> String {
    format!("godwit-{}-{}.service", escape(machine), escape(role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_do_not_run_together() {
        assert_eq!(unit_name("a-b", "c"), "godwit-a\\x2db-c.service");
        assert_ne!(unit_name("a-b", "c"), unit_name("a", "b-c"));
        assert_eq!(slice_name("web-1"), "godwit-web\\x2d1.slice");
    }
}
