//! What can go wrong, as a person sees it: a sentence, what to do next, an exit status.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use api::Error as ApiError;

/// Exit statuses. They never change their meaning; `godwit --help` and the man page list them.
pub mod status {
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const NO_BROKER: u8 = 3;
    pub const NOT_FOUND: u8 = 4;
    pub const CONFLICT: u8 = 5;
    pub const REFUSED: u8 = 6;
    pub const UNAVAILABLE: u8 = 7;
    pub const DENIED: u8 = 8;
    pub const MACHINE_FAILED: u8 = 9;
    pub const TIMED_OUT: u8 = 10;
    pub const CANCELLED: u8 = 11;
    pub const NOT_MOVED: u8 = 12;
    pub const UNDECIDED: u8 = 13;
    pub const INTERRUPTED: u8 = 130;
}

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// No broker answers where one was looked for.
    #[error("no broker answers at {address}")]
    NoBroker {
        address: String,
        #[source]
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// The broker's socket is another user's.
    #[error("you may not call the broker at {address}")]
    NotYours { address: String },
    /// The address of the bus is none.
    #[error("{address:?} is no D-Bus address")]
    BadAddress {
        address: String,
        #[source]
        source: zbus::Error,
    },
    /// There is nowhere to put the embedded broker's socket.
    #[error("the folder {} for the embedded broker cannot be made", folder.display())]
    NoFolder {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No broker answers, and none can be started with a socket of this name.
    #[error("no broker answers at {}", socket.display())]
    NotEmbeddable { socket: PathBuf },
    /// The embedded broker is not installed.
    #[error("godwit-broker is neither beside this program nor in PATH")]
    NoBrokerProgram,
    /// The embedded broker was started, and did not answer.
    #[error("{} did not start: {why}", program.display())]
    BrokerStart { program: PathBuf, why: String },
    /// The broker said no.
    #[error("{}", about(what, error))]
    Refused { what: String, error: ApiError },
    /// The definition of a machine is impossible.
    #[error("{of}: {problem}{}", excerpt.as_ref().map(|text| format!("\n{text}")).unwrap_or_default())]
    Definition {
        /// The file, or the machine.
        of: String,
        problem: String,
        /// The line of the file.
        excerpt: Option<String>,
    },
    /// The machine has no such device.
    #[error("{machine} has no device {device}: there are {there_are}")]
    NoDevice {
        machine: String,
        device: String,
        there_are: String,
    },
    /// The console was closed under a machine that goes on.
    #[error("the console of {machine} was closed")]
    ConsoleLost { machine: String },
    /// A job did not succeed.
    #[error("{}", of_job(what, message))]
    Job {
        what: String,
        id: u32,
        /// D-Bus name of the error, or nothing.
        name: String,
        message: String,
    },
    /// A job was cancelled.
    #[error("{what} was cancelled")]
    Cancelled { what: String },
    /// The machine ended by a failure.
    #[error("{machine} failed: {reason}")]
    MachineFailed { machine: String, reason: String },
    /// What was waited for took too long; it goes on.
    #[error("{what} took longer than {seconds} s; job {job} goes on")]
    TimedOut {
        what: String,
        seconds: u64,
        job: u32,
    },
    /// A person went away from what was waited for.
    #[error("{what} goes on as job {job}")]
    Detached { what: String, job: u32 },
    /// Ctrl-C, or a signal that asks to end.
    #[error("interrupted")]
    Interrupted,
    /// A file or descriptor of this computer.
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    /// A path that cannot be sent over D-Bus.
    #[error("{} is not UTF-8, as paths in a definition must be", path.display())]
    PathNotUtf8 { path: PathBuf },
    /// A name that no machine can be given.
    #[error("{path} gives no name for a machine", path = path.display())]
    NoName { path: PathBuf },
    /// What the verb prints is for a person, a shell or the machine's console.
    #[error("what this prints is no JSON")]
    NoJson,
    /// There is no guest for a demonstration.
    #[error("the bundled guest is not installed")]
    NoDemoGuest,
    /// The demonstration showed that something does not work.
    #[error("the demonstration failed: {0}")]
    Demo(String),
    /// Several things, each reported already.
    #[error("{failed} of {of} failed")]
    Several {
        failed: usize,
        of: usize,
        status: u8,
    },
}

/// What is waited for when a guest was asked to switch its machine off, before the machine's name.
pub const POWER_OFF: &str = "power-off of ";

/// A result of this program.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Of a file or descriptor.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::NoBroker { .. }
            | Self::NotEmbeddable { .. }
            | Self::NoBrokerProgram
            | Self::BrokerStart { .. } => status::NO_BROKER,
            Self::BadAddress { .. }
            | Self::PathNotUtf8 { .. }
            | Self::NoName { .. }
            | Self::NoJson => status::USAGE,
            Self::NoFolder { .. } | Self::Io { .. } | Self::Demo(_) | Self::ConsoleLost { .. } => {
                status::FAILED
            }
            Self::Definition { .. } => status::REFUSED,
            Self::NoDevice { .. } => status::NOT_FOUND,
            Self::NotYours { .. } => status::DENIED,
            Self::Refused { error, .. } => of_api(error),
            Self::Job { name, .. } => of_name(name),
            Self::Cancelled { .. } => status::CANCELLED,
            Self::MachineFailed { .. } => status::MACHINE_FAILED,
            Self::TimedOut { .. } => status::TIMED_OUT,
            Self::Detached { .. } | Self::Interrupted => status::INTERRUPTED,
            Self::NoDemoGuest => status::UNAVAILABLE,
            Self::Several { status, .. } => *status,
        }
    }

    /// The exit status as the program returns it.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status())
    }

    /// What to do next, where something can be done.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NoBroker { .. } => {
                "godwit run starts one; --bus ADDRESS or GODWIT_BUS names another".into()
            }
            Self::NotEmbeddable { .. } => {
                "start godwit-broker, or give --bus FOLDER/bus: an embedded broker's socket is named bus".into()
            }
            Self::BadAddress { .. } => {
                "give the path of a socket, or an address as unix:path=/run/godwit/bus".into()
            }
            Self::NoFolder { .. } => {
                "set XDG_RUNTIME_DIR to a folder of yours, or give --bus PATH".into()
            }
            Self::NoBrokerProgram => {
                "install godwit-broker, or build it with cargo build --bins".into()
            }
            Self::Refused {
                error: ApiError::LimitsExceeded(_),
                ..
            } => return None,
            Self::NotYours { .. } => hint_of(status::DENIED)?.into(),
            Self::Refused { what, error } => {
                let hint = hint_of(of_api(error))?;
                match what.split('/').next() {
                    // It was something of this machine, and no phrase.
                    Some(name) if !name.contains(' ') && !name.is_empty() => {
                        hint.replace("NAME", name)
                    }
                    _ => hint.into(),
                }
            }
            Self::Job { name, id, .. } => match hint_of(of_name(name)) {
                Some(hint) => hint.into(),
                None => format!("godwit job show {id} has all that is known of it"),
            },
            Self::MachineFailed { machine, .. } => {
                hint_of(status::MACHINE_FAILED)?.replace("NAME", machine)
            }
            Self::TimedOut { what, job, .. } | Self::Detached { what, job }
                if let Some(name) = what.strip_prefix(POWER_OFF) =>
            {
                format!(
                    "its guest may not heed the power button: godwit stop --force {name} ends it at once, godwit job wait {job} waits on"
                )
            }
            Self::TimedOut { job, .. } | Self::Detached { job, .. } => {
                format!("godwit job wait {job} waits for it, godwit job cancel {job} ends it")
            }
            Self::ConsoleLost { machine } => {
                format!(
                    "godwit show {machine} says how it does, godwit console {machine} comes back"
                )
            }
            Self::Definition { .. } => "godwit run --help lists the keys of a definition".into(),
            Self::NoDevice { machine, .. } => format!("godwit device list {machine} shows them"),
            Self::NoName { .. } => "give one with --name".into(),
            Self::NoJson => "leave out --json; godwit run has it with --detach".into(),
            Self::NoDemoGuest => {
                "give --kernel PATH of a guest of yours, or run cargo xtask demo in the sources"
                    .into()
            }
            _ => return None,
        };
        Some(text)
    }
}

