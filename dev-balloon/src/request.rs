//! Requests to inflate and deflate: arrays of page numbers (virtio 1.3, 5.5.6.1).

use device_kit::{Chain, QueueFault};

/// Bytes of a page's number.
const NUMBER: usize = 4;
/// Most pages of one request, so that one does not keep the others waiting. Linux asks for 256.
const MOST: usize = 64 << 10;
/// Bytes that are read at a time.
const PART: usize = 4096;

/// Reads the pages that a request names, in ascending runs without overlap: first page and number
/// of pages.
pub(crate) fn runs(chain: &Chain, numbers: &mut Vec<u32>) -> Result<Vec<(u64, u64)>, QueueFault> {
    let refuse = |reason| QueueFault::Request {
        head: chain.head(),
        reason,
    };
    let len = chain.readable_len();
    if len == 0 || !len.is_multiple_of(NUMBER) {
        return Err(refuse("page numbers have four bytes each"));
    }
    if len > MOST * NUMBER {
        return Err(refuse("it names more than 65536 pages"));
    }
    numbers.clear();
    let mut part = [0; PART];
    for offset in (0..len).step_by(PART) {
        let part = &mut part[..PART.min(len - offset)];
        chain.read(offset, part)?;
        let (words, _) = part.as_chunks();
        numbers.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
    }
    Ok(merge(numbers))
}

fn merge(numbers: &mut Vec<u32>) -> Vec<(u64, u64)> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for page in numbers.iter().map(|page| u64::from(*page)) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_any_order_become_runs() {
        let mut numbers = vec![9, 3, 4, 2, 4, u32::MAX, 10];
        let expected = [(2, 3), (9, 2), (u32::MAX.into(), 1)];
        assert_eq!(merge(&mut numbers), expected);
    }
}
