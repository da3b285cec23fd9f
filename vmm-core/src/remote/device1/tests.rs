//! A process that answers, and processes that do not behave.

use std::io::{Read as _, Write as _};
use std::time::Instant;

use api::device1::{Device1, DeviceProcess, Identity, PATH, Prefault, Status};

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A process of which only the words are there.
struct Talker {
    words: Words,
}

impl DeviceProcess for Talker {
    fn identity(&self) -> Identity {
        Identity {
            kind: "blk".into(),
            unit: "disk".into(),
            version: "0".into(),
        }
    }

    fn status(&self) -> Status {
        Status {
            state: self.words.state.clone(),
            connected: true,
            last_error: self.words.last_error.clone(),
            mapped: self.words.mapped,
            prefaulted: self.words.prefaulted,
            prefaulting: false,
        }
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        self.words.statistics.clone()
    }

    fn prefault(&self, _: Prefault) -> Result<(), api::Error> {
        Ok(())
    }

    fn cancel_prefault(&self) {}
}

async fn talk(socket: UnixStream, words: Words) -> Connection {
    let process = api::peer::server(socket).unwrap();
    let process = process.serve_at(PATH, Device1(Talker { words }));
    process.build().await.unwrap()
}

/// Links with one for `disk`, where changes are told, and the process's end.
fn linked() -> (DeviceLinks, mpsc::Receiver<String>, UnixStream) {
    let (links, changes) = DeviceLinks::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    links.attach("disk", ours.into()).unwrap();
    (links, changes, theirs)
}

