//! From a kernel image, or a firmware's, to the first instruction of a vCPU.
//!
//! [`BootSource::load`] fills guest memory with all that a kernel expects to find, and
//! says with what registers its first vCPU starts. It may be called again and again:
//! a reset boots the same images once more, over whatever the guest left behind.
//!
//! ```text
//! 0x00500  GDT                        0x20000  command line
//! 0x06000  PVH: start info, modules   0x9fc00  reserved up to 1 MiB
//! 0x07000  PVH: memory map,           0xe0000  ACPI tables
//!          or bzImage: zero page      1 MiB …  kernel
//! 0x09000  page tables (64-bit entry) …        initrd, as high as the kernel allows
//! ```
//!
//! A machine may start in a [`Firmware`] instead, which loads what it boots by itself.
//!
//! Images are checked once, when they are opened; loading uses what was checked then and
//! never parses again, so an image that changes on disk meanwhile can give a broken
//! guest, but no write outside of what was checked. `linux-loader` has the structures
//! of both boot protocols and writes them; its own image parsers are not used, because
//! their errors name no values, they leave `.bss` as it was, and parse at each load.

pub mod acpi;
mod bzimage;
mod elf;
mod firmware;
mod image;
mod initrd;
mod kernel;
mod memory_map;
mod pvh;
mod registers;
mod source;
#[cfg(test)]
mod testing;
mod zero_page;

pub use firmware::{Firmware, FirmwareError, FirmwareProblem};
pub use image::{FileError, ImageError};
pub use initrd::{Initrd, InitrdError, InitrdProblem};
pub use kernel::{Kernel, KernelError, KernelProblem};
pub use memory_map::firmware_map;
pub use registers::{BootMode, EntryPoint};
pub use source::{BootError, BootSource};
