//! Waiting for a job of the broker, with a progress bar, a deadline, and Ctrl-C.
//!
//! ```text
//! running ─► done | failed | cancelled
//!    │ Ctrl-C at a terminal: detach (status 130), cancel, or wait on
//!    │ Ctrl-C elsewhere, SIGTERM: detach
//!    └ deadline: status 10; the job goes on
//! ```
//! What the job is now is read again when a change was signalled, and once a second in case that a
//! signal is lost. Signals are taken off the connection all the time, whatever is waited for: behind
//! those that nobody takes, an answer would never come.

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::Duration;

use api::job::{JobProxy, RESULT_ERROR, RESULT_MESSAGE};
use api::job_migration::JobMigrationProxy;
use futures_util::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until};
use zbus::OwnedObjectPath;
use zbus::fdo::PropertiesProxy;
use zbus::names::InterfaceName;
use zbus::proxy::CacheProperties;

use crate::connection::Broker;
use crate::error::{Failure, Result, What as _};
use crate::options::Wait;
use crate::render::say;
use crate::value::Milliseconds;
use crate::view;

/// Steps of the progress bar.
const STEPS: u64 = 1000;
const INTERFACE: &str = "org.godwit.Vmm1.Job";
const MIGRATION: &str = "org.godwit.Vmm1.Job.Migration";
/// When to look without a signal.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A job that takes less has no progress bar.
const UNSEEN: Duration = Duration::from_millis(300);
/// Longest deadline: what is beyond is for ever.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86400);

/// A job of the broker.
#[derive(Debug)]
pub struct Job {
    /// What it does, in a few words, for messages.
    what: String,
    proxy: JobProxy<'static>,
    properties: PropertiesProxy<'static>,
}

impl Job {
    /// The job at `path`, which does `what`.
    pub async fn at(broker: &Broker, what: &str, path: OwnedObjectPath) -> Result<Self> {
        let proxy = JobProxy::builder(broker.connection())
            .path(path.clone())
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .what(what)?;
        Ok(Self {
            what: what.into(),
            proxy,
            properties: broker.properties_of(what, &path).await?,
        })
    }

    /// The job of this number.
    pub async fn numbered(broker: &Broker, id: u32) -> Result<Self> {
        let what = format!("job {id}");
        let path = broker.manager().await?.get_job(id).await.what(&what)?;
        Self::at(broker, &what, path).await
    }

    /// What it is now.
    pub async fn look(&self) -> Result<view::Job> {
        let interface = InterfaceName::from_static_str(INTERFACE).what(&self.what)?;
        let properties = self.properties.get_all(interface).await.what(&self.what)?;
        let mut job = view::Job::read(&properties).what(&self.what)?;
        if job.kind == "migrate" {
            let interface = InterfaceName::from_static_str(MIGRATION).what(&self.what)?;
            let properties = self.properties.get_all(interface).await.what(&self.what)?;
            job.migration = Some(view::Migration::read(&properties).what(&self.what)?);
        }
        Ok(job)
    }

    /// Changes the longest stop that is wanted of the machine that it moves.
    pub async fn set_max_downtime(&self, time: Milliseconds) -> Result<()> {
        let job = self.look().await?;
        let (id, kind) = (job.id, job.kind);
        if kind != "migrate" || job.state != "running" {
            let error = format!("job {id} ({kind}, {}) moves no machine away", job.state);
            return Err(api::Error::InvalidState(error)).what(&self.what);
        }
        let connection = self.properties.inner().connection();
        let migration = JobMigrationProxy::builder(connection)
            .path(self.proxy.inner().path().to_owned())
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .what(&self.what)?;
        let usec = time.0.saturating_mul(1000);
        let set = migration.set_max_downtime_usec(usec).await;
        set.what(&self.what)
    }

    /// Asks it to end.
    pub async fn cancel(&self) -> Result<()> {
        self.proxy.cancel().await.what(&self.what)
    }

    /// Waits for its success.
    ///
    /// # Errors
    /// It failed or was cancelled; the deadline passed or the person went away, and it goes on.
    pub async fn wait(&self, wait: Wait) -> Result<view::Job> {
        let changes = Changes::of(&self.properties).await.what(&self.what)?;
        let seconds = wait.timeout;
        let patience = seconds.map_or(FOREVER, |seconds| Duration::from_secs(seconds).min(FOREVER));
        let end = Instant::now() + patience;
        let mut bar = Bar::new(&self.what);
        let mut interrupts = Interrupts::new()?;
        loop {
            let job = self.look().await?;
            bar.show(&job);
            if !job.is_running() {
                bar.close();
                return self.outcome(job);
            }
            tokio::select! {
                () = changes.next() => {}
                () = sleep(LOOK_AGAIN) => {}
                () = sleep_until(end) => {
                    bar.close();
                    return Err(Failure::TimedOut {
                        what: self.what.clone(),
                        seconds: seconds.unwrap_or_default(),
                        job: job.id,
                    });
                }
                asked = interrupts.next() => {
                    bar.close();
                    if asked.is_terminal() {
                        self.ask(&job, &mut interrupts).await?;
                    } else {
                        return Err(self.detached(&job));
                    }
                }
            }
        }
    }

