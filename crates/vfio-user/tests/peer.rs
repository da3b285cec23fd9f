//! The `vfio_user` crate, which nobody here wrote, as the client of our server and as the server of
//! our client.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tempfile::TempDir;
use vfio_user::{
    Area, Client, Device, DeviceFlags, DeviceInfo, DmaLog, DmaRegion, Ended, Errno, Error,
    IrqAction, IrqData, IrqFlags, IrqInfo, Migration, Region, RegionFlags, pci, serve,
};

const LONG: Duration = Duration::from_secs(60);
const DOORBELLS: Area = Area {
    offset: 0x1000,
    size: 0x1000,
};
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const SET_EVENTFDS: u32 = 4 | 32;

fn memfd(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file
}

fn listening() -> (TempDir, PathBuf, UnixListener) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device");
    let listener = UnixListener::bind(&path).unwrap();
    (folder, path, listener)
}

/// A device that reads the eight bytes of memory whose address is written to its first register into
/// its second one, and then interrupts.
struct Reader {
    registers: [u8; 16],
    doorbells: File,
    memory: Vec<(DmaRegion, File)>,
    interrupt: Option<File>,
}

impl Device for Reader {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            flags: DeviceFlags::PCI | DeviceFlags::RESET,
            regions: 2,
            irqs: pci::IRQS,
        }
    }

    fn region(&self, index: u32) -> Result<Region<'_>, Errno> {
        let read_write = RegionFlags::READ | RegionFlags::WRITE;
        Ok(if index == 0 {
            Region {
                flags: read_write,
                size: 16,
                ..Region::default()
            }
        } else {
            Region {
                flags: read_write | RegionFlags::MMAP,
                size: 0x2000,
                offset: 0,
                areas: vec![DOORBELLS],
                file: Some(self.doorbells.as_fd()),
            }
        })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo {
            flags: IrqFlags::EVENTFD | IrqFlags::NORESIZE,
            count: if index == pci::MSIX_IRQ { 4 } else { 0 },
        })
    }

    fn set_irqs(&mut self, _: u32, start: u32, action: IrqAction<OwnedFd>) -> Result<(), Errno> {
        self.interrupt = match action {
            IrqAction::Disable => None,
            IrqAction::Trigger(IrqData::Eventfds(mut eventfds)) => {
                assert_eq!((start, eventfds.len()), (1, 2));
                eventfds.pop().flatten().map(File::from)
            }
            _ => return Err(Errno::EINVAL),
        };
        Ok(())
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        assert_eq!(region, 0);
        let offset = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.registers[offset..][..data.len()]);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        assert_eq!((region, offset), (0, 0));
        let address = u64::from_le_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
        let has = |region: &DmaRegion| {
            (region.address..region.address + region.size - 7).contains(&address)
        };
        let memory = self.memory.iter().find(|it| has(&it.0));
        let (region, file) = memory.ok_or(Errno::EFAULT)?;
        let at = address - region.address + region.offset;
        file.read_exact_at(&mut self.registers[8..], at).unwrap();
        if let Some(mut interrupt) = self.interrupt.as_ref() {
            interrupt.write_all(&1u64.to_le_bytes()).unwrap();
        }
        Ok(())
    }

    fn dma_map(&mut self, region: DmaRegion, memory: Option<OwnedFd>) -> Result<(), Errno> {
        let file = memory.ok_or(Errno::EINVAL)?.into();
        self.memory.push((region, file));
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, _: u64) -> Result<(), Errno> {
        self.memory.retain(|it| it.0.address != address);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn Migration> {
        None
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        None
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.registers = [0; 16];
        Ok(())
    }
}

