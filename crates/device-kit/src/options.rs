//! The command line that all device processes share.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use migration::schema::UnitId;

use crate::memory::PrefaultMode;

/// The options of every device process, and the device's.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct CommandLine<O: Args> {
    #[command(flatten)]
    pub(crate) process: ProcessOptions,
    #[command(flatten)]
    pub(crate) device: O,
}

/// Options of every device process.
#[derive(Debug, Args)]
pub(crate) struct ProcessOptions {
    #[command(flatten)]
    pub(crate) socket: SocketOptions,

    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,

    /// Give up all rights that serving a guest does not need
    #[arg(long, value_enum, default_value_t = Switch::On, value_name = "on|off")]
    pub(crate) sandbox: Switch,

    /// Serve org.godwit.Device1 (D-Bus, peer to peer) on the connected Unix socket that was handed
    /// over as descriptor N
    #[arg(long, value_name = "N")]
    pub(crate) control_fd: Option<i32>,

    /// Serve metrics as OpenMetrics text by HTTP on a new Unix socket at PATH
    #[arg(long, value_name = "PATH")]
    pub(crate) metrics_socket: Option<PathBuf>,

    /// Name of this unit, as it is called on the other host too [default: the device's kind]
    #[arg(long, value_name = "NAME")]
    pub(crate) unit: Option<UnitId>,
}

/// Options of every vhost-user back-end, and the device's.
#[derive(Debug, Args)]
pub struct VhostUserOptions<O: Args> {
    /// A machine moves in: what only one process may have, the lock of an image, is taken when the
    /// machine starts here and not before
    #[arg(long)]
    pub(crate) incoming: bool,

    /// Map guest memory ahead of its first use
    #[arg(long, value_enum, default_value_t, value_name = "off|data|all")]
    pub(crate) prefault: PrefaultMode,

    #[command(flatten)]
    pub(crate) device: O,
}

/// Where the front-end comes from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct SocketOptions {
    /// Listen for the front-end on a new Unix socket at PATH
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,

    /// Use the Unix socket that was handed over as descriptor N, listening or connected
    #[arg(long, value_name = "N")]
    pub(crate) fd: Option<i32>,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

/// What is wrong with a command line, on one line.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines: Vec<&str> = text
        .lines()
        .take_while(|line| !line.is_empty())
        .map(|line| line.trim().trim_start_matches("error: "))
        .collect();
    format!("{}; see --help", lines.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Args)]
    struct NoOptions {}

    fn parse(line: &str) -> Result<CommandLine<NoOptions>, clap::Error> {
        CommandLine::try_parse_from(std::iter::once("device").chain(line.split_whitespace()))
    }

    #[test]
    fn one_socket_is_needed_and_one_only() {
        assert!(parse("").is_err());
        assert!(parse("--fd 3 --socket-path /x").is_err());
        assert_eq!(parse("--fd 3").unwrap().process.socket.fd, Some(3));
        let options = parse("--socket-path /x").unwrap().process;
        assert_eq!(options.sandbox, Switch::On);
        assert_eq!(options.socket.socket_path, Some(PathBuf::from("/x")));
    }

    #[test]
    fn a_mistake_is_said_on_one_line() {
        let line = one_line(&parse("--fd three").unwrap_err());
        assert_eq!(
            line,
            "invalid value 'three' for '--fd <N>': invalid digit found in string; see --help"
        );
        let line = one_line(&parse("--nonsense").unwrap_err());
        assert_eq!(line, "unexpected argument '--nonsense' found; see --help");
    }
}
