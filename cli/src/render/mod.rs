//! What is printed on stdout: JSON, tables, and text.
//!
//! A reader that goes away (`godwit list | head -1`) ends the program quietly.

mod table;
pub mod text;

use std::io::{self, Write as _};

use serde::Serialize;

pub use self::table::{Column, table};
use crate::error::{Failure, Result};
use crate::options::{Common, Json};

/// How this call prints.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: Json,
    pub legend: bool,
}

impl Output {
    /// As the options say.
    pub fn new(common: &Common) -> Self {
        Self {
            json: common.json,
            legend: !common.no_legend,
        }
    }

    /// Whether JSON is wanted.
    pub fn is_json(self) -> bool {
        self.json != Json::Off
    }

    /// Prints `value` as JSON, or what `human` makes of it.
    ///
    /// # Errors
    /// stdout takes nothing.
    pub fn print<T: Serialize + ?Sized>(
        self,
        value: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<()> {
        let text = match self.json {
            Json::Off => human(value),
            Json::Short => serde_json::to_string(value).map_err(unwritten)? + "\n",
            Json::Pretty => serde_json::to_string_pretty(value).map_err(unwritten)? + "\n",
        };
        write(text.as_bytes())
    }

    /// Prints `value` for a program; a person sees success by silence.
    ///
    /// # Errors
    /// stdout takes nothing.
    pub fn print_json<T: Serialize + ?Sized>(self, value: &T) -> Result<()> {
        self.print(value, |_| String::new())
    }
}

fn unwritten(error: serde_json::Error) -> Failure {
    Failure::Io {
        what: "this cannot be printed as JSON".into(),
        source: error.into(),
    }
}

/// Writes bytes to stdout at once.
///
/// # Errors
/// stdout takes nothing. If its reader is gone, the program ends here.
pub fn write(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let done = stdout.write_all(bytes).and_then(|()| stdout.flush());
    match done {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            crate::terminal::restore();
            std::process::exit(0)
        }
        done => done.map_err(Failure::io("stdout takes nothing")),
    }
}

/// Says something to the person, beside the output.
pub fn say(text: &str) {
    // Nobody is left to be told when stderr is closed.
    let _ = writeln!(io::stderr(), "{text}");
}
