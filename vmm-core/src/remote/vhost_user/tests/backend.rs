//! A back-end on the `vhost` crate's own message handler, in a thread of the test.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandler,
};

pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 26 | 1 << 12 | 1 << 9;

/// A ring as the back-end was told of it.
#[derive(Default)]
pub(super) struct FakeRing {
    pub(super) size: u32,
    pub(super) base: u32,
    pub(super) descriptors: u64,
    pub(super) log: Option<u64>,
    pub(super) enabled: bool,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
}

/// What the back-end was told.
#[derive(Default)]
pub(super) struct Told {
    pub(super) messages: Vec<String>,
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) rings: BTreeMap<u32, FakeRing>,
    pub(super) regions: Vec<(u64, u64)>,
    pub(super) inflight_inodes: Vec<u64>,
    pub(super) config_writes: Vec<(u32, Vec<u8>)>,
    pub(super) log_size: u64,
}

/// How the back-end behaves.
#[derive(Clone)]
pub(super) struct Behaviour {
    pub(super) features: u64,
    pub(super) protocol: VhostUserProtocolFeatures,
    pub(super) rings: u64,
    pub(super) slots: u64,
    pub(super) config: Vec<u8>,
    /// The message that it never answers.
    pub(super) silent_at: Option<&'static str>,
    /// The size that it says of its inflight buffer.
    pub(super) inflight_size: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            features: FEATURES,
            protocol: VhostUserProtocolFeatures::all(),
            rings: 4,
            slots: 32,
            config: (0..60).collect(),
            silent_at: None,
            inflight_size: 4096,
        }
    }
}

#[derive(Default)]
struct Shared {
    told: Mutex<Told>,
    changed: Condvar,
    ended: Mutex<bool>,
    end: Condvar,
}

/// A back-end that serves one connection after the other.
#[derive(Clone, Default)]
pub(super) struct FakeBackend {
    pub(super) behaviour: Arc<Mutex<Behaviour>>,
    shared: Arc<Shared>,
    connection: Arc<Mutex<Option<UnixStream>>>,
}

impl FakeBackend {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        let backend = Self::default();
        *backend.behaviour.lock().unwrap() = behaviour;
        backend
    }

    /// One connection; the front-end's end of it.
    pub(super) fn pair(&self) -> OwnedFd {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let backend = self.clone();
        thread::spawn(move || backend.serve(theirs));
        ours.into()
    }

    /// Takes connections for as long as the test runs.
    pub(super) fn listen(&self, listener: UnixListener) {
        let backend = self.clone();
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                backend.serve(stream);
            }
        });
    }

    fn serve(&self, stream: UnixStream) {
        *self.connection.lock().unwrap() = Some(stream.try_clone().unwrap());
        let mut handler = BackendReqHandler::from_stream(stream, Arc::new(self.clone()));
        while handler.handle_request().is_ok() {}
        drop(self.connection.lock().unwrap().take());
    }

    /// Dies, as far as the front-end can see.
    pub(super) fn hang_up(&self) {
        let connection = self.connection.lock().unwrap();
        connection
            .as_ref()
            .unwrap()
            .shutdown(Shutdown::Both)
            .unwrap();
    }

    pub(super) fn told<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.shared.told.lock().unwrap())
    }

    /// Waits until something was told.
    pub(super) fn wait(&self, what: impl Fn(&Told) -> bool) {
        let told = self.shared.told.lock().unwrap();
        let limit = std::time::Duration::from_secs(20);
        let (told, timeout) = self
            .shared
            .changed
            .wait_timeout_while(told, limit, |told| !what(told))
            .unwrap();
        assert!(!timeout.timed_out(), "told only {:?}", told.messages);
    }

    fn hear(&self, message: &'static str, note: impl FnOnce(&mut Told)) {
        let silent = self.behaviour.lock().unwrap().silent_at == Some(message);
        {
            let mut told = self.shared.told.lock().unwrap();
            told.messages.push(message.into());
            note(&mut told);
        }
        self.shared.changed.notify_all();
        if silent {
            let ended = self.shared.ended.lock().unwrap();
            drop(self.shared.end.wait_while(ended, |ended| !*ended).unwrap());
        }
    }

    fn ring(&self, message: &'static str, index: u32, note: impl FnOnce(&mut FakeRing)) {
        self.hear(message, |t| note(t.rings.entry(index).or_default()));
    }

    fn behaviour(&self) -> Behaviour {
        self.behaviour.lock().unwrap().clone()
    }
}

