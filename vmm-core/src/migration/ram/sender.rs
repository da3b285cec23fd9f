//! Sending pages: a thread for each channel.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use migration::channel::{Cancel, StateChannel};
use migration::ram::{PageRead, RamError, RamWriter, channel_of};
use vm_memory::{Bytes as _, GuestAddress};

use super::PAGE;
use crate::memory::GuestMemory;
use crate::migration::error::system;
use crate::migration::{MigrationError, STALL_DEADLINE};

/// Chunks that may wait for a channel.
const QUEUE: usize = 4;

/// First page of a record, its pages, and those of them that are holes.
type Batch = (u64, u64, u64);

enum Work {
    /// This was all.
    End,
    /// Of records.
    Pages(Vec<Batch>),
    /// Answered when everything before was sent.
    Flush(Sender<()>),
}

struct Channel {
    work: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<Result<u64, RamError>>>,
}

/// The channels of one migration.
pub struct RamSender {
    channels: Vec<Channel>,
    sent: Arc<AtomicU64>,
}

impl RamSender {
    /// Starts a thread for each of `sockets`. `cancel` ends what they wait for.
    pub fn start(
        sockets: Vec<OwnedFd>,
        memory: &Arc<GuestMemory>,
        cancel: &Cancel,
    ) -> Result<Self, MigrationError> {
        let sent = Arc::new(AtomicU64::new(0));
        let mut channels = Vec::with_capacity(sockets.len());
        for (number, socket) in sockets.into_iter().enumerate() {
            let (work, inbox) = sync_channel(QUEUE);
            let socket = StateChannel::new(socket, STALL_DEADLINE, cancel.clone());
            let (memory, sent) = (Arc::clone(memory), Arc::clone(&sent));
            let thread = thread::Builder::new()
                .name(format!("ram-out{number}"))
                .spawn(move || serve(socket, number, &memory, &inbox, &sent))
                .map_err(system("a thread for a memory channel"))?;
            channels.push(Channel {
                work: Some(work),
                thread: Some(thread),
            });
        }
        Ok(Self { channels, sent })
    }

    /// Bytes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sends pages: `words` of bits from page `first` on. Waits when too much is under way.
    pub fn send(&mut self, first: u64, words: &[u64]) -> Result<(), MigrationError> {
        self.send_with_holes(first, words, &vec![0; words.len()])
    }

    /// As [`Self::send`], where those in `holes` are known to be zero and are not read.
    pub fn send_with_holes(
        &mut self,
        first: u64,
        words: &[u64],
        holes: &[u64],
    ) -> Result<(), MigrationError> {
        let count = self.channels.len();
        let mut batches = vec![Vec::new(); count];
        let firsts = (first..).step_by(u64::BITS as usize);
        let records = firsts.zip(words.iter().zip(holes));
        for (first, (bits, holes)) in records.filter(|(_, (bits, _))| **bits != 0) {
            batches[channel_of(first, count)].push((first, *bits, *holes));
        }
        for (number, batch) in batches.into_iter().enumerate() {
            if !batch.is_empty() {
                self.give(number, Work::Pages(batch))?;
            }
        }
        Ok(())
    }

    /// Waits until everything was sent.
    pub fn flush(&mut self) -> Result<(), MigrationError> {
        let mut answers = Vec::with_capacity(self.channels.len());
        for number in 0..self.channels.len() {
            let (answer, answered) = channel();
            self.give(number, Work::Flush(answer))?;
            answers.push(answered);
        }
        for (number, answered) in answers.into_iter().enumerate() {
            if answered.recv().is_err() {
                return Err(self.why(number));
            }
        }
        Ok(())
    }

    /// Says on every channel that this was all, and waits until that is sent.
    pub fn end(mut self) -> Result<u64, MigrationError> {
        for number in 0..self.channels.len() {
            self.give(number, Work::End)?;
        }
        for number in 0..self.channels.len() {
            match self.channels[number].thread.take().map(JoinHandle::join) {
                Some(Ok(Ok(_))) | None => {}
                Some(Ok(Err(error))) => return Err(error.into()),
                Some(Err(_)) => return Err(MigrationError::RamStalled),
            }
        }
        Ok(self.sent())
    }

