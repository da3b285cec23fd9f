use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;

#[derive(Default)]
struct Memory(RefCell<BTreeMap<u64, Vec<u8>>>);
impl PageSink for Memory {
    fn has(&self, page: u64) -> bool {
        page < 1000
    }
    fn fill(&self, page: u64, content: &[u8]) -> io::Result<()> {
        let pages = (page..).zip(content.chunks(PAGE));
        let pages = pages.map(|(page, content)| (page, content.to_vec()));
        self.0.borrow_mut().extend(pages);
        Ok(())
    }
}

#[test]
fn what_is_together_is_one_run() {
    let runs = |bits| runs(64, bits).collect::<Vec<_>>();
    assert_eq!(runs(0), []);
    assert_eq!(runs(u64::MAX), [(64, 64)]);
    assert_eq!(runs(0b1101), [(64, 1), (66, 2)]);
    assert_eq!(runs(1 << 63 | 1), [(64, 1), (127, 1)]);
}

/// Page 64 is zero, others are full of their number.
fn content(page: u64, into: &mut [u8]) -> io::Result<PageRead> {
    into.fill(if page == 64 { 0 } else { page.to_le_bytes()[0] });
    Ok(PageRead::Filled)
}

fn stream(first: u64, bits: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = RamWriter::begin(&mut bytes, 0).unwrap();
    writer.pages(first, bits, content, |_| false).unwrap();
    let said = writer.end().unwrap();
    assert_eq!(said, bytes.len() as u64);
    bytes
}

fn load(bytes: &[u8]) -> Result<Memory, RamError> {
    let memory = Memory::default();
    let mut reader = RamReader::begin(bytes, 0, 1)?;
    while reader.record(&memory)? {}
    assert_eq!(reader.bytes(), bytes.len() as u64);
    Ok(memory)
}

#[test]
fn pages_arrive_and_zero_ones_without_content() {
    let bytes = stream(64, 0b1011);
    assert_eq!(bytes.len(), PREFACE + 2 * HEADER + 2 * PAGE);
    let memory = load(&bytes).unwrap().0.into_inner();
    assert_eq!(memory.keys().copied().collect::<Vec<_>>(), [64, 65, 67]);
    assert!(memory[&64].iter().all(|byte| *byte == 0));
    assert!(memory[&67].iter().all(|byte| *byte == 67));
}

const GOLDEN: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../tests/compat/memory-2.state"
);

#[test]
fn a_golden_channel_is_read_and_written() {
    let golden = std::fs::read(GOLDEN).unwrap();
    let loaded = load(&golden).unwrap().0.into_inner();
    assert_eq!(loaded.keys().copied().collect::<Vec<_>>(), [64, 65, 67]);
    assert_eq!(stream(64, 0b1011), golden);
}

#[test]
#[ignore = "writes into tests/compat, see its README"]
fn write_golden_memory() {
    std::fs::File::create_new(GOLDEN)
        .and_then(|mut file| file.write_all(&stream(64, 0b1011)))
        .unwrap();
}

#[test]
fn a_zero_page_that_is_new_is_not_mentioned() {
    let mut bytes = Vec::new();
    let mut writer = RamWriter::begin(&mut bytes, 0).unwrap();
    let sent = writer.pages(64, 1, content, |_| true).unwrap();
    assert_eq!(sent, Sent::default());
    assert_eq!(writer.bytes(), PREFACE as u64);
}

#[test]
fn a_hole_is_zero_whatever_was_read_before_it() {
    let mut bytes = Vec::new();
    let mut writer = RamWriter::begin(&mut bytes, 0).unwrap();
    // The record before leaves its pages in the buffer.
    writer.pages(64, 0b110, content, |_| false).unwrap();
    let holes = |page, into: &mut [u8]| match page {
        65 | 66 => Ok(PageRead::Hole),
        page => content(page, into),
    };
    let sent = writer.pages(64, 0b1110, holes, |_| false).unwrap();
    let (content, zero) = (0b1000, 0b110);
    assert_eq!(sent, Sent { content, zero });
    writer.end().unwrap();
    let memory = load(&bytes).unwrap().0.into_inner();
    for (page, byte) in [(65, 0), (66, 0), (67, 67)] {
        assert!(memory[&page].iter().all(|found| *found == byte), "{page}");
    }
}

#[test]
fn every_flipped_bit_is_found_before_anything_of_the_record_is_loaded() {
    let bytes = stream(64, 0b11);
    let header = (PREFACE + HEADER) * 8;
    let sample = (header..bytes.len() * 8).step_by(977);
    for bit in (0..header).chain(sample) {
        let mut wrong = bytes.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        let memory = Memory::default();
        let result = RamReader::begin(wrong.as_slice(), 0, 1).and_then(|mut reader| {
            while reader.record(&memory)? {}
            Ok(())
        });
        assert!(result.is_err(), "bit {bit}");
        let loaded = memory.0.into_inner();
        for (page, bytes) in loaded {
            let mut right = vec![0; PAGE];
            content(page, &mut right).unwrap();
            assert_eq!(bytes, right, "page {page} was loaded wrongly, bit {bit}");
        }
    }
}

#[test]
fn a_flipped_bit_of_a_header_is_found_without_waiting_for_content() {
    let (mut wrong, end) = (stream(64, 0b11), PREFACE + HEADER);
    wrong.truncate(end);
    for bit in PREFACE * 8..end * 8 {
        wrong[bit / 8] ^= 1 << (bit % 8);
        let error = load(&wrong).map(drop).unwrap_err();
        assert!(matches!(error, RamError::Corrupted { .. }), "bit {bit}");
        wrong[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn every_truncation_is_found() {
    let bytes = stream(64, 0b11);
    for length in (0..bytes.len()).step_by(61) {
        assert!(load(&bytes[..length]).is_err(), "{length}");
    }
    let whole = bytes.len() - HEADER;
    assert!(load(&bytes[..whole]).is_err(), "without its end");
}

#[test]
fn hostile_records_are_refused() {
    let forge = |words: [u64; 3]| {
        let mut bytes = preface(0).to_vec();
        let length = HEADER + words[1].count_ones() as usize * PAGE;
        let mut writer = RamWriter {
            channel: &mut bytes,
            number: 0,
            records: 0,
            bytes: 0,
            buffer: vec![0; length].into(),
        };
        writer.seal(length, PAGES, words).unwrap();
        load(&bytes).map(drop).unwrap_err().to_string()
    };
    assert!(forge([1, 1, 0]).contains("cannot be one"));
    assert!(forge([1 << 60, 1, 0]).contains("cannot be one"));
    assert!(forge([64, 3, 1]).contains("zero and is not"));
    assert!(forge([6400, 1, 0]).contains("no such memory"));
    assert!(forge([960, 0, 1 << 63]).contains("no such memory"));
}

#[test]
fn a_record_on_the_wrong_channel_could_overtake_another() {
    assert_eq!(channel_of(64, 4), 1);
    assert_eq!(channel_of(320, 4), 1);
    let bytes = stream(64, 1);
    let mut reader = RamReader::begin(bytes.as_slice(), 0, 4).unwrap();
    let error = reader.record(&Memory::default()).unwrap_err().to_string();
    assert!(error.contains("another channel"), "{error}");
    assert!(RamReader::begin(bytes.as_slice(), 1, 4).is_err());
}