impl VhostUserBackendReqHandler for FakeBackend {
    fn set_owner(&self) -> Result<()> {
        self.hear("SET_OWNER", |_| ());
        Ok(())
    }
    fn reset_owner(&self) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn reset_device(&self) -> Result<()> {
        self.hear("RESET_DEVICE", |_| ());
        Ok(())
    }
    fn get_features(&self) -> Result<u64> {
        self.hear("GET_FEATURES", |_| ());
        Ok(self.behaviour().features)
    }
    fn set_features(&self, features: u64) -> Result<()> {
        self.hear("SET_FEATURES", |t| t.features = features);
        Ok(())
    }
    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.hear("SET_MEM_TABLE", |t| {
            t.regions = regions
                .iter()
                .map(|r| (r.guest_phys_addr, r.memory_size))
                .collect();
        });
        Ok(None)
    }
    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.ring("SET_VRING_NUM", index, |r| r.size = num);
        Ok(())
    }
    fn set_vring_addr(
        &self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        _used: u64,
        _available: u64,
        log: u64,
    ) -> Result<()> {
        self.ring("SET_VRING_ADDR", index, |r| {
            r.descriptors = descriptor;
            r.log = (!flags.is_empty()).then_some(log);
        });
        Ok(())
    }
    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.ring("SET_VRING_BASE", index, |r| r.base = base);
        Ok(())
    }
    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let mut base = 0;
        self.ring("GET_VRING_BASE", index, |r| {
            base = r.base + 7;
            *r = FakeRing::default();
        });
        Ok(VhostUserVringState::new(index, base))
    }
    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring("SET_VRING_KICK", index.into(), |r| r.kick = fd);
        Ok(())
    }
    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring("SET_VRING_CALL", index.into(), |r| r.call = fd);
        Ok(())
    }
    fn set_vring_err(&self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }
    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.behaviour().protocol)
    }
    fn set_protocol_features(&self, features: u64) -> Result<()> {
        self.hear("SET_PROTOCOL_FEATURES", |t| t.protocol = features);
        Ok(())
    }
    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.behaviour().rings)
    }
    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.ring("SET_VRING_ENABLE", index, |r| r.enabled = enable);
        Ok(())
    }
    fn get_config(&self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.hear("GET_CONFIG", |_| ());
        let config = self.behaviour().config;
        let (from, to) = (offset as usize, (offset + size) as usize);
        Ok(config.get(from..to).unwrap_or_default().to_vec())
    }
    fn set_config(&self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let mut behaviour = self.behaviour.lock().unwrap();
        let at = offset as usize;
        behaviour.config[at..at + buf.len()].copy_from_slice(buf);
        drop(behaviour);
        self.hear("SET_CONFIG", |t| {
            t.config_writes.push((offset, buf.to_vec()))
        });
        Ok(())
    }
    fn set_backend_req_fd(&self, _backend: Backend) {
        self.hear("SET_BACKEND_REQ_FD", |_| ());
    }
    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidParam)
    }
    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidParam)
    }
    fn get_inflight_fd(&self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.hear("GET_INFLIGHT_FD", |_| ());
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let size = self.behaviour().inflight_size;
        let shape = VhostUserInflight::new(size, 0, wanted.num_queues, wanted.queue_size);
        Ok((shape, file))
    }
    fn set_inflight_fd(&self, _: &VhostUserInflight, file: File) -> Result<()> {
        let inode = file.metadata().unwrap().ino();
        self.hear("SET_INFLIGHT_FD", |t| t.inflight_inodes.push(inode));
        Ok(())
    }
    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(self.behaviour().slots)
    }
    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = (region.guest_phys_addr, region.memory_size);
        self.hear("ADD_MEM_REG", |t| t.regions.push(region));
        Ok(None)
    }
    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let gpa = region.guest_phys_addr;
        self.hear("REM_MEM_REG", |t| t.regions.retain(|r| r.0 != gpa));
        Ok(())
    }
    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> Result<Option<File>> {
        match direction {
            VhostTransferStateDirection::SAVE => file.write_all(b"what it was doing").unwrap(),
            VhostTransferStateDirection::LOAD => {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                self.hear("LOAD", |t| t.messages.push(text));
            }
        }
        Ok(None)
    }
    fn check_device_state(&self) -> Result<()> {
        self.hear("CHECK_DEVICE_STATE", |_| ());
        Ok(())
    }
    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidParam)
    }
    fn set_log_base(&self, log: &VhostUserLog, _file: File) -> Result<()> {
        let size = log.mmap_size;
        self.hear("SET_LOG_BASE", |t| t.log_size = size);
        Ok(())
    }
}
