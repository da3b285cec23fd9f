//! A client with our server, and with one that says exactly what the test wants.

mod hostile;
mod migration;
mod scripted;

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::thread;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Client;
use crate::fake::{self, AREAS, Fake, LONG, Served};
use crate::{
    Command, DeviceFlags, DmaRegion, Ended, Error, IrqAction, IrqData, IrqFlags, RegionFlags, pci,
};

fn start() -> (Client, Served) {
    let (socket, served) = Served::start(Fake::new(), LONG);
    (Client::new(socket, LONG).unwrap(), served)
}

fn end(client: Client, served: Served) -> Fake {
    drop(client);
    let (ended, device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    device
}

fn is_refused(result: Result<(), Error>, with: Errno) -> bool {
    matches!(result, Err(Error::Remote { errno, .. }) if errno == with)
}

#[test]
fn what_the_device_is() {
    let (client, served) = start();
    let info = client.device_info().unwrap();
    assert_eq!(info.flags, DeviceFlags::PCI | DeviceFlags::RESET);
    assert_eq!((info.regions, info.irqs), (pci::REGIONS, pci::IRQS));

    let plain = client.region_info(0).unwrap();
    assert_eq!(plain.flags, RegionFlags::READ | RegionFlags::WRITE);
    assert_eq!(plain.size, fake::SIZE as u64);
    assert!(plain.areas.is_empty() && plain.file.is_none());
    for (index, areas) in [(fake::SPARSE, AREAS.as_slice()), (fake::MAPPED, &[])] {
        let region = client.region_info(index).unwrap();
        assert_eq!(region.flags, RegionFlags::all());
        assert_eq!((region.size, region.offset), (0x5000, 0x1000));
        assert_eq!(region.areas, areas);
        let mut byte = [0];
        let file = File::from(region.file.unwrap());
        file.read_exact_at(&mut byte, region.offset).unwrap();
        assert_eq!(byte, [7]);
    }
    let absent = client.region_info(8).unwrap();
    assert_eq!((absent.flags, absent.size), (RegionFlags::empty(), 0));
    let broken = client.region_info(fake::BROKEN).map(drop);
    assert!(is_refused(broken, Errno::EREMOTEIO));
    assert!(is_refused(client.region_info(9).map(drop), Errno::EINVAL));

    let msix = client.irq_info(pci::MSIX_IRQ).unwrap();
    assert_eq!(msix.flags, IrqFlags::EVENTFD | IrqFlags::NORESIZE);
    assert_eq!(msix.count, 150);
    assert!(is_refused(client.irq_info(5).map(drop), Errno::EINVAL));
    assert!(end(client, served).taken().is_empty());
}

#[test]
fn interrupts_get_their_eventfds_in_as_many_messages_as_it_takes() {
    let (client, served) = start();
    let eventfds: Vec<_> = (0..150)
        .map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap())
        .collect();
    let some = |range: std::ops::Range<usize>| eventfds[range].iter().map(|it| Some(it.as_fd()));
    let trigger = |start, eventfds: Vec<Option<BorrowedFd<'_>>>| {
        let action = IrqAction::Trigger(IrqData::Eventfds(eventfds));
        client.set_irqs(pci::MSIX_IRQ, start, &action).unwrap();
    };
    trigger(0, some(0..150).collect());
    trigger(10, some(0..2).chain([None; 70]).chain(some(2..3)).collect());
    trigger(0, Vec::new());
    let mut device = end(client, served);
    let done = [
        "trigger (2, 0, 64, 0)",
        "trigger (2, 64, 64, 0)",
        "trigger (2, 128, 22, 0)",
        "trigger (2, 10, 2, 0)",
        "trigger (2, 12, 0, 70)",
        "trigger (2, 82, 1, 0)",
        "disable (2, 0)",
    ];
    assert_eq!(device.taken(), done);
}

#[test]
fn an_interrupt_reaches_the_client() {
    let (socket, served) = Served::start(Fake::new(), LONG);
    let client = Client::new(socket, LONG).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let action = IrqAction::Trigger(IrqData::Eventfds(vec![Some(theirs.as_fd())]));
    client.set_irqs(pci::INTX_IRQ, 0, &action).unwrap();
    served.stop();
    let (ended, device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::Stopped);
    // It was closed with the rest that was the client's: nobody else has the other end.
    assert!(device.eventfds.is_empty());
    drop(theirs);
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
}

