//! Puts programs, units, policies and manuals where a system looks for them: for
//! `cargo xtask install`, packages, and tests in emulated hosts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use thiserror::Error;

/// Programs, which go to `bin`.
pub const PROGRAMS: &[&str] = &[
    "godwit",
    "godwit-balloon",
    "godwit-blk",
    "godwit-broker",
    "godwit-launch",
    "godwit-net",
    "godwit-vfio",
    "godwit-vmm",
];

/// The bundled guest, which goes to `lib/godwit`, where `godwit run --demo` looks for it.
pub const DEMO_GUEST: &str = "godwit-demo-guest";

/// Files of the source tree and where they go below the prefix.
const BELOW_PREFIX: &[(&str, &str)] = &[
    (
        "packaging/systemd/godwit-broker.service",
        "lib/systemd/system/godwit-broker.service",
    ),
    (
        "packaging/systemd/godwit-machine@.service",
        "lib/systemd/system/godwit-machine@.service",
    ),
    (
        "packaging/systemd/godwit.slice",
        "lib/systemd/system/godwit.slice",
    ),
    (
        "packaging/systemd/godwit.target",
        "lib/systemd/system/godwit.target",
    ),
    (
        "packaging/systemd/godwit-.slice.d/10-machine.conf",
        "lib/systemd/system/godwit-.slice.d/10-machine.conf",
    ),
    (
        "packaging/systemd/godwit.sysusers.conf",
        "lib/sysusers.d/godwit.conf",
    ),
    (
        "packaging/systemd/godwit.tmpfiles.conf",
        "lib/tmpfiles.d/godwit.conf",
    ),
];

/// The same for what D-Bus and polkit look for in `/usr` only.
const BELOW_USR: &[(&str, &str)] = &[
    (
        "packaging/dbus/org.godwit.Vmm1.conf",
        "share/dbus-1/system.d/org.godwit.Vmm1.conf",
    ),
    (
        "packaging/dbus/org.godwit.Vmm1.service",
        "share/dbus-1/system-services/org.godwit.Vmm1.service",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Balloon.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Balloon.xml",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Device.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Device.xml",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Job.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Job.xml",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Job.Migration.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Job.Migration.xml",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Machine.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Machine.xml",
    ),
    (
        "crates/api/introspection/org.godwit.Vmm1.Manager.xml",
        "share/dbus-1/interfaces/org.godwit.Vmm1.Manager.xml",
    ),
    (
        "packaging/polkit/org.godwit.Vmm1.policy",
        "share/polkit-1/actions/org.godwit.Vmm1.policy",
    ),
    (
        "packaging/polkit/godwit.rules",
        "share/polkit-1/rules.d/50-godwit.rules",
    ),
];

/// Scripts that `godwit completions SHELL` prints.
const COMPLETIONS: &[(&str, &str)] = &[
    ("bash", "share/bash-completion/completions/godwit"),
    ("fish", "share/fish/vendor_completions.d/godwit.fish"),
    ("zsh", "share/zsh/site-functions/_godwit"),
];

/// Why something was not put in place.
#[derive(Debug, Error)]
pub enum InstallError {
    /// A file.
    #[error("{} cannot be put in place", .path.display())]
    File {
        /// Where it was to go.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The command line that prints completions and man pages.
    #[error("{} {arguments} failed: {said}", .program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// What it was to do.
        arguments: String,
        /// What it said.
        said: String,
    },
    /// A program that was not built.
    #[error("{} is missing: build it first", .0.display())]
    Missing(PathBuf),
}

/// What is put where.
#[derive(Debug)]
pub struct Install<'a> {
    /// The root of the source tree.
    pub source: &'a Path,
    /// Where the built programs are.
    pub programs: &'a Path,
    /// The bundled guest.
    pub guest: &'a Path,
    /// The root of the system, or the folder that a package is made of.
    pub destdir: &'a Path,
    /// Where programs and units go, such as `/usr/local`.
    pub prefix: &'a Path,
}

