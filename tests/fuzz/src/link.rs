//! What a hostile core says on the link: messages with right checksums, whatever is in them.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use migration::channel::Cancel;
use migration::link::Link;
use migration::wire::{Definition, ToDestination, ToSource};

/// Less than a socket holds.
const LONGEST: usize = 32 << 10;

/// A message of this payload, with right checksums.
pub fn framed(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut message = b"GWLK".to_vec();
    message.extend(length.to_le_bytes());
    message.extend(crc32c::crc32c(payload).to_le_bytes());
    message.extend(crc32c::crc32c(&message).to_le_bytes());
    message.extend(payload);
    message
}

fn received<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (ours, mut theirs) = UnixStream::pair().ok()?;
    theirs.write_all(bytes).ok()?;
    drop(theirs);
    let mut link = Link::new(ours.into(), Cancel::new().ok()?);
    link.receive(Duration::from_secs(10)).ok()
}

/// See the module.
pub fn link(data: &[u8]) {
    let data = &data[..data.len().min(LONGEST)];
    // As it is: framing.
    let _ = received::<ToSource>(data);
    // As a payload: what is in it.
    let message = framed(data);
    if let Some(message) = received::<ToSource>(&message) {
        let _ = message.input();
    }
    let Some(message) = received::<ToDestination>(&message) else {
        return;
    };
    let _ = message.input();
    if let ToDestination::Hello(hello) = message {
        let here = Definition {
            cpus: 2,
            ..hello.definition.clone()
        };
        let _ = here.obstacles(&hello.definition);
    }
}
