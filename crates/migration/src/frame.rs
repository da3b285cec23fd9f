//! The frame around saved state, on a pipe, a socket or a file.
//!
//! ```text
//! header   96 bytes: magic "GODWITST", u16 frame version, u16 0, u32 schema number,
//!                    kind (16 bytes), unit id (64 bytes), both padded with zeroes
//! chunk    u32 type, u32 length, bytes        type 1: structured part, in one or more chunks
//! …                                           type 2: bulk, after it, raw
//! trailer  u32 type 0xffffffff, u32 12, u64 bytes before the trailer, u32 CRC-32C of them
//! end of file
//! ```
//! All numbers are little-endian. The structured part is MessagePack with named fields, see
//! [`Schema`]. An end of file anywhere before the trailer is a truncation, and bytes after it are
//! as wrong; neither loads anything. Every length is bounded before a byte is allocated for it.
//!
//! Writing: [`FrameWriter::begin`], [`FrameWriter::bulk`] any number of times,
//! [`FrameWriter::finish`], close. Reading: [`FrameReader::begin`], [`FrameReader::structured`],
//! [`FrameReader::bulk`] until it says `None`, which is when all of it is known to be whole. Both
//! end in order: a unit that leaves bulk unread has not consumed its state, which is an error.

use std::io::{self, BufReader, BufWriter, Read, Write};

use thiserror::Error;

use crate::schema::{MAX_KIND, MAX_UNIT_ID, Schema, SchemaError, UnitId};

/// First bytes of every frame.
pub const MAGIC: [u8; 8] = *b"GODWITST";
/// Version of the frame itself.
pub const FRAME_VERSION: u16 = 1;
/// Longest chunk, in bytes.
pub const MAX_CHUNK: usize = 1 << 20;
/// Longest structured part, in bytes.
pub const MAX_STRUCTURED: usize = 16 << 20;

const HEADER_LEN: usize = 16 + MAX_KIND + MAX_UNIT_ID;
const CHUNK_HEADER_LEN: usize = 8;
const TRAILER_LEN: usize = 12;

const STRUCTURED: u32 = 1;
const BULK: u32 = 2;
const TRAILER: u32 = u32::MAX;

/// Asks the processor what it can do for checksums, which is remembered. Where a hypervisor answers
/// that takes longer than to save most devices, and is better done before a machine stands still.
pub fn warm_up() {
    crc32c::crc32c(&[]);
}

/// Why saved state could not be written or read.
#[derive(Debug, Error)]
pub enum FrameError {
    /// It does not begin as a frame does.
    #[error("not saved state: it begins with {found:02x?}")]
    Magic {
        /// The first bytes found.
        found: [u8; 8],
    },
    /// A frame of another version.
    #[error("frame version {found} is unknown here, known is {FRAME_VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The state of something else.
    #[error("state of {found_kind:?} unit {found_unit:?} was given to {kind:?} unit {unit:?}")]
    WrongUnit {
        /// The kind found.
        found_kind: String,
        /// The unit found.
        found_unit: String,
        /// The kind expected.
        kind: String,
        /// The unit expected.
        unit: String,
    },
    /// The kind or unit in the header is not text padded with zeroes, or a reserved field is set.
    #[error("damaged header: {field} is not valid")]
    Header {
        /// The field.
        field: &'static str,
    },
    /// It ended before its end.
    #[error("truncated after {after} bytes")]
    Truncated {
        /// Bytes read until then.
        after: u64,
    },
    /// A chunk of a type that does not belong where it is.
    #[error("chunk type {found:#x} at byte {at} is unknown or out of order")]
    Chunk {
        /// The type found.
        found: u32,
        /// Where.
        at: u64,
    },
    /// A chunk or the structured part is longer than allowed.
    #[error("{what} of {len} bytes at byte {at} is longer than {limit}")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// Where.
        at: u64,
        /// The longest allowed.
        limit: usize,
    },
    /// The trailer does not fit what was read.
    #[error(
        "corrupted: trailer says {said_len} bytes with checksum {said_crc:08x}, \
         there are {len} with {crc:08x}"
    )]
    Corrupted {
        /// Length by the trailer.
        said_len: u64,
        /// Checksum by the trailer.
        said_crc: u32,
        /// Length read.
        len: u64,
        /// Checksum of it.
        crc: u32,
    },
    /// Something follows the trailer.
    #[error("data after the end of saved state at byte {at}")]
    Surplus {
        /// Where.
        at: u64,
    },
    /// Part of the state was not taken by the unit that it is for.
    #[error("bulk state at byte {at} was not expected by this unit")]
    Unconsumed {
        /// Where.
        at: u64,
    },
    /// The structured part is not what its schema says.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The channel failed.
    #[error("the state channel failed after {after} bytes")]
    Io {
        /// Bytes read or written until then.
        after: u64,
        /// Why.
        source: io::Error,
    },
}

