//! A server that says what it is told to.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use crate::Client;
use crate::fake::LONG;
use crate::socket::{self, Awaited, Deadline, Message};
use crate::wire::{Command, Header, Layout as _, MOST_BYTES, REPLY, Version};

/// Its end of the connection.
pub(super) struct Script(pub(super) UnixStream);

impl Script {
    pub(super) fn hear(&self) -> Message {
        let deadline = Deadline::new(LONG, Awaited::Rest);
        socket::receive(&self.0, MOST_BYTES, deadline).unwrap()
    }

    /// A message with a payload, of the size that follows.
    pub(super) fn say(&self, header: Header, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let size = u32::try_from(Header::SIZE + payload.len()).unwrap();
        let header = Header { size, ..header }.bytes();
        self.write(&[&header, payload], descriptors);
    }

    pub(super) fn write(&self, parts: &[&[u8]], descriptors: &[BorrowedFd<'_>]) {
        let deadline = Deadline::new(LONG, Awaited::Taken(Command(0)));
        // The client may have hung up before.
        let _ = socket::send(&self.0, parts, descriptors, deadline);
    }

    /// The reply to the next request.
    pub(super) fn reply(&self, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> Message {
        let message = self.hear();
        self.say(reply(&message), payload, descriptors);
        message
    }

    pub(super) fn agree(&self, text: &str) -> Message {
        self.reply(&version(0, 1, text), &[])
    }
}

/// The header of the right reply.
pub(super) fn reply(message: &Message) -> Header {
    Header {
        flags: REPLY,
        ..message.header
    }
}

pub(super) fn version(major: u16, minor: u16, text: &str) -> Vec<u8> {
    [&Version { major, minor }.bytes(), text.as_bytes()].concat()
}

/// A client whose server does as the script says once they have agreed.
pub(super) fn agreed<T: Send + 'static>(
    script: impl FnOnce(Script) -> T + Send + 'static,
) -> (Client, JoinHandle<T>) {
    let (socket, server) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let server = Script(server);
        server.agree("{}\0");
        script(server)
    });
    (Client::new(socket, LONG).unwrap(), server)
}
