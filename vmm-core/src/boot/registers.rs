//! The registers with which the first vCPU starts, and the tables that they point to.
//!
//! | mode | entered as | parameters in |
//! |---|---|---|
//! | [`BootMode::Pvh32`] | 32-bit protected mode, no paging | `ebx` |
//! | [`BootMode::Long64`] | 64-bit mode, the first 4 GiB mapped to themselves | `rsi` |

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest-physical address of the descriptor table.
const GDT: u64 = 0x500;
/// Guest-physical address of the top page table; the others follow it.
const PAGE_TABLES: u64 = 0x9000;
const PAGE: u64 = 4096;
/// Each maps 1 GiB.
const PAGE_DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SHIFT: u32 = 21;

const CR0_PE: u64 = 1;
/// Reads as 1 on every processor of today.
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags is always set; interrupts are off.
const RFLAGS: u64 = 2;

/// Linux's `__BOOT_CS`, `__BOOT_DS` and the task state segment behind them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// Xen's x86/HVM direct boot ABI, which ELF kernels use.
    Pvh32,
    /// Linux's 64-bit boot protocol, which bzImages use.
    Long64,
}

/// Where and how the first vCPU starts. The others wait for its SIPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPoint {
    /// Address of the first instruction.
    pub rip: u64,
    /// State of the processor there.
    pub mode: BootMode,
    /// Guest-physical address of the start info, or of the zero page.
    pub parameters: u64,
}

impl EntryPoint {
    /// The general registers.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs {
            rip: self.rip,
            rflags: RFLAGS,
            ..Default::default()
        };
        match self.mode {
            BootMode::Pvh32 => regs.rbx = self.parameters,
            BootMode::Long64 => regs.rsi = self.parameters,
        }
        regs
    }

    /// The special registers, given those of the vCPU, of which the APIC base is kept.
    #[must_use]
    pub fn sregs(&self, vcpu: &kvm_sregs) -> kvm_sregs {
        let data = segment(DATA, DATA_FLAT);
        let mut sregs = kvm_sregs {
            cs: segment(CODE, code(self.mode)),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: segment(TASK, TASK_EMPTY),
            ldt: kvm_segment {
                unusable: 1,
                ..Default::default()
            },
            gdt: kvm_dtable {
                base: GDT,
                limit: GDT_LIMIT,
                ..Default::default()
            },
            cr0: CR0_PE | CR0_ET,
            apic_base: vcpu.apic_base,
            ..Default::default()
        };
        if self.mode == BootMode::Long64 {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        sregs
    }

    /// Writes the descriptor table, and for 64-bit mode the page tables.
    pub(super) fn write_tables(
        &self,
        memory: &GuestMemoryMmap<()>,
    ) -> Result<(), vm_memory::GuestMemoryError> {
        for (selector, descriptor) in [
            (0, 0),
            (8, 0),
            (CODE, code(self.mode)),
            (DATA, DATA_FLAT),
            (TASK, TASK_EMPTY),
        ] {
            memory.write_obj(descriptor, GuestAddress(GDT + u64::from(selector)))?;
        }
        if self.mode == BootMode::Long64 {
            for (table, bytes) in (0..).zip(page_tables()) {
                memory.write_slice(&bytes, GuestAddress(PAGE_TABLES + table * PAGE))?;
            }
        }
        Ok(())
    }
}

/// Descriptors as they stand in memory (Intel SDM 3A, 3.4.5).
const DATA_FLAT: u64 = 0x00cf_9300_0000_ffff;
const CODE_FLAT_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
/// A busy 32-bit task state segment of 0x68 bytes at 0, which nothing uses.
const TASK_EMPTY: u64 = 0x0000_8b00_0000_0067;
const GDT_LIMIT: u16 = TASK + 7;

const fn code(mode: BootMode) -> u64 {
    match mode {
        BootMode::Pvh32 => CODE_FLAT_32,
        BootMode::Long64 => CODE_64,
    }
}

/// What the processor makes of a descriptor when it loads it.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits = |shift: u32, count: u32| descriptor >> shift & ((1 << count) - 1);
    let flag = |shift: u32| u8::from(bits(shift, 1) != 0);
    let limit = u32::try_from(bits(0, 16) | bits(48, 4) << 16).unwrap_or(0);
    let granular = flag(55);
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: if granular == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector,
        type_: u8::try_from(bits(40, 4)).unwrap_or(0),
        s: flag(44),
        dpl: u8::try_from(bits(45, 2)).unwrap_or(0),
        present: flag(47),
        avl: flag(52),
        l: flag(53),
        db: flag(54),
        g: granular,
        ..Default::default()
    }
}

