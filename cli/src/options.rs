//! The command line of `godwit`. What is written here is also its man pages and completions.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::value::{Disk, Escape, HugePages, Milliseconds, Net, Size, VhostUser};

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
    Run(Box<Run>),
    /// Lists machines
    #[command(visible_alias = "ls")]
    List(List),
    /// Shows machines with all they have
    Show(Show),
    /// Starts machines that are off
    ///
    /// A machine that runs already is left alone. Returns when the guests run.
    Start(Start),
    /// Switches machines off: presses the power button, or ends them at once
    ///
    /// A machine that is off already is left alone. Returns when the guests are off.
    Stop(Stop),
    /// Boots machines again at once, without asking the guests
    Reset(Names),
    /// Stops all vCPUs and devices of machines
    Pause(Names),
    /// Lets paused machines run on
    Resume(Names),
    /// Forgets machines that are off; their files stay
    #[command(visible_alias = "rm")]
    Remove(Names),
    /// Moves a machine while it runs: to another host, or to new processes of this one
    ///
    /// Returns when it runs there. Whatever fails before leaves it running where it was. The other
    /// host's broker must listen (--migration-listen), and see the machine's disks under the same
    /// paths unless it was told otherwise.
    Migrate(Migrate),
    /// Says where a machine is after a migration whose end nobody heard of
    ///
    /// Look at the destination first: if it runs there it is forgotten here with --there. If its
    /// process there has ended, or the host is gone for good, --here lets it run on here.
    Decide(Decide),
    /// Writes a running machine into a new folder; its disks are not in it
    Snapshot(Snapshot),
    /// Makes a machine of a snapshot and lets it run on
    Restore(Restore),
    /// Attaches to a machine's console; ^] leaves it
    Console(Console),
    /// Lists, shows, awaits and cancels jobs
    #[command(subcommand)]
    Job(Job),
    /// Lists, shows and restarts devices
    #[command(subcommand)]
    Device(Device),
    /// Shows a machine's memory balloon, or changes its size
    ///
    /// The guest follows by and by, as far as it can spare memory.
    Balloon(Balloon),
    /// Prints what a machine's processes said
    Logs(Logs),
    /// Shows what machines and devices use, again and again
    ///
    /// Ctrl-C or q ends it. Where stdout is no terminal, and with --json, it looks once.
    Top(Top),
    /// Reads the definitions in the configuration folder again
    Reload,
    /// Shows a machine that works while its disk process is killed
    ///
    /// It boots the bundled guest on a scratch disk, kills the process that serves the disk
    /// while the guest uses it, shows that the guest goes on, and ends the machine. Nothing is
    /// left behind.
    Demo(Demo),
    /// Prints the completions of a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Writes the man pages into a folder
    Man {
        /// The folder; it is made when it is not there
        folder: PathBuf,
    },
}

/// Makes a machine, starts it and attaches to its console.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  godwit run --kernel vmlinuz --initrd initrd.img --disk disk.img --net tap:tap0 \\
      --memory 1G --cpus 2 --cmdline 'console=ttyS0 root=/dev/vda'
  godwit run web.toml --detach

A definition file has these keys; paths are absolute:
  kernel, initrd, cmdline, vcpus, cpu, memory = \"1G\", hugepages, prefault, uuid
  [[disk]]        path, read-only, queues, serial, id
  [[net]]         tap, mac, queue-pairs, mtu, id
  [[balloon]]     target = \"256M\", id
  [[vhost-user]]  type, socket, queues, tag, id")]
pub struct Run {
    /// A definition file (TOML), in the place of the options that define a machine
    #[arg(value_name = "FILE", conflicts_with = "definition")]
    pub file: Option<PathBuf>,
    /// Name of the machine; by default the file's, or the first of vm1, vm2, … that is free
    #[arg(long)]
    pub name: Option<String>,
    /// Returns when the machine runs, and leaves the console alone
    #[arg(long, short)]
    pub detach: bool,
    /// Keeps the machine when it has ended, so that it can be started again
    #[arg(long)]
    pub keep: bool,
    /// Runs the bundled guest, which needs no kernel of yours and works on a scratch disk
    #[arg(long, conflicts_with_all = ["file", "kernel", "initrd", "disk", "keep"])]
    pub demo: bool,
    /// Leaves the machine paused
    #[arg(long)]
    pub paused: bool,
    /// The key that leaves the console
    #[arg(long, value_name = "KEY", default_value = "^]")]
    pub escape: Escape,
    #[command(flatten)]
    pub define: Define,
}

