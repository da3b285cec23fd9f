//! What a hostile core says on the link: messages with right checksums, whatever is in them.
#![no_main]

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use migration::channel::Cancel;
use migration::link::Link;
use migration::wire::{Definition, ToDestination, ToSource};

/// Less than a socket holds.
const LONGEST: usize = 32 << 10;

fn framed(payload: &[u8]) -> Vec<u8> {
    let mut message = b"GWLK".to_vec();
    message.extend((payload.len() as u32).to_le_bytes());
    message.extend(crc32c::crc32c(payload).to_le_bytes());
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

fuzz_target!(|data: &[u8]| {
    let data = &data[..data.len().min(LONGEST)];
    // As it is: framing.
    let _ = received::<ToSource>(data);
    // As a payload: what is in it.
    let message = framed(data);
    if let Some(message) = received::<ToSource>(&message) {
        let _ = message.input();
    }
    let Some(message) = received::<ToDestination>(&message) else { return };
    let _ = message.input();
    if let ToDestination::Hello(hello) = message {
        let here = Definition { cpus: 2, ..hello.definition.clone() };
        let _ = here.obstacles(&hello.definition);
    }
});
