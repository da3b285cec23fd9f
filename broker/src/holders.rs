//! Who holds a socket: a process that a killed broker had started and not yet written down.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

/// Processes that have a socket open that was bound to `path`.
///
/// # Errors
/// /proc cannot be read.
pub(crate) fn of(path: &Path) -> io::Result<Vec<u32>> {
    let sockets = fs::read_to_string("/proc/net/unix")?;
    let path = path.to_string_lossy();
    let links: BTreeSet<_> = sockets
        .lines()
        .filter_map(|line| inode(line, &path))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if links.is_empty() {
        return Ok(Vec::new());
    }
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Others' processes cannot be looked into, and have nothing of ours.
        let open = fs::read_dir(entry.path().join("fd"));
        let holds = open.into_iter().flatten().flatten().any(|descriptor| {
            fs::read_link(descriptor.path())
                .is_ok_and(|link| links.contains(&*link.to_string_lossy()))
        });
        if holds && pid != std::process::id() {
            holders.push(pid);
        }
    }
    Ok(holders)
}

/// The inode in a line of /proc/net/unix, if the line is of this path (unix(7), «/proc»).
fn inode<'a>(line: &'a str, path: &str) -> Option<&'a str> {
    let mut fields = line.split_whitespace();
    let inode = fields.nth(6)?;
    (line.strip_suffix(path)?.ends_with(' ') && fields.next().is_some()).then_some(inode)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn lines_are_read() {
        let line = "0000000057 : 00000002 00000000 00010000 0001 01 351278 /tmp/a b";
        let line = &line.replace(" :", ":");
        assert_eq!(inode(line, "/tmp/a b"), Some("351278"));
        assert_eq!(inode(line, "/a b"), None);
        assert_eq!(inode("0: 0 0 0 0 0 5", "/tmp/x"), None);
    }

    #[test]
    fn who_inherited_a_socket_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = UnixListener::bind(&path).unwrap();
        assert!(of(&path).unwrap().is_empty());
        let mut command = Command::new("sleep");
        command
            .arg("600")
            .arg0("holder")
            .stdin(std::os::fd::OwnedFd::from(socket));
        let mut child = command.spawn().unwrap();
        // What was moved into the command is closed with it.
        drop(command);
        assert_eq!(of(&path).unwrap(), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(of(&path).unwrap().is_empty());
    }
}