/// Asks until the link is what it is to be.
async fn becomes(links: &DeviceLinks, wanted: Link) -> Words {
    let end = Instant::now() + PATIENCE;
    loop {
        let (link, words) = links.ask("disk").await;
        if link == wanted {
            return words;
        }
        assert!(Instant::now() < end, "the link is {link:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Shakes hands as a process does.
fn shake(socket: &mut UnixStream) {
    let mut said = Vec::new();
    let mut part = [0; 256];
    let mut expect = |socket: &mut UnixStream, word: &[u8]| {
        while !said.windows(word.len()).any(|window| window == word) {
            let len = socket.read(&mut part).unwrap();
            assert!(len > 0, "the core hung up");
            said.extend_from_slice(&part[..len]);
        }
    };
    expect(socket, b"AUTH ANONYMOUS");
    let ok = format!("OK {}\r\n", zbus::Guid::generate());
    socket.write_all(ok.as_bytes()).unwrap();
    expect(socket, b"NEGOTIATE_UNIX_FD\r\n");
    socket.write_all(b"AGREE_UNIX_FD\r\n").unwrap();
    expect(socket, b"BEGIN\r\n");
}

#[tokio::test]
async fn a_process_is_asked() {
    let (links, mut changes, theirs) = linked();
    assert_eq!(links.ask("disk").await.0, Link::Waiting);
    assert_eq!(links.ask("other").await.0, Link::None);
    let words = Words {
        state: "Running".into(),
        last_error: "write failed".into(),
        mapped: 4096,
        prefaulted: 12,
        statistics: BTreeMap::from([("requests".into(), 7)]),
    };
    let process = talk(theirs, words.clone()).await;
    assert_eq!(becomes(&links, Link::Up).await, words);
    assert_eq!(changes.recv().await.as_deref(), Some("disk"));
    process.close().await.unwrap();
    becomes(&links, Link::Lost).await;
    assert_eq!(changes.recv().await.as_deref(), Some("disk"));

    // Its successor.
    let (ours, theirs) = UnixStream::pair().unwrap();
    links.attach("disk", ours.into()).unwrap();
    let _process = talk(theirs, words.clone()).await;
    assert_eq!(becomes(&links, Link::Up).await, words);
}

#[tokio::test]
async fn words_are_cleaned() {
    let (links, _changes, theirs) = linked();
    let counters = (0..400).map(|i| (format!("counter_{i}"), i));
    let odd = ["", "Upper", "a b", "\u{1b}[2J", &"x".repeat(65)].map(|n| (n.to_owned(), 1));
    let _process = talk(
        theirs,
        Words {
            state: "s".repeat(10_000),
            last_error: format!("\u{1b}[31mred\n{}", "e".repeat(10_000)),
            statistics: counters.chain(odd).collect(),
            ..Words::default()
        },
    )
    .await;
    let words = becomes(&links, Link::Up).await;
    assert_eq!(words.state.len(), MAX_NAME);
    assert_eq!(words.last_error.chars().count(), MAX_TEXT);
    assert!(words.last_error.starts_with(" [31mred e"));
    assert_eq!(words.statistics.len(), MAX_COUNTERS);
    assert!(
        words
            .statistics
            .keys()
            .all(|name| name.starts_with("counter_"))
    );
}

#[tokio::test]
async fn a_process_that_never_answers_has_a_deadline() {
    let (links, _changes, mut theirs) = linked();
    let theirs = tokio::task::spawn_blocking(move || {
        shake(&mut theirs);
        theirs
    });
    let _theirs = theirs.await.unwrap();
    becomes(&links, Link::Silent).await;
}

#[tokio::test]
async fn a_process_that_says_nothing_at_all_is_waited_for_by_nobody() {
    let (links, _changes, _theirs) = linked();
    for _ in 0..100 {
        assert_eq!(links.ask("disk").await.0, Link::Waiting);
    }
}

#[tokio::test]
async fn junk_loses_the_link_and_no_other() {
    let (links, _changes, _theirs) = linked();
    let (ours, good) = UnixStream::pair().unwrap();
    links.attach("good", ours.into()).unwrap();
    let _good = talk(good, Words::default()).await;
    let huge = [&b"l\x02\0\x01"[..], &[0xff; 12]].concat();
    let before: &[&[u8]] = &[
        b"\n",
        b"\0\0\0\0\r\n",
        b"OK\r\n",
        b"REJECTED\r\n",
        &[0xff; 5000],
    ];
    let after: &[&[u8]] = &[&huge, &[0; 64], &[b'l'; 64], &[b'B'; 64]];
    let all = before.iter().map(|junk| (*junk, false));
    for (junk, shaken) in all.chain(after.iter().map(|junk| (*junk, true))) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        links.attach("disk", ours.into()).unwrap();
        let junk = junk.to_vec();
        let theirs = tokio::task::spawn_blocking(move || {
            if shaken {
                shake(&mut theirs);
            }
            // The core may hang up in the middle of it.
            let _ = theirs.write_all(&junk);
            theirs
        });
        let _theirs = theirs.await.unwrap();
        becomes(&links, Link::Lost).await;
        assert_eq!(links.ask("good").await.0, Link::Up);
    }
}

#[tokio::test]
async fn answers_of_a_wrong_form_are_none() {
    struct Liar;

    #[zbus::interface(name = "org.godwit.Device1")]
    impl Liar {
        async fn statistics(&self) -> &str {
            "many"
        }
    }

    let (links, _changes, theirs) = linked();
    let process = api::peer::server(theirs).unwrap();
    let _process = process.serve_at(PATH, Liar).build().await.unwrap();
    becomes(&links, Link::Lost).await;
}

#[tokio::test]
async fn changes_are_passed_on_at_a_bounded_rate() {
    struct Chatter;

    #[zbus::interface(name = "org.godwit.Device1")]
    impl Chatter {
        #[zbus(property)]
        async fn state(&self) -> String {
            "Running".into()
        }
    }

    let (links, mut changes, theirs) = linked();
    let process = api::peer::server(theirs).unwrap();
    let process = process.serve_at(PATH, Chatter).build().await.unwrap();
    let server = process.object_server();
    let chatter = server.interface::<_, Chatter>(PATH).await.unwrap();
    let begin = Instant::now();
    for _ in 0..3 {
        for _ in 0..50 {
            let state = chatter.get().await;
            state.state_changed(chatter.signal_emitter()).await.unwrap();
        }
        assert_eq!(changes.recv().await.as_deref(), Some("disk"));
    }
    // Three of them are at least two intervals.
    assert!(begin.elapsed() >= 2 * CHANGE_INTERVAL);
    drop(links);
}

#[tokio::test]
async fn a_process_that_tells_much_is_still_heard() {
    let (links, _changes, theirs) = linked();
    let process = talk(theirs, Words::default()).await;
    let server = process.object_server();
    let interface = server.interface::<_, Device1<Talker>>(PATH).await.unwrap();
    becomes(&links, Link::Up).await;
    for _ in 0..300 {
        let emitter = interface.signal_emitter();
        let state = interface.get().await;
        state.state_changed(emitter).await.unwrap();
    }
    assert_eq!(links.ask("disk").await.0, Link::Up);
}

#[test]
fn what_is_no_connection_is_refused() {
    let (links, _changes) = DeviceLinks::new();
    let (_, pipe) = nix::unistd::pipe().unwrap();
    assert!(links.attach("disk", pipe).is_err());
    let folder = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(folder.path().join("s")).unwrap();
    assert!(links.attach("disk", listener.into()).is_err());
}
