//! The messages of vhost-user.rst, one method each.
//!
//! A method that returns an error ends the session, with the error as its logged reason, except
//! where the protocol has an answer for failure (GET_CONFIG, SET_DEVICE_STATE_FD,
//! CHECK_DEVICE_STATE).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as ProtocolError, GpuBackend, Result, VhostUserBackendReqHandler,
    VhostUserProtocolFeatures,
};

use super::error::SessionError;
use super::transfer::Direction;
use super::vring::{UserAddresses, Vring};
use super::{Session, State};
use crate::device::{ConfigWriter, Device, Keepsake, MAX_KEPT};
use crate::features::{KIT_FEATURES, PROTOCOL_FEATURES, RING_FEATURES};
use crate::memory::{MAX_REGIONS, Memory, RegionDescription, SharedMapping};
use crate::queue::InflightFile;
use crate::queue_thread::RingEvent;

impl From<SessionError> for ProtocolError {
    fn from(error: SessionError) -> Self {
        ProtocolError::ReqHandlerError(io::Error::other(error))
    }
}

impl<D: Device> Session<D> {
    pub(super) fn vring_at(&self, index: u32) -> std::result::Result<usize, SessionError> {
        let count = self.services.queues.queue_count();
        usize::try_from(index)
            .ok()
            .filter(|at| *at < count)
            .ok_or(SessionError::QueueIndex { index, count })
    }

    fn offered(&self) -> u64 {
        self.services.device.features() | KIT_FEATURES
    }

    fn set_event(&self, index: u8, which: RingEvent, file: Option<File>) -> Result<()> {
        let at = self.vring_at(u32::from(index))?;
        let state = &mut *self.state();
        let vring = &mut state.vrings[at];
        let fd = file.map(OwnedFd::from);
        if let Some(fd) = &fd {
            // The thread that serves the ring must never wait in a read or write of it.
            set_nonblocking(fd).map_err(|source| SessionError::Event {
                queue: vring.index,
                source,
            })?;
        }
        if which == RingEvent::Kick {
            vring.kick = fd.is_some();
        }
        self.services
            .queues
            .set_event(vring.index, which, fd)
            .map_err(SessionError::from)?;
        Ok(self.update_ring(state, at)?)
    }
}

