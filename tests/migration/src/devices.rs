//! The device processes of one side: how they are started, and started again.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use test_framework::machine::DEADLINE;
use test_framework::process::{Launch, Process};
use test_framework::programs::program;

use super::Spec;

/// A counting device, of `godwit-fault`.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    /// Queues.
    pub queues: u16,
    /// Bytes of state besides the counters.
    pub state_bytes: u64,
    /// The script at its start, see `tests/fault`.
    pub script: String,
    /// Most MiB of memory that it can map.
    pub map_limit: Option<u64>,
}

/// A back-end of somebody else's.
#[derive(Clone, Debug)]
pub enum Foreign {
    /// A counting device on the `vhost-user-backend` crate.
    Counter {
        /// Whether it logs what it writes.
        log: bool,
        /// Whether it can move its state.
        state: bool,
    },
    /// QEMU's storage daemon on this image, with two queues.
    StorageDaemon(PathBuf),
}

/// How a device process is started.
#[derive(Debug)]
pub(super) struct Recipe {
    program: PathBuf,
    /// Its device type, for the core.
    kind: &'static str,
    arguments: Vec<String>,
    /// It is handed a listening socket, and does not make its own.
    takes_listener: bool,
    /// It has a link to the core.
    has_link: bool,
    /// Where its front-end finds it.
    socket: PathBuf,
}

impl Recipe {
    /// All of a machine, in the order of [`Spec::ids`]; sockets and scripts are in `folder`.
    pub(super) fn all(spec: &Spec, folder: &Path) -> Result<Vec<Self>> {
        let mut ids = spec.ids().into_iter();
        let mut next_socket = || folder.join(ids.next().unwrap_or_default());
        let mut all = Vec::new();
        let mut ours = |name: &str, kind, options: Vec<(&str, String)>, socket| {
            let arguments = options.into_iter().flat_map(|(o, v)| [o.to_owned(), v]);
            all.push(Recipe {
                program: program(name)?,
                kind,
                arguments: arguments.collect(),
                takes_listener: true,
                has_link: kind == BALLOON && spec.hints,
                socket,
            });
            anyhow::Ok(())
        };
        for (image, queues) in &spec.disks {
            let options = vec![
                ("--blk-file", image.display().to_string()),
                ("--num-queues", queues.to_string()),
            ];
            ours("godwit-blk", "blk", options, next_socket())?;
        }
        for (tap, pairs) in &spec.nics {
            let options = vec![
                ("--tap", tap.clone()),
                ("--queue-pairs", pairs.to_string()),
                ("--mac", "52:54:00:12:34:56".to_owned()),
            ];
            ours("godwit-net", "net", options, next_socket())?;
        }
        if spec.balloon {
            ours("godwit-balloon", BALLOON, Vec::new(), next_socket())?;
        }
        for (number, counter) in spec.counters.iter().enumerate() {
            let script = script_path(folder, number);
            std::fs::write(&script, &counter.script)?;
            let mut options = vec![
                ("--num-queues", counter.queues.to_string()),
                ("--state-bytes", counter.state_bytes.to_string()),
                ("--script", script.display().to_string()),
            ];
            options.extend(
                counter
                    .map_limit
                    .map(|mib| ("--map-limit", mib.to_string())),
            );
            ours("godwit-fault", COUNTER_TYPE, options, next_socket())?;
        }
        for foreign in &spec.foreign {
            all.push(Self::foreign(foreign, next_socket())?);
        }
        Ok(all)
    }

    fn foreign(foreign: &Foreign, socket: PathBuf) -> Result<Self> {
        let path = socket.display().to_string();
        let (program, kind, arguments) = match foreign {
            Foreign::Counter { log, state } => {
                let words = [(*log, "log"), (*state, "state")];
                let words = words.into_iter().filter(|(on, _)| *on);
                let words = words.map(|(_, word)| word.to_owned());
                let arguments = [path].into_iter().chain(words).collect();
                (program("foreign-counter")?, COUNTER_TYPE, arguments)
            }
            Foreign::StorageDaemon(image) => {
                // Both sides have it open for a while.
                let image = image.display();
                let disk = format!("driver=file,node-name=disk,locking=off,filename={image}");
                let export = format!(
                    "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,\
                     addr.type=unix,addr.path={path}"
                );
                let arguments = vec!["--blockdev".into(), disk, "--export".into(), export];
                ("qemu-storage-daemon".into(), "blk", arguments)
            }
        };
        Ok(Recipe {
            program,
            kind,
            arguments,
            takes_listener: false,
            has_link: false,
            socket,
        })
    }

    /// Its device's id.
    pub(super) fn id(&self) -> Cow<'_, str> {
        self.socket
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
    }

    /// Both ends of its link, if it has one: the core's, and its own.
    pub(super) fn link(&self) -> Result<Option<(OwnedFd, OwnedFd)>> {
        if !self.has_link {
            return Ok(None);
        }
        let (core, device) = UnixStream::pair().context("no link")?;
        Ok(Some((core.into(), device.into())))
    }

    /// Starts it, or its successor; for a machine that arrives, or that is here.
    pub(super) fn start(&self, arrives: bool, link: Option<OwnedFd>) -> Result<Process> {
        // There is none at the first time.
        let _ = std::fs::remove_file(&self.socket);
        let mut launch = Launch::new(&self.program);
        if self.takes_listener {
            let listener = UnixListener::bind(&self.socket).context("no socket for a device")?;
            let number = launch.inherit(listener.into());
            launch = launch.option("--fd", number.to_string());
            if arrives {
                launch = launch.arg("--incoming");
            }
        }
        if let Some(link) = link {
            let number = launch.inherit(link);
            launch = launch.option("--control-fd", number.to_string());
        }
        for argument in &self.arguments {
            launch = launch.arg(argument);
        }
        let mut process = launch.start()?;
        let end = Instant::now() + DEADLINE;
        while !self.socket.exists() {
            ensure!(process.is_running(), "it ended: {}", process.stderr());
            ensure!(Instant::now() < end, "{} does not listen", process.name());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(process)
    }

    /// The core's option for it, and for the number of its link's end there.
    pub(super) fn for_core(&self, id: &str, link: Option<i32>) -> String {
        let device = format!("{},socket={},id={id}", self.kind, self.socket.display());
        match link {
            Some(number) => format!("{device},control-fd={number}"),
            None => device,
        }
    }
}

const BALLOON: &str = "balloon";
/// A type of no specification.
const COUNTER_TYPE: &str = "63";

/// The script of a counting device.
pub(super) fn script_path(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("script{number}"))
}
