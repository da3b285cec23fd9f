//! Who ends what a broker of a test has started, which is in sessions of its own.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

/// Waits for the end of its input, then kills whoever has a file below one of the folders open,
/// but for process `$1`, until nobody has. All have: their logs, a lock, an image.
const SCRIPT: &str = r#"
own=$1
shift
read -r _
for round in $(seq 200); do
    found=$(for folder; do find /proc/[0-9]*/fd -lname "$folder/*" 2>/dev/null; done |
        cut -d/ -f3 | sort -u | grep -vx "$own") || exit
    kill -9 $found
    sleep 0.05
done
"#;

/// Kills every process that has a file in a folder open: when it is dropped, and when this process
/// has ended, however it has.
#[derive(Debug)]
pub struct Keeper(Child);

impl Keeper {
    /// Of these folders, of which no file may be another's.
    pub fn of(folders: &[&Path]) -> Result<Self> {
        Command::new("sh")
            .args(["-c", SCRIPT, "keeper"])
            .arg(std::process::id().to_string())
            .args(folders)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A test that takes too long is killed with its process group.
            .process_group(0)
            .spawn()
            .map(Self)
            .context("sh cannot be started")
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn who_has_a_file_open_ends_with_the_keeper() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let open = std::fs::File::create(folder.path().join("log"))?;
        let mut inside = Command::new("sleep").arg("60").stdout(open).spawn()?;
        let mut outside = Command::new("sleep").arg("60").spawn()?;
        drop(Keeper::of(&[folder.path()])?);
        let goes_on = outside.try_wait()?.is_none();
        outside.kill()?;
        outside.wait()?;
        assert!(goes_on);
        assert_eq!(inside.wait()?.signal(), Some(9));
        Ok(())
    }
}
