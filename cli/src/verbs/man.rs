//! `godwit man`: a man page of the program and of each verb.

use std::fs;
use std::path::Path;

use clap::CommandFactory as _;

use crate::error::{Failure, Result};
use crate::options::Options;

pub fn run(folder: &Path) -> Result<()> {
    let failed = || {
        Failure::io(format!(
            "the man pages cannot be written to {}",
            folder.display()
        ))
    };
    fs::create_dir_all(folder).map_err(failed())?;
    clap_mangen::generate_to(Options::command(), folder).map_err(failed())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of the pages of a command and all below it.
    fn pages(command: &clap::Command, name: &str) -> Vec<String> {
        let below = command.get_subcommands().flat_map(|verb| {
            let name = format!("{name}-{}", verb.get_name());
            pages(verb, &name)
        });
        std::iter::once(format!("{name}.1")).chain(below).collect()
    }

    #[test]
    fn every_verb_has_a_page() {
        let folder = tempfile::TempDir::new().unwrap();
        let folder = folder.path().join("man1");
        run(&folder).unwrap();
        let expected = pages(&Options::command(), "godwit");
        assert!(
            expected.contains(&"godwit-device-restart.1".into()),
            "{expected:?}"
        );
        for page in &expected {
            let text = fs::read_to_string(folder.join(page)).unwrap();
            assert!(text.contains(".SH SYNOPSIS"), "{page}");
        }
    }

    #[test]
    fn the_page_of_the_program_lists_exit_statuses() {
        let folder = tempfile::TempDir::new().unwrap();
        run(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join("godwit.1")).unwrap();
        assert!(text.contains("Exit status"), "{text}");
    }
}
