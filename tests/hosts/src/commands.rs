//! Hosts for people: they run until they are stopped, and are found by name from any program.
//!
//! `<cache>/hosts/running/NAME` is a link to the folder of the host NAME.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use crate::host::{Host, HostOptions, check_name};
use crate::job::Output;
use crate::{Assets, Error, Result};

/// A person's command may take its time.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3600);

/// Prepares everything and gives the folder where it is.
///
/// # Errors
///
/// See [`Assets::prepare`].
pub fn prepare() -> Result<PathBuf> {
    Ok(Assets::prepare()?.folder().to_owned())
}

/// Starts a host that runs until [`stop`]; gives the folder here that is `/share` there.
///
/// # Errors
///
/// When a host of that name runs already, or it does not start.
pub fn start(name: &str) -> Result<PathBuf> {
    let link = link(name)?;
    if let Ok(folder) = fs::read_link(&link) {
        let mut host = Host::attach(name, folder);
        if host.alive() {
            return Err(Error::Name {
                name: name.to_owned(),
                problem: "runs already; stop it first",
            });
        }
        host.stop()?;
        fs::remove_file(&link).map_err(Error::io("removing", &link))?;
    }
    let host = Host::start(&HostOptions {
        outlives_us: true,
        ..HostOptions::named(name)
    })?;
    let share = host.share();
    let folder = host.leave();
    symlink(folder, &link).map_err(Error::io("creating", &link))?;
    Ok(share)
}

/// Runs a shell command in a host that was started with [`start`].
///
/// # Errors
///
/// When no such host runs, or it takes more than an hour.
pub fn run(name: &str, command: &str) -> Result<Output> {
    find(name)?.run_for(command, COMMAND_DEADLINE)
}

/// Stops a host that was started with [`start`] and forgets what it wrote.
///
/// # Errors
///
/// When no such host runs.
pub fn stop(name: &str) -> Result<()> {
    let host = find(name)?;
    let link = link(name)?;
    host.stop()?;
    fs::remove_file(&link).map_err(Error::io("removing", &link))
}

fn find(name: &str) -> Result<Host> {
    match fs::read_link(link(name)?) {
        Ok(folder) => Ok(Host::attach(name, folder)),
        Err(_) => Err(Error::Name {
            name: name.to_owned(),
            problem: "is not running; start it first",
        }),
    }
}

fn link(name: &str) -> Result<PathBuf> {
    check_name(name)?;
    let folder = Assets::prepare()?.cache().join("running");
    fs::create_dir_all(&folder).map_err(Error::io("creating", &folder))?;
    Ok(folder.join(name))
}
