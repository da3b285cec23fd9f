//! `godwit run`: makes a machine, starts it, attaches to its console.
//!
//! The machine is started paused, its console opened, and then it runs: the first line is not
//! missed, nor the last of a guest that is quickly done.

use std::fs;
use std::path::Path;

use api::Error;
use api::machine::{PAUSED, REPLAY};
use api::manager::TRANSIENT;

use super::bundled;
use super::console::follow;
use super::start::start_one;
use super::watch::Watch;
use crate::connection::{Broker, Machine};
use crate::definition::{self, DefinitionFile};
use crate::error::{Failure, Result, What as _};
use crate::options::{Run, Wait};
use crate::render::{Output, say};

/// Largest definition file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Names that are tried when others take them at the same time.
const TRIES: usize = 20;

pub async fn run(broker: &Broker, output: Output, mut run: Run) -> Result<()> {
    let scratch = match run.demo {
        true => Some(bundled::complete(&mut run.define)?),
        false => None,
    };
    let flags = if run.keep { 0 } else { TRANSIENT };
    let machine = create(broker, &run, flags).await?;
    let done = start_and_follow(broker, output, &run, &machine).await;
    if let Some(scratch) = scratch
        && !machine.has_ended().await
    {
        // Whoever serves the disk next opens it again.
        let _ = scratch.keep();
    }
    done
}

async fn start_and_follow(
    broker: &Broker,
    output: Output,
    run: &Run,
    machine: &Machine,
) -> Result<()> {
    if run.detach || run.paused {
        let flags = if run.paused { PAUSED } else { 0 };
        let start = start_one(broker, machine, flags, Wait::default()).await;
        started(machine, start, run.keep).await?;
        return announce(output, machine).await;
    }
    let watch = Watch::start(broker, machine).await?;
    let start = start_one(broker, machine, PAUSED, Wait::default()).await;
    if let Err(Failure::Detached { .. }) = start {
        let name = &machine.name;
        say(&format!(
            "{name} will be paused; godwit resume {name} lets it run"
        ));
    }
    started(machine, start, run.keep).await?;
    let console = machine
        .proxy
        .open_console("", REPLAY)
        .await
        .what(&machine.name)?;
    machine.proxy.resume(0).await.what(&machine.name)?;
    say(&format!(
        "{} runs; {} leaves its console",
        machine.name, run.escape
    ));
    follow(machine, watch, console.into(), run.escape, true).await
}

/// After a start: one that failed leaves no machine behind, unless it is kept.
async fn started<T>(machine: &Machine, start: Result<T>, keep: bool) -> Result<T> {
    let goes_on = matches!(
        start,
        Ok(_) | Err(Failure::Detached { .. } | Failure::TimedOut { .. })
    );
    if !goes_on && !keep {
        // The broker may have forgotten it already.
        let _ = machine.proxy.remove(0).await;
    }
    start
}

async fn announce(output: Output, machine: &Machine) -> Result<()> {
    let (view, _) = machine.look().await?;
    output.print(&view, |view| format!("{}\n", view.name))
}

/// Makes the machine.
async fn create(broker: &Broker, run: &Run, flags: u64) -> Result<Machine> {
    let manager = broker.manager().await?;
    let names: Vec<String> = match (&run.name, &run.file) {
        (Some(name), _) => vec![name.clone()],
        (None, Some(file)) => vec![name_of(file)?],
        (None, None) => {
            let machines = manager.list_machines().await.what("the machines")?;
            let taken = |name: &String| machines.iter().any(|machine| machine.name == *name);
            let free = (1..).map(|number: u32| format!("vm{number}"));
            free.filter(|name| !taken(name)).take(TRIES).collect()
        }
    };
    let file = run.file.as_deref().map(read).transpose()?;
    let mut last = None;
    for name in names {
        let definition = match &file {
            Some(file) => file.dictionary()?,
            None => definition::of_options(&run.define)?,
        };
        match manager.create_machine(&name, definition, flags).await {
            Ok(path) => return Machine::at(broker, &name, path).await,
            Err(error @ Error::MachineExists(_)) => last = Some((name, error)),
            Err(Error::InvalidDefinition(problem)) => {
                return Err(match &file {
                    Some(file) => file.mistake(problem),
                    None => Failure::Definition {
                        of: name,
                        problem,
                        excerpt: None,
                    },
                });
            }
            Err(error) => return Err(error).what(name),
        }
    }
    let (name, error) = last.unwrap_or_else(|| (String::new(), Error::Internal("no name".into())));
    Err(error).what(name)
}

/// The name of the machine of a definition file.
fn name_of(file: &Path) -> Result<String> {
    let name = file.file_stem().and_then(|stem| stem.to_str());
    name.map(str::to_owned)
        .ok_or_else(|| Failure::NoName { path: file.into() })
}

fn read(path: &Path) -> Result<DefinitionFile> {
    let failed = || Failure::io(format!("{} cannot be read", path.display()));
    let size = fs::metadata(path).map_err(failed())?.len();
    if size > MAX_FILE {
        let much = format!("it has {size} bytes, {MAX_FILE} at most are read");
        return Err(failed()(std::io::Error::other(much)));
    }
    let text = fs::read_to_string(path).map_err(failed())?;
    Ok(DefinitionFile::new(path, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_its_files_name() {
        assert_eq!(name_of(Path::new("/a/web.toml")).unwrap(), "web");
        assert!(name_of(Path::new("/")).is_err());
    }

    #[test]
    fn large_files_are_refused() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("f.toml");
        fs::File::create(&file)
            .unwrap()
            .set_len(MAX_FILE + 1)
            .unwrap();
        assert!(read(&file).is_err());
        assert!(read(folder.path()).is_err());
    }
}
