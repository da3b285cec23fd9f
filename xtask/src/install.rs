//! `cargo xtask install`: what a system needs to run machines as services.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use packaging::Install;

use crate::cargo::{build, root};

/// Where everything goes.
#[derive(Debug, Args)]
pub struct Place {
    /// Where programs and units go
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// A folder that stands for the root of the system
    #[arg(long, value_name = "DIR", default_value = "/")]
    destdir: PathBuf,
    /// Take the programs from there, instead of building them for release
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

/// Builds what is missing and puts everything in place.
pub fn install(place: Place) -> Result<()> {
    let programs = match place.programs {
        Some(folder) => folder,
        None => build(true)?,
    };
    let install = Install {
        source: root(),
        programs: &programs,
        guest: test_guest::program(),
        destdir: &place.destdir,
        prefix: &place.prefix,
    };
    install.run().context("not all is in place")?;
    println!("installed; on a system that runs, go on with:");
    println!("  systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload");
    println!("  systemctl reload dbus && systemctl enable --now godwit-broker");
    Ok(())
}