/// Refuses to change what a running ring is built on.
fn while_stopped(vring: &Vring, what: &'static str) -> std::result::Result<(), SessionError> {
    if vring.running {
        return Err(SessionError::Running {
            queue: vring.index,
            what,
        });
    }
    Ok(())
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn describe(region: &VhostUserMemoryRegion) -> RegionDescription {
    RegionDescription {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl<D: Device> VhostUserBackendReqHandler for Session<D> {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; the specification suggests to disable all rings, and nothing more.
    fn reset_owner(&self) -> Result<()> {
        let state = &mut *self.state();
        for vring in &mut state.vrings {
            vring.enabled = false;
        }
        Ok(self.stop_all(state)?)
    }

    fn reset_device(&self) -> Result<()> {
        let state = &mut *self.state();
        self.stop_all(state)?;
        let max_size = self.services.device.max_queue_size();
        for vring in &mut state.vrings {
            *vring = Vring::new(vring.index, max_size);
        }
        state.life.reset();
        self.services.device.reset();
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(SessionError::Features { unknown }.into());
        }
        let state = &mut *self.state();
        if state.running() && (features ^ state.features) & RING_FEATURES != 0 {
            return Err(SessionError::FeaturesWhileRunning.into());
        }
        state.features = features;
        self.services.device.accept_features(features);
        self.update_log(state)?;
        if features & PROTOCOL_FEATURES == 0 {
            for at in 0..state.vrings.len() {
                state.vrings[at].enabled = true;
                self.update_ring(state, at)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &self,
        ctx: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let state = &mut *self.state();
        let regions = ctx.iter().map(describe).zip(files);
        let memory = Memory::new(regions, state.log.clone()).map_err(SessionError::from)?;
        self.use_memory(state, memory)?;
        Ok(None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        let at = self.vring_at(index)?;
        let max = self.services.device.max_queue_size();
        let vring = &mut self.state().vrings[at];
        let size = u16::try_from(num)
            .ok()
            .filter(|size| *size <= max && size.is_power_of_two())
            .ok_or(SessionError::QueueSize {
                queue: vring.index,
                size: num,
                max,
            })?;
        if size != vring.size {
            while_stopped(vring, "size")?;
            vring.size = size;
        }
        Ok(())
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        // The log flag and address are for used rings behind an IOMMU. Without one the used ring
        // is logged where it is, with all other writes.
        let at = self.vring_at(index)?;
        let state = &mut *self.state();
        let vring = &mut state.vrings[at];
        let addresses = UserAddresses {
            descriptors: descriptor,
            available,
            used,
        };
        if vring.addresses != Some(addresses) {
            while_stopped(vring, "address")?;
            vring.addresses = Some(addresses);
            vring.metrics(&self.services.metrics);
        }
        // Said at once where it can be: a wrong address is easier to find here than at the start.
        if state.memory.size() > 0 {
            state.layout(at)?;
        }
        Ok(self.update_ring(state, at)?)
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        let at = self.vring_at(index)?;
        let vring = &mut self.state().vrings[at];
        while_stopped(vring, "base")?;
        vring.base = u16::try_from(base).map_err(|_| SessionError::Base {
            queue: vring.index,
            base,
        })?;
        Ok(())
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let at = self.vring_at(index)?;
        let state = &mut *self.state();
        self.stop_rings(state, &[at])?;
        let vring = &mut state.vrings[at];
        // It starts again when it is given a kick descriptor again.
        vring.kick = false;
        let (queue, base) = (vring.index, vring.base);
        self.services
            .queues
            .set_event(queue, RingEvent::Kick, None)
            .map_err(SessionError::from)?;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        if fd.is_none() {
            let at = self.vring_at(u32::from(index))?;
            let queue = self.state().vrings[at].index;
            return Err(SessionError::NoKick { queue }.into());
        }
        self.set_event(index, RingEvent::Kick, fd)
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.set_event(index, RingEvent::Call, fd)
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        self.set_event(index, RingEvent::Error, fd)
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.protocol_offered())
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        let unknown = features & !self.protocol_offered().bits();
        if unknown != 0 {
            return Err(SessionError::ProtocolFeatures { unknown }.into());
        }
        self.state().protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(u64::from(self.services.device.queue_count()))
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        let at = self.vring_at(index)?;
        let state = &mut *self.state();
        state.vrings[at].enabled = enable;
        Ok(self.update_ring(state, at)?)
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The protocol library bounds size and offset by 4 KiB.
        let mut data = vec![0; usize::try_from(size).map_err(|_| ProtocolError::InvalidParam)?];
        self.services.device.read_config(offset, &mut data);
        Ok(data)
    }

    fn set_config(&self, offset: u32, buf: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        // The specification's value 1, which the protocol library calls WRITABLE, is the one of a
        // live migration.
        let writer = match flags.bits() {
            0 => ConfigWriter::Driver,
            _ => ConfigWriter::Migration,
        };
        match (
            writer,
            self.services.device.write_config(offset, buf, writer),
        ) {
            (_, Ok(())) => Ok(()),
            // The guest's mistake must not cost the front-end its session: it changes nothing.
            (ConfigWriter::Driver, Err(error)) => {
                tracing::warn!(%error, "ignored a write by the driver");
                Ok(())
            }
            (ConfigWriter::Migration, Err(error)) => Err(SessionError::from(error).into()),
        }
    }

    fn set_gpu_socket(&self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(SessionError::NotOffered("GPU_SET_SOCKET").into())
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(SessionError::NotOffered("GET_SHARED_OBJECT").into())
    }

    fn get_inflight_fd(&self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let device = &self.services.device;
        if queues > device.queue_count() || size > device.max_queue_size() {
            return Err(SessionError::InflightSize { queues, size }.into());
        }
        let kept = device.keepsake().map_or(0, Keepsake::words);
        let len = InflightFile::len(queues, size, kept.min(MAX_KEPT));
        let shared = |source: io::Error| SessionError::Shared {
            what: "in-flight file",
            source,
        };
        let fd = memfd_create(c"godwit-inflight", MFdFlags::MFD_CLOEXEC)
            .map_err(|error| shared(error.into()))?;
        let file = File::from(fd);
        file.set_len(len).map_err(shared)?;
        let answer = VhostUserInflight::new(len, 0, queues, size);
        Ok((answer, file))
    }

    fn set_inflight_fd(&self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let state: &mut State = &mut self.state();
        if state.running() {
            let queue = state.vrings[0].index;
            let what = "in-flight file";
            return Err(SessionError::Running { queue, what }.into());
        }
        if inflight.mmap_size < InflightFile::len(queues, size, 0) {
            return Err(SessionError::InflightSize { queues, size }.into());
        }
        let mapping = SharedMapping::new(&file, inflight.mmap_offset, inflight.mmap_size).map_err(
            |source| SessionError::Shared {
                what: "in-flight file",
                source,
            },
        )?;
        let file = InflightFile::new(mapping, size);
        file.touch(queues.min(self.services.device.queue_count()));
        if let Some(keepsake) = self.services.device.keepsake()
            && let Some(kept) = file.kept(queues, keepsake.words().min(MAX_KEPT))
        {
            keepsake.keep(kept);
        }
        state.inflight = Some(file);
        Ok(())
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let state = &mut *self.state();
        let memory = state
            .memory
            .with(describe(region), fd)
            .map_err(SessionError::from)?;
        self.use_memory(state, memory)?;
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let state = &mut *self.state();
        let memory = state
            .memory
            .without(&describe(region))
            .map_err(SessionError::from)?;
        Ok(self.use_memory(state, memory)?)
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        self.start_transfer(direction, fd.into())
            .map(|()| None)
            .map_err(|reason| {
                tracing::warn!(?direction, reason, "state transfer refused");
                let what = format!("{direction:?} of its state was refused: {reason}");
                self.services.health.error(&what);
                ProtocolError::BackendInternalError
            })
    }

    fn check_device_state(&self) -> Result<()> {
        self.check_transfer().map_err(|reason| {
            self.transfer_failed(&reason);
            ProtocolError::BackendInternalError
        })
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(SessionError::NotOffered("GET_SHMEM_CONFIG").into())
    }

    fn set_log_base(&self, log: &VhostUserLog, file: File) -> Result<()> {
        let mapping =
            SharedMapping::new(&file, log.mmap_offset, log.mmap_size).map_err(|source| {
                SessionError::Shared {
                    what: "dirty log",
                    source,
                }
            })?;
        let state = &mut *self.state();
        state.log.set_bitmap(Some(mapping));
        Ok(self.update_log(state)?)
    }
}