/// What a machine is made of.
#[derive(Debug, Default, Args)]
#[group(id = "definition", multiple = true)]
pub struct Define {
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH note (vmlinux)
    #[arg(long, value_name = "PATH", required_unless_present_any = ["file", "demo"])]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// What vCPUs show of the host's processor: host, or no more than x86-64-v1, -v2, -v3 or -v4, so
    /// that the machine can move to other processors [default: host]
    #[arg(long, value_name = "LEVEL")]
    pub cpu: Option<String>,
    /// RAM, with K, M, G or T [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Puts RAM on huge pages of 2M or 1G
    #[arg(long, value_name = "SIZE")]
    pub hugepages: Option<HugePages>,
    /// Makes all RAM present before the guest starts
    #[arg(long)]
    pub prefault: bool,
    /// Disks, with image and settings.
    #[arg(
        long,
        value_name = "DISK",
        help = "A disk: IMAGE[,read-only][,queues=N][,serial=TEXT][,id=NAME]"
    )]
    pub disk: Vec<Disk>,
    /// Network cards, with tap and settings.
    #[arg(
        long,
        value_name = "NET",
        help = "A network card: tap:NAME[,mac=MAC][,queue-pairs=N][,mtu=N][,id=NAME]"
    )]
    pub net: Vec<Net>,
    /// Gives the machine a memory balloon, by which its guest gives memory back
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub balloon: Option<Size>,
    /// Devices that other processes serve.
    #[arg(
        long,
        value_name = "DEVICE",
        help = "A device that another process serves: TYPE,socket=PATH[,queues=N][,tag=TAG][,id=NAME]"
    )]
    pub vhost_user: Vec<VhostUser>,
}

