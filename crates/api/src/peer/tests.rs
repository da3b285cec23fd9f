//! Two peers, and peers that misbehave.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;

use tokio::time::timeout;
use zbus::{Connection, Message};

use super::*;

const PATH: &str = "/org/example/Echo1";

struct Echo;

#[zbus::interface(
    name = "org.example.Echo1",
    spawn = false,
    proxy(
        default_path = "/org/example/Echo1",
        default_service = "org.example.Echo1"
    )
)]
impl Echo {
    async fn echo(&self, text: &str) -> String {
        text.to_owned()
    }

    /// How long a file is.
    async fn measure(&self, file: zbus::Fd<'_>) -> u64 {
        let file = File::from(file.as_fd().try_clone_to_owned().unwrap());
        file.metadata().unwrap().len()
    }
}

fn served(socket: UnixStream) -> tokio::task::JoinHandle<zbus::Result<Connection>> {
    let builder = server(socket).unwrap().serve_at(PATH, Echo);
    tokio::spawn(builder.build())
}

/// The server's connection and a peer that shook hands with it and may now say anything.
async fn shaken() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = served(theirs);
    let peer = tokio::task::spawn_blocking(move || {
        let mut peer = ours;
        peer.write_all(b"\0AUTH ANONYMOUS\r\n").unwrap();
        let mut said = [0; 5];
        peer.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"DATA\r");
        peer.write_all(b"DATA\r\nBEGIN\r\n").unwrap();
        peer
    });
    let peer = peer.await.unwrap();
    (server.await.unwrap().unwrap(), peer)
}

async fn ends(connection: &Connection) {
    timeout(Duration::from_secs(20), connection.closed())
        .await
        .expect("the connection goes on");
}

/// A call without a body, but for what its head says of it.
fn call(serial: u32, fields: u32, body: u32) -> Vec<u8> {
    let mut head = vec![b'l', 1, 0, 1];
    for word in [body, serial, fields] {
        head.extend(word.to_le_bytes());
    }
    head
}

#[tokio::test]
async fn peers_talk() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = served(theirs);
    let connection = client(ours).unwrap().build().await.unwrap();
    let _server = server.await.unwrap().unwrap();
    let echo = EchoProxy::new(&connection).await.unwrap();
    for len in [0, 1, 60 << 10] {
        let text = "x".repeat(len);
        assert_eq!(echo.echo(&text).await.unwrap(), text);
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_is_not_read() {
    for (fields, body) in [(0, 128 << 20), (u32::MAX, 0), (u32::MAX, u32::MAX)] {
        let (connection, mut peer) = shaken().await;
        peer.write_all(&call(1, fields, body)).unwrap();
        ends(&connection).await;
    }
}

#[tokio::test]
async fn junk_ends_the_connection() {
    for junk in [&[0xff; 64][..], &[b'l'; 64], &[0; 64]] {
        let (connection, mut peer) = shaken().await;
        peer.write_all(junk).unwrap();
        ends(&connection).await;
    }
}

#[tokio::test]
async fn words_that_are_none_end_the_handshake() {
    let endless = "ERROR\r\n".repeat(1000);
    for words in [b"\n".as_slice(), b"\0\n", b"HELO\r\n", endless.as_bytes()] {
        for serves in [true, false] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(words).unwrap();
            let built = match serves {
                true => server(ours).unwrap().build().await,
                false => client(ours).unwrap().build().await,
            };
            assert!(built.is_err(), "{words:?} was taken, serving: {serves}");
        }
    }
}

#[tokio::test]
async fn a_flood_ends_the_connection() {
    let (connection, mut peer) = shaken().await;
    let flood = tokio::task::spawn_blocking(move || {
        let signal = Message::signal("/", "org.example.Echo1", "Heard")
            .serial(std::num::NonZeroU32::MIN)
            .build(&())
            .unwrap();
        let many = signal
            .data()
            .repeat(usize::try_from(LIMITS.rate).unwrap() * 2);
        // The other side hangs up in the middle of it.
        let _ = peer.write_all(&many);
        peer
    });
    ends(&connection).await;
    drop(connection);
    flood.await.unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_given_up() {
    let (connection, mut peer) = shaken().await;
    let calls = tokio::task::spawn_blocking(move || {
        let call = Message::method_call(PATH, "Echo")
            .interface("org.example.Echo1")
            .serial(std::num::NonZeroU32::MIN)
            .build(&("x".repeat(32 << 10),))
            .unwrap();
        // Each answer is as long; they fill whatever lies between.
        for _ in 0..1000 {
            if peer.write_all(call.data()).is_err() {
                break;
            }
        }
        peer
    });
    ends(&connection).await;
    drop(connection);
    calls.await.unwrap();
}

#[tokio::test]
async fn a_descriptor_goes_with_a_message() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = served(theirs);
    let connection = client(ours).unwrap().build().await.unwrap();
    let _server = server.await.unwrap().unwrap();
    let echo = EchoProxy::new(&connection).await.unwrap();
    let file = File::open("Cargo.toml").unwrap();
    let len = file.metadata().unwrap().len();
    for _ in 0..3 {
        assert_eq!(echo.measure(file.as_fd().into()).await.unwrap(), len);
    }
}