#[test]
fn a_client_of_others_uses_our_server() {
    let (_folder, path, listener) = listening();
    let server = thread::spawn(move || {
        let mut reader = Reader {
            registers: [9; 16],
            doorbells: memfd(&[3; 0x2000]),
            memory: Vec::new(),
            interrupt: None,
        };
        let socket = listener.accept().unwrap().0;
        let (_stop, stopped) = UnixStream::pair().unwrap();
        let ended = serve(&socket, &mut reader, stopped.as_fd(), LONG).unwrap();
        (ended, reader)
    });
    let mut client = peer::Client::new(&path).unwrap();

    let registers = client.region(0).unwrap();
    assert_eq!((registers.flags, registers.size), (3, 16));
    assert!(registers.file_offset.is_none() && registers.sparse_areas.is_empty());
    let doorbells = client.region(1).unwrap();
    assert_eq!((doorbells.flags, doorbells.size), (1 | 2 | 4 | 8, 0x2000));
    let areas = &doorbells.sparse_areas;
    assert_eq!(
        (areas.len(), areas[0].offset, areas[0].size),
        (1, 0x1000, 0x1000)
    );
    let mut byte = [0];
    let file = doorbells.file_offset.as_ref().unwrap();
    file.file().read_exact_at(&mut byte, 0x1000).unwrap();
    assert_eq!(byte, [3]);

    let irq = client.get_irq_info(pci::MSIX_IRQ).unwrap();
    assert_eq!((irq.index, irq.flags, irq.count), (2, 1 | 8, 4));
    let eventfds = [(); 2].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let numbers = eventfds.each_ref().map(|it| it.as_fd().as_raw_fd());
    client
        .set_irqs(pci::MSIX_IRQ, SET_EVENTFDS, 1, 2, &numbers)
        .unwrap();

    let memory = memfd(
        &(0..0x4000u32)
            .flat_map(u32::to_le_bytes)
            .collect::<Vec<_>>(),
    );
    client
        .dma_map(0x1000, 0x10_0000, 0x2000, memory.as_raw_fd())
        .unwrap();
    client
        .region_write(0, 0, &0x10_1008u64.to_le_bytes())
        .unwrap();
    assert_eq!(eventfds[1].read().unwrap(), 1);
    let mut read = [0; 8];
    client.region_read(0, 8, &mut read).unwrap();
    // 0x2008 bytes into the file.
    assert_eq!(read, [0x02, 0x08, 0, 0, 0x03, 0x08, 0, 0]);

    client.reset().unwrap();
    client.region_read(0, 8, &mut read).unwrap();
    assert_eq!(read, [0; 8]);
    client.dma_unmap(0x10_0000, 0x2000).unwrap();
    client
        .dma_map(0, 0x20_0000, 0x1000, memory.as_raw_fd())
        .unwrap();
    client.shutdown().unwrap();
    let (ended, reader) = server.join().unwrap();
    assert_eq!(ended, Ended::ClientGone);
    assert!(reader.memory.is_empty() && reader.interrupt.is_none());
}

/// What a server of others was asked, and one region's bytes.
#[derive(Default)]
struct Notes {
    calls: Vec<String>,
    bytes: Vec<u8>,
    eventfds: Vec<File>,
}

impl peer::ServerBackend for Notes {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == 1 {
            return Err(io::Error::other("not this one"));
        }
        let offset = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.bytes[offset..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).unwrap();
        self.bytes[offset..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: peer::DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        let with = file.map(|it| it.metadata().unwrap().len());
        let call = ("map", flags.bits(), offset, address, size, with);
        self.calls.push(format!("{call:?}"));
        Ok(())
    }

    fn dma_unmap(&mut self, flags: peer::DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let call = ("unmap", flags.bits(), address, size);
        self.calls.push(format!("{call:?}"));
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.calls.push("reset".into());
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        eventfds: Vec<File>,
    ) -> io::Result<()> {
        let call = ("irqs", index, flags, start, count, eventfds.len());
        self.calls.push(format!("{call:?}"));
        for mut eventfd in &eventfds {
            eventfd.write_all(&1u64.to_le_bytes())?;
        }
        self.eventfds.extend(eventfds);
        Ok(())
    }
}

