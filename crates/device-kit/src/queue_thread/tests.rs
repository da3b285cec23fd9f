use std::io;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::device::Source;
use crate::queue::Chain;
use crate::queue::tests::Guest;

const PATIENCE: Duration = Duration::from_secs(10);
const HELD: QueueIndex = QueueIndex::new(0);
const QUICK: QueueIndex = QueueIndex::new(1);

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

/// Answers queue 1 at once, and queue 0 when it is released.
struct Clerk {
    release: Arc<EventFd>,
    held: Vec<Chain>,
    fails: Arc<Mutex<bool>>,
}

impl Worker for Clerk {
    fn start(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn wait_for(&self, interest: &mut Interest<'_>) {
        interest.readable(Source(7), self.release.as_fd());
    }

    fn ready(&mut self, source: Source, queues: &mut Queues<'_>) -> Result<(), WorkerError> {
        assert_eq!(source, Source(7));
        let _ = self.release.read();
        for mut chain in self.held.drain(..) {
            if let Some(queue) = queues.get(HELD) {
                queue.complete(&mut chain, 0)?;
            }
        }
        Ok(())
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        if *self.fails.lock().unwrap() {
            let gone = io::Error::from(io::ErrorKind::NotFound);
            return Err(HostError::new("the clerk is out", gone).into());
        }
        loop {
            let mut chain = Chain::default();
            if !queue.pop(&mut chain)? {
                return Ok(Progress::Emptied);
            }
            if queue.index() == HELD {
                self.held.push(chain);
            } else {
                queue.complete(&mut chain, 0)?;
            }
        }
    }
}

struct Office {
    rings: Arc<dyn Rings>,
    release: Arc<EventFd>,
    fails: Arc<Mutex<bool>>,
    ending: Ending,
}

fn employ(worker: impl Worker, ending: &Ending) -> Arc<dyn Rings> {
    let shared =
        QueueThread::new(worker, &[HELD, QUICK], ending.clone(), Health::default()).unwrap();
    let thread = Arc::clone(&shared);
    thread::spawn(move || thread.run());
    shared
}

fn office() -> Office {
    let release = Arc::new(event());
    let fails = Arc::new(Mutex::new(false));
    let ending = Ending::new().unwrap();
    let clerk = Clerk {
        release: Arc::clone(&release),
        held: Vec::new(),
        fails: Arc::clone(&fails),
    };
    let rings = employ(clerk, &ending);
    Office {
        rings,
        release,
        fails,
        ending,
    }
}

/// A ring's driver and its eventfds.
struct Driver {
    guest: Guest,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Driver {
    fn new() -> Self {
        Driver {
            guest: Guest::new(),
            kick: event(),
            call: event(),
            error: event(),
        }
    }

    fn start(&self, office: &Office, index: QueueIndex, base: u16) {
        let queue = self.guest.start_as(index.get(), base, None).unwrap();
        let events = [
            (RingEvent::Kick, &self.kick),
            (RingEvent::Call, &self.call),
            (RingEvent::Error, &self.error),
        ];
        for (which, event) in events {
            let fd = Some(event.as_fd().try_clone_to_owned().unwrap());
            office.rings.set_event(index, which, fd).unwrap();
        }
        office.rings.start(queue).unwrap();
    }

    fn request(&mut self, head: u16) {
        self.guest.request(head);
        self.kick.write(1).unwrap();
    }

    fn wait_used(&self, index: u16) {
        let deadline = Instant::now() + PATIENCE;
        while self.guest.used_index() != index {
            assert!(Instant::now() < deadline, "used index is not {index}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn wait(fd: &EventFd) {
    assert!(is_readable(fd, PATIENCE), "no event");
    fd.read().unwrap();
}

fn is_readable(fd: &impl AsFd, patience: Duration) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(patience).unwrap()).unwrap() > 0
}

#[test]
fn a_stop_waits_for_its_requests_and_holds_up_nobody() {
    let office = office();
    let (mut held, mut quick) = (Driver::new(), Driver::new());
    held.start(&office, HELD, 0);
    quick.start(&office, QUICK, 0);
    held.request(0);
    held.request(1);
    quick.request(0);
    quick.wait_used(1);
    let (base, stopped) = channel();
    office.rings.stop(HELD, base).unwrap();
    // Requests of a queue that is being stopped are left where they are.
    held.request(2);
    for round in 1..20u16 {
        quick.request(round % 8);
        quick.wait_used(round + 1);
    }
    assert!(
        stopped.try_recv().is_err(),
        "stopped with requests in flight"
    );
    office.release.write(1).unwrap();
    let base = stopped.recv_timeout(PATIENCE).unwrap();
    assert!(base == held.guest.used_index() && base >= 2);
    // It goes on where it stopped, without another kick.
    held.start(&office, HELD, base);
    while held.guest.used_index() != 3 {
        office.release.write(1).unwrap();
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_broken_ring_is_reported_once_and_can_be_stopped() {
    let office = office();
    let (mut bad, mut good) = (Driver::new(), Driver::new());
    bad.start(&office, QUICK, 0);
    good.start(&office, HELD, 0);
    bad.guest.offer(99);
    bad.kick.write(1).unwrap();
    wait(&bad.error);
    bad.request(0);
    good.request(0);
    office.release.write(1).unwrap();
    let (base, stopped) = channel();
    office.rings.stop(QUICK, base).unwrap();
    assert_eq!(stopped.recv_timeout(PATIENCE).unwrap(), 0);
    assert_eq!(bad.guest.used_index(), 0, "a broken ring was served");
    assert!(!is_readable(&bad.error, Duration::ZERO), "reported twice");
}

#[test]
fn a_kick_descriptor_that_is_replaced_or_unusable_harms_nothing() {
    let office = office();
    let mut driver = Driver::new();
    driver.start(&office, QUICK, 0);
    let old = std::mem::replace(&mut driver.kick, event());
    let fd = Some(driver.kick.as_fd().try_clone_to_owned().unwrap());
    let (queue, which) = (QUICK, RingEvent::Kick);
    office.rings.set_event(queue, which, fd).unwrap();
    driver.request(0);
    driver.wait_used(1);
    old.write(1).unwrap();
    // A pipe whose other end is gone: readable for ever, with nothing to read.
    let (broken, _) = nix::unistd::pipe().unwrap();
    let fd = Some(broken);
    office.rings.set_event(queue, which, fd).unwrap();
    let fd = Some(driver.kick.as_fd().try_clone_to_owned().unwrap());
    office.rings.set_event(queue, which, fd).unwrap();
    driver.request(1);
    driver.wait_used(2);
}

/// Answers two requests at once, and none alone.
struct Pairing<const ANY_THREAD: bool> {
    turns: Arc<AtomicUsize>,
}

impl<const ANY_THREAD: bool> Worker for Pairing<ANY_THREAD> {
    const ANY_THREAD: bool = ANY_THREAD;

    fn start(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn wait_for(&self, _: &mut Interest<'_>) {}

    fn ready(&mut self, _: Source, _: &mut Queues<'_>) -> Result<(), WorkerError> {
        Ok(())
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        self.turns.fetch_add(1, Ordering::Relaxed);
        loop {
            let (mut first, mut second) = (Chain::default(), Chain::default());
            if !queue.pop(&mut first)? {
                return Ok(Progress::Emptied);
            }
            if !queue.pop(&mut second)? {
                queue.unpop(&mut first);
                return Ok(Progress::Short);
            }
            queue.answer(&[(first.head(), 0), (second.head(), 0)])?;
        }
    }
}

#[test]
fn a_queue_that_is_short_rests_until_the_guest_gives_more() {
    let turns = Arc::new(AtomicUsize::new(0));
    let worker = Pairing::<false> {
        turns: Arc::clone(&turns),
    };
    let ending = Ending::new().unwrap();
    let office = Office {
        rings: employ(worker, &ending),
        release: Arc::new(event()),
        fails: Arc::default(),
        ending,
    };
    let mut driver = Driver::new();
    driver.start(&office, QUICK, 0);
    for round in 0..20u16 {
        let head = 2 * round % 8;
        let before = turns.load(Ordering::Relaxed);
        driver.request(head);
        thread::sleep(Duration::from_millis(2));
        assert_eq!(driver.guest.used_index(), 2 * round);
        let spent = turns.load(Ordering::Relaxed) - before;
        assert!(spent < 10, "{spent} turns for one request");
        driver.request(head + 1);
        driver.wait_used(2 * round + 2);
    }
}

/// A queue thread that does not run.
fn asleep<const ANY_THREAD: bool>() -> (
    Arc<QueueThread<Pairing<ANY_THREAD>>>,
    Office,
    Arc<AtomicUsize>,
) {
    let turns = Arc::new(AtomicUsize::new(0));
    let worker = Pairing {
        turns: Arc::clone(&turns),
    };
    let ending = Ending::new().unwrap();
    let rings = QueueThread::new(worker, &[QUICK], ending.clone(), Health::default()).unwrap();
    let office = Office {
        rings: Arc::clone(&rings) as Arc<dyn Rings>,
        release: Arc::new(event()),
        fails: Arc::default(),
        ending,
    };
    (rings, office, turns)
}

#[test]
fn a_worker_of_any_thread_looks_at_a_ring_that_starts_at_once() {
    let (_, office, turns) = asleep::<true>();
    let mut driver = Driver::new();
    driver.start(&office, QUICK, 0);
    assert_eq!(turns.load(Ordering::Relaxed), 0, "there was nothing");
    let (base, stopped) = channel();
    office.rings.stop(QUICK, base).unwrap();
    assert_eq!(stopped.try_recv(), Ok(0));
    driver.guest.request(0);
    driver.guest.request(1);
    driver.start(&office, QUICK, 0);
    assert_eq!(driver.guest.used_index(), 2);
    assert!(is_readable(&driver.call, Duration::ZERO));
}

#[test]
fn a_guest_is_called_at_the_start_unless_it_has_seen_all_answers() {
    for (event_idx, word, called) in [
        (true, 2, false),
        (true, 1, true),
        (false, 0, true),
        (false, 1, false),
    ] {
        let (_, office, _) = asleep::<true>();
        let mut driver = Driver::new();
        driver.start(&office, QUICK, 0);
        driver.guest.request(0);
        driver.guest.request(1);
        let (base, stopped) = channel();
        office.rings.stop(QUICK, base).unwrap();
        assert_eq!(stopped.try_recv(), Ok(0));
        driver.start(&office, QUICK, 0);
        wait(&driver.call);
        let (base, stopped) = channel();
        office.rings.stop(QUICK, base).unwrap();
        assert_eq!(stopped.try_recv(), Ok(2));

        driver.guest.wish(event_idx, word);
        driver.start(&office, QUICK, 2);
        let is_called = is_readable(&driver.call, Duration::ZERO);
        assert_eq!(is_called, called, "{event_idx} {word}");
    }
}

#[test]
fn a_ring_at_rest_stops_and_starts_without_its_thread() {
    let (rings, office, turns) = asleep::<false>();
    let mut driver = Driver::new();
    for _ in 0..3 {
        driver.start(&office, QUICK, 0);
        let (base, stopped) = channel();
        office.rings.stop(QUICK, base).unwrap();
        assert_eq!(stopped.try_recv(), Ok(0));
    }
    assert_eq!(turns.load(Ordering::Relaxed), 0);

    // What came while it was stopped is not missed.
    driver.guest.request(0);
    driver.guest.request(1);
    driver.start(&office, QUICK, 0);
    thread::spawn(move || rings.run());
    driver.wait_used(2);
    driver.request(2);
    driver.request(3);
    driver.wait_used(4);
}

#[test]
fn a_failure_of_the_host_ends_the_process() {
    let office = office();
    let mut driver = Driver::new();
    driver.start(&office, QUICK, 0);
    *office.fails.lock().unwrap() = true;
    driver.request(0);
    assert!(is_readable(&office.ending, PATIENCE));
    assert!(office.ending.failed());
}
