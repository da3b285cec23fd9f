//! The verbs, a file each.

mod balloon;
mod bundled;
mod completions;
mod console;
mod control;
mod demo;
mod device;
mod job;
mod list;
mod logs;
mod man;
mod migrate;
mod reload;
mod run;
mod show;
mod start;
mod stop;
mod top;
mod watch;

use crate::connection::{Broker, Purpose};
use crate::error::{Failure, Result};
use crate::options::{Options, Verb};
use crate::render::{Output, say};

/// Does what the command line says.
///
/// # Errors
/// It could not be done.
pub async fn run(options: Options) -> Result<()> {
    let output = Output::new(&options.common);
    if output.is_json() && !options.verb.has_json() {
        return Err(Failure::NoJson);
    }
    let bus = options.common.bus.as_deref();
    let find = |purpose| Broker::find(bus, purpose);
    match options.verb {
        Verb::Run(run) => run::run(&find(Purpose::Make).await?, output, *run).await,
        Verb::Start(start) => start::run(&find(Purpose::Make).await?, output, start).await,
        Verb::Demo(demo) => demo::run(bus, demo).await,
        Verb::Completions { shell } => completions::run(shell),
        Verb::Man { folder } => man::run(&folder),
        Verb::List(list) => list::run(&find(Purpose::Look).await?, output, list).await,
        Verb::Show(show) => show::run(&find(Purpose::Look).await?, output, show).await,
        Verb::Stop(stop) => stop::run(&find(Purpose::Change).await?, output, stop).await,
        Verb::Reset(names) => control::reset(&find(Purpose::Change).await?, output, names).await,
        Verb::Pause(names) => control::pause(&find(Purpose::Change).await?, output, names).await,
        Verb::Resume(names) => control::resume(&find(Purpose::Change).await?, output, names).await,
        Verb::Remove(names) => control::remove(&find(Purpose::Change).await?, output, names).await,
        Verb::Migrate(it) => migrate::migrate(&find(Purpose::Change).await?, output, it).await,
        Verb::Decide(it) => control::decide(&find(Purpose::Change).await?, output, it).await,
        Verb::Snapshot(it) => migrate::snapshot(&find(Purpose::Change).await?, output, it).await,
        Verb::Restore(it) => migrate::restore(&find(Purpose::Make).await?, output, it).await,
        Verb::Console(console) => console::run(&find(Purpose::Change).await?, console).await,
        Verb::Job(job) => job::run(&find(Purpose::Change).await?, output, job).await,
        Verb::Device(device) => device::run(&find(Purpose::Change).await?, output, device).await,
        Verb::Balloon(verb) => balloon::run(&find(Purpose::Change).await?, output, verb).await,
        Verb::Logs(logs) => logs::run(&find(Purpose::Change).await?, output, logs).await,
        Verb::Top(top) => top::run(&find(Purpose::Look).await?, output, top).await,
        Verb::Reload => reload::run(&find(Purpose::Change).await?, output).await,
    }
}

/// Tells a person about a failure.
pub fn report(failure: &Failure) {
    let mut text = format!("error: {failure}");
    let mut source = std::error::Error::source(failure);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors hold the text of their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(&format!(": {cause_text}"));
        }
        source = cause.source();
    }
    say(&text);
    if let Some(hint) = failure.hint() {
        say(&format!("hint: {hint}"));
    }
}

/// Does something with each of `things`, and goes on when it fails with one. Returns what came
/// of those with which it succeeded.
async fn each<T, R>(things: &[T], mut action: impl AsyncFnMut(&T) -> Result<R>) -> Each<R> {
    let mut each = Each {
        done: Vec::new(),
        failures: Vec::new(),
        of: things.len(),
    };
    for thing in things {
        match action(thing).await {
            Ok(result) => each.done.push(result),
            Err(failure) => {
                // It was not only this one that was interrupted.
                let over = matches!(failure, Failure::Detached { .. } | Failure::Interrupted);
                each.failures.push(failure);
                if over {
                    break;
                }
            }
        }
    }
    each
}

/// What came of doing something several times.
struct Each<R> {
    done: Vec<R>,
    failures: Vec<Failure>,
    of: usize,
}

impl<R> Each<R> {
    /// The failure of all: the only one, or a sum of those that are reported here, with the
    /// exit status of the first.
    fn result(mut self) -> Result<()> {
        if self.of == 1 || self.failures.len() == 1 && self.done.is_empty() {
            return self.failures.pop().map_or(Ok(()), Err);
        }
        let Some(first) = self.failures.first() else {
            return Ok(());
        };
        self.failures.iter().for_each(report);
        Err(Failure::Several {
            failed: self.failures.len(),
            of: self.of,
            status: first.status(),
        })
    }
}
