//! How memory travels: records of up to 64 pages on any number of channels.
//!
//! ```text
//! preface   "GODWITRM", u16 version, u16 channel's number, u32 0
//! record    u32 kind, u32 CRC-32C of the content, u64 first page, u64 pages with content (a bit
//!           each), u64 pages that are zero, u32 CRC-32C of the 32 bytes before it; the content
//! end       a record of kind 2: u64 records before it, two zeroes
//! ```
//! Numbers are little-endian; pages are 4 KiB, counted from guest-physical 0. A record's header is
//! checked before it is believed how much content follows. Its first page is a multiple of 64, and
//! *which channel* it travels on follows from that alone ([`channel_of`]): so what was sent later is
//! applied later, without any channel waiting for another.

use std::io::{self, Read, Write};

use thiserror::Error;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages of a record, at most.
pub const RECORD_PAGES: u64 = 64;
/// Most channels.
pub const MAX_CHANNELS: usize = 16;

const MAGIC: [u8; 8] = *b"GODWITRM";
const VERSION: u16 = 2;
const PREFACE: usize = 16;
const HEADER: usize = 36;
/// Where the header's own checksum is.
const CHECKED: usize = 32;
const PAGES: u32 = 1;
const END: u32 = 2;
/// Bytes of the pages of a record, at most: it has a bit for each.
const MOST_BYTES: usize = u64::BITS as usize * PAGE;
/// Pages beyond this have no 64-bit address.
const MAX_PAGE: u64 = 1 << 52;

/// The channel, of so many, on which the record travels that starts at `page`.
pub fn channel_of(page: u64, channels: usize) -> usize {
    // The remainder is smaller than a usize.
    usize::try_from(page / RECORD_PAGES % channels.max(1) as u64).unwrap_or(0)
}

