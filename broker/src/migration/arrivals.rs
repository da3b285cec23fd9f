//! What became of machines that other brokers sent here, for those of them that never heard.
//!
//! ```text
//! accepted ─► Coming ─► Came     it is here, or was and has ended or gone on since
//!                   └─► Never    it did not come, and what waited for it is no more
//! ```
//! What came before the host's last boot and was on its way then is not known, and forgotten.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::folder::{self, Folder};
use crate::name::MachineName;

/// So many are remembered.
const MOST: usize = 1024;

/// What became of a machine that was sent here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fate {
    /// It may come yet.
    Coming,
    /// It came.
    Came,
    /// It did not, and never will.
    Never,
}

impl Fate {
    /// Of a machine for which processes in `place` waited, or wait: from now on in vain.
    pub(crate) fn forestall(place: &Path) -> Self {
        folder::forestall(place);
        match folder::has_arrived(place) {
            true => Self::Came,
            false => Self::Never,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Arrival {
    id: String,
    machine: MachineName,
    fate: Fate,
}

/// All that are remembered.
#[derive(Debug)]
pub struct Arrivals {
    path: PathBuf,
    list: Mutex<VecDeque<Arrival>>,
    changed: watch::Sender<()>,
}

impl Arrivals {
    /// Those that brokers before this one have written down.
    pub fn load(folder: &Folder) -> Self {
        let path = folder.arrivals();
        Self {
            list: Mutex::new(folder::load(&path).unwrap_or_default()),
            path,
            changed: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arrival>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut VecDeque<Arrival>)) {
        {
            let list = &mut *self.lock();
            change(list);
            if let Err(error) = folder::save(&self.path, list) {
                tracing::error!(%error, "who sent a machine could not learn later what became of it");
            }
        }
        // Who waits looks at the list under this one's lock.
        self.changed.send_replace(());
    }

    /// Notes that a machine begins to come.
    pub(crate) fn begin(&self, id: &str, machine: &MachineName) {
        self.change(|list| {
            list.push_back(Arrival {
                id: id.to_owned(),
                machine: machine.clone(),
                fate: Fate::Coming,
            });
            while list.len() > MOST {
                list.pop_front();
            }
        });
    }

    /// Notes what became of the machine of this name that was coming.
    pub(crate) fn settle(&self, machine: &MachineName, fate: Fate) {
        let coming =
            |arrival: &Arrival| arrival.machine == *machine && arrival.fate == Fate::Coming;
        if self.lock().iter().any(coming) {
            self.change(|list| {
                for arrival in list.iter_mut().filter(|arrival| coming(arrival)) {
                    arrival.fate = fate;
                }
            });
        }
    }

    /// Forgets those of which nothing `is_left` here that could tell.
    pub(crate) fn forget_lost(&self, is_left: impl Fn(&MachineName) -> bool) {
        let known = |arrival: &Arrival| arrival.fate != Fate::Coming || is_left(&arrival.machine);
        if !self.lock().iter().all(known) {
            self.change(|list| list.retain(known));
        }
    }

    fn fate(&self, id: &str) -> Option<Fate> {
        let list = self.lock();
        let arrival = list.iter().rev().find(|arrival| arrival.id == id)?;
        Some(arrival.fate)
    }

    /// What became of one, as soon as that is known, but not later than `within`.
    pub(crate) async fn ask(&self, id: &str, within: Duration) -> Option<Fate> {
        let mut changes = self.changed.subscribe();
        let known = changes.wait_for(|()| self.fate(id) != Some(Fate::Coming));
        // The sender lives as long as this.
        let _ = tokio::time::timeout(within, known).await;
        self.fate(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn name(text: &str) -> MachineName {
        MachineName::new(text).unwrap()
    }

    #[tokio::test]
    async fn what_became_of_each_is_remembered() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path(), place.path()).unwrap();
        let arrivals = Arrivals::load(&folder);
        arrivals.begin("1", &name("a"));
        arrivals.settle(&name("a"), Fate::Never);
        arrivals.begin("2", &name("a"));
        arrivals.begin("3", &name("b"));
        assert_eq!(arrivals.ask("2", Duration::ZERO).await, Some(Fate::Coming));
        let (told, ()) = tokio::join!(arrivals.ask("2", SOON), async {
            arrivals.settle(&name("a"), Fate::Came);
        });
        assert_eq!(told, Some(Fate::Came));
        // A later end changes nothing.
        arrivals.settle(&name("a"), Fate::Never);
        let again = Arrivals::load(&folder);
        assert_eq!(again.ask("1", SOON).await, Some(Fate::Never));
        assert_eq!(again.ask("2", SOON).await, Some(Fate::Came));
        again.forget_lost(|machine| *machine != name("b"));
        assert_eq!(again.ask("3", SOON).await, None);
        assert_eq!(again.ask("4", SOON).await, None);
    }

    #[test]
    fn not_more_than_so_many_are_kept() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path(), place.path()).unwrap();
        let arrivals = Arrivals::load(&folder);
        arrivals.change(|list| {
            for number in 0..MOST {
                list.push_back(Arrival {
                    id: number.to_string(),
                    machine: name("a"),
                    fate: Fate::Came,
                });
            }
        });
        arrivals.begin("new", &name("a"));
        assert_eq!(arrivals.lock().len(), MOST);
        assert_eq!(
            (arrivals.fate("0"), arrivals.fate("new")),
            (None, Some(Fate::Coming))
        );
        assert_eq!(Arrivals::load(&folder).lock().len(), MOST);
    }
}
