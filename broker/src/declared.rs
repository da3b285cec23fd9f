//! Machines that files in the configuration folder declare.
//!
//! Where the folder and a machine disagree: a new file is a new machine, another text is a
//! machine's definition unless it runs, and a machine whose file is gone is forgotten when it has
//! ended. A file with a mistake changes nothing.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use api::Error;
use api::machine::State;

use crate::broker::Broker;
use crate::definition::Definition;
use crate::machine::Machine;
use crate::name::MachineName;

/// Most mistakes that are told at once.
const MOST_MISTAKES: usize = 10;

/// What came of reading the folder.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    /// Machines that are new or have another definition.
    pub(crate) changed: Vec<Arc<Machine>>,
    /// Machines that do not run and have lost their file.
    pub(crate) orphans: Vec<Arc<Machine>>,
    /// What was not read, each with its file and line.
    pub(crate) mistakes: Vec<String>,
}

impl Broker {
    /// Reads the definitions in the configuration folder.
    pub(crate) fn read_configuration(&self) -> Reading {
        let mut reading = Reading::default();
        let Some(folder) = &self.config else {
            return reading;
        };
        let files = match files(folder) {
            Ok(files) => files,
            Err(error) => {
                let mistake = format!("{} cannot be read: {error}", folder.display());
                reading.mistakes.push(mistake);
                return reading;
            }
        };
        let mut names = BTreeSet::new();
        for file in files {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            names.extend(MachineName::new(&stem));
            let result = Definition::from_file(&file)
                .map_err(|error| error.to_string())
                .and_then(|(name, definition)| {
                    self.declare(name, definition).map_err(|e| e.to_string())
                });
            match result {
                Ok(changed) => reading.changed.extend(changed),
                Err(why) => reading.mistakes.push(format!("{}: {why}", file.display())),
            }
        }
        for machine in self.machines().into_iter().filter(|m| m.from_file) {
            let orphan = !names.contains(machine.name());
            machine.set_orphan(orphan);
            if orphan && matches!(machine.state(), State::Off | State::Failed) {
                reading.orphans.push(machine);
            }
        }
        reading
    }

    /// Takes a definition from a file; the machine, if that is new to it.
    fn declare(
        &self,
        name: MachineName,
        definition: Definition,
    ) -> Result<Option<Arc<Machine>>, Error> {
        let known = self.lock().get(&name).cloned();
        match known {
            Some(machine) if !machine.from_file => Err(Error::MachineExists(format!(
                "there is a machine {name} already, made by a call"
            ))),
            Some(machine) if *machine.definition() == definition => Ok(None),
            Some(machine) => match machine.redefine(definition) {
                Ok(()) => Ok(Some(machine)),
                Err(error) => Err(Error::InvalidState(format!(
                    "{error}: reload when it is off, until then its definition stays"
                ))),
            },
            None => self.insert(name, definition, false, true).map(Some),
        }
    }

    /// Reads the configuration folder again.
    ///
    /// # Errors
    /// There are mistakes in it; everything else is done.
    pub(crate) async fn reload(&self) -> Result<(), Error> {
        let mut reading = self.read_configuration();
        for machine in reading.changed {
            self.publish_added(&machine).await;
        }
        for machine in reading.orphans {
            // One that runs is looked at again by the next call.
            if let Err(error) = self.remove(&machine).await {
                reading
                    .mistakes
                    .push(format!("{}: its file is gone, but {error}", machine.name()));
            }
        }
        if reading.mistakes.is_empty() {
            return Ok(());
        }
        let more = reading.mistakes.len().saturating_sub(MOST_MISTAKES);
        reading.mistakes.truncate(MOST_MISTAKES);
        if more > 0 {
            reading.mistakes.push(format!("and {more} more"));
        }
        Err(Error::InvalidDefinition(reading.mistakes.join("\n")))
    }
}

/// The definitions in a folder, of which there are none in one that is not there.
fn files(folder: &std::path::Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "toml")
    });
    files.sort();
    Ok(files)
}
