//! Memory channels of a hostile peer: bytes as they are, and records with right checksums.

use std::io;

use migration::ram::{PAGE, PageSink, RamReader, channel_of};

/// Pages of the machine, with a hole.
const PAGES: u64 = 1000;
const CHANNELS: usize = 3;

struct Memory;

impl PageSink for Memory {
    fn has(&self, page: u64) -> bool {
        page < PAGES && page != 70
    }

    fn fill(&self, first: u64, content: &[u8]) -> io::Result<()> {
        assert!(content.len().is_multiple_of(PAGE));
        for page in first..first + (content.len() / PAGE) as u64 {
            assert!(self.has(page));
            // On which channel it came follows from the page.
            assert_eq!(channel_of(page / 64 * 64, CHANNELS), 1);
        }
        Ok(())
    }
}

fn read(bytes: &[u8]) {
    let Ok(mut reader) = RamReader::begin(bytes, 1, CHANNELS) else {
        return;
    };
    while let Ok(true) = reader.record(&Memory) {}
    assert!(reader.bytes() <= bytes.len() as u64);
}

/// See the module.
pub fn ram(data: &[u8]) {
    read(data);
    let mut preface = b"GODWITRM".to_vec();
    preface.extend([2, 0, 1, 0, 0, 0, 0, 0]);
    read(&[&preface, data].concat());
    // Of each 28 bytes a record.
    let mut stream = preface;
    let (records, _) = data.as_chunks::<28>();
    for record in records.iter().take(8) {
        let pages = u64::from_le_bytes(std::array::from_fn(|at| record[12 + at]));
        let content = vec![record[27]; pages.count_ones() as usize * PAGE];
        let (kind, words) = record.split_at(4);
        let header = [kind, &crc32c::crc32c(&content).to_le_bytes(), words].concat();
        stream.extend(&header);
        stream.extend(crc32c::crc32c(&header).to_le_bytes());
        stream.extend(content);
    }
    read(&stream);
}
