//! `godwit completions`: what a shell needs to complete the command line.

use clap::CommandFactory as _;
use clap_complete::{Shell, generate};

use crate::error::Result;
use crate::options::Options;
use crate::render;

pub fn run(shell: Shell) -> Result<()> {
    render::write(&script(shell))
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    generate(shell, &mut Options::command(), "godwit", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    #[test]
    fn every_shell_completes_every_verb() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for verb in Options::command().get_subcommands() {
                let name = verb.get_name();
                assert!(script.contains(name), "{shell} does not know {name}");
            }
        }
    }
}
