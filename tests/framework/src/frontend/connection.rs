//! The vhost-user messages, sent and answered in time.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use anyhow::{Context, Result, ensure};
use migration::rings;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight,
};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::PATIENCE;
use super::ram::{DirtyBitmap, GuestRam};
use super::ring::Ring;

/// The messages of [`migration::rings`].
const WIRED_RINGS: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::from_bits_retain(rings::FEATURE);
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_RING_F_INDIRECT_DESC.
const INDIRECT: u64 = 1 << 28;

/// A front-end's side of the socket. When an answer does not come in time the socket is shut down,
/// and the call that waits fails.
pub struct Connection {
    frontend: Frontend,
    features: u64,
    stream: UnixStream,
    /// Held for its drop, which ends the watch over the socket.
    _watch: Sender<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl Connection {
    /// Connects and negotiates: all protocol features offered, and of the features those of the
    /// ring and those in `device_features` that are offered.
    pub fn open(socket: &Path, device_features: u64, event_idx: bool) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let watched = stream.try_clone()?;
        let own = stream.try_clone()?;
        let (watch, ended) = channel::<()>();
        thread::spawn(move || {
            // A test that is over drops its end; one that hangs is cut off.
            if ended.recv_timeout(3 * PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = watched.shutdown(Shutdown::Both);
            }
        });
        let mut frontend = Frontend::from_stream(stream, 256);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        // The library does not show bits that it does not know; all our devices have this one.
        let protocol = frontend.get_protocol_features()? | WIRED_RINGS;
        frontend.set_protocol_features(protocol)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let ring = VERSION_1 | INDIRECT | if event_idx { EVENT_IDX } else { 0 };
        let wanted = ring | device_features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        ensure!(offered & VERSION_1 != 0, "VERSION_1 is not offered");
        let connection = Connection {
            frontend,
            features: offered & wanted,
            stream: own,
            _watch: watch,
        };
        connection.frontend.set_features(connection.features)?;
        Ok(connection)
    }