impl Install<'_> {
    /// Puts everything in place.
    ///
    /// # Errors
    /// A program was not built, or a file cannot be written.
    pub fn run(&self) -> Result<(), InstallError> {
        for name in PROGRAMS {
            self.put(&self.programs.join(name), &format!("bin/{name}"))?;
        }
        self.put(self.guest, &format!("lib/godwit/{DEMO_GUEST}"))?;
        for (from, to) in BELOW_PREFIX {
            self.copy(from, &self.below_prefix(to))?;
        }
        for (from, to) in BELOW_USR {
            self.copy(from, &self.below(Path::new("/usr"), to))?;
        }
        for (shell, to) in COMPLETIONS {
            let script = self.godwit(&["completions", shell])?;
            write(&self.below_prefix(to), &script)?;
        }
        let pages = self.below_prefix("share/man/man1");
        self.godwit(&["man", &pages.display().to_string()])?;
        Ok(())
    }

    /// Copies what was built.
    fn put(&self, from: &Path, to: &str) -> Result<(), InstallError> {
        if !from.is_file() {
            return Err(InstallError::Missing(from.to_owned()));
        }
        let to = self.below_prefix(to);
        make_parent(&to)?;
        fs::copy(from, &to).map(drop).map_err(failed(&to))
    }

    fn below(&self, prefix: &Path, to: &str) -> PathBuf {
        let prefix = prefix.strip_prefix("/").unwrap_or(prefix);
        self.destdir.join(prefix).join(to)
    }

    fn below_prefix(&self, to: &str) -> PathBuf {
        self.below(self.prefix, to)
    }

    /// Copies a text, in which programs are in `/usr/bin`.
    fn copy(&self, from: &str, to: &Path) -> Result<(), InstallError> {
        let text = fs::read_to_string(self.source.join(from)).map_err(failed(to))?;
        let bin = format!("{}/", self.prefix.join("bin").display());
        write(to, text.replace("/usr/bin/", &bin).as_bytes())
    }

    fn godwit(&self, arguments: &[&str]) -> Result<Vec<u8>, InstallError> {
        let program = self.programs.join("godwit");
        let refused = |said: String| InstallError::Program {
            program: program.clone(),
            arguments: arguments.join(" "),
            said,
        };
        let output = Command::new(&program).args(arguments).output();
        let output = output.map_err(|error| refused(error.to_string()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(refused(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> InstallError + '_ {
    |source| InstallError::File {
        path: path.to_owned(),
        source,
    }
}

fn make_parent(path: &Path) -> Result<(), InstallError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(failed(path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), InstallError> {
    make_parent(path)?;
    fs::write(path, bytes).map_err(failed(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn source() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn no_file_is_forgotten() {
        let listed: Vec<_> = BELOW_PREFIX.iter().chain(BELOW_USR).collect();
        let mut folders: Vec<_> = [
            "packaging/dbus",
            "packaging/polkit",
            "packaging/systemd",
            "crates/api/introspection",
        ]
        .map(|folder| source().join(folder))
        .into();
        let mut found = 0;
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let known = listed.iter().any(|(from, _)| path.ends_with(from));
                assert!(known, "{} goes nowhere", path.display());
                found += 1;
            }
        }
        assert_eq!(found, listed.len());
    }

    #[test]
    fn units_find_the_programs_below_the_prefix() {
        let place = tempfile::tempdir().unwrap();
        let built = place.path().join("built");
        fs::create_dir(&built).unwrap();
        for name in PROGRAMS {
            let program = built.join(name);
            fs::write(&program, "#!/bin/sh\necho \"$@\"\n").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let root = place.path().join("root");
        let install = Install {
            source: &source(),
            programs: &built,
            guest: &built.join("godwit"),
            destdir: &root,
            prefix: Path::new("/usr/local"),
        };
        install.run().unwrap();
        let local = root.join("usr/local");
        let unit = local.join("lib/systemd/system/godwit-machine@.service");
        let unit = fs::read_to_string(unit).unwrap();
        assert!(
            unit.contains("ExecStart=/usr/local/bin/godwit-launch "),
            "{unit}"
        );
        let bash = local.join("share/bash-completion/completions/godwit");
        assert_eq!(fs::read_to_string(bash).unwrap(), "completions bash\n");
        assert!(
            root.join("usr/share/polkit-1/rules.d/50-godwit.rules")
                .is_file()
        );
        assert!(local.join("lib/godwit/godwit-demo-guest").is_file());
        fs::remove_file(built.join("godwit-blk")).unwrap();
        assert!(matches!(install.run(), Err(InstallError::Missing(_))));
    }
}
