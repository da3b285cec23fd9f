//! The command line of `godwit`. What is written here is also its man pages and completions.

mod examples;
mod machine;
mod migrate;
mod parts;
mod watch;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use self::machine::{Define, Demo, List, Run, Show, Start, Stop};
pub use self::migrate::{Decide, Migrate, Restore, Snapshot};
pub use self::parts::{Device, Job};
pub use self::watch::{Balloon, Console, Logs, Top};

/// Makes, watches and ends virtual machines whose devices are processes of their own.
///
/// It is a client of the broker, `org.godwit.Vmm1` on D-Bus. `run`, `start` and `demo` start an
/// embedded broker when none answers: nothing needs to be installed or configured.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, after_long_help = AFTER, max_term_width = 100)]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub verb: Verb,
}

/// What every man page ends with.
const AFTER: &str = "\
Which broker:
  --bus ADDRESS, else $GODWIT_BUS, else the system bus if the service is there, else the
  embedded broker at $XDG_RUNTIME_DIR/godwit/bus, or /run/godwit/bus without that variable.

Exit status:
  0    done
  1    the broker, or this program, failed
  2    the command line is wrong
  3    no broker answers
  4    there is no such machine, device or job
  5    the machine is not in a state for this, exists already, or is worked on
  6    a definition or an argument was refused
  7    something that the definition names cannot be had
  8    you may not do this
  9    the machine or a device failed
  10   it took too long
  11   it was cancelled
  12   the machine did not move, and is where it was
  13   the machine is paused here and may run elsewhere: decide
  130  interrupted; what was waited for goes on";

/// Options of every verb.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// D-Bus address of the broker, or the path of its socket
    #[arg(long, global = true, value_name = "ADDRESS")]
    pub bus: Option<String>,
    /// Prints JSON: on one line, on many, or not
    ///
    /// A verb for one thing prints an object, a verb for several an array: what it shows, what it
    /// has changed as it is then, or the job in which it does that.
    #[arg(
        long,
        global = true,
        value_name = "FORM",
        num_args = 0..=1,
        require_equals = true,
        default_value = "off",
        default_missing_value = "pretty"
    )]
    pub json: Json,
    /// Leaves out headings and sums
    #[arg(long, global = true)]
    pub no_legend: bool,
}

/// Whether and how to print JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Json {
    /// All on one line
    Short,
    /// Indented
    Pretty,
    /// Tables and text
    Off,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Makes a machine, starts it and attaches to its console
    ///
    /// The machine is forgotten when it ends, unless it is kept. The exit status tells how it
    /// ended. Where stdin is no terminal, it is typed at the console as it is.
    #[command(override_usage = examples::RUN_USAGE, after_long_help = examples::RUN)]
    Run(Box<Run>),
    /// Lists machines
    #[command(visible_alias = "ls", after_long_help = examples::LIST)]
    List(List),
    /// Shows machines with all they have
    #[command(after_long_help = examples::SHOW)]
    Show(Show),
    /// Starts machines that are off
    ///
    /// A machine that runs already is left alone. Returns when the guests run.
    #[command(after_long_help = examples::START)]
    Start(Start),
    /// Switches machines off: presses the power button, or ends them at once
    ///
    /// A machine that is off already is left alone. Returns when the guests are off.
    #[command(after_long_help = examples::STOP)]
    Stop(Stop),
    /// Boots machines again at once, without asking the guests
    #[command(after_long_help = examples::RESET)]
    Reset(Names),
    /// Stops all vCPUs and devices of machines
    #[command(after_long_help = examples::PAUSE)]
    Pause(Names),
    /// Lets paused machines run on
    #[command(after_long_help = examples::RESUME)]
    Resume(Names),
    /// Forgets machines that are off; their files stay
    #[command(visible_alias = "rm", after_long_help = examples::REMOVE)]
    Remove(Names),
    /// Moves a machine while it runs: to another host, or to new processes of this one
    ///
    /// Returns when it runs there. Whatever fails before leaves it running where it was. The other
    /// host's broker must listen (--migration-listen), and see the machine's disks under the same
    /// paths unless it was told otherwise.
    #[command(after_long_help = examples::MIGRATE)]
    Migrate(Migrate),
    /// Says where a machine is after a migration whose end nobody heard of
    ///
    /// Look at the destination first: if it runs there it is forgotten here with --there. If its
    /// process there has ended, or the host is gone for good, --here lets it run on here.
    #[command(after_long_help = examples::DECIDE)]
    Decide(Decide),
    /// Writes a running machine into a new folder; its disks are not in it
    #[command(after_long_help = examples::SNAPSHOT)]
    Snapshot(Snapshot),
    /// Makes a machine of a snapshot and lets it run on
    #[command(after_long_help = examples::RESTORE)]
    Restore(Restore),
    /// Attaches to a machine's console; ^] leaves it
    #[command(after_long_help = examples::CONSOLE)]
    Console(Console),
    /// Lists, shows, awaits, changes and cancels jobs
    #[command(subcommand)]
    #[command(after_long_help = examples::JOB)]
    Job(Job),
    /// Lists, shows and restarts devices
    #[command(subcommand)]
    #[command(after_long_help = examples::DEVICE)]
    Device(Device),
    /// Shows a machine's memory balloon, or changes its size
    ///
    /// The guest follows by and by, as far as it can spare memory.
    #[command(after_long_help = examples::BALLOON)]
    Balloon(Balloon),
    /// Prints what a machine's processes said
    #[command(after_long_help = examples::LOGS)]
    Logs(Logs),
    /// Shows what machines and devices use, again and again
    ///
    /// Ctrl-C or q ends it. Where stdout is no terminal, and with --json, it looks once.
    #[command(after_long_help = examples::TOP)]
    Top(Top),
    /// Reads the definitions in the configuration folder again
    #[command(after_long_help = examples::RELOAD)]
    Reload,
    /// Shows a machine that works while its disk process is killed
    ///
    /// It boots the bundled guest on a scratch disk, kills the process that serves the disk
    /// while the guest uses it, shows that the guest goes on, and ends the machine. Nothing is
    /// left behind.
    #[command(after_long_help = examples::DEMO)]
    Demo(Demo),
    /// Prints the completions of a shell
    #[command(after_long_help = examples::COMPLETIONS)]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Writes the man pages into a folder
    #[command(after_long_help = examples::MAN)]
    Man {
        /// The folder; it is made when it is not there
        folder: PathBuf,
    },
}

