//! The socket to which the processes of units come for their programs.
//!
//! ```text
//!  start(program) ── expects a unit ──► Place::Expected ◄── its process comes
//!  administrator starts a machine's unit; its process comes ──► Place::Waiting, a visit
//!  start(program) ── finds it there ◄── the broker starts that machine
//! ```
//! Who came is known by its control group, which only systemd can put a process into.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::launch::hand_over;
use crate::process::Process;

/// Wait after a connection that could not be taken, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Control groups of the product's units are in this one.
const SLICE: &str = "/godwit.slice/";

/// A process that waits for its program.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) stream: UnixStream,
    pub(super) process: Process,
}

#[derive(Debug)]
enum Place {
    Expected(oneshot::Sender<Arrival>),
    Waiting(Arrival),
}

/// Who is expected, and who waits.
#[derive(Debug)]
pub(super) struct Arrivals {
    places: Mutex<HashMap<String, Place>>,
    visits: mpsc::UnboundedSender<String>,
}

/// A unit whose process is to come. It is not expected any more when this is dropped.
#[derive(Debug)]
pub(super) struct Expected {
    arrivals: Arc<Arrivals>,
    unit: String,
    arrival: oneshot::Receiver<Arrival>,
    /// It waits already.
    pub(super) is_here: bool,
}

impl Expected {
    pub(super) async fn come(&mut self) -> Option<Arrival> {
        (&mut self.arrival).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let places = &mut *self.arrivals.lock();
        if let Some(Place::Expected(_)) = places.get(&self.unit) {
            places.remove(&self.unit);
        }
    }
}

impl Arrivals {
    /// Listens at `path`. Units whose processes come unasked are told to `visits`.
    pub(super) fn listen(
        path: &Path,
        visits: mpsc::UnboundedSender<String>,
    ) -> io::Result<Arc<Self>> {
        if path.exists() {
            fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        // The folder keeps everybody out; the units have it mounted into their own view.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        let arrivals = Arc::new(Self {
            places: Mutex::default(),
            visits,
        });
        let door = Arc::clone(&arrivals);
        tokio::spawn(async move {
            loop {
                let come = match listener.accept().await {
                    Ok((stream, _)) => door.arrive(stream),
                    Err(error) => Err(error),
                };
                if let Err(error) = come {
                    tracing::warn!(%error, "a process that came for its program was lost");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        });
        Ok(arrivals)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrive(&self, stream: tokio::net::UnixStream) -> io::Result<()> {
        let pid = stream.peer_cred()?.pid();
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) else {
            return Ok(());
        };
        let process = Process::new(pid, String::new())?;
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let Some(unit) = unit_of(&groups) else {
            tracing::warn!(pid, "a process that is in none of our units was refused");
            return hand_over::refuse(&stream, "it is in no unit of a machine");
        };
        let arrival = Arrival {
            stream,
            process: process.in_unit(unit),
        };
        let places = &mut *self.lock();
        match places.remove(unit) {
            Some(Place::Expected(sender)) => {
                // Who does not expect it any more stops the unit.
                let _ = sender.send(arrival);
            }
            Some(Place::Waiting(_)) | None => {
                places.insert(unit.to_owned(), Place::Waiting(arrival));
                // Without a broker it is of no use to anybody.
                let _ = self.visits.send(unit.to_owned());
            }
        }
        Ok(())
    }

    /// Expects the process of a unit from now on, or takes the one that waits.
    pub(super) fn expect(self: &Arc<Self>, unit: &str) -> Expected {
        let (sender, arrival) = oneshot::channel();
        let places = &mut *self.lock();
        let is_here = match places.remove(unit) {
            Some(Place::Waiting(waiting)) => sender.send(waiting).is_ok(),
            _ => {
                places.insert(unit.to_owned(), Place::Expected(sender));
                false
            }
        };
        Expected {
            arrivals: Arc::clone(self),
            unit: unit.to_owned(),
            arrival,
            is_here,
        }
    }

    /// Sends a process away that waits.
    pub(super) fn turn_away(&self, unit: &str, why: &str) {
        let waiting = {
            let places = &mut *self.lock();
            match places.remove(unit) {
                Some(Place::Waiting(waiting)) => waiting,
                Some(expected) => {
                    places.insert(unit.to_owned(), expected);
                    return;
                }
                None => return,
            }
        };
        if let Err(error) = hand_over::refuse(&waiting.stream, why) {
            tracing::debug!(unit, %error, "who is sent away has gone already");
        }
    }
}

/// The unit that a process is in, by its `/proc/PID/cgroup`.
fn unit_of(groups: &str) -> Option<&str> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let unit = path.strip_prefix(SLICE)?.rsplit('/').next()?;
    unit.ends_with(".service").then_some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_below_our_slice_are_known() {
        let group = |path: &str| format!("1:name=systemd:/x.service\n0::{path}\n");
        let ours = group("/godwit.slice/godwit-vm.slice/godwit-vm-core.service");
        assert_eq!(unit_of(&ours), Some("godwit-vm-core.service"));
        for other in [
            "/user.slice/user-1000.slice/user@1000.service/app.slice/godwit-vm-core.service",
            "/godwit.slice/godwit-vm.slice",
            "/system.slice/godwit-broker.service",
            "/",
        ] {
            assert_eq!(unit_of(&group(other)), None, "{other}");
        }
        assert_eq!(unit_of(""), None);
    }

    fn arrival() -> Arrival {
        Arrival {
            stream: UnixStream::pair().unwrap().0,
            process: Process::new(std::process::id(), String::new()).unwrap(),
        }
    }

    #[tokio::test]
    async fn who_waits_is_found_and_who_is_not_expected_any_more_is_forgotten() {
        let (visits, _told) = mpsc::unbounded_channel();
        let arrivals = Arc::new(Arrivals {
            places: Mutex::default(),
            visits,
        });
        let waiting = Place::Waiting(arrival());
        arrivals.lock().insert("a".into(), waiting);
        let mut expected = arrivals.expect("a");
        assert!(expected.is_here);
        assert!(expected.come().await.is_some());
        let expected = arrivals.expect("b");
        assert!(!expected.is_here);
        drop(expected);
        assert!(arrivals.lock().is_empty());
    }
}