/// Adds to an error of the broker what was to be done.
pub trait What<T> {
    /// Names what was to be done.
    fn what(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<ApiError>> What<T> for std::result::Result<T, E> {
    fn what(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|error| Failure::Refused {
            what: what.into(),
            error: error.into(),
        })
    }
}

/// What a job did and why not, without saying a machine's name twice.
fn of_job(what: &str, message: &str) -> String {
    let name = what.rsplit(' ').next().unwrap_or_default();
    match message.split(' ').next() {
        Some(first) if first == name => message.to_owned(),
        _ => format!("{what}: {message}"),
    }
}

/// What was to be done and why not, without saying a name twice.
fn about(what: &str, error: &ApiError) -> String {
    let text = match error {
        error if is_unanswered(error) => "the broker did not answer in time".into(),
        error => error.to_string(),
    };
    if text.contains(what) {
        text
    } else {
        format!("{what}: {text}")
    }
}

/// Whether a call was given up, the broker being there for all that is known.
fn is_unanswered(error: &ApiError) -> bool {
    matches!(error, ApiError::ZBus(zbus::Error::InputOutput(error))
        if error.kind() == io::ErrorKind::TimedOut)
}

/// Whether the object that was asked is there no more.
pub fn is_gone(error: &ApiError) -> bool {
    match error {
        ApiError::NoSuchMachine(_) | ApiError::NoSuchDevice(_) | ApiError::NoSuchJob(_) => true,
        ApiError::ZBus(zbus::Error::FDO(standard)) => matches!(
            **standard,
            zbus::fdo::Error::UnknownObject(_)
                | zbus::fdo::Error::UnknownInterface(_)
                | zbus::fdo::Error::UnknownMethod(_)
        ),
        _ => false,
    }
}

fn of_api(error: &ApiError) -> u8 {
    if is_gone(error) {
        return status::NOT_FOUND;
    }
    match error {
        error if is_unanswered(error) => status::TIMED_OUT,
        ApiError::ZBus(error) => match error {
            zbus::Error::InputOutput(_) | zbus::Error::Connection(..) => status::NO_BROKER,
            zbus::Error::FDO(standard) => match **standard {
                zbus::fdo::Error::ServiceUnknown(_)
                | zbus::fdo::Error::NameHasNoOwner(_)
                | zbus::fdo::Error::Disconnected(_) => status::NO_BROKER,
                zbus::fdo::Error::TimedOut(_) | zbus::fdo::Error::Timeout(_) => status::TIMED_OUT,
                _ => status::FAILED,
            },
            _ => status::FAILED,
        },
        error => of_name(zbus::DBusError::name(error).as_str()),
    }
}

/// The exit status for the D-Bus name of an error.
fn of_name(name: &str) -> u8 {
    let short = name.rsplit('.').next().unwrap_or_default();
    match short {
        "NoSuchMachine" | "NoSuchDevice" | "NoSuchJob" => status::NOT_FOUND,
        "MachineExists" | "InvalidState" | "JobInProgress" => status::CONFLICT,
        "InvalidDefinition" | "InvalidArgs" => status::REFUSED,
        "ResourceUnavailable" | "LimitsExceeded" => status::UNAVAILABLE,
        "AccessDenied" | "InteractiveAuthorizationRequired" => status::DENIED,
        "MachineFailed" | "DeviceFailed" => status::MACHINE_FAILED,
        "TimedOut" => status::TIMED_OUT,
        "Cancelled" => status::CANCELLED,
        "NotMigratable" | "MigrationFailed" | "DestinationUnreachable" => status::NOT_MOVED,
        "Undecided" => status::UNDECIDED,
        _ => status::FAILED,
    }
}

fn hint_of(status: u8) -> Option<&'static str> {
    let text = match status {
        status::NO_BROKER => {
            "the broker has ended; godwit run or godwit start starts a new one, which takes over what runs"
        }
        status::NOT_FOUND => "godwit list shows the machines, godwit job list the jobs",
        status::CONFLICT => {
            "godwit show NAME says what the machine does, godwit job list what is done with it"
        }
        status::UNAVAILABLE => {
            "it must be there, the broker must be able to open it, and nobody else may use it"
        }
        status::TIMED_OUT => "godwit show NAME and godwit job list say how far it is",
        status::UNDECIDED => {
            "look whether it runs at the destination (godwit show NAME there); then godwit decide NAME --there or --here"
        }
        status::DENIED => {
            "ask as the user whose broker it is, or as root; --bus names another broker"
        }
        status::MACHINE_FAILED => {
            "godwit logs NAME has what its processes said, if it was kept (--keep)"
        }
        _ => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Make = fn(String) -> ApiError;

    fn refused(error: ApiError) -> Failure {
        Failure::Refused {
            what: "vm1".into(),
            error,
        }
    }

    #[test]
    fn each_error_of_the_broker_has_its_status() {
        let table: [(Make, u8); 21] = [
            (ApiError::NoSuchMachine, 4),
            (ApiError::NoSuchDevice, 4),
            (ApiError::NoSuchJob, 4),
            (ApiError::MachineExists, 5),
            (ApiError::InvalidState, 5),
            (ApiError::JobInProgress, 5),
            (ApiError::InvalidDefinition, 6),
            (ApiError::InvalidArgs, 6),
            (ApiError::ResourceUnavailable, 7),
            (ApiError::LimitsExceeded, 7),
            (ApiError::AccessDenied, 8),
            (ApiError::InteractiveAuthorizationRequired, 8),
            (ApiError::MachineFailed, 9),
            (ApiError::DeviceFailed, 9),
            (ApiError::TimedOut, 10),
            (ApiError::Cancelled, 11),
            (ApiError::NotMigratable, 12),
            (ApiError::MigrationFailed, 12),
            (ApiError::DestinationUnreachable, 12),
            (ApiError::Undecided, 13),
            (ApiError::Internal, 1),
        ];
        for (make, status) in table {
            let error = make("x".into());
            let name = zbus::DBusError::name(&error).to_string();
            assert_eq!(refused(error).status(), status, "{name}");
            // The result of a job carries the same name.
            assert_eq!(of_name(&name), status, "{name}");
        }
    }

    #[test]
    fn hints_name_the_machine_where_it_is_known() {
        let busy = |what: &str| Failure::Refused {
            what: what.into(),
            error: ApiError::InvalidState("no".into()),
        };
        let hint = |what| busy(what).hint().unwrap();
        assert!(hint("vm1/disk0").starts_with("godwit show vm1 says"));
        assert!(hint("the machines").starts_with("godwit show NAME says"));
        let waited = Failure::TimedOut {
            what: format!("{POWER_OFF}vm1"),
            seconds: 1,
            job: 7,
        };
        assert!(waited.hint().unwrap().contains("godwit stop --force vm1"));
    }

    #[test]
    fn a_jobs_failure_says_the_machine_once() {
        let said = |message| of_job("start of vm1", message);
        assert_eq!(said("no tap"), "start of vm1: no tap");
        assert_eq!(said("vm1 did not start: no"), "vm1 did not start: no");
        assert_eq!(said("vm10 is there"), "start of vm1: vm10 is there");
    }

    #[test]
    fn a_lost_connection_is_a_broker_that_does_not_answer() {
        let broken = zbus::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(refused(ApiError::ZBus(broken)).status(), 3);
        let late = zbus::Error::from(io::Error::from(io::ErrorKind::TimedOut));
        let late = refused(ApiError::ZBus(late));
        assert_eq!(late.status(), 10);
        assert_eq!(late.to_string(), "vm1: the broker did not answer in time");
        let gone = zbus::fdo::Error::ServiceUnknown("x".into());
        assert_eq!(refused(gone.into()).status(), 3);
        let gone = zbus::fdo::Error::UnknownObject("x".into());
        assert_eq!(refused(gone.into()).status(), 4);
    }

    #[test]
    fn the_help_lists_every_status() {
        let help = <crate::options::Options as clap::CommandFactory>::command()
            .render_long_help()
            .to_string();
        for status in (0..=13).chain([130]) {
            assert!(help.contains(&format!("\n  {status:<4} ")), "{status}");
        }
    }
}
