//! The device configuration. It is read once and whole, and again when the back-end says
//! that it has changed, so a guest's read waits for nobody.
//!
//! Always from offset 0: libvhost-user ignores the offset, and refuses a length beyond
//! the structure that it knows. Numbers of queues are made to agree with the rings that
//! the guest finds.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_HASH_REPORT, VIRTIO_NET_F_RSS, VIRTIO_NET_F_SPEED_DUPLEX,
};

use super::connection::Connection;
use super::negotiation::Negotiated;
use super::queues::QueuePlan;
use super::{VhostUserConfig, VhostUserError};
use crate::transport::DeviceKind;

const BLK_F_SECURE_ERASE: u64 = 1 << 16;
const BLK_F_ZONED: u64 = 1 << 17;
const BALLOON_F_FREE_PAGE_HINT: u64 = 1 << 3;
const BALLOON_F_PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// Bytes of a file system's name.
const TAG: usize = 36;

/// Offset and length of the request and of the answer.
const MESSAGE: usize = 12;

/// Bytes of configuration that a device has with these features (virtio 1.3, 5).
fn length(config: &VhostUserConfig, features: u64) -> u16 {
    let has = |bits: u64| features & bits != 0;
    if let Some(size) = config.config_size {
        return size;
    }
    match config.kind {
        DeviceKind::NET if has(1 << VIRTIO_NET_F_RSS | 1 << VIRTIO_NET_F_HASH_REPORT) => 24,
        DeviceKind::NET if has(1 << VIRTIO_NET_F_SPEED_DUPLEX) => 20,
        DeviceKind::NET => 12,
        DeviceKind::BLK if has(BLK_F_ZONED) => 96,
        DeviceKind::BLK if has(BLK_F_SECURE_ERASE) => 72,
        DeviceKind::BLK => 60,
        DeviceKind::CONSOLE => 12,
        DeviceKind::BALLOON if has(BALLOON_F_PAGE_POISON) => 16,
        DeviceKind::BALLOON if has(BALLOON_F_FREE_PAGE_HINT) => 12,
        DeviceKind::BALLOON | DeviceKind::VSOCK | DeviceKind::GPIO => 8,
        DeviceKind::SCSI => 36,
        DeviceKind::GPU => 16,
        DeviceKind::INPUT => 136,
        DeviceKind::CRYPTO => 56,
        DeviceKind::SOUND => 12,
        DeviceKind::FS => 40,
        _ => 0,
    }
}

/// The configuration of a device, from the back-end if that has one.
pub(super) fn read(
    connection: &mut Connection,
    config: &VhostUserConfig,
    plan: &QueuePlan,
    negotiated: &Negotiated,
) -> Result<Vec<u8>, VhostUserError> {
    let length = length(config, negotiated.features);
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = if negotiated.has(VhostUserProtocolFeatures::CONFIG) {
        fetch(connection, length)?
    } else {
        make(config, length.into())?
    };
    patch(&mut bytes, config.kind, plan);
    Ok(bytes)
}

/// GET_CONFIG (VU). A back-end that refuses answers with no bytes, with or without the
/// header of the configuration.
fn fetch(connection: &mut Connection, length: u16) -> Result<Vec<u8>, VhostUserError> {
    const NAME: &str = "GET_CONFIG";
    let words = |data: &[u8]| -> Vec<u32> {
        let words = data.chunks_exact(4);
        words
            .map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]))
            .collect()
    };
    let mut request = Vec::with_capacity(MESSAGE + usize::from(length));
    for word in [0, u32::from(length), 0] {
        request.extend(word.to_ne_bytes());
    }
    let length = usize::from(length);
    request.resize(MESSAGE + length, 0);
    let mut answers = connection.exchange(FrontendReq::GET_CONFIG as u32, NAME, &[request])?;
    let answer = answers.pop().unwrap_or_default();
    let Some((header, bytes)) = answer.split_at_checked(MESSAGE) else {
        return Err(connection.refused(NAME));
    };
    let header = words(header);
    if header[1] == 0 && bytes.is_empty() {
        return Err(connection.refused(NAME));
    }
    if header[0] != 0 || header[1] as usize != length || bytes.len() != length {
        let what = format!("{} of {length} bytes of configuration", bytes.len());
        return Err(connection.nonsense(NAME, what));
    }
    Ok(bytes.to_vec())
}

