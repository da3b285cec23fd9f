//! Saved state of earlier programs, from `tests/compat`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::subject::{Subject, running};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../compat")
}

/// The state of a device whose driver has changed it, and which has moved: it may remember that.
fn changed<S: Subject>() -> Result<Vec<u8>> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.change_state(&mut machine)?;
    machine.stop_rings()?;
    let state = machine.connection.save()?;
    machine.connection.load(&state)?;
    machine.connection.save()
}

/// The schema's number in the header of a state.
fn schema(state: &[u8]) -> Result<u32> {
    let number = state.get(12..16).context("a state without a header")?;
    Ok(u32::from_le_bytes(number.try_into()?))
}

/// The golden state of schema `number`.
fn path<S: Subject>(number: u32) -> PathBuf {
    folder().join(format!("{}-{number}.state", S::KIND))
}

pub(crate) fn golden_states_are_loaded<S: Subject>() -> Result<()> {
    let newest = schema(&changed::<S>()?)?;
    for number in 1..=newest {
        let path = path::<S>(number);
        let golden = fs::read(&path)
            .with_context(|| format!("{}: see tests/compat/README.md", path.display()))?;
        ensure!(schema(&golden)? == number, "{}", path.display());
        let (mut subject, mut machine) = running::<S>()?;
        machine.stop_rings()?;
        machine.connection.load(&golden)?;
        if number == newest {
            ensure!(
                machine.connection.save()? == golden,
                "it is saved otherwise"
            );
        }
        machine.start_rings()?;
        subject.verify_state(&mut machine)?;
    }
    Ok(())
}

/// Writes what [`golden_states_are_loaded`] reads.
pub(crate) fn write_golden_state<S: Subject>() -> Result<()> {
    let state = changed::<S>()?;
    let path = path::<S>(schema(&state)?);
    if path.exists() {
        bail!("{} is there, and must not change", path.display());
    }
    Ok(fs::write(path, state)?)
}
