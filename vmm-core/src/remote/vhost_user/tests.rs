mod away;
mod backend;
mod migration;
mod raw;
mod start;
mod trouble;

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::backend::{Behaviour, FEATURES, FakeBackend};
use self::raw::Answer;
use super::*;
use crate::memory::{LayoutListener, Memory, Ram, Region};
use crate::remote::Endpoint;
use crate::transport::{
    ActivatedQueue, DeviceKind, DeviceNotifier, QueueIndex, RingBase, StoppedQueue, VirtioDevice,
};

const MIB: u64 = 1 << 20;

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);
impl DeviceNotifier for Notes {
    fn config_changed(&self, change: &mut dyn FnMut()) {
        change();
        self.0.lock().unwrap().push("config changed".into());
    }
    fn trouble(&self, error: &(dyn Error + 'static)) {
        self.0.lock().unwrap().push(error.to_string());
    }
}
impl Notes {
    fn wait_for(&self, count: usize) -> Vec<String> {
        eventually(|| self.0.lock().unwrap().len() >= count);
        self.0.lock().unwrap().clone()
    }
}

fn eventually(what: impl Fn() -> bool) {
    for _ in 0..4000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it never came about");
}

struct Machine {
    device: Arc<VhostUserDevice>,
    memory: Arc<Memory>,
    notes: Arc<Notes>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

fn region(gpa: u64) -> Region {
    let ram = Ram::allocate(MIB, None).unwrap();
    let file = Arc::clone(ram.regions().unwrap()[0].file());
    Region::map(gpa, MIB, file, 0).unwrap()
}

fn blk() -> VhostUserConfig {
    let mut config = VhostUserConfig::new(DeviceKind::BLK, "disk0");
    // Nothing here takes long, but the machine may be busy.
    config.deadline = Duration::from_secs(20);
    config
}

/// For back-ends that are silent.
fn impatient() -> VhostUserConfig {
    let mut config = blk();
    config.deadline = Duration::from_millis(300);
    config
}

fn connect(config: VhostUserConfig, fd: OwnedFd) -> Result<Arc<VhostUserDevice>, VhostUserError> {
    let watchdog = Watchdog::start().unwrap();
    VhostUserDevice::connect(
        config,
        Endpoint::Connected(fd),
        &Arc::new(Memory::default()),
        &watchdog,
    )
}

impl Machine {
    fn new(endpoint: Endpoint, config: VhostUserConfig) -> Self {
        let memory = Arc::new(Memory::default());
        let mut layout = memory.begin();
        layout.add(region(0)).unwrap();
        layout.commit().unwrap();
        let watchdog = Watchdog::start().unwrap();
        let device = VhostUserDevice::connect(config, endpoint, &memory, &watchdog).unwrap();
        memory.subscribe(device.clone()).unwrap();
        let notes = Arc::new(Notes::default());
        device.set_notifier(notes.clone());
        let events = || (0..4).map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            device,
            memory,
            notes,
            kicks: events().collect(),
            calls: events().collect(),
        }
    }

    fn on(backend: &FakeBackend) -> Self {
        Self::new(Endpoint::Connected(backend.pair()), blk())
    }

    fn listening(backend: &FakeBackend, folder: &Path) -> Self {
        let path = folder.join("disk0.sock");
        backend.listen(UnixListener::bind(&path).unwrap());
        Self::new(Endpoint::Path(path), blk())
    }

    fn queue(&self, index: u16, base: u16) -> ActivatedQueue {
        let at = 0x1_0000 * (u64::from(index) + 1);
        ActivatedQueue {
            index: QueueIndex(index),
            size: 128,
            descriptors: at,
            driver: at + 0x1000,
            device: at + 0x2000,
            base: RingBase(base),
            kick: Arc::new(self.kicks[usize::from(index)].try_clone().unwrap()),
            call: Arc::new(self.calls[usize::from(index)].try_clone().unwrap()),
        }
    }

    fn activate(&self) {
        let queues = vec![self.queue(0, 0), self.queue(2, 5)];
        self.device.activate(1 << 32 | 1 << 9, queues).unwrap();
    }

    /// What a back-end leaves in a used ring.
    fn set_used(&self, queue: u16, index: u16) {
        let at = 0x1_0000 * (u64::from(queue) + 1) + 0x2002;
        let guest = self.memory.guest();
        guest.write_obj(index, GuestAddress(at)).unwrap();
    }
}
