//! A balloon's part of its link: `org.godwit.Balloon1`.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsFd as _, BorrowedFd};

use api::Error;
use api::balloon1::Balloon1Proxy;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;
use zbus::Connection;
use zbus::proxy::CacheProperties;

use super::{DEADLINE, DeviceLinks, MAX_COUNTERS, Phase, current, is_name};

/// A balloon whose link is up. What it says is the word of a process that the guest may have
/// taken over.
#[derive(Clone, Debug)]
pub struct Balloon {
    connection: Connection,
    runtime: Handle,
}

/// How large a balloon is, and what its guest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonSize {
    /// Bytes that the host wants.
    pub target: u64,
    /// Bytes that the guest says it has given.
    pub actual: u64,
    /// What the guest says of its memory.
    pub statistics: BTreeMap<String, u64>,
}

impl DeviceLinks {
    /// The balloon at the other end of the link of `device`, if that is up.
    pub fn balloon(&self, device: &str) -> Option<Balloon> {
        let inner = self.lock();
        let runtime = inner.runtime.clone()?;
        match current(&inner.links.get(device)?.phase) {
            Phase::Up(connection) => Some(Balloon {
                connection,
                runtime,
            }),
            Phase::Waiting | Phase::Lost => None,
        }
    }
}

impl Balloon {
    /// How large it is.
    pub async fn size(&self) -> Result<BalloonSize, Error> {
        let asked = self.ask(|balloon| async move {
            let statistics = balloon.guest_statistics().await?;
            Ok(BalloonSize {
                target: balloon.target().await?,
                actual: balloon.actual().await?,
                statistics: statistics
                    .into_iter()
                    .filter(|(name, _)| is_name(name))
                    .take(MAX_COUNTERS)
                    .collect(),
            })
        });
        asked.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Asks the guest for so many bytes.
    pub async fn set_target(&self, bytes: u64) -> Result<(), Error> {
        let asked = self.ask(move |balloon| async move { Ok(balloon.set_target(bytes).await?) });
        asked.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Seconds between two questions for what the guest says; 0: none is asked.
    pub async fn statistics_interval(&self) -> Result<u32, Error> {
        let asked = self.ask(|balloon| async move { Ok(balloon.statistics_interval().await?) });
        asked.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Has it ask as often.
    pub async fn set_statistics_interval(&self, seconds: u32) -> Result<(), Error> {
        let asked = self
            .ask(move |balloon| async move { Ok(balloon.set_statistics_interval(seconds).await?) });
        asked.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Begins a round of free page hints; its number. Waits here for the answer.
    pub fn start_hints(&self, map: BorrowedFd<'_>) -> Result<u32, Error> {
        let no_copy = |error| Error::LimitsExceeded(format!("no descriptor: {error}"));
        let map = map.try_clone_to_owned().map_err(no_copy)?;
        let asked =
            self.ask(move |balloon| async move { balloon.start_hints(map.as_fd().into()).await });
        asked.blocking_recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Ends the round: nothing is marked any more when this returns without an error. Waits here.
    pub fn stop_hints(&self) -> Result<(), Error> {
        let asked = self.ask(|balloon| async move { Ok(balloon.stop_hints().await?) });
        asked.blocking_recv().unwrap_or_else(|_| Err(gone()))
    }

    /// As [`Self::stop_hints`]; and the guest may use its pages again.
    pub fn end_hints(&self) -> Result<(), Error> {
        let asked = self.ask(|balloon| async move { Ok(balloon.end_hints().await?) });
        asked.blocking_recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Asks on the thread of the links, within the deadline of all questions.
    fn ask<T, F>(
        &self,
        question: impl FnOnce(Balloon1Proxy<'static>) -> F + Send + 'static,
    ) -> oneshot::Receiver<Result<T, Error>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let connection = self.connection.clone();
        self.runtime.spawn(async move {
            let asked = async {
                let balloon = Balloon1Proxy::builder(&connection)
                    .cache_properties(CacheProperties::No)
                    .build()
                    .await?;
                question(balloon).await
            };
            let result = timeout(DEADLINE, asked).await.unwrap_or_else(|_| {
                Err(Error::TimedOut(format!(
                    "the balloon did not answer within {} s",
                    DEADLINE.as_secs()
                )))
            });
            // Nobody listens any more when the caller was cut off.
            let _ = answer.send(result);
        });
        answered
    }
}

fn gone() -> Error {
    Error::DeviceFailed("the link to the balloon is gone".into())
}
