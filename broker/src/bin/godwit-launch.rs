//! `godwit-launch`: what a systemd unit starts. It comes to the broker for a program and its
//! descriptors, and becomes that program.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(socket), None) = (arguments.next(), arguments.next()) else {
        eprintln!("godwit-launch: give the socket at which the broker waits");
        return ExitCode::from(2);
    };
    let error = broker::launch::hand_over::become_program(Path::new(&socket));
    eprintln!("godwit-launch: {error}");
    ExitCode::FAILURE
}
