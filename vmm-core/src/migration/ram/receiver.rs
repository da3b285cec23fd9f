//! Receiving pages: a thread for each channel.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use migration::channel::{Cancel, StateChannel};
use migration::ram::{PageSink, RamError, RamReader};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap,
};

use super::PAGE;
use crate::memory::GuestMemory;
use crate::migration::MigrationError;
use crate::migration::error::system;

/// A channel may be silent as long as its machine is copied. That the other side lives is watched
/// on the link, whose end cancels the channels.
const CHANNEL_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

struct Sink(Arc<GuestMemory>);

impl PageSink for Sink {
    fn has(&self, page: u64) -> bool {
        let bytes = usize::try_from(PAGE).unwrap_or(0);
        self.0.check_range(GuestAddress(page * PAGE), bytes)
    }

    fn fill(&self, first: u64, content: &[u8]) -> io::Result<()> {
        let start = GuestAddress(first * PAGE);
        // Of a file of huge pages, which knows no write, or of none.
        let by_mapping = || {
            let written = self.0.write_slice(content, start);
            written.map_err(io::Error::other)
        };
        let region = self.0.find_region(start);
        let within = region.map(|region| (region, start.0 - region.start_addr().0));
        let whole = |region: &GuestRegionMmap, at| region.len() - at >= content.len() as u64;
        match within.and_then(|(region, at)| Some((region, at, region.file_offset()?))) {
            // Into the file, which costs no fault and clears no page first.
            Some((region, at, file)) if whole(region, at) => {
                match file.file().write_all_at(content, file.start() + at) {
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => by_mapping(),
                    written => written,
                }
            }
            _ => by_mapping(),
        }
    }
}

/// The channels of one migration.
pub struct RamReceiver {
    ends: Receiver<Result<u64, RamError>>,
    left: usize,
    bytes: u64,
    cancel: Cancel,
}

impl RamReceiver {
    /// Starts a thread for each of `sockets`.
    pub fn start(sockets: Vec<OwnedFd>, memory: &Arc<GuestMemory>) -> Result<Self, MigrationError> {
        let cancel = Cancel::new().map_err(system("an eventfd"))?;
        let (sender, ends) = channel();
        let left = sockets.len();
        for (number, socket) in sockets.into_iter().enumerate() {
            let socket = StateChannel::new(socket, CHANNEL_DEADLINE, cancel.clone());
            let (sender, sink) = (sender.clone(), Sink(Arc::clone(memory)));
            thread::Builder::new()
                .name(format!("ram-in{number}"))
                .spawn(move || {
                    let receive = || {
                        let mut reader = RamReader::begin(socket, number, left)?;
                        while reader.record(&sink)? {}
                        Ok(reader.bytes())
                    };
                    // Nobody waits any more when the migration was given up.
                    let _ = sender.send(receive());
                })
                .map_err(system("a thread for a memory channel"))?;
        }
        Ok(Self {
            ends,
            left,
            bytes: 0,
            cancel,
        })
    }

    /// Whether a channel has failed already.
    pub fn check(&mut self) -> Result<(), MigrationError> {
        while let Ok(end) = self.ends.try_recv() {
            self.left -= 1;
            self.bytes += end?;
        }
        Ok(())
    }

    /// Waits until every channel has come to its end, whole; the bytes of all.
    pub fn wait(mut self, within: Duration) -> Result<u64, MigrationError> {
        let end = Instant::now() + within;
        while self.left > 0 {
            let left = end.saturating_duration_since(Instant::now());
            let ended = self.ends.recv_timeout(left);
            self.bytes += ended.map_err(|_| MigrationError::RamStalled)??;
            self.left -= 1;
        }
        Ok(self.bytes)
    }
}

impl Drop for RamReceiver {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}