    /// Ends the connection, whatever is under way.
    pub fn disconnect(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The socket, for messages that no front-end should send.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The messages themselves.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// Features in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Protocol features offered.
    pub fn protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.frontend.get_protocol_features()?)
    }

    /// Reads `len` bytes of the configuration space.
    pub fn config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let buffer = vec![0; usize::try_from(len)?];
        let (_, data) =
            self.frontend
                .get_config(offset, len, VhostUserConfigFlags::empty(), &buffer)?;
        Ok(data)
    }

    /// Writes to the configuration space, as a driver does.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        let flags = VhostUserConfigFlags::empty();
        Ok(self.frontend.set_config(offset, flags, data)?)
    }

    /// Hands over memory.
    pub fn set_memory(&self, ram: &[&GuestRam]) -> Result<()> {
        let regions = ram
            .iter()
            .map(|ram| ram.region())
            .collect::<Result<Vec<_>>>()?;
        self.frontend.set_mem_table(&regions)?;
        Ok(())
    }

    /// Sets up a ring and enables it.
    pub fn start_ring(&mut self, at: usize, ring: &Ring, ram: &GuestRam, base: u16) -> Result<()> {
        self.set_up_ring(at, ring, ram, base)?;
        self.frontend.set_vring_enable(at, true)?;
        Ok(())
    }

    /// Sets up a ring, wired but not enabled.
    pub fn set_up_ring(&mut self, at: usize, ring: &Ring, ram: &GuestRam, base: u16) -> Result<()> {
        self.frontend.set_vring_num(at, ring.size())?;
        self.frontend
            .set_vring_addr(at, &ring.config(ram, false)?)?;
        self.frontend.set_vring_base(at, base)?;
        self.frontend.set_vring_call(at, &ring.call)?;
        self.frontend.set_vring_err(at, &ring.error)?;
        self.frontend.set_vring_kick(at, &ring.kick)?;
        Ok(())
    }

    /// Stops a ring and returns its base.
    pub fn stop_ring(&mut self, at: usize) -> Result<u16> {
        Ok(u16::try_from(self.frontend.get_vring_base(at)?)?)
    }

    /// Turns dirty logging on, in QEMU's order.
    pub fn start_logging(&self, log: &DirtyBitmap) -> Result<()> {
        self.frontend.set_log_base(0, Some(log.region()?))?;
        let bits = VhostUserVirtioFeatures::LOG_ALL.bits();
        Ok(self.frontend.set_features(self.features | bits)?)
    }

    /// Turns dirty logging off.
    pub fn stop_logging(&self) -> Result<()> {
        Ok(self.frontend.set_features(self.features)?)
    }

    /// Asks for a file to record requests in flight in.
    pub fn make_inflight(&mut self, queues: u16, size: u16) -> Result<(VhostUserInflight, File)> {
        let wish = VhostUserInflight::new(0, 0, queues, size);
        Ok(self.frontend.get_inflight_fd(&wish)?)
    }

    /// Hands over that file.
    pub fn set_inflight(&mut self, inflight: &(VhostUserInflight, File)) -> Result<()> {
        let (description, file) = inflight;
        Ok(self
            .frontend
            .set_inflight_fd(description, file.as_raw_fd())?)
    }

    /// Takes the device's state.
    pub fn save(&self) -> Result<Vec<u8>> {
        let (mut reader, writer) = UnixStream::pair()?;
        reader.set_read_timeout(Some(PATIENCE))?;
        self.begin_transfer(VhostTransferStateDirection::SAVE, writer.into())?;
        let mut state = Vec::new();
        reader.read_to_end(&mut state)?;
        self.frontend.check_device_state()?;
        Ok(state)
    }

    /// Gives the device a state.
    pub fn load(&self, state: &[u8]) -> Result<()> {
        let (reader, mut writer) = UnixStream::pair()?;
        writer.set_write_timeout(Some(PATIENCE))?;
        self.begin_transfer(VhostTransferStateDirection::LOAD, reader.into())?;
        // A device that has seen enough closes its end; its verdict says why.
        let _ = writer.write_all(state);
        drop(writer);
        Ok(self.frontend.check_device_state()?)
    }

    /// Sends a message of [`migration::rings`]; the body of its answer.
    pub fn wired(&self, request: u32, body: &[u8]) -> Result<Vec<u8>> {
        self.send_wired(request, body, &[])?;
        self.hear_wired(request)
    }

    /// Has the device stop and save by one message: the answer to STOP, and the state.
    pub fn stop_and_save(&self, leaves: bool) -> Result<(Vec<u8>, Vec<u8>)> {
        let (mut reader, writer) = UnixStream::pair()?;
        reader.set_read_timeout(Some(PATIENCE))?;
        let body = u32::from(leaves).to_ne_bytes();
        self.send_wired(rings::STOP, &body, &[writer.as_raw_fd()])?;
        drop(writer);
        let stopped = self.hear_wired(rings::STOP)?;
        let mut state = Vec::new();
        reader.read_to_end(&mut state)?;
        let problem = self.hear_wired(rings::STOP)?;
        ensure!(problem.is_empty(), "{}", String::from_utf8_lossy(&problem));
        Ok((stopped, state))
    }

    fn send_wired(&self, request: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        let mut message = Vec::new();
        for word in [request, 1, u32::try_from(body.len())?] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(body);
        // Descriptors travel with the first byte.
        let sent = self.stream.send_with_fds(&[message.as_slice()], fds)?;
        Ok((&self.stream).write_all(&message[sent..])?)
    }

    fn hear_wired(&self, request: u32) -> Result<Vec<u8>> {
        let mut stream = &self.stream;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut header = [[0; 4]; 3];
        stream.read_exact(header.as_flattened_mut())?;
        let [answered, flags, size] = header.map(u32::from_ne_bytes);
        ensure!(
            (answered, flags) == (request, 5) && size <= 4096,
            "answer {answered:#x} with flags {flags:#x} and {size} bytes"
        );
        let mut answer = vec![0; usize::try_from(size)?];
        stream.read_exact(&mut answer)?;
        stream.set_read_timeout(None)?;
        Ok(answer)
    }

    /// Starts a transfer of state.
    pub fn begin_transfer(
        &self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
    ) -> Result<()> {
        let other =
            self.frontend
                .set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, fd)?;
        ensure!(other.is_none(), "the device wants a channel of its own");
        Ok(())
    }
}