/// SET_CONFIG (VU) of what a driver wrote.
pub(super) fn write(
    connection: &mut Connection,
    offset: u32,
    data: &[u8],
) -> Result<(), VhostUserError> {
    connection.call_acked("SET_CONFIG", |f| {
        f.set_config(offset, VhostUserConfigFlags::empty(), data)
    })
}

/// What a device needs whose back-end has no configuration.
fn make(config: &VhostUserConfig, length: usize) -> Result<Vec<u8>, VhostUserError> {
    let mut bytes = vec![0; length];
    let missing = |hint| VhostUserError::NoConfig {
        device: config.id.clone(),
        hint,
    };
    match config.kind {
        DeviceKind::NET => {
            let mac = config.mac.unwrap_or_else(|| address_of(&config.id));
            bytes[..6].copy_from_slice(&mac);
            bytes[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        }
        DeviceKind::FS => {
            let tag = config.tag.as_ref();
            let tag = tag.ok_or_else(|| missing("; give the file system a tag"))?;
            bytes[..tag.len()].copy_from_slice(tag.as_bytes());
        }
        DeviceKind::CONSOLE => {}
        _ => return Err(missing("")),
    }
    Ok(bytes)
}

/// A locally administered address that a device keeps wherever its machine runs
/// (FNV-1a of its name).
fn address_of(id: &str) -> [u8; 6] {
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x02, a, b, c, d, e]
}

/// Makes the numbers of queues in the configuration those of the plan.
fn patch(bytes: &mut [u8], kind: DeviceKind, plan: &QueuePlan) {
    let narrow = plan.counted.to_le_bytes();
    let wide = u32::from(plan.counted).to_le_bytes();
    let (at, value): (usize, &[u8]) = match kind {
        DeviceKind::NET => (8, &narrow),
        DeviceKind::BLK => (34, &narrow),
        DeviceKind::SCSI => (0, &wide),
        DeviceKind::FS => (TAG, &wide),
        _ => return,
    };
    if let Some(field) = bytes.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(kind: DeviceKind) -> VhostUserConfig {
        VhostUserConfig::new(kind, "dev")
    }

    #[test]
    fn numbers_of_queues_agree_with_the_rings() {
        let plan = QueuePlan {
            counted: 3,
            rings: 3,
            served: 3,
            has_control: false,
        };
        for (kind, at) in [
            (DeviceKind::NET, 8),
            (DeviceKind::BLK, 34),
            (DeviceKind::SCSI, 0),
            (DeviceKind::FS, 36),
        ] {
            let mut bytes = vec![0xff; length(&config(kind), 0).into()];
            patch(&mut bytes, kind, &plan);
            assert_eq!(bytes[at..at + 2], [3, 0], "{kind}");
        }
    }

    #[test]
    fn a_net_device_without_configuration_gets_an_address() {
        let mut net = config(DeviceKind::NET);
        let made = make(&net, 12).unwrap();
        assert_eq!((made[0], made[6]), (2, 1));
        assert_eq!(made, make(&net, 12).unwrap());
        net.mac = Some([2, 1, 2, 3, 4, 5]);
        assert_eq!(make(&net, 12).unwrap()[..6], [2, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn what_cannot_be_made_up_is_asked_for() {
        assert_eq!(
            make(&config(DeviceKind::FS), 40).unwrap_err().to_string(),
            "device dev: the back-end has no device configuration; give the file system a tag"
        );
        assert!(make(&config(DeviceKind::BLK), 60).is_err());
        let mut fs = config(DeviceKind::FS);
        fs.tag = Some("x".repeat(36));
        assert_eq!(make(&fs, 40).unwrap()[..36], [b'x'; 36]);
    }
}
