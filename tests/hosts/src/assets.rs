//! The files that hosts are made of, prepared once and kept in a cache folder.
//!
//! ```text
//! <cache>/hosts/lock          held while something is being prepared
//! <cache>/hosts/<key>/        what `prepare/prepare.sh` made; <key> is a hash of `prepare/`
//! <cache>/hosts/<key>/template/   a booted host, see `template`
//! ```
//! `<cache>` is `$GODWIT_CACHE`, or `.cache` in the repository. A folder gets its final name only
//! when it is complete, so whatever is found under that name can be used without the lock.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::tail_of;
use crate::template::Template;
use crate::{Error, Result};

/// The preparation takes a minute; a slow mirror may make it many.
const PREPARE_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// Whoever holds the lock prepares, and then boots a template.
const LOCK_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// The prepared files of the emulated hosts.
#[derive(Clone, Debug)]
pub struct Assets {
    cache: PathBuf,
    folder: PathBuf,
}

impl Assets {
    /// Finds the files in the cache, or makes them: as root, on Debian 12 or later, in about a
    /// minute and a half, with progress lines on standard error.
    ///
    /// # Errors
    ///
    /// When the preparation fails, or another process has been preparing for twenty minutes.
    pub fn prepare() -> Result<Self> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("prepare");
        let cache = cache_folder();
        let assets = Self {
            folder: cache.join(key(&source)?),
            cache,
        };
        if !assets.folder.exists() {
            let _lock = assets.lock()?;
            // The one who held the lock may have done it.
            if !assets.folder.exists() {
                assets.make(&source)?;
            }
        }
        Template::ensure(&assets)?;
        Ok(assets)
    }

    /// The folder of the prepared files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cache folder, the same for all versions of the prepared files.
    pub(crate) fn cache(&self) -> &Path {
        &self.cache
    }

    /// Keeps other processes from preparing at the same time, until the file is dropped.
    pub(crate) fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.cache).map_err(Error::io("creating", &self.cache))?;
        let path = self.cache.join("lock");
        let file = File::create(&path).map_err(Error::io("creating", &path))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => {
                    return Err(Error::io("locking", &path)(source));
                }
                Err(TryLockError::WouldBlock) if start.elapsed() > LOCK_DEADLINE => {
                    return Err(Error::Locked {
                        path,
                        waited: start.elapsed(),
                    });
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// A command for a QEMU program of the hosts' release, run by its own dynamic loader, because
    /// this machine's libraries may be older.
    pub(crate) fn qemu(&self, program: &'static str) -> Command {
        let usr = self.folder.join("qemu/usr");
        let libraries = usr.join("lib/x86_64-linux-gnu");
        let mut command = Command::new(usr.join("lib64/ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--library-path")
            .arg(format!("{0}:{0}/pulseaudio", libraries.display()))
            .arg(usr.join("bin").join(program));
        if program == "qemu-system-x86_64" {
            command.arg("-L").arg(usr.join("share/qemu"));
            command.arg("-L").arg(usr.join("share/seabios"));
        }
        command.stdin(Stdio::null());
        command
    }

    fn make(&self, source: &Path) -> Result<()> {
        let partial = self.folder.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(Error::io("removing", &partial))?;
        }
        fs::create_dir_all(&partial).map_err(Error::io("creating", &partial))?;
        let script = source.join("prepare.sh");
        let status = Command::new("timeout")
            .arg("--kill-after=5")
            .arg(PREPARE_DEADLINE.as_secs().to_string())
            .arg("bash")
            .arg(&script)
            .arg(&partial)
            .stdin(Stdio::null())
            .status()
            .map_err(Error::io("running", &script))?;
        if !status.success() {
            return Err(Error::Prepare {
                status,
                log: tail_of(&partial.join("prepare.log"), 10),
            });
        }
        fs::rename(&partial, &self.folder).map_err(Error::io("renaming", &partial))
    }
}

fn cache_folder() -> PathBuf {
    let cache = std::env::var_os("GODWIT_CACHE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache"),
        PathBuf::from,
    );
    // Kept in the template's disk as the path of its backing file, so without `..`.
    fs::create_dir_all(&cache)
        .and_then(|()| cache.canonicalize())
        .unwrap_or(cache)
        .join("hosts")
}

/// FNV-1a over names and contents of all files: the same on every machine, and no defence against
/// anyone, which a cache of one's own does not need.
fn key(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    files.sort();
    let mut hash = Fnv::default();
    for file in files {
        let name = file.strip_prefix(folder).unwrap_or(&file);
        hash.add(name.as_os_str().as_encoded_bytes());
        hash.add(&fs::read(&file).map_err(Error::io("reading", &file))?);
    }
    Ok(format!("{:016x}", hash.0))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("reading", folder))? {
        let path = entry.map_err(Error::io("reading", folder))?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Adds a string and its length, so that moving a byte from one string to the next is seen.
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().chain(&bytes.len().to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(files: &[(&str, &str)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        key(folder.path()).unwrap()
    }

    #[test]
    fn key_depends_on_names_and_contents_only() {
        let one = key_of(&[("a", "x"), ("sub/b", "y")]);
        assert_eq!(one, key_of(&[("sub/b", "y"), ("a", "x")]));
        assert_ne!(one, key_of(&[("a", "x"), ("sub/b", "z")]));
        assert_ne!(one, key_of(&[("a", "x"), ("sub/c", "y")]));
        assert_ne!(key_of(&[("a", "xb")]), key_of(&[("ax", "b")]));
        assert_eq!(one.len(), 16);
    }
}