impl Verb {
    /// Whether it prints JSON where that is wanted: its stdout is no console, script or show.
    pub fn has_json(&self) -> bool {
        match self {
            Self::Run(run) => run.detach || run.paused,
            Self::Console(_) | Self::Demo(_) | Self::Completions { .. } | Self::Man { .. } => false,
            _ => true,
        }
    }
}

/// Names of machines.
#[derive(Debug, Args)]
pub struct Names {
    /// Machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// How to wait for a job.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Wait {
    /// Does not wait for the end
    #[arg(long, conflicts_with = "timeout")]
    pub no_wait: bool,
    /// Waits for so many seconds at most; what was begun goes on
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(std::iter::once("godwit").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn a_first_machine_needs_three_options() {
        let options = parse("run --kernel K --disk D --net tap:T").unwrap();
        let Verb::Run(run) = options.verb else {
            panic!("{options:?}")
        };
        assert_eq!(run.define.disk[0].path, PathBuf::from("D"));
        assert_eq!(run.define.net[0].tap, "T");
        assert!(!run.detach && !run.keep);
    }

    #[test]
    fn a_file_and_options_exclude_each_other() {
        assert!(parse("run").is_err());
        assert!(parse("run vm.toml").is_ok());
        assert!(parse("run vm.toml --name other --detach").is_ok());
        assert!(parse("run vm.toml --kernel K").is_err());
        assert!(parse("run --firmware F --disk D").is_ok());
        assert!(parse("run --firmware F --cmdline quiet").is_err());
        assert!(parse("run --firmware F --kernel K").is_err());
        assert!(parse("run vm.toml --memory 1G").is_err());
    }

    #[test]
    fn json_has_three_forms_and_stands_anywhere() {
        assert_eq!(parse("list").unwrap().common.json, Json::Off);
        assert_eq!(parse("list --json").unwrap().common.json, Json::Pretty);
        assert_eq!(parse("--json=short list").unwrap().common.json, Json::Short);
        assert_eq!(parse("list --json=off").unwrap().common.json, Json::Off);
        // The value must be attached, or a name would be taken for it.
        assert!(parse("show --json vm1").is_ok());
        assert!(parse("list --json=yaml").is_err());
    }

    #[test]
    fn verbs_that_need_a_name_say_so() {
        for line in [
            "show", "start", "stop", "reset", "pause", "resume", "remove", "console", "logs",
        ] {
            assert!(parse(line).is_err(), "{line}");
            assert!(parse(&format!("{line} vm1")).is_ok(), "{line}");
        }
    }

    #[test]
    fn exclusive_options_are_refused() {
        assert!(parse("stop vm1 --no-wait --timeout 3").is_err());
        assert!(parse("console vm1 --read-only --force").is_err());
        assert!(parse("top --interval 0").is_err());
        assert!(parse("decide vm1").is_err());
        assert!(parse("decide vm1 --here --there").is_err());
        assert!(parse("decide vm1 --here").is_ok());
        assert!(parse("migrate vm1 local: --max-downtime 20ms --channels 4").is_ok());
        assert!(parse("migrate vm1 local: --max-bandwidth 100M --blackout-limit 2s").is_ok());
        assert!(parse("migrate vm1 local: --max-bandwidth fast").is_err());
        assert!(parse("migrate vm1 local: --max-downtime soon").is_err());
        assert!(parse("migrate vm1 local: --no-wait --trace f").is_err());
    }
}
