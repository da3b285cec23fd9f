//! Names of units.
//!
//! | unit | what |
//! |---|---|
//! | `godwit-NAME.slice` | everything of a machine |
//! | `godwit-machine@NAME.service` | the core of a declared machine, from the template |
//! | `godwit-NAME-core.service` | the core of a machine that a call has made, transient |
//! | `godwit-NAME-ID.service` | the process of a device, transient |
//! | `godwit-…-2.service` | the same of a machine that has moved within its host |
//! | `godwit.target` | between all devices and all cores |
//!
//! A name is taken again by the next move but one, so no unit names another that is transient:
//! systemd would keep that one in mind when it has ended, and not let its name be taken.

use crate::launch::Program;

/// Before it are all devices, after it all cores.
pub(super) const ANCHOR: &str = "godwit.target";

/// The role of a core.
const CORE: &str = "core";

/// A part of a unit's name, as systemd.unit(5) escapes it: a `-` would be a level of its own.
fn escape(text: &str) -> String {
    text.replace('-', "\\x2d")
}

/// The slice of a machine.
pub(super) fn slice(machine: &str) -> String {
    format!("godwit-{}.slice", escape(machine))
}

/// The unit that is a declared machine for its administrator, and has its core.
pub fn machine(machine: &str) -> String {
    format!("godwit-machine@{}.service", escape(machine))
}

/// Units that a program can be in: the first that is free.
pub(super) fn candidates(program: &Program) -> Vec<String> {
    match (is_core(program), program.declared, program.beside) {
        (true, true, false) => vec![machine(&program.machine)],
        (_, _, false) => vec![transient(&program.machine, &program.role)],
        (_, _, true) => both(&program.machine, &program.role).into(),
    }
}

/// Whether a unit comes from the template.
pub(super) fn is_from_template(unit: &str) -> bool {
    unit.contains('@')
}

pub(super) fn is_core(program: &Program) -> bool {
    program.role == CORE
}

/// The one name and the other, as a machine that moves within its host has two of each process.
fn both(machine: &str, role: &str) -> [String; 2] {
    let one = transient(machine, role);
    let other = one.replace(".service", "-2.service");
    [one, other]
}

fn transient(machine: &str, role: &str) -> String {
    format!("godwit-{}-{}.service", escape(machine), escape(role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_do_not_run_together() {
        assert_eq!(transient("a-b", "c"), "godwit-a\\x2db-c.service");
        assert_ne!(transient("a-b", "c"), transient("a", "b-c"));
        assert_eq!(slice("web-1"), "godwit-web\\x2d1.slice");
        assert_eq!(machine("web-1"), "godwit-machine@web\\x2d1.service");
    }

    #[test]
    fn a_core_that_takes_over_leaves_the_unit_of_the_other_alone() {
        let mut program = Program {
            machine: "web".into(),
            declared: true,
            beside: false,
            pins_memory: false,
            role: CORE.into(),
            path: "/bin/true".into(),
            args: Vec::new(),
            descriptors: Vec::new(),
            log: std::fs::File::open("/dev/null").unwrap(),
        };
        assert_eq!(candidates(&program), ["godwit-machine@web.service"]);
        program.beside = true;
        let beside = ["godwit-web-core.service", "godwit-web-core-2.service"];
        assert_eq!(candidates(&program), beside);
        program.declared = false;
        assert_eq!(candidates(&program), beside);
        program.beside = false;
        assert_eq!(candidates(&program), beside[..1]);
    }
}
