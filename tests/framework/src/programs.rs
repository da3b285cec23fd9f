//! Where the built programs are.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Takes the programs from `folder` from now on, instead of from the caller's own build.
/// The first call counts.
pub fn use_folder(folder: PathBuf) {
    let _ = FOLDER.set(folder);
}

/// The program `name`, built in the same way as the caller.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = match FOLDER.get() {
        Some(folder) => folder.clone(),
        None => beside(&env::current_exe().context("this program's path is unknown")?)?,
    };
    let program = folder.join(name);
    if !program.is_file() {
        bail!(
            "{} is not there: run cargo build --workspace --bins",
            program.display()
        );
    }
    Ok(program)
}

/// Tests are one folder below the programs.
fn beside(executable: &Path) -> Result<PathBuf> {
    let folder = executable
        .parent()
        .context("this program is in no folder")?;
    let folder = if folder.ends_with("deps") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    Ok(folder.to_owned())
}