/// Writes one frame.
#[derive(Debug)]
pub struct FrameWriter<W: Write> {
    /// Each write to the channel wakes who reads it.
    channel: BufWriter<W>,
    len: u64,
    crc: u32,
}

impl<W: Write> FrameWriter<W> {
    /// Writes the header and the structured part.
    pub fn begin<S: Schema>(channel: W, unit: &UnitId, state: &S) -> Result<Self, FrameError> {
        const {
            assert!(
                S::KIND.len() <= MAX_KIND,
                "the kind has no room in the header"
            )
        };
        let structured = state.encode()?;
        check_len("structured part", structured.len(), 0, MAX_STRUCTURED)?;
        let mut writer = FrameWriter {
            channel: BufWriter::new(channel),
            len: 0,
            crc: 0,
        };
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(&MAGIC);
        header[8..10].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&S::NUMBER.to_le_bytes());
        header[16..16 + S::KIND.len()].copy_from_slice(S::KIND.as_bytes());
        let unit = unit.as_str().as_bytes();
        header[16 + MAX_KIND..16 + MAX_KIND + unit.len()].copy_from_slice(unit);
        writer.put(&header)?;
        // An empty structured part is a chunk too.
        if structured.is_empty() {
            writer.chunk(STRUCTURED, &[])?;
        }
        for part in structured.chunks(MAX_CHUNK) {
            writer.chunk(STRUCTURED, part)?;
        }
        Ok(writer)
    }

    /// Writes bulk state; it may be called again and again.
    pub fn bulk(&mut self, data: &[u8]) -> Result<(), FrameError> {
        data.chunks(MAX_CHUNK)
            .try_for_each(|part| self.chunk(BULK, part))
    }

    /// Writes the trailer and returns the channel, to be closed, with the bytes written.
    pub fn finish(mut self) -> Result<(W, u64), FrameError> {
        let mut trailer = [0; TRAILER_LEN];
        trailer[..8].copy_from_slice(&self.len.to_le_bytes());
        trailer[8..].copy_from_slice(&self.crc.to_le_bytes());
        self.chunk(TRAILER, &trailer)?;
        let failed = |source| FrameError::Io {
            after: self.len,
            source,
        };
        let mut channel = self
            .channel
            .into_inner()
            .map_err(|error| failed(error.into_error()))?;
        channel.flush().map_err(failed)?;
        Ok((channel, self.len))
    }

    fn chunk(&mut self, kind: u32, data: &[u8]) -> Result<(), FrameError> {
        // `data` is at most MAX_CHUNK here.
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut header = [0; CHUNK_HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[4..].copy_from_slice(&len.to_le_bytes());
        self.put(&header)?;
        self.put(data)
    }

    fn put(&mut self, data: &[u8]) -> Result<(), FrameError> {
        self.channel
            .write_all(data)
            .map_err(|source| FrameError::Io {
                after: self.len,
                source,
            })?;
        self.len += data.len() as u64;
        self.crc = crc32c::crc32c_append(self.crc, data);
        Ok(())
    }
}

/// What a frame says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind of unit whose state it is.
    pub kind: String,
    /// The unit.
    pub unit: String,
    /// The schema number that it was written under.
    pub schema: u32,
}

/// Reads one frame.
#[derive(Debug)]
pub struct FrameReader<R> {
    channel: BufReader<R>,
    header: Header,
    len: u64,
    crc: u32,
    /// The header of a chunk that was read ahead.
    next: Option<ChunkHeader>,
}

#[derive(Clone, Copy, Debug)]
struct ChunkHeader {
    kind: u32,
    len: usize,
    at: u64,
    /// Length and checksum before this header.
    before: (u64, u32),
}

impl<R: Read> FrameReader<R> {
    /// Reads the header.
    pub fn begin(channel: R) -> Result<Self, FrameError> {
        let mut reader = FrameReader {
            channel: BufReader::new(channel),
            header: Header {
                kind: String::new(),
                unit: String::new(),
                schema: 0,
            },
            len: 0,
            crc: 0,
            next: None,
        };
        let magic: [u8; 8] = reader.take()?;
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let [v0, v1, r0, r1, s0, s1, s2, s3] = reader.take()?;
        let found = u16::from_le_bytes([v0, v1]);
        if found != FRAME_VERSION {
            return Err(FrameError::Version { found });
        }
        if [r0, r1] != [0, 0] {
            return Err(FrameError::Header { field: "reserved" });
        }
        let kind: [u8; MAX_KIND] = reader.take()?;
        let unit: [u8; MAX_UNIT_ID] = reader.take()?;
        reader.header = Header {
            kind: text(&kind, "kind")?,
            unit: text(&unit, "unit")?,
            schema: u32::from_le_bytes([s0, s1, s2, s3]),
        };
        Ok(reader)
    }

