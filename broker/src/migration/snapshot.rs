//! A machine in a folder, and out of it.
//!
//! ```text
//! FOLDER/machine.toml   what the machine is, which may be changed where paths are others now
//! FOLDER/core           the core's state
//! FOLDER/ram0 …         memory
//! FOLDER/device-ID      a device's state
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::Error;
use api::machine::State;
use zbus::{OwnedFd as BusFd, OwnedObjectPath};

use super::arrival;
use super::ends::{Ends, From, Incoming};
use super::mover::Mover;
use crate::broker::Broker;
use crate::definition::Definition;
use crate::host::Host;
use crate::jobs::{Job, Kind};
use crate::machine::{Machine, start};
use crate::name::MachineName;

/// Files for memory.
const CHANNELS: usize = 2;
const DEFINITION: &str = "machine.toml";
const NAME: &str = "name";
/// Largest definition, in bytes.
const MAX_DEFINITION: u64 = 1 << 20;

fn folder_of(text: &str) -> Result<PathBuf, Error> {
    let folder = PathBuf::from(text);
    if folder.is_absolute() && text.len() < 4096 && !text.contains('\0') {
        return Ok(folder);
    }
    let shown: String = text.chars().take(80).collect();
    Err(Error::InvalidArgs(format!(
        "{shown:?}: give an absolute path of a folder"
    )))
}

fn open(folder: &Path, definition: &Definition, new: bool) -> io::Result<Ends> {
    let ids = definition.devices.iter().map(|device| device.id.as_str());
    let open = |name: String| {
        let path = folder.join(&name);
        let file = OpenOptions::new()
            .read(true)
            .write(new)
            .create_new(new)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let file = file.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok((name, OwnedFd::from(file)))
    };
    let named: Vec<_> = Ends::names(CHANNELS, ids)
        .into_iter()
        .map(open)
        .collect::<io::Result<_>>()?;
    Ends::of(named).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file?.write_all(text.as_bytes())
}

fn read(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_DEFINITION).read_to_string(&mut text))
        .map_err(|error| {
            Error::ResourceUnavailable(format!(
                "{} cannot be read ({error}): is the folder a snapshot?",
                path.display()
            ))
        })?;
    Ok(text)
}

async fn take(host: &Host, machine: &Machine, job: &Job, folder: &Path) -> Result<(), Error> {
    let definition = machine.definition();
    let unavailable = |error: io::Error| {
        Error::ResourceUnavailable(format!("{} cannot be written: {error}", folder.display()))
    };
    write(&folder.join(DEFINITION), &definition.to_toml()).map_err(unavailable)?;
    write(&folder.join(NAME), machine.name().as_str()).map_err(unavailable)?;
    let ends = open(folder, &definition, true).map_err(unavailable)?;
    let mover = Mover::of(&machine.core("written into files")?).await?;
    let ram = ends.ram.into_iter().map(BusFd::from).collect();
    let states = ends.states.into_iter();
    let states = states.map(|(id, fd)| (id, fd.into())).collect();
    mover.0.snapshot(ends.control.into(), ram, states).await?;
    written(host, machine, job, &mover).await
}

/// Waits until a machine is in its files.
///
/// # Errors
/// It is not; it goes on as it was.
async fn written(host: &Host, machine: &Machine, job: &Job, mover: &Mover) -> Result<(), Error> {
    let outcome = mover.watch(job, &host.publisher).await?;
    let Some(why) = outcome.reason else {
        return Ok(());
    };
    let text = format!("{} was not written into files: {why}", machine.name());
    Err(match job.is_cancelled() {
        true => Error::Cancelled(text),
        false => Error::MigrationFailed(text),
    })
}

impl Broker {
    /// Writes a machine into a new folder.
    ///
    /// # Errors
    /// The folder is there already or cannot be made, or the machine does not run.
    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        folder: &str,
    ) -> Result<OwnedObjectPath, Error> {
        machine.must_be(&[State::Running, State::Paused], "written into files")?;
        machine.must_be_movable()?;
        let folder = folder_of(folder)?;
        let made = DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(|error| {
            Error::ResourceUnavailable(format!(
                "{} cannot be made ({error}): give a folder that is not there yet",
                folder.display()
            ))
        })?;
        let place = folder.clone();
        let begun = self
            .begin(Kind::Snapshot, machine, |broker, machine, job| async move {
                job.set_phase("writing", 0.0);
                let result = take(&broker.host, &machine, &job, &folder).await;
                if result.is_err() {
                    discard(&folder);
                }
                result
            })
            .await;
        if begun.is_err() {
            discard(&place);
        }
        begun
    }

    /// Goes on with a snapshot that a broker before this one began.
    ///
    /// # Errors
    /// The machine is not in its files.
    pub(crate) async fn go_on_writing(&self, machine: &Machine, job: &Job) -> Result<(), Error> {
        let mover = Mover::of(&machine.core("written into files")?).await?;
        written(&self.host, machine, job, &mover).await
    }

    /// Makes a machine of a folder.
    ///
    /// # Errors
    /// It is no snapshot, or the machine has no place here. What happens later is the job's.
    pub(crate) async fn restore(
        self: &Arc<Self>,
        name: &str,
        folder: &str,
        paused: bool,
        transient: bool,
    ) -> Result<OwnedObjectPath, Error> {
        let folder = folder_of(folder)?;
        let name = match name {
            "" => read(&folder.join(NAME))?,
            name => name.to_owned(),
        };
        let name =
            MachineName::new(name.trim()).map_err(|error| Error::InvalidArgs(error.to_string()))?;
        let definition = Definition::from_toml(&name, &read(&folder.join(DEFINITION))?)
            .map_err(|error| Error::InvalidDefinition(error.to_string()))?;
        let ends = open(&folder, &definition, false)
            .map_err(|error| Error::ResourceUnavailable(error.to_string()))?;
        let machine = self.place_for(&name, &definition, transient)?;
        self.publish_added(&machine).await;
        let begun = self
            .begin(Kind::Restore, &machine, |broker, machine, job| async move {
                machine.starts();
                let result = async {
                    let host = &broker.host;
                    let incoming = Incoming {
                        from: From::Files,
                        ends,
                        memory: None,
                    };
                    let instance = start::prepare(host, &machine, &job, Some(incoming)).await?;
                    arrival::take_in(host, &machine, &job, instance, !paused).await
                };
                let result = result.await;
                broker.received(&machine, &result);
                result
            })
            .await;
        if begun.is_err() {
            self.withdraw(&machine);
        }
        begun
    }
}

fn discard(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        tracing::warn!(folder = %folder.display(), %error, "a snapshot that failed is left");
    }
}
