//! `godwit`: the command line of Godwit, a client of the broker.
//!
//! | module | what it is for |
//! |---|---|
//! | `options`, `value` | the command line |
//! | `connection` | the way to the broker, and starting the embedded one |
//! | `verbs` | what is done, a file for each verb |
//! | `job` | waiting for the broker's jobs |
//! | `console`, `terminal` | a person at a machine's console |
//! | `view`, `render` | what is printed: JSON forms, tables, text |
//! | `error` | failures, their exit statuses and hints |

mod connection;
mod console;
mod definition;
mod error;
mod job;
mod options;
mod render;
mod terminal;
mod value;
mod verbs;
mod view;

use std::process::ExitCode;

use clap::Parser as _;

use crate::error::Failure;
use crate::options::Options;

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(verbs::run(options));
            // A thread may wait for a key that is never pressed.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(Failure::io("no runtime")(error)),
    };
    terminal::restore();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            verbs::report(&failure);
            failure.exit_code()
        }
    }
}
