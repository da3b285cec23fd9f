//! Clients that misbehave: they lose their connection, and nobody else notices.

use std::io::{Read as _, Write as _};
use std::num::NonZeroU32;
use std::os::unix::net::UnixStream;

use zbus::message::Flags;
use zbus::{Connection, Message};

use super::tests::{Built as _, CounterProxy, PATH, SERVICE, bus, dial, user};
use super::*;

/// How long something that must come may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client that knows no library. Reads give up after [`PATIENCE`].
fn raw(bus: &PrivateBus) -> UnixStream {
    let stream = dial(bus);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// One that shook hands and may now say anything.
pub(super) async fn shaken(bus: &PrivateBus) -> UnixStream {
    let mut stream = raw(bus);
    let shake = move || {
        let hex: String = user()
            .to_string()
            .bytes()
            .map(|b| format!("{b:02x}"))
            .collect();
        let words = format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n");
        stream.write_all(words.as_bytes()).unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            said.extend(byte);
        }
        assert!(said.starts_with(b"OK "), "{said:?}");
        stream
    };
    tokio::task::spawn_blocking(shake).await.unwrap()
}

/// Sends `bytes` as far as they are taken, and waits until the bus has hung up.
async fn is_disconnected(mut stream: UnixStream, bytes: Vec<u8>) {
    let work = move || {
        // The bus may hang up in the middle of it.
        let _ = stream.write_all(&bytes);
        let mut rest = [0; 4096];
        loop {
            match stream.read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    let kind = error.kind();
                    assert_eq!(kind, std::io::ErrorKind::ConnectionReset, "{error}");
                    return;
                }
            }
        }
    };
    tokio::task::spawn_blocking(work).await.unwrap();
}

async fn serves(bus: &PrivateBus) {
    let client = Builder::unix_stream(dial(bus)).unwrap_built().await;
    let counter = CounterProxy::new(&client).await.unwrap();
    let called = tokio::time::timeout(PATIENCE, counter.add(0)).await;
    called.expect("the service does not answer").unwrap();
}

fn call(member: &str, flags: Option<Flags>) -> Vec<u8> {
    let call = Message::method_call(PATH, member)
        .interface(SERVICE)
        .serial(NonZeroU32::MIN);
    let call = match flags {
        Some(flags) => call.with_flags(flags),
        None => call,
    };
    call.build(&(1u32,)).unwrap().data().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_are_none_end() {
    let (bus, _service) = bus(user()).await;
    let endless = b"\0"
        .iter()
        .chain(b"CANCEL\r\n".repeat(2000).iter())
        .copied()
        .collect();
    for words in [
        b"\n".to_vec(),
        b"\0\n".to_vec(),
        b"\0\r\n\n".to_vec(),
        vec![0xff; 5000],
        endless,
    ] {
        is_disconnected(raw(&bus), words).await;
        serves(&bus).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_none_end_the_connection() {
    let (bus, _service) = bus(user()).await;
    let head = |fields: u32, body: u32| {
        let mut head = vec![b'l', 1, 0, 1];
        for word in [body, 1, fields] {
            head.extend(word.to_le_bytes());
        }
        head
    };
    for bytes in [
        head(0, 127 << 20),
        head(64 << 20, 0),
        head(u32::MAX, u32::MAX),
        vec![0; 64],
        vec![b'l'; 64],
        vec![0xff; 64],
    ] {
        is_disconnected(shaken(&bus).await, bytes).await;
        serves(&bus).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_long_is_refused_by_name() {
    let (bus, _service) = bus(user()).await;
    let client: Connection = Builder::unix_stream(dial(&bus)).unwrap_built().await;
    for size in [256 << 10, 1 << 20, 15 << 20] {
        let text = ("x".repeat(size),);
        let called = client.call_method(Some(SERVICE), PATH, Some(SERVICE), "Add", &text);
        let refused = tokio::time::timeout(PATIENCE, called).await.unwrap();
        let text = refused.unwrap_err().to_string();
        assert!(text.starts_with("org.freedesktop.DBus.Error.LimitsExceeded: the message has"));
        assert!(text.ends_with("at most 262144 are read"), "{text}");
        // It is served on.
        let counter = CounterProxy::new(&client).await.unwrap();
        counter.add(0).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_not_read() {
    let (bus, _service) = bus(user()).await;
    let stream = shaken(&bus).await;
    stream.set_nonblocking(true).unwrap();
    let calls = call("Add", None).repeat(64);
    // The replies to what is read fill whatever is between; then no more is read.
    let mut sent = 0;
    let mut idle = 0;
    while idle < 50 {
        match (&stream).write(&calls) {
            Ok(count) => (sent, idle) = (sent + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
                idle += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        assert!(sent < 64 << 20, "all of it is taken");
    }
    serves(&bus).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_want_no_reply_are_bounded() {
    let (bus, _service) = bus(user()).await;
    let flood = call("Add", Some(Flags::NO_REPLY_EXPECTED)).repeat(2000);
    is_disconnected(shaken(&bus).await, flood).await;
    serves(&bus).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn match_rules_are_bounded() {
    let (bus, _service) = bus(user()).await;
    let client: Connection = Builder::unix_stream(dial(&bus)).unwrap_built().await;
    let add = async |rule: &str| {
        let driver = Some("org.freedesktop.DBus");
        client
            .call_method(driver, "/", driver, "AddMatch", &(rule,))
            .await
            .map(drop)
    };
    let long = format!("arg0='{}'", "x".repeat(2000));
    let error = add(&long).await.unwrap_err().to_string();
    assert!(error.contains("1024 bytes"), "{error}");
    let mut kept = 0;
    while add(&format!("arg0='{kept}'")).await.is_ok() {
        kept += 1;
        assert!(kept < 10_000, "there is no end to rules");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn seats_are_bounded_and_given_back() {
    let (bus, _service) = bus(user()).await;
    let silent: Vec<_> = (0..MAX_CLIENTS).map(|_| raw(&bus)).collect();
    until(|| bus.0.seats.available_permits() == 0).await;
    is_disconnected(raw(&bus), Vec::new()).await;
    drop(silent);
    until(|| bus.0.seats.available_permits() == MAX_CLIENTS).await;
    serves(&bus).await;
}

async fn until(holds: impl Fn() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < end, "it does not come");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