    fn give(&mut self, number: usize, work: Work) -> Result<(), MigrationError> {
        let given = match &self.channels[number].work {
            Some(channel) => channel.send(work).is_ok(),
            None => false,
        };
        if given { Ok(()) } else { Err(self.why(number)) }
    }

    /// Why a channel takes nothing more.
    fn why(&mut self, number: usize) -> MigrationError {
        self.channels[number].work = None;
        let ended = self.channels[number].thread.take().map(JoinHandle::join);
        match ended {
            Some(Ok(Err(error))) => error.into(),
            _ => MigrationError::RamStalled,
        }
    }
}

/// The thread of one channel, until nobody has work for it any more.
fn serve(
    socket: StateChannel,
    number: usize,
    memory: &GuestMemory,
    inbox: &Receiver<Work>,
    sent: &AtomicU64,
) -> Result<u64, RamError> {
    let mut writer = RamWriter::begin(socket, number)?;
    // Pages by record whose content the other side has.
    let mut known: HashMap<u64, u64> = HashMap::new();
    let mut counted = 0;
    let mut count = |writer: &RamWriter<StateChannel>| {
        sent.fetch_add(writer.bytes() - counted, Ordering::Relaxed);
        counted = writer.bytes();
    };
    for work in inbox {
        let batch = match work {
            Work::Pages(batch) => batch,
            Work::End => {
                writer.channel_mut().set_deadline(STALL_DEADLINE);
                return writer.end();
            }
            Work::Flush(answer) => {
                // Nobody waits any more when the migration was given up.
                let _ = answer.send(());
                continue;
            }
        };
        for (first, bits, holes) in batch {
            writer.channel_mut().set_deadline(STALL_DEADLINE);
            let has = known.entry(first).or_default();
            let before = *has;
            let read = |page: u64, into: &mut [u8]| {
                if holes >> (page - first) & 1 != 0 {
                    return Ok(PageRead::Hole);
                }
                let read = memory.read_slice(into, GuestAddress(page * PAGE));
                read.map(|()| PageRead::Filled).map_err(io::Error::other)
            };
            let done = writer.pages(first, bits, read, |page| before >> (page - first) & 1 == 0)?;
            *has = before | done.content;
            count(&writer);
        }
    }
    // Given up: the other side sees a channel without an end.
    Ok(writer.bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::migration::ram::RamReceiver;

    /// Pages of the machine: a word of bits on each of two channels, and one more.
    const PAGES: u64 = 192;

    fn memory(content: impl Fn(u64) -> u8) -> Arc<GuestMemory> {
        let bytes = usize::try_from(PAGES * PAGE).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        for page in 0..PAGES {
            let bytes = [content(page); migration::ram::PAGE];
            let at = GuestAddress(page * PAGE);
            memory.write_slice(&bytes, at).unwrap();
        }
        Arc::new(memory)
    }

    fn first_byte(memory: &GuestMemory, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE)).unwrap()
    }

    #[test]
    fn a_page_that_became_a_hole_arrives_as_zero() {
        // The source's own bytes are not looked at where there is a hole.
        let source = memory(|page| page.to_le_bytes()[0] | 1);
        let destination = memory(|_| 0);
        let pairs = [(); 2].map(|()| UnixStream::pair().unwrap());
        let (ours, theirs) = pairs.map(|(a, b)| (a.into(), b.into())).into_iter().unzip();
        let receiver = RamReceiver::start(theirs, &destination).unwrap();
        let mut sender = RamSender::start(ours, &source, &Cancel::new().unwrap()).unwrap();
        sender.send(0, &[u64::MAX; 3]).unwrap();
        let holes = [0xf0, 0, u64::MAX];
        sender
            .send_with_holes(0, &[0xff, 0, u64::MAX], &holes)
            .unwrap();
        sender.end().unwrap();
        receiver.wait(Duration::from_secs(30)).unwrap();
        for page in 0..PAGES {
            let word = usize::try_from(page / 64).unwrap();
            let is_hole = holes[word] >> (page % 64) & 1 != 0;
            let right = if is_hole {
                0
            } else {
                first_byte(&source, page)
            };
            assert_eq!(first_byte(&destination, page), right, "page {page}");
        }
    }
}
