//! A counting device as somebody else would write it: on the `vhost-user-backend` crate, with
//! nothing of ours. Its state is 8 bytes and nothing around them.
//!
//! `foreign-counter SOCKET [log] [state]`: with dirty logging, with state to move.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT as _};
use virtio_queue::QueueOwnedT as _;
use vm_memory::{
    ByteValued as _, Bytes as _, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;

const VERSION_1: u64 = 1 << 32;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

struct Counter {
    memory: Memory,
    next: Arc<AtomicU64>,
    log: bool,
    state: bool,
    transfer: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl VhostUserBackendMut for Counter {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        let log = if self.log {
            VhostUserVirtioFeatures::LOG_ALL.bits()
        } else {
            0
        };
        VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | log
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        features.set(VhostUserProtocolFeatures::LOG_SHMFD, self.log);
        features.set(VhostUserProtocolFeatures::DEVICE_STATE, self.state);
        features
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut vring = vrings[0].get_mut();
        let chains = vring
            .get_queue_mut()
            .iter(memory.clone())
            .map_err(io::Error::other)?;
        for chain in chains.collect::<Vec<_>>() {
            let head = chain.head_index();
            let mut written = 0;
            let mut token = 0_u64;
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            for descriptor in chain {
                if descriptor.is_write_only() {
                    let words = descriptor.len() as usize / 16;
                    let content: Vec<u8> = (0..words)
                        .flat_map(|_| [token, number])
                        .flat_map(u64::to_le_bytes)
                        .collect();
                    memory
                        .write_slice(&content, descriptor.addr())
                        .map_err(io::Error::other)?;
                    written = descriptor.len();
                } else {
                    memory
                        .read_slice(token.as_mut_slice(), descriptor.addr())
                        .map_err(io::Error::other)?;
                }
            }
            vring.add_used(head, written).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> io::Result<Option<File>> {
        let next = Arc::clone(&self.next);
        let work = move || match direction {
            VhostTransferStateDirection::SAVE => {
                file.write_all(&next.load(Ordering::SeqCst).to_le_bytes())
            }
            VhostTransferStateDirection::LOAD => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes)?;
                let bytes = <[u8; 8]>::try_from(bytes).map_err(|_| io::Error::other("no state"))?;
                next.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
                Ok(())
            }
        };
        self.transfer = Mutex::new(Some(thread::spawn(work)));
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        let transfer = self
            .transfer
            .lock()
            .map_err(|_| io::Error::other("poisoned"))?
            .take();
        let transfer = transfer.ok_or_else(|| io::Error::other("no transfer was begun"))?;
        transfer
            .join()
            .map_err(|_| io::Error::other("the transfer panicked"))?
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments
        .next()
        .ok_or("foreign-counter SOCKET [log] [state]")?;
    let words: Vec<String> = arguments.collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let counter = Counter {
        memory: memory.clone(),
        next: Arc::default(),
        log: has("log"),
        state: has("state"),
        transfer: Mutex::new(None),
    };
    let counter = Arc::new(Mutex::new(counter));
    let mut daemon = VhostUserDaemon::new("counter".into(), counter, memory)
        .map_err(|error| format!("no daemon: {error}"))?;
    daemon
        .serve(socket)
        .map_err(|error| format!("it cannot serve: {error}"))?;
    Ok(())
}
