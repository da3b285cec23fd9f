//! A bus with a small service, and clients of both kinds.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::object_server::SignalEmitter;

use super::*;

pub(super) const SERVICE: &str = "org.example.Counter1";
pub(super) const PATH: &str = "/org/example/Counter1";

pub(super) struct Counter(u32);

#[zbus::interface(
    name = "org.example.Counter1",
    proxy(
        default_path = "/org/example/Counter1",
        default_service = "org.example.Counter1"
    )
)]
impl Counter {
    async fn add(
        &mut self,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
        by: u32,
    ) -> zbus::fdo::Result<u32> {
        self.0 += by;
        self.value_changed(&emitter).await?;
        emitter.added(by).await?;
        Ok(self.0)
    }

    #[zbus(property)]
    async fn value(&self) -> u32 {
        self.0
    }

    #[zbus(signal)]
    async fn added(emitter: &SignalEmitter<'_>, by: u32) -> zbus::Result<()>;
}

pub(super) fn user() -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid()
}

pub(super) async fn bus(owner: u32) -> (PrivateBus, Connection) {
    let (bus, service) = PrivateBus::new(SERVICE, owner).unwrap();
    let service = service.serve_at(PATH, Counter(0)).unwrap_built().await;
    (bus, service)
}

pub(super) trait Built {
    async fn unwrap_built(self) -> Connection;
}

impl Built for Builder<'static> {
    async fn unwrap_built(self) -> Connection {
        self.build().await.unwrap()
    }
}

pub(super) fn dial(bus: &PrivateBus) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = tokio::net::UnixStream::from_std(theirs).unwrap();
    let bus = bus.clone();
    tokio::spawn(async move { bus.serve(theirs).await });
    ours
}

async fn signal(stream: &mut AddedStream) -> u32 {
    use futures_core::Stream as _;
    let signal = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *stream).poll_next(cx));
    let signal = tokio::time::timeout(Duration::from_secs(10), signal).await;
    signal.unwrap().unwrap().args().unwrap().by
}

#[tokio::test]
async fn a_client_of_a_bus_finds_a_bus() {
    let (bus, _service) = bus(user()).await;
    let client = Builder::unix_stream(dial(&bus)).unwrap_built().await;
    assert_eq!(client.unique_name().unwrap().as_str(), ":1.1");
    let driver = DBusProxy::new(&client).await.unwrap();
    let names = driver.list_names().await.unwrap();
    assert!(names.iter().any(|name| name.as_str() == SERVICE));
    let owner = driver.get_name_owner(SERVICE.try_into().unwrap()).await;
    assert_eq!(owner.unwrap().as_str(), ":1.0");
    let taken = client.request_name("org.example.Mine").await;
    assert!(taken.unwrap_err().to_string().contains(SERVICE));
    let lost = client
        .call_method(Some("org.example.Other"), "/", None::<&str>, "Do", &())
        .await;
    assert!(lost.unwrap_err().to_string().contains("org.example.Other"));
}

#[tokio::test]
async fn the_first_that_a_client_hears_is_the_reply_to_hello() {
    let (bus, _service) = bus(user()).await;
    let mut late = super::hostile::shaken(&bus).await;
    while bus.0.clients().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let other = Builder::unix_stream(dial(&bus)).p2p().unwrap_built().await;
    let other = CounterProxy::new(&other).await.unwrap();
    // It is signalled, while the first has not said anything.
    other.add(1).await.unwrap();
    let hello = zbus::Message::method_call("/org/freedesktop/DBus", "Hello")
        .destination("org.freedesktop.DBus")
        .interface("org.freedesktop.DBus")
        .build(&())
        .unwrap();
    let heard = tokio::task::spawn_blocking(move || {
        late.write_all(hello.data()).unwrap();
        let mut start = [0; 2];
        late.read_exact(&mut start).unwrap();
        start[1]
    });
    assert_eq!(
        heard.await.unwrap(),
        zbus::message::Type::MethodReturn as u8
    );
}

#[tokio::test]
async fn every_client_hears_the_service() {
    let (bus, _service) = bus(user()).await;
    let on_bus = Builder::unix_stream(dial(&bus)).unwrap_built().await;
    let peer = Builder::unix_stream(dial(&bus)).p2p().unwrap_built().await;
    let first = CounterProxy::new(&on_bus).await.unwrap();
    let second = CounterProxy::new(&peer).await.unwrap();
    assert_eq!(second.value().await.unwrap(), 0);
    let mut heard = [
        first.receive_added().await.unwrap(),
        second.receive_added().await.unwrap(),
    ];
    assert_eq!(first.add(5).await.unwrap(), 5);
    for stream in &mut heard {
        assert_eq!(signal(stream).await, 5);
    }
    assert_eq!(second.add(2).await.unwrap(), 7);
    for stream in &mut heard {
        assert_eq!(signal(stream).await, 2);
    }
    // The cache of properties is kept up to date by signals, which came before.
    assert_eq!(second.value().await.unwrap(), 7);
    assert_eq!(first.value().await.unwrap(), 7);
}

#[tokio::test]
async fn clients_that_leave_are_forgotten() {
    let (bus, _service) = bus(user()).await;
    for _ in 0..20 {
        let client = Builder::unix_stream(dial(&bus)).unwrap_built().await;
        assert_eq!(
            CounterProxy::new(&client)
                .await
                .unwrap()
                .add(0)
                .await
                .unwrap(),
            0
        );
        client.close().await.unwrap();
    }
    for _ in 0..100 {
        if bus.0.clients().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{} clients are left", bus.0.clients().len());
}

#[test]
fn only_the_owner_and_root_may_call() {
    let (calls, _queue) = mpsc::channel(1);
    let shared = Shared {
        service: SERVICE,
        owner: 1000,
        guid: Guid::generate().into(),
        calls,
        clients: Mutex::default(),
        seats: Semaphore::new(1),
        next: AtomicU64::new(1),
    };
    assert!(shared.permits(1000) && shared.permits(0));
    assert!(!shared.permits(1001));
}
