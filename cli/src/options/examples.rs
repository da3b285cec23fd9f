//! Examples of every verb, at the end of its help and of its man page. A test parses each.

pub const RUN_USAGE: &str = "godwit run [OPTIONS] <FILE|--kernel PATH|--demo>";

pub const RUN: &str = "\
Examples:
  godwit run --kernel vmlinuz --initrd initrd.img --disk disk.img --net tap:tap0 \\
      --memory 1G --cpus 2 --cmdline 'console=ttyS0 root=/dev/vda'
  godwit run --firmware /usr/share/seabios/bios-256k.bin --disk disk.img
  godwit run web.toml --detach
  godwit run --demo --name first        # needs no kernel of yours

A definition file has these keys; paths are absolute:
  kernel, initrd, cmdline or firmware, vcpus, cpu, memory = \"1G\", hugepages, prefault, uuid
  [[disk]]        path, read-only, queues, serial, id
  [[net]]         tap, mac, queue-pairs, mtu, id
  [[balloon]]     target = \"256M\", statistics-interval, id
  [[vhost-user]]  type, socket, queues, tag, id
  [[vfio]]        host = \"0000:01:00.0\" or socket or synthetic = true, id";

pub const LIST: &str = "\
Examples:
  godwit list
  godwit list --state running --state paused
  godwit list --json=short";

pub const SHOW: &str = "\
Examples:
  godwit show web
  godwit show web db --json";

pub const START: &str = "\
Examples:
  godwit start web db
  godwit start web --paused";

pub const STOP: &str = "\
Examples:
  godwit stop web --timeout 60
  godwit stop --force web db";

pub const RESET: &str = "\
Examples:
  godwit reset web";

pub const PAUSE: &str = "\
Examples:
  godwit pause web db";

pub const RESUME: &str = "\
Examples:
  godwit resume web db";

pub const REMOVE: &str = "\
Examples:
  godwit remove web";

pub const MIGRATE: &str = "\
Examples:
  godwit migrate web tcp://other:4747 --max-downtime 20ms
  godwit migrate web local:        # to the programs that are installed now
  godwit migrate web tcp://other:4747 --max-bandwidth 100M --trace web.json";

pub const DECIDE: &str = "\
Examples:
  godwit decide web --there
  godwit decide web --here";

pub const SNAPSHOT: &str = "\
Examples:
  godwit snapshot web /srv/web.snapshot";

pub const RESTORE: &str = "\
Examples:
  godwit restore /srv/web.snapshot
  godwit restore /srv/web.snapshot --name web2 --paused";

pub const CONSOLE: &str = "\
Examples:
  godwit console web
  godwit console web --read-only
  godwit console web --escape ^A";

pub const JOB: &str = "\
Examples:
  godwit job list
  godwit job wait 7";

pub const JOB_LIST: &str = "\
Examples:
  godwit job list";

pub const JOB_SHOW: &str = "\
Examples:
  godwit job show 7
  godwit job show 7 --json";

pub const JOB_WAIT: &str = "\
Examples:
  godwit job wait 7 8 --timeout 60";

pub const JOB_SET: &str = "\
Examples:
  godwit job set 7 --max-downtime 1s   # of a migration that does not converge";

pub const JOB_CANCEL: &str = "\
Examples:
  godwit job cancel 7";

pub const DEVICE: &str = "\
Examples:
  godwit device list
  godwit device restart web disk0";

pub const DEVICE_LIST: &str = "\
Examples:
  godwit device list
  godwit device list web --no-legend";

pub const DEVICE_SHOW: &str = "\
Examples:
  godwit device show web disk0";

pub const DEVICE_RESTART: &str = "\
Examples:
  godwit device restart web disk0      # to the program that is installed now";

pub const BALLOON: &str = "\
Examples:
  godwit balloon web
  godwit balloon web 512M";

pub const LOGS: &str = "\
Examples:
  godwit logs web
  godwit logs web disk0 --follow
  godwit logs web console";

pub const TOP: &str = "\
Examples:
  godwit top
  godwit top web --interval 0.5
  godwit top --count 10 --json=short";

pub const RELOAD: &str = "\
Examples:
  godwit reload";

pub const DEMO: &str = "\
Examples:
  godwit demo
  godwit demo --net tap:tap0";

pub const COMPLETIONS: &str = "\
Examples:
  godwit completions bash > ~/.local/share/bash-completion/completions/godwit
  godwit completions zsh > ~/.zfunc/_godwit";

pub const MAN: &str = "\
Examples:
  godwit man ~/.local/share/man/man1";

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _, Parser as _};

    use crate::options::Options;

    /// A command, and what it is called in examples.
    fn commands(command: &Command, name: &str) -> Vec<(String, Command)> {
        let mut all = Vec::new();
        for verb in command.get_subcommands() {
            let name = format!("{name} {}", verb.get_name());
            all.extend(commands(verb, &name));
            all.push((name, verb.clone()));
        }
        all
    }

    /// The words of a line as a shell has them, without comment and redirection.
    fn words(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            if at % 2 == 1 {
                words.push(part.to_owned());
                continue;
            }
            let plain = part.split_whitespace();
            words.extend(
                plain
                    .take_while(|word| !matches!(*word, "#" | ">"))
                    .map(Into::into),
            );
        }
        words
    }

    #[test]
    fn every_verb_says_what_it_does_and_has_examples_that_are_right() {
        for (name, command) in commands(&Options::command(), "godwit") {
            assert!(command.get_about().is_some(), "{name} says nothing");
            let help = command.get_after_long_help();
            let help = help
                .unwrap_or_else(|| panic!("{name} has no examples"))
                .to_string();
            let examples = help.strip_prefix("Examples:\n").unwrap();
            let examples = examples.split("\n\n").next().unwrap().replace("\\\n", "");
            for line in examples.lines() {
                let line = line.trim_start();
                assert!(line.starts_with(&name), "{line} is no example of {name}");
                let parsed = Options::try_parse_from(words(line));
                parsed.unwrap_or_else(|error| panic!("{line}: {error}"));
            }
        }
    }
}