    /// What the frame says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Reads the structured part, which must be that of `unit`.
    ///
    /// It is decoded before the checksum is known: nothing of it may be acted upon until
    /// [`FrameReader::bulk`] has said `None`, or [`FrameReader::finish`] has returned.
    pub fn structured<S: Schema>(&mut self, unit: &UnitId) -> Result<S, FrameError> {
        if self.header.kind != S::KIND || self.header.unit != unit.as_str() {
            return Err(FrameError::WrongUnit {
                found_kind: self.header.kind.clone(),
                found_unit: self.header.unit.clone(),
                kind: S::KIND.to_owned(),
                unit: unit.to_string(),
            });
        }
        let mut payload = Vec::new();
        let mut chunk = self.chunk_header()?;
        if chunk.kind != STRUCTURED {
            return Err(chunk.out_of_order());
        }
        while chunk.kind == STRUCTURED {
            let start = payload.len();
            check_len(
                "structured part",
                start + chunk.len,
                chunk.at,
                MAX_STRUCTURED,
            )?;
            payload.resize(start + chunk.len, 0);
            self.fill(&mut payload[start..])?;
            chunk = self.chunk_header()?;
        }
        self.next = Some(chunk);
        Ok(S::decode(self.header.schema, &payload)?)
    }

    /// Reads the next bulk chunk into `buffer`, which is at most [`MAX_CHUNK`] long afterwards, and
    /// returns its length; `None` after the last one, when everything was checked.
    pub fn bulk(&mut self, buffer: &mut Vec<u8>) -> Result<Option<usize>, FrameError> {
        let chunk = match self.next.take() {
            Some(chunk) => chunk,
            None => self.chunk_header()?,
        };
        match chunk.kind {
            BULK => {
                buffer.resize(chunk.len, 0);
                self.fill(buffer)?;
                Ok(Some(chunk.len))
            }
            TRAILER => self.trailer(chunk).map(|()| None),
            _ => Err(chunk.out_of_order()),
        }
    }

    /// Reads the end of a frame without bulk; returns the bytes read.
    pub fn finish(mut self) -> Result<u64, FrameError> {
        let at = self.len;
        match self.bulk(&mut Vec::new())? {
            None => Ok(self.len),
            Some(_) => Err(FrameError::Unconsumed { at }),
        }
    }

    fn trailer(&mut self, chunk: ChunkHeader) -> Result<(), FrameError> {
        if chunk.len != TRAILER_LEN {
            return Err(chunk.out_of_order());
        }
        let trailer: [u8; TRAILER_LEN] = self.take()?;
        let (said_len, said_crc) = trailer.split_at(8);
        let said_len = u64::from_le_bytes(array(said_len));
        let said_crc = u32::from_le_bytes(array(said_crc));
        let (len, crc) = chunk.before;
        if (said_len, said_crc) != (len, crc) {
            return Err(FrameError::Corrupted {
                said_len,
                said_crc,
                len,
                crc,
            });
        }
        let mut surplus = [0];
        match self.read_some(&mut surplus)? {
            0 => Ok(()),
            _ => Err(FrameError::Surplus { at: self.len }),
        }
    }

    fn chunk_header(&mut self) -> Result<ChunkHeader, FrameError> {
        let before = (self.len, self.crc);
        let [k0, k1, k2, k3, l0, l1, l2, l3] = self.take()?;
        let len = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        check_len("chunk", len, before.0, MAX_CHUNK)?;
        Ok(ChunkHeader {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            len,
            at: before.0,
            before,
        })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            match self.read_some(bytes)? {
                0 => return Err(FrameError::Truncated { after: self.len }),
                n => {
                    let (done, rest) = bytes.split_at_mut(n);
                    self.crc = crc32c::crc32c_append(self.crc, done);
                    self.len += n as u64;
                    bytes = rest;
                }
            }
        }
        Ok(())
    }

    fn read_some(&mut self, bytes: &mut [u8]) -> Result<usize, FrameError> {
        loop {
            match self.channel.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    return result.map_err(|source| FrameError::Io {
                        after: self.len,
                        source,
                    });
                }
            }
        }
    }
}

impl ChunkHeader {
    fn out_of_order(&self) -> FrameError {
        FrameError::Chunk {
            found: self.kind,
            at: self.at,
        }
    }
}

fn check_len(what: &'static str, len: usize, at: u64, limit: usize) -> Result<(), FrameError> {
    if len > limit {
        return Err(FrameError::TooLong {
            what,
            len,
            at,
            limit,
        });
    }
    Ok(())
}

/// The bytes as an array of their own length; callers split at fixed places.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| bytes[i])
}

/// Printable ASCII, at least one character, padded with zeroes.
fn text(field: &[u8], name: &'static str) -> Result<String, FrameError> {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    let (name_bytes, padding) = field.split_at(end);
    let plain = name_bytes.iter().all(u8::is_ascii_graphic) && !name_bytes.is_empty();
    if !plain || padding.iter().any(|byte| *byte != 0) {
        return Err(FrameError::Header { field: name });
    }
    Ok(name_bytes.iter().copied().map(char::from).collect())
}

#[cfg(test)]
mod tests;