/// Regions of a server of others: one that is only read and written, and one with an area. Types of
/// another crate are in them, which is not named here.
fn regions(file: &File) -> Vec<peer::ServerRegion> {
    let region = |index: u32, size: u64| {
        let mut region = peer::ServerRegion {
            region_info: Default::default(),
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        region.region_info.argsz = 32;
        region.region_info.index = index;
        region.region_info.size = size;
        region.region_info.flags = 3;
        region
    };
    let mut mapped = region(1, 0x2000);
    let mut area = peer::SparseArea {
        area: Default::default(),
    };
    area.area.offset = DOORBELLS.offset;
    area.area.size = DOORBELLS.size;
    mapped.sparse_areas = vec![area];
    mapped.region_info.flags |= 4;
    mapped.mmap_fd = Some(file.as_raw_fd());
    vec![region(0, 2 << 20), mapped]
}

#[test]
fn our_client_uses_a_server_of_others() {
    let (_folder, path, listener) = listening();
    let server = thread::spawn(move || {
        let file = memfd(&[3; 0x2000]);
        let irq = |index| peer::IrqInfo {
            index,
            flags: 1,
            count: 4,
        };
        let irqs = (0..3).map(irq).collect();
        let server = peer::Server::from_owned_fd(listener.into(), true, irqs, regions(&file));
        let mut notes = Notes {
            bytes: vec![0; 2 << 20],
            ..Notes::default()
        };
        server.run(&mut notes).unwrap();
        notes
    });
    let client = Client::new(UnixStream::connect(&path).unwrap(), LONG).unwrap();

    let info = client.device_info().unwrap();
    assert_eq!(info.flags, DeviceFlags::PCI | DeviceFlags::RESET);
    assert_eq!((info.regions, info.irqs), (2, 3));
    let plain = client.region_info(0).unwrap();
    assert_eq!((plain.size, plain.file.is_some()), (2 << 20, false));
    let mapped = client.region_info(1).unwrap();
    assert_eq!(mapped.areas, [DOORBELLS]);
    let mut byte = [0];
    let file = File::from(mapped.file.unwrap());
    file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [3]);
    let irq = client.irq_info(2).unwrap();
    assert_eq!((irq.flags, irq.count), (IrqFlags::EVENTFD, 4));

    // More than one message carries, and more eventfds than it takes at once.
    let data: Vec<u8> = (0..1_500_000u32).map(|at| at.to_le_bytes()[0]).collect();
    client.region_write(0, 100, &data).unwrap();
    let mut read = vec![0; data.len()];
    client.region_read(0, 100, &mut read).unwrap();
    assert!(read == data);
    let eventfds = [(); 3].map(|()| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let borrowed = eventfds.iter().map(|it| Some(it.as_fd())).collect();
    let action = IrqAction::Trigger(IrqData::Eventfds(borrowed));
    client.set_irqs(2, 1, &action).unwrap();
    for eventfd in &eventfds {
        assert_eq!(eventfd.read().unwrap(), 1);
    }
    client.set_irqs(2, 0, &IrqAction::Disable).unwrap();

    // What it refuses, with an error number or without, ends nothing.
    for (region, expected) in [(7, Errno::EINVAL), (1, Errno::EIO)] {
        let refused = client.region_read(region, 0, &mut [0]).unwrap_err();
        assert!(
            matches!(refused, Error::Remote { errno, .. } if errno == expected),
            "{refused:?}"
        );
    }
    let region = DmaRegion {
        address: 0x10_0000,
        size: 0x2000,
        offset: 0x1000,
        readable: true,
        writable: true,
    };
    let memory = memfd(&[0; 0x5000]);
    client.dma_map(region, Some(memory.as_fd())).unwrap();
    let other = DmaRegion {
        address: 0,
        offset: 0,
        writable: false,
        ..region
    };
    client.dma_map(other, None).unwrap();
    client.dma_unmap(0x10_0000, 0x2000).unwrap();
    client.reset().unwrap();
    drop(client);
    let expected = [
        r#"("irqs", 2, 36, 1, 1, 1)"#,
        r#"("irqs", 2, 36, 2, 1, 1)"#,
        r#"("irqs", 2, 36, 3, 1, 1)"#,
        r#"("irqs", 2, 33, 0, 0, 0)"#,
        r#"("map", 3, 4096, 1048576, 8192, Some(20480))"#,
        r#"("map", 1, 0, 0, 8192, None)"#,
        r#"("unmap", 0, 1048576, 8192)"#,
        "reset",
    ];
    assert_eq!(server.join().unwrap().calls, expected);
}
