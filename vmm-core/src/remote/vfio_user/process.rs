//! The process that has the device: the connection to it, and guest memory that it may reach.

use std::error::Error as StdError;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vfio_user::{Client, DmaRegion, Error};

use super::{VfioUserConfig, VfioUserError};
use crate::machine::chain;
use crate::memory::{LayoutChange, LayoutListener, Region};
use crate::remote::{Health, RemoteDevice};

/// A process that may go away, and another one come.
pub(super) struct Process {
    config: VfioUserConfig,
    /// None while there is no process. Held while it is asked, so that it is not lost before it is
    /// known why.
    client: RwLock<Option<Arc<Client>>>,
    /// What it is to reach. Held while it is told so.
    ram: Mutex<Vec<Region>>,
    /// Never held while something is waited for.
    health: Mutex<Health>,
}

impl Process {
    /// One that has been reached. Memory comes with [`crate::memory::Memory::subscribe`].
    pub(super) fn new(config: VfioUserConfig, client: Client) -> Self {
        Self {
            config,
            client: RwLock::new(Some(Arc::new(client))),
            ram: Mutex::default(),
            health: Mutex::new(Health {
                connected: true,
                ..Health::default()
            }),
        }
    }

    pub(super) fn config(&self) -> &VfioUserConfig {
        &self.config
    }

    pub(super) fn id(&self) -> &str {
        &self.config.id
    }

    /// The connection, if there is one.
    pub(super) fn client(&self) -> Option<Arc<Client>> {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner);
        client.clone()
    }

    /// Asks the process for something. One that does not keep to the protocol is given up, which
    /// whoever watches the connection sees.
    pub(super) fn ask<T>(
        &self,
        question: impl FnOnce(&Client) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner);
        let client = client.as_deref().ok_or(Error::Closed)?;
        let result = question(client);
        if let Err(error) = &result
            && is_lost(error)
        {
            self.health().note(error);
            client.close();
        }
        result
    }

    /// The process at the other end of `client` is gone; why, if it was not replaced meanwhile.
    pub(super) fn lose(&self, client: &Arc<Client>) -> Option<VfioUserError> {
        let current = &mut *self.client.write().unwrap_or_else(PoisonError::into_inner);
        current.take_if(|it| Arc::ptr_eq(it, client))?;
        let health = &mut *self.health();
        health.note(&Error::Closed);
        health.connected = false;
        Some(VfioUserError::Lost {
            device: self.id().into(),
            why: health.trouble.clone(),
        })
    }

    /// There is one again. It is given the memory that the one before had.
    pub(super) fn replace(&self, client: Client) -> Result<(), Error> {
        let ram = self.ram();
        reach(&client, &[], &ram)?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(client));
        let health = &mut *self.health();
        health.connected = true;
        health.reconnects += 1;
        health.trouble.clear();
        Ok(())
    }

    fn ram(&self) -> MutexGuard<'_, Vec<Region>> {
        self.ram.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    /// The first reason counts; others follow from it.
    fn note(&mut self, error: &Error) {
        if self.trouble.is_empty() {
            self.trouble = chain(error);
        }
    }
}

impl RemoteDevice for Process {
    fn health(&self) -> Health {
        self.health().clone()
    }
}

impl LayoutListener for Process {
    fn name(&self) -> String {
        format!("device {}", self.id())
    }

    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let wanted = change.all.iter().filter(|region| region.is_ram());
        let wanted: Vec<_> = wanted.cloned().collect();
        let mut ram = self.ram();
        match self.ask(|client| reach(client, &ram, &wanted)) {
            Err(error) if !is_lost(&error) => return Err(Box::new(error)),
            // Its successor hears of it.
            _ => *ram = wanted,
        }
        Ok(())
    }
}

/// Whether the connection is of no use any more.
pub(super) fn is_lost(error: &Error) -> bool {
    !matches!(error, Error::Remote { .. } | Error::TooLong { .. })
}

/// Brings a process from the memory that it reaches to that which it shall reach, or back.
fn reach(client: &Client, old: &[Region], new: &[Region]) -> Result<(), Error> {
    let (gone, come) = (without(old, new), without(new, old));
    for region in &gone {
        client.dma_unmap(region.gpa(), region.size())?;
    }
    for (number, region) in come.iter().enumerate() {
        if let Err(error) = map(client, region) {
            for region in &come[..number] {
                client.dma_unmap(region.gpa(), region.size())?;
            }
            for region in &gone {
                map(client, region)?;
            }
            return Err(error);
        }
    }
    Ok(())
}

fn without<'a>(regions: &'a [Region], others: &[Region]) -> Vec<&'a Region> {
    let differs = |region: &&Region| !others.contains(region);
    regions.iter().filter(differs).collect()
}

fn map(client: &Client, region: &Region) -> Result<(), Error> {
    let dma = DmaRegion {
        address: region.gpa(),
        size: region.size(),
        offset: region.offset(),
        readable: true,
        writable: true,
    };
    client.dma_map(dma, Some(region.file().as_fd()))
}
