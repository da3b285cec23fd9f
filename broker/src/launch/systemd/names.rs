//! Names of units.
//!
//! | unit | what |
//! |---|---|
//! | `godwit-NAME.slice` | everything of a machine |
//! | `godwit-machine@NAME.service` | the core of a declared machine, from the template |
//! | `godwit-NAME-core.service` | the core of a machine that a call has made, transient |
//! | `godwit-NAME-ID.service` | the process of a device, transient |

use crate::launch::Program;

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

/// The unit of the core of a program's machine.
pub(super) fn core(program: &Program) -> String {
    match program.declared {
        true => machine(&program.machine),
        false => transient(&program.machine, CORE),
    }
}

/// The unit of a program.
pub(super) fn unit(program: &Program) -> String {
    match is_core(program) {
        true => core(program),
        false => transient(&program.machine, &program.role),
    }
}

pub(super) fn is_core(program: &Program) -> bool {
    program.role == CORE
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
}