#[test]
fn interrupts_are_triggered_masked_and_disabled() {
    let (client, served) = start();
    let set =
        |index, start, action: IrqAction<BorrowedFd<'_>>| client.set_irqs(index, start, &action);
    set(0, 0, IrqAction::Mask(IrqData::Count(1))).unwrap();
    set(0, 0, IrqAction::Unmask(IrqData::Chosen(vec![true]))).unwrap();
    let chosen = vec![true, false, true];
    set(2, 5, IrqAction::Trigger(IrqData::Chosen(chosen))).unwrap();
    set(2, 0, IrqAction::Disable).unwrap();
    let masked = set(2, 0, IrqAction::Mask(IrqData::Count(1)));
    assert!(is_refused(masked, Errno::EINVAL));
    let (here, _there) = UnixStream::pair().unwrap();
    let eventfds = || IrqData::Eventfds(vec![Some(here.as_fd()), None]);
    let wrapping = set(2, u32::MAX, IrqAction::Trigger(eventfds()));
    assert!(is_refused(wrapping, Errno::EINVAL));
    let long = IrqData::Chosen(vec![true; 2 << 20]);
    let long = set(2, 0, IrqAction::Trigger(long)).unwrap_err();
    assert_eq!(
        long.to_string(),
        "DEVICE_SET_IRQS does not fit into a message"
    );
    set(
        0,
        0,
        IrqAction::Mask(IrqData::Eventfds(vec![Some(here.as_fd())])),
    )
    .unwrap();
    let mut device = end(client, served);
    let done = [
        "mask (0, 0, 1)",
        "unmask (0, 0, [true])",
        "trigger (2, 5, [true, false, true])",
        "disable (2, 0)",
        "mask (0, 0, 1, 0)",
        "disable (0, 0)",
    ];
    assert_eq!(device.taken(), done);
}

#[test]
fn regions_are_read_and_written_in_as_many_messages_as_it_takes() {
    let (client, served) = start();
    let data: Vec<u8> = (0..fake::SIZE - 3).map(|at| at.to_le_bytes()[0]).collect();
    client.region_write(0, 3, &data).unwrap();
    let mut read = vec![0; data.len()];
    client.region_read(0, 3, &mut read).unwrap();
    assert!(read == data);
    client.region_read(0, 3, &mut []).unwrap();
    client.region_write(0, 3, &[]).unwrap();
    for offset in [fake::SIZE as u64 - 1, u64::MAX] {
        let outside = client.region_read(0, offset, &mut [0; 2]);
        assert!(is_refused(outside, Errno::EINVAL), "{offset}");
        let outside = client.region_write(0, offset, &[0; 2]);
        assert!(is_refused(outside, Errno::EINVAL), "{offset}");
    }
    let mut device = end(client, served);
    let rest = data.len() - (2 << 20);
    let mut done = Vec::new();
    for call in ["write", "read"] {
        for (offset, count) in [(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, rest)] {
            done.push(format!("{call} {:?}", (0, offset + 3, count)));
        }
    }
    assert_eq!(device.taken(), done);
}

#[test]
fn memory_comes_with_its_file_or_without() {
    let (client, served) = start();
    let region = DmaRegion {
        address: 0x10_0000,
        size: 0x2000,
        offset: 0x3000,
        readable: true,
        writable: false,
    };
    let (here, there) = UnixStream::pair().unwrap();
    client.dma_map(region, Some(here.as_fd())).unwrap();
    let next = DmaRegion {
        address: 0,
        offset: 0,
        writable: true,
        ..region
    };
    client.dma_map(next, None).unwrap();
    let again = client.dma_map(region, None);
    assert!(is_refused(again, Errno::EEXIST));
    client.dma_unmap(0, 0x2000).unwrap();
    assert!(is_refused(client.dma_unmap(0, 0x2000), Errno::ENOENT));
    client.dma_unmap(0x10_0000, 0x2000).unwrap();
    client.reset().unwrap();
    // The device has no copy of the file any more.
    drop(here);
    let mut there = File::from(OwnedFd::from(there));
    assert_eq!(there.read(&mut [0]).unwrap(), 0);
    let mut device = end(client, served);
    let done = [
        "map (1048576, 8192, 12288, true, false)",
        "map (0, 8192, 0, true, true)",
        "unmap (0, 8192)",
        "unmap (1048576, 8192)",
        "reset ()",
    ];
    assert_eq!(device.taken(), done);
}

#[test]
fn threads_do_not_get_each_other_s_replies() {
    let (client, served) = start();
    thread::scope(|scope| {
        for thread in 0..4u8 {
            let client = &client;
            scope.spawn(move || {
                for round in 0..200u8 {
                    let offset = u64::from(thread) * 8;
                    client.region_write(0, offset, &[thread, round]).unwrap();
                    let mut read = [0; 2];
                    client.region_read(0, offset, &mut read).unwrap();
                    assert_eq!(read, [thread, round]);
                }
            });
        }
    });
    assert_eq!(end(client, served).taken().len(), 4 * 2 * 200);
}

#[test]
fn ids_of_messages_begin_again() {
    let (client, served) = start();
    for _ in 0..70_000 {
        client.irq_info(0).unwrap();
    }
    end(client, served);
}

#[test]
fn a_server_that_is_gone_is_seen_and_told() {
    let (client, served) = start();
    served.stop();
    served.ended().0.unwrap();
    let command = Command::DEVICE_RESET;
    for _ in 0..2 {
        assert!(matches!(client.reset(), Err(Error::Closed)), "{command}");
    }
    // What one watches for.
    let mut fds = [nix::poll::PollFd::new(
        client.as_fd(),
        nix::poll::PollFlags::empty(),
    )];
    nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE).unwrap();
    let seen = fds[0].revents().unwrap();
    assert!(seen.contains(nix::poll::PollFlags::POLLHUP));
}
