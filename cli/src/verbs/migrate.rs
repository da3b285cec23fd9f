//! `godwit migrate`, `snapshot`, `restore`: machines that go elsewhere.

use std::fs;
use std::path::{Path, PathBuf};

use api::Dictionary;
use api::job_migration::Place;
use api::machine::PAUSED;
use api::manager::TRANSIENT;
use migration::picture;

use super::start::wait_for;
use crate::connection::Broker;
use crate::error::{Failure, Result, What as _};
use crate::job::Job;
use crate::options::{Migrate, Restore, Snapshot};
use crate::render::{Output, say};
use crate::view;

pub async fn migrate(broker: &Broker, output: Output, migrate: Migrate) -> Result<()> {
    let machine = broker.machine(&migrate.name).await?;
    let path = machine
        .proxy
        .migrate(&migrate.uri, options(&migrate), 0)
        .await
        .what(&migrate.name)?;
    let what = format!("migration of {}", migrate.name);
    let job = Job::at(broker, &what, path).await?;
    let waited = match wait_for(&job, migrate.wait).await {
        Err(failure) => Err(stays(failure, &migrate.name, &job).await),
        moved => moved,
    };
    if let Some(file) = &migrate.trace {
        // There is one of a migration that failed, too.
        trace(&job.look().await?, file)?;
    }
    let job = waited?;
    if !output.is_json() && !job.is_running() {
        say(&summary(&migrate, &job));
    }
    output.print_json(&job)
}

/// Says of a migration that failed where its machine is, if it is where it was.
async fn stays(failure: Failure, machine: &str, job: &Job) -> Failure {
    let migration = job.look().await.ok().and_then(|job| job.migration);
    let is_here = migration.is_some_and(|migration| migration.facts.place == Place::Source);
    match failure {
        Failure::Job {
            name, message, id, ..
        } if is_here => Failure::Job {
            what: format!("{machine} stays where it was"),
            name,
            message,
            id,
        },
        other => other,
    }
}

fn options(migrate: &Migrate) -> Dictionary {
    let mut options = Dictionary::new();
    let mut put = |key: &str, value: Option<u64>| {
        if let Some(value) = value {
            options.insert(key.into(), value.into());
        }
    };
    put("max-downtime-ms", migrate.max_downtime.map(|time| time.0));
    put(
        "blackout-limit-ms",
        migrate.blackout_limit.map(|time| time.0),
    );
    put("max-bandwidth", migrate.max_bandwidth.map(|size| size.0));
    put("channels", migrate.channels.map(u64::from));
    put("patience-s", migrate.patience);
    if migrate.auto_converge {
        options.insert("auto-converge".into(), true.into());
    }
    options
}

fn summary(migrate: &Migrate, job: &view::Job) -> String {
    let Migrate { name, uri, .. } = migrate;
    match &job.migration {
        #[expect(clippy::cast_precision_loss, reason = "shown to a person")]
        Some(migration) => format!(
            "{name} has moved ({uri}): it stood still for {:.1} ms, {:.1} MiB were sent",
            migration.facts.downtime_usec as f64 / 1000.0,
            migration.facts.bytes_sent as f64 / f64::from(1 << 20)
        ),
        None => format!("{name} has moved ({uri})"),
    }
}

/// Writes the timeline for a viewer of traces.
fn trace(job: &view::Job, file: &Path) -> Result<()> {
    let report = job.migration.as_ref().and_then(view::Migration::report);
    let Some(report) = report else {
        say("there is no timeline: the machine was not stopped");
        return Ok(());
    };
    let failed = || Failure::io(format!("{} cannot be written", file.display()));
    let text = serde_json::to_vec(&picture::trace(&report))
        .map_err(|error| failed()(std::io::Error::other(error)))?;
    fs::write(file, text).map_err(failed())
}

fn absolute(folder: &Path) -> Result<String> {
    let path: PathBuf = std::path::absolute(folder)
        .map_err(Failure::io(format!("{} is no folder", folder.display())))?;
    Ok(path.display().to_string())
}

pub async fn snapshot(broker: &Broker, output: Output, snapshot: Snapshot) -> Result<()> {
    let machine = broker.machine(&snapshot.name).await?;
    let folder = absolute(&snapshot.folder)?;
    let path = machine.proxy.snapshot(&folder, 0).await;
    let path = path.what(&snapshot.name)?;
    let what = format!("snapshot of {}", snapshot.name);
    let job = Job::at(broker, &what, path).await?;
    let job = wait_for(&job, snapshot.wait).await?;
    output.print_json(&job)
}

pub async fn restore(broker: &Broker, output: Output, restore: Restore) -> Result<()> {
    let folder = absolute(&restore.folder)?;
    let name = restore.name.unwrap_or_default();
    let mut flags = if restore.paused { PAUSED } else { 0 };
    if !restore.keep {
        flags |= TRANSIENT;
    }
    let manager = broker.manager().await?;
    let path = manager.restore_machine(&name, &folder, flags).await;
    let what = format!("restore of {folder}");
    let job = Job::at(broker, &what, path.what(&what)?).await?;
    let job = wait_for(&job, restore.wait).await?;
    output.print_json(&job)
}