/// One top table, one page-directory pointer table, and the page directories.
fn page_tables() -> impl Iterator<Item = Vec<u8>> {
    let pointers = PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    let table = |entries: Vec<u64>| -> Vec<u8> {
        let absent = ENTRIES - entries.len() as u64;
        let absent = (0..absent).map(|_| 0);
        let entries = entries.into_iter().chain(absent);
        entries.flat_map(u64::to_le_bytes).collect()
    };
    let top = vec![pointers | PRESENT_WRITABLE];
    let second = (0..PAGE_DIRECTORIES)
        .map(|i| (directories + i * PAGE) | PRESENT_WRITABLE)
        .collect();
    let third = (0..PAGE_DIRECTORIES).map(|directory| {
        (0..ENTRIES)
            .map(|i| (directory * ENTRIES + i) << LARGE_PAGE_SHIFT | PRESENT_WRITABLE | LARGE_PAGE)
            .collect()
    });
    [top, second].into_iter().chain(third).map(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::memory;

    const PVH: EntryPoint = EntryPoint {
        rip: 0x10_0000,
        mode: BootMode::Pvh32,
        parameters: 0x6000,
    };
    const LONG: EntryPoint = EntryPoint {
        rip: 0x100_0200,
        mode: BootMode::Long64,
        parameters: 0x7000,
    };

    #[test]
    fn pvh_state_is_what_the_abi_says() {
        let regs = PVH.regs();
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x10_0000, 0x6000, 2));
        let s = PVH.sregs(&kvm_sregs {
            apic_base: 0xfee0_0900,
            cr3: 7,
            cr4: 7,
            efer: 0x500,
            ..Default::default()
        });
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0));
        assert_eq!(s.apic_base, 0xfee0_0900);
        assert_eq!((s.cs.base, s.cs.limit, s.cs.type_), (0, 0xffff_ffff, 0xb));
        assert_eq!((s.cs.db, s.cs.l, s.cs.g, s.cs.s), (1, 0, 1, 1));
        for data in [s.ds, s.es, s.ss] {
            assert_eq!((data.base, data.limit, data.type_), (0, 0xffff_ffff, 3));
            assert_eq!((data.db, data.present, data.dpl), (1, 1, 0));
        }
        assert_eq!((s.tr.limit, s.tr.type_, s.tr.s), (0x67, 0xb, 0));
    }

    #[test]
    fn long_mode_state_is_what_linux_says() {
        let regs = LONG.regs();
        assert_eq!((regs.rip, regs.rsi, regs.rbx), (0x100_0200, 0x7000, 0));
        let s = LONG.sregs(&kvm_sregs::default());
        assert_eq!((s.cr0, s.cr4, s.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((s.cs.selector, s.cs.l, s.cs.db), (0x10, 1, 0));
        assert_eq!(s.ds.selector, 0x18);
    }

    #[test]
    fn the_segments_are_those_of_the_table_in_memory() {
        let memory = memory(2);
        for entry in [PVH, LONG] {
            entry.write_tables(&memory).unwrap();
            let s = entry.sregs(&kvm_sregs::default());
            for loaded in [s.cs, s.ds, s.tr] {
                let at = GDT + u64::from(loaded.selector);
                assert!(loaded.selector + 7 <= s.gdt.limit);
                let descriptor: u64 = memory.read_obj(GuestAddress(at)).unwrap();
                assert_eq!(loaded, segment(loaded.selector, descriptor));
            }
        }
    }

    #[test]
    fn the_page_tables_map_4_gib_to_themselves() {
        let memory = memory(2);
        LONG.write_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory
                .read_obj(GuestAddress((table & !0xfff) + index * 8))
                .unwrap()
        };
        for address in [0, 0x1234_5678, 0xbfff_ffff, 0xffff_ffff_u64] {
            let top = entry(LONG.sregs(&kvm_sregs::default()).cr3, address >> 39);
            let pointer = entry(top, address >> 30 & 0x1ff);
            let page = entry(pointer, address >> 21 & 0x1ff);
            assert_eq!([top & 3, pointer & 3, page & 0x83], [3, 3, 0x83]);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
        }
        assert_eq!(entry(PAGE_TABLES, 1), 0);
    }
}