    /// What came of it.
    fn outcome(&self, job: view::Job) -> Result<view::Job> {
        match job.state.as_str() {
            "done" => Ok(job),
            "cancelled" => Err(Failure::Cancelled {
                what: self.what.clone(),
            }),
            _ => Err(Failure::Job {
                what: self.what.clone(),
                id: job.id,
                name: job.result_text(RESULT_ERROR),
                message: job.result_text(RESULT_MESSAGE),
            }),
        }
    }

    fn detached(&self, job: &view::Job) -> Failure {
        Failure::Detached {
            what: self.what.clone(),
            job: job.id,
        }
    }

    /// Asks the person whether to go away, to cancel, or to wait on. Returns to wait on, be it
    /// for the end after a cancellation.
    async fn ask(&self, job: &view::Job, interrupts: &mut Interrupts) -> Result<()> {
        let choice = if job.cancellable {
            "[d]etach and let it go on, [c]ancel it, or [w]ait?"
        } else {
            "[d]etach and let it go on, or [w]ait? (it cannot be cancelled now)"
        };
        say(&format!("\n{}: {choice}", self.what));
        let mut answer = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            // No answer is an empty one.
            let _ = io::stdin().read_line(&mut line);
            line
        });
        loop {
            tokio::select! {
                answer = &mut answer => {
                    let answer = answer.unwrap_or_default();
                    return match answer.trim().to_lowercase().as_str() {
                        "c" | "cancel" => self.cancel().await,
                        "w" | "wait" => Ok(()),
                        _ => Err(self.detached(job)),
                    };
                }
                _ = interrupts.next() => return Err(self.detached(job)),
                () = sleep(LOOK_AGAIN) => {
                    if !self.look().await?.is_running() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Changes of an object, many of which are as good as one.
struct Changes {
    news: Arc<Notify>,
    reader: AbortHandle,
}

impl Changes {
    /// From now on.
    async fn of(properties: &PropertiesProxy<'static>) -> zbus::Result<Self> {
        let mut changes = properties.receive_properties_changed().await?;
        let news = Arc::new(Notify::new());
        let tell = Arc::clone(&news);
        let reader = tokio::spawn(async move {
            while changes.next().await.is_some() {
                tell.notify_one();
            }
        });
        Ok(Self {
            news,
            reader: reader.abort_handle(),
        })
    }

    /// Waits for one since the last time.
    async fn next(&self) {
        self.news.notified().await;
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Signals that ask this program to end.
pub struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A person, most likely, by Ctrl-C.
    Interrupt,
    /// Another program, or the terminal that went away.
    Terminate,
}

impl Asked {
    /// Whether there is somebody who can be asked back.
    fn is_terminal(self) -> bool {
        self == Self::Interrupt && io::stdin().is_terminal() && io::stderr().is_terminal()
    }
}

impl Interrupts {
    /// From now on these signals do not end the program by themselves.
    pub fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(Failure::io("signals cannot be received"));
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.interrupt.recv() => Asked::Interrupt,
            _ = self.terminate.recv() => Asked::Terminate,
            _ = self.hangup.recv() => Asked::Terminate,
        }
    }
}

/// The progress bar on stderr; there is none when that is no terminal.
struct Bar {
    bar: ProgressBar,
    since: Instant,
    what: String,
}

impl Bar {
    fn new(what: &str) -> Self {
        Self {
            bar: ProgressBar::hidden(),
            since: Instant::now(),
            what: what.into(),
        }
    }

    fn show(&self, job: &view::Job) {
        if self.since.elapsed() < UNSEEN || !job.is_running() {
            return;
        }
        if self.bar.length().is_none() {
            let style = "{msg} [{bar:30}] {percent}% {elapsed}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                self.bar.set_style(style.progress_chars("=> "));
            }
            self.bar.set_length(STEPS);
            self.bar
                .set_draw_target(indicatif::ProgressDrawTarget::stderr());
        }
        let mut phase = match job.phase.as_str() {
            "" => self.what.clone(),
            phase => format!("{}: {phase}", self.what),
        };
        if let Some(migration) = &job.migration {
            let (left, rate) = (
                migration.facts.bytes_remaining >> 20,
                migration.facts.link_rate >> 20,
            );
            phase.push_str(&format!(", {left} MiB left, {rate} MiB/s"));
        }
        self.bar.set_message(phase);
        self.bar.set_position(position(job.progress));
    }

    /// Takes it off the screen; what is shown next brings it back.
    fn close(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.close();
    }
}

/// Where on the bar this part is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is between 0 and STEPS"
)]
fn position(part: f64) -> u64 {
    (part.clamp(0.0, 1.0) * STEPS as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_stay_on_the_bar() {
        for (part, at) in [
            (-1.0, 0),
            (0.0, 0),
            (0.5, 500),
            (1.0, 1000),
            (7.0, 1000),
            (f64::NAN, 0),
        ] {
            assert_eq!(position(part), at, "{part}");
        }
    }
}