/// What is wrong with what came on a channel.
#[derive(Debug, Error)]
pub enum RamError {
    /// It does not begin as a channel does.
    #[error(
        "this is no memory channel {channel} of version {VERSION}: it begins with {found:02x?}"
    )]
    Preface {
        /// The channel's number here.
        channel: usize,
        /// What was found.
        found: [u8; PREFACE],
    },
    /// A record that cannot be.
    #[error("memory channel {channel}: record {record} is impossible: {what}")]
    Record {
        /// The channel's number.
        channel: usize,
        /// Records before it.
        record: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A checksum that does not fit.
    #[error("memory channel {channel}: the {part} of record {record} is corrupted")]
    Corrupted {
        /// The channel's number.
        channel: usize,
        /// Records before it.
        record: u64,
        /// Header or content.
        part: &'static str,
    },
    /// The channel failed or ended early.
    #[error("memory channel {channel} failed after {record} records")]
    Io {
        /// The channel's number.
        channel: usize,
        /// Records before.
        record: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes one channel. A record is put together in a buffer of its own, so that a page that the
/// guest changes meanwhile is sent as it was when its checksum was made.
#[derive(Debug)]
pub struct RamWriter<W> {
    channel: W,
    number: usize,
    records: u64,
    bytes: u64,
    /// Room for the longest record.
    buffer: Box<[u8]>,
}

impl<W: Write> RamWriter<W> {
    /// Begins channel `number`.
    pub fn begin(mut channel: W, number: usize) -> Result<Self, RamError> {
        channel
            .write_all(&preface(number))
            .map_err(|source| RamError::Io {
                channel: number,
                record: 0,
                source,
            })?;
        Ok(Self {
            channel,
            number,
            records: 0,
            bytes: PREFACE as u64,
            buffer: vec![0; HEADER + MOST_BYTES].into(),
        })
    }

    /// What it writes to.
    pub fn channel_mut(&mut self) -> &mut W {
        &mut self.channel
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sends the pages of `bits` from `first` on. `read` fills a page's buffer or says that it is a
    /// hole; `is_new` says whether a page was never sent with content, so that it need not be said
    /// that it is zero.
    pub fn pages(
        &mut self,
        first: u64,
        bits: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<PageRead>,
        is_new: impl Fn(u64) -> bool,
    ) -> Result<Sent, RamError> {
        let (channel, record) = (self.number, self.records);
        let failed = |source| RamError::Io {
            channel,
            record,
            source,
        };
        let mut sent = Sent::default();
        let mut end = HEADER;
        for at in 0..RECORD_PAGES {
            if bits >> at & 1 == 0 {
                continue;
            }
            let page = &mut self.buffer[end..end + PAGE];
            let is_zero = match read(first + at, page).map_err(failed)? {
                PageRead::Hole => true,
                PageRead::Filled => *page == ZERO,
            };
            if is_zero {
                if !is_new(first + at) {
                    sent.zero |= 1 << at;
                }
            } else {
                sent.content |= 1 << at;
                end += PAGE;
            }
        }
        if sent.content | sent.zero == 0 {
            return Ok(sent);
        }
        self.seal(end, PAGES, [first, sent.content, sent.zero])?;
        Ok(sent)
    }

    /// Ends the channel; returns the bytes written in all.
    pub fn end(mut self) -> Result<u64, RamError> {
        self.seal(HEADER, END, [self.records, 0, 0])?;
        Ok(self.bytes)
    }

    /// Sends the first `length` bytes of the buffer, with this header.
    fn seal(&mut self, length: usize, kind: u32, words: [u64; 3]) -> Result<(), RamError> {
        let record = &mut self.buffer[..length];
        let crc = crc32c::crc32c(&record[HEADER..]);
        record[..4].copy_from_slice(&kind.to_le_bytes());
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        for (at, word) in (8..).step_by(8).zip(words) {
            record[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&record[..CHECKED]);
        record[CHECKED..HEADER].copy_from_slice(&crc.to_le_bytes());
        self.channel
            .write_all(record)
            .map_err(|source| RamError::Io {
                channel: self.number,
                record: self.records,
                source,
            })?;
        self.records += 1;
        self.bytes += length as u64;
        Ok(())
    }
}

/// What was read of a page that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRead {
    /// The buffer holds its content.
    Filled,
    /// It is zero, and the buffer was not touched: it still holds another page.
    Hole,
}

/// What became of the pages of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Sent with their content.
    pub content: u64,
    /// Said to be zero.
    pub zero: u64,
}

/// Where the pages of a channel go.
pub trait PageSink {
    /// Whether the machine has this page.
    fn has(&self, page: u64) -> bool;
    /// Fills pages from `first` on, all that `content` has.
    fn fill(&self, first: u64, content: &[u8]) -> io::Result<()>;
}

/// Reads one channel. Nothing of a record is passed on before all of it is known to be whole.
#[derive(Debug)]
pub struct RamReader<R> {
    channel: R,
    number: usize,
    channels: usize,
    records: u64,
    bytes: u64,
    /// Room for the pages of the longest record so far.
    buffer: Vec<u8>,
}

impl<R: Read> RamReader<R> {
    /// Begins channel `number` of `channels`.
    pub fn begin(channel: R, number: usize, channels: usize) -> Result<Self, RamError> {
        let mut reader = Self {
            channel,
            number,
            channels,
            records: 0,
            bytes: PREFACE as u64,
            buffer: Vec::new(),
        };
        let mut found = [0; PREFACE];
        reader.read(&mut found)?;
        if found != preface(number) {
            return Err(RamError::Preface {
                channel: number,
                found,
            });
        }
        Ok(reader)
    }

    /// Takes one record over; `false` after the end, when all of it is known to have come.
    pub fn record(&mut self, memory: &impl PageSink) -> Result<bool, RamError> {
        let mut header = [0; HEADER];
        self.read(&mut header)?;
        let [kind, crc, checked] = [0, 4, CHECKED].map(|at| u32::from_le_bytes(part(&header, at)));
        if crc32c::crc32c(&header[..CHECKED]) != checked {
            return Err(self.corrupted("header"));
        }
        let [first, content, zero] = [8, 16, 24].map(|at| u64::from_le_bytes(part(&header, at)));
        let pages = if kind == PAGES {
            content.count_ones()
        } else {
            0
        };
        // At most 64 pages.
        let length = pages as usize * PAGE;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(buffer.len().max(length), 0);
        let content_bytes = &mut buffer[..length];
        self.read(content_bytes)?;
        if crc32c::crc32c(content_bytes) != crc {
            return Err(self.corrupted("content"));
        }
        let goes_on = match kind {
            PAGES => {
                self.check(first, content, zero, memory)?;
                self.apply(first, content, zero, content_bytes, memory)?;
                true
            }
            END if first == self.records => false,
            END => return Err(self.impossible("records are missing")),
            _ => return Err(self.impossible("its kind is unknown")),
        };
        self.records += 1;
        self.bytes += (HEADER + length) as u64;
        self.buffer = buffer;
        Ok(goes_on)
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn check(
        &self,
        first: u64,
        content: u64,
        zero: u64,
        memory: &impl PageSink,
    ) -> Result<(), RamError> {
        if !first.is_multiple_of(RECORD_PAGES) || first >= MAX_PAGE {
            return Err(self.impossible("its first page cannot be one"));
        }
        if content & zero != 0 {
            return Err(self.impossible("a page is zero and is not"));
        }
        if channel_of(first, self.channels) != self.number {
            return Err(self.impossible("it belongs on another channel"));
        }
        if !pages_of(first, content | zero).all(|page| memory.has(page)) {
            return Err(self.impossible("there is no such memory"));
        }
        Ok(())
    }

    fn apply(
        &self,
        first: u64,
        content: u64,
        zero: u64,
        bytes: &[u8],
        memory: &impl PageSink,
    ) -> Result<(), RamError> {
        let failed = |source| RamError::Io {
            channel: self.number,
            record: self.records,
            source,
        };
        let mut bytes = bytes;
        for (page, count) in runs(first, content) {
            // At most 64 pages.
            let (run, rest) = bytes.split_at(count as usize * PAGE);
            memory.fill(page, run).map_err(failed)?;
            bytes = rest;
        }
        for page in pages_of(first, zero) {
            memory.fill(page, &ZERO).map_err(failed)?;
        }
        Ok(())
    }

    fn corrupted(&self, part: &'static str) -> RamError {
        RamError::Corrupted {
            channel: self.number,
            record: self.records,
            part,
        }
    }

    fn impossible(&self, what: &'static str) -> RamError {
        RamError::Record {
            channel: self.number,
            record: self.records,
            what,
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), RamError> {
        self.channel
            .read_exact(bytes)
            .map_err(|source| RamError::Io {
                channel: self.number,
                record: self.records,
                source,
            })
    }
}

static ZERO: [u8; PAGE] = [0; PAGE];

fn preface(number: usize) -> [u8; PREFACE] {
    let mut bytes = [0; PREFACE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    bytes[10..12].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The numbers of the pages whose bits are set.
pub fn pages_of(first: u64, bits: u64) -> impl Iterator<Item = u64> {
    (0..RECORD_PAGES)
        .filter(move |at| bits >> at & 1 != 0)
        .map(move |at| first + at)
}

/// First pages and lengths of what is set in `bits` without a gap.
fn runs(first: u64, mut bits: u64) -> impl Iterator<Item = (u64, u32)> {
    std::iter::from_fn(move || {
        let start = bits.trailing_zeros();
        let count = bits.checked_shr(start)?.trailing_ones();
        let through = u64::MAX.checked_shl(start + count).unwrap_or(0);
        bits &= through;
        Some((first + u64::from(start), count))
    })
}

/// Part of a header; callers stay inside.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

#[cfg(test)]
mod tests;
