//! Memory that is not Rust's: device registers and firmware tables.
//!
//! All memory is mapped one to one, so a guest-physical address is also a pointer.

/// An integer as devices and tables hold it.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// Reads one word at any address, aligned or not.
pub fn read<T: Word>(address: u64) -> T {
    let pointer = address as *const T;
    if pointer.is_aligned() {
        // SAFETY: the page is mapped (a page fault ends the program with its address), the type
        // has no invalid values, and a volatile read makes no claim about other accesses.
        unsafe { pointer.read_volatile() }
    } else {
        // SAFETY: as above; firmware tables are not volatile, and only they are unaligned.
        unsafe { pointer.read_unaligned() }
    }
}

/// Writes one word to a device register.
pub fn write<T: Word>(address: u64, value: T) {
    // SAFETY: callers hold the address of a device register or of memory that they took out of the
    // free ranges, which no Rust reference covers.
    unsafe { (address as *mut T).write_volatile(value) }
}
