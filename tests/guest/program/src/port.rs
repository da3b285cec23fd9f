//! Port I/O. Allowed at CPL3 by the I/O bitmap in entry.s; each access costs a VM exit.

use core::arch::asm;

macro_rules! port_access {
    ($read:ident, $write:ident, $type:ty, $register:tt) => {
        pub fn $read(port: u16) -> $type {
            let value;
            // SAFETY: reading a port reaches devices, not Rust's memory.
            unsafe { asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value, options(nostack, preserves_flags)) };
            value
        }
        pub fn $write(port: u16, value: $type) {
            // SAFETY: none of the ports that this program writes starts DMA.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nostack, preserves_flags)) };
        }
    };
}
port_access!(read8, write8, u8, "al");
port_access!(read16, write16, u16, "ax");
port_access!(read32, write32, u32, "eax");
