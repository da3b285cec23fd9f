//! Who owns which RAM: a heap that only grows, and whole pages for the dirty work.
//!
//! Everything is allocated while the work is set up and kept to the end, so nothing is ever freed.
//! Low memory and the program's own image are never handed out.

use crate::console::fail;
use crate::protocol::Text;
use crate::pvh::{Range, StartInfo};
use crate::sync::SpinLock;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};

pub const PAGE: u64 = 4096;
/// What [`take_pages`] leaves for later allocations.
const HEAP_RESERVE: u64 = 1 << 20;
const MAX_FREE: usize = 64;

unsafe extern "C" {
    static image_end: u8;
}

struct Free {
    ranges: [Range; MAX_FREE],
    count: usize,
}

static FREE: SpinLock<Free> = SpinLock::new(Free {
    ranges: [Range { start: 0, end: 0 }; MAX_FREE],
    count: 0,
});

struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

// SAFETY: `alloc` hands out each byte of RAM once, from ranges that nothing else uses.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut free = FREE.lock();
        let count = free.count;
        for range in &mut free.ranges[..count] {
            let start = range.start.next_multiple_of(layout.align() as u64);
            if start + layout.size() as u64 <= range.end {
                range.start = start + layout.size() as u64;
                return start as *mut u8;
            }
        }
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

/// Takes over all RAM above the image.
pub fn init(info: &StartInfo) {
    let floor = (&raw const image_end as u64).next_multiple_of(PAGE);
    let mut free = FREE.lock();
    for range in info.ram() {
        let start = range.start.max(floor).next_multiple_of(PAGE);
        let end = range.end & !(PAGE - 1);
        if start < end {
            let slot = free.count;
            free.ranges[slot] = Range { start, end };
            free.count += 1;
        }
    }
    free.ranges[..MAX_FREE].sort_unstable_by_key(|range| {
        if range.end == 0 {
            u64::MAX
        } else {
            range.start
        }
    });
}

/// `bytes` of zeroed memory on a page boundary, for DMA; returns its address.
pub fn dma(bytes: usize) -> u64 {
    let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE as usize), PAGE as usize)
        .unwrap_or_else(|_| fail("dma-size", bytes as u64, 0, Text::new("")));
    // SAFETY: the size is not zero: callers ask for rings and buffers.
    let pointer = unsafe { alloc::alloc::alloc_zeroed(layout) };
    if pointer.is_null() {
        fail("out-of-memory", bytes as u64, 0, Text::new("dma"));
    }
    pointer as u64
}

/// Takes `bytes` of whole pages out of the free ranges, highest addresses first.
pub fn take_pages(bytes: u64) -> Vec<Range> {
    let mut taken = Vec::with_capacity(MAX_FREE);
    let mut left = bytes;
    let mut free = FREE.lock();
    let count = free.count;
    for (i, range) in free.ranges[..count].iter_mut().enumerate().rev() {
        let reserve = if i == 0 { HEAP_RESERVE } else { 0 };
        let floor = range.start.next_multiple_of(PAGE) + reserve;
        let take = range.end.saturating_sub(floor).min(left);
        if take > 0 {
            range.end -= take;
            left -= take;
            taken.push(Range {
                start: range.end,
                end: range.end + take,
            });
        }
    }
    drop(free);
    if left > 0 {
        fail("out-of-memory", bytes >> 20, left >> 20, Text::new("span"));
    }
    taken
}