/// Names of machines.
#[derive(Debug, Args)]
pub struct Names {
    /// Machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Lists machines.
#[derive(Debug, Args)]
pub struct List {
    /// Only machines in this state: off, starting, running, paused, stopping or failed
    #[arg(long, value_name = "STATE")]
    pub state: Vec<String>,
}

/// Shows machines with all they have.
#[derive(Debug, Args)]
pub struct Show {
    /// Machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Starts machines that are off.
#[derive(Debug, Args)]
pub struct Start {
    #[command(flatten)]
    pub names: Names,
    /// Leaves them paused
    #[arg(long)]
    pub paused: bool,
    /// Starts also those that have moved to another host: they must have ended there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub wait: Wait,
}

/// Switches machines off: presses the power button, or ends them at once.
#[derive(Debug, Args)]
pub struct Stop {
    #[command(flatten)]
    pub names: Names,
    /// Ends them at once, without asking the guests
    #[arg(long, short)]
    pub force: bool,
    #[command(flatten)]
    pub wait: Wait,
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

/// Moves a machine while it runs.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  godwit migrate web tcp://other:4747 --max-downtime 20ms
  godwit migrate web local:        # to the programs that are installed now")]
pub struct Migrate {
    /// The machine
    pub name: String,
    /// tcp://HOST:PORT or unix:/PATH of a broker that listens, or local:
    pub uri: String,
    /// It is stopped when the stop is predicted to be shorter, as 20ms or 1s [default: 300ms]
    #[arg(long, value_name = "TIME")]
    pub max_downtime: Option<Milliseconds>,
    /// A stop that lasts longer is given up, and the machine goes on where it was [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub blackout_limit: Option<Milliseconds>,
    /// Most memory to send a second while the guest runs, as 100M; at least 1M
    #[arg(long, value_name = "SIZE")]
    pub max_bandwidth: Option<Size>,
    /// Connections for memory, 1 to 16 [default: 2]
    #[arg(long, value_name = "N")]
    pub channels: Option<u32>,
    /// Slows a guest down that writes faster than its memory can be sent
    #[arg(long)]
    pub auto_converge: bool,
    /// Gives up after so many seconds of a guest that is too fast [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub patience: Option<u64>,
    /// Writes what took how long on both hosts, for Perfetto and other viewers of traces
    #[arg(long, value_name = "FILE", conflicts_with = "no_wait")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    pub wait: Wait,
}

/// Says where a machine is.
#[derive(Debug, Args)]
pub struct Decide {
    /// The machine
    pub name: String,
    /// It runs at the destination: it is forgotten here
    #[arg(long, required_unless_present = "here", conflicts_with = "here")]
    pub there: bool,
    /// It does not run at the destination and never will: it goes on here
    #[arg(long)]
    pub here: bool,
}

/// Writes a running machine into a new folder.
#[derive(Debug, Args)]
pub struct Snapshot {
    /// The machine
    pub name: String,
    /// The folder, which must not be there yet
    pub folder: PathBuf,
    #[command(flatten)]
    pub wait: Wait,
}

/// Makes a machine of a snapshot.
#[derive(Debug, Args)]
pub struct Restore {
    /// The folder
    pub folder: PathBuf,
    /// Name of the machine; by default the one that it had
    #[arg(long)]
    pub name: Option<String>,
    /// Leaves the machine paused
    #[arg(long)]
    pub paused: bool,
    /// Keeps the machine when it has ended, so that it can be started again
    #[arg(long)]
    pub keep: bool,
    #[command(flatten)]
    pub wait: Wait,
}

/// Attaches to a machine's console; ^] leaves it.
#[derive(Debug, Args)]
pub struct Console {
    /// The machine
    pub name: String,
    /// Only reads
    #[arg(long, short)]
    pub read_only: bool,
    /// Takes the console from whoever writes to it now
    #[arg(long, short, conflicts_with = "read_only")]
    pub force: bool,
    /// Does not begin with what was printed lately
    #[arg(long)]
    pub no_replay: bool,
    /// The key that leaves the console
    #[arg(long, value_name = "KEY", default_value = "^]")]
    pub escape: Escape,
}

/// Lists, shows, awaits and cancels jobs.
#[derive(Debug, Subcommand)]
pub enum Job {
    /// Lists jobs, those that ended lately included
    List,
    /// Shows jobs with their results
    Show {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
    /// Waits for the end of jobs; their results are the exit status
    Wait {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
        /// Waits for so many seconds at most
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Cancels jobs
    Cancel {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
}

/// Lists, shows and restarts devices.
#[derive(Debug, Subcommand)]
pub enum Device {
    /// Lists the devices of machines; of all machines when none is named
    List {
        /// Machines
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Shows a device
    Show {
        /// Its machine
        name: String,
        /// The device
        device: String,
    },
    /// Replaces a device's process under the running machine; no request is lost
    Restart {
        /// Its machine
        name: String,
        /// The device
        device: String,
        #[command(flatten)]
        wait: Wait,
    },
}

/// Shows a machine's memory balloon, or changes its size.
#[derive(Debug, Args)]
pub struct Balloon {
    /// The machine
    pub name: String,
    /// How much memory the guest shall give to the host, with K, M, G or T
    pub size: Option<Size>,
}

/// Prints what a machine's processes said.
#[derive(Debug, Args)]
pub struct Logs {
    /// The machine
    pub name: String,
    /// Whose log: core, console, or a device; by default of the core and all devices
    #[arg(value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Goes on with what they will say
    #[arg(long, short)]
    pub follow: bool,
}

/// Shows what machines and devices use, again and again.
#[derive(Debug, Args)]
pub struct Top {
    /// Machines; all when none is named
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Seconds between two looks
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2.0, value_parser = crate::value::interval)]
    pub interval: f64,
    /// How often to look
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<u64>,
}

/// Shows a machine that works while its disk process is killed.
#[derive(Debug, Args)]
pub struct Demo {
    /// Another guest's kernel; by default the bundled guest, where it is installed
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Its command line; by default what makes the bundled guest use its disk
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// A network card beside the disk, as of `godwit run`
    #[arg(long, value_name = "NET")]
    pub net: Vec<Net>,
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
