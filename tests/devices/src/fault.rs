//! `godwit-fault`, which behaves when it is not told otherwise, as a subject.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use test_framework::frontend::{Buffer, DeviceSpec, DirtyBitmap, Machine, PATIENCE};
use vm_memory::GuestAddress;

use crate::cases::program::refused;
use crate::subject::{Subject, options};

/// Bytes of a buffer: more than a page.
const BUFFER: usize = 6400;
/// Requests of one load on each queue.
const LOAD: usize = 12;

/// The device, and how far it must have counted.
pub(crate) struct Counter {
    pending: BTreeMap<(usize, u16), GuestAddress>,
    /// By queue: the number of the next answer.
    next: Vec<u64>,
    /// How often a queue was set back, as it is by a reset, a crash or an older state.
    set_back: u32,
}

impl Counter {
    fn submit(&mut self, machine: &mut Machine, queue: usize) -> Result<GuestAddress> {
        let Machine { rings, ram, .. } = machine;
        let token = ram.allocate(8, 8)?;
        let address = ram.allocate(BUFFER, 4096)?;
        // The answer's address is as good a token as any.
        ram.write(token, &address.0.to_le_bytes())?;
        ram.write(address, &[0xff; BUFFER])?;
        let buffer = |address, len, writable| Buffer {
            address,
            len,
            writable,
        };
        let room = buffer(address, u32::try_from(BUFFER)?, true);
        let head = rings[queue].add(ram, &[buffer(token, 8, false), room])?;
        self.pending.insert((queue, head), address);
        Ok(address)
    }

    /// Takes the next answer of a queue, which must be the next number.
    fn verify_one(&mut self, machine: &mut Machine, queue: usize) -> Result<()> {
        let Machine { rings, ram, .. } = machine;
        let used = rings[queue].wait_used(ram, PATIENCE)?;
        let address = self
            .pending
            .remove(&(queue, used.head))
            .with_context(|| format!("queue {queue} answered {used:?} unasked"))?;
        ensure!(used.len as usize == BUFFER, "{used:?}");
        let content = ram.read(address, BUFFER)?;
        let (pairs, _) = content.as_chunks::<16>();
        let same = pairs.iter().all(|pair| *pair == pairs[0]);
        ensure!(same, "an answer has two contents");
        let [token, word] = [0, 8].map(|at| {
            let bytes = std::array::from_fn(|byte| pairs[0][at + byte]);
            u64::from_le_bytes(bytes)
        });
        ensure!(token == address.0, "the answer of another request");
        ensure!(word >> 48 == queue as u64, "{word:#x} on queue {queue}");
        let number = word & 0xffff_ffff_ffff;
        let expected = self.next[queue];
        ensure!(number <= expected, "answer {number} instead of {expected}");
        self.set_back += u32::from(number < expected);
        self.next[queue] = number + 1;
        Ok(())
    }
}

impl Subject for Counter {
    const PROGRAM: &'static str = "godwit-fault";
    const KIND: &'static str = "fault";
    const TYPE: &'static str = "fault";
    const FEATURES: u64 = 0;
    const QUEUES: usize = 3;

    fn new() -> Result<Self> {
        Ok(Counter {
            pending: BTreeMap::new(),
            next: vec![0; Self::QUEUES],
            set_back: 0,
        })
    }

    fn spec(&self) -> DeviceSpec {
        DeviceSpec {
            program: Self::PROGRAM,
            arguments: vec![
                format!("--num-queues={}", Self::QUEUES),
                "--state-bytes=5000".to_owned(),
            ],
        }
    }

    fn twin_spec(&self) -> DeviceSpec {
        self.spec()
    }

    fn exchange(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            for _ in 0..4 {
                self.submit(machine, queue)?;
            }
            machine.rings[queue].kick()?;
            for _ in 0..4 {
                self.verify_one(machine, queue)?;
            }
        }
        Ok(())
    }

    fn load(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            for _ in 0..LOAD {
                self.submit(machine, queue)?;
                machine.rings[queue].kick()?;
            }
        }
        Ok(())
    }

    fn settle(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            while machine.rings[queue].in_flight() > 0 {
                self.verify_one(machine, queue)?;
            }
        }
        ensure!(self.pending.is_empty(), "lost: {:?}", self.pending);
        Ok(())
    }

    fn write_to_guest(&mut self, machine: &mut Machine) -> Result<Vec<u64>> {
        let mut pages = Vec::new();
        for queue in 0..Self::QUEUES {
            let address = self.submit(machine, queue)?;
            pages.extend([address.0, address.0 + 4096]);
            machine.rings[queue].kick()?;
            self.verify_one(machine, queue)?;
        }
        Ok(pages)
    }

    fn change_state(&mut self, machine: &mut Machine) -> Result<()> {
        self.exchange(machine)
    }

    fn verify_state(&mut self, _machine: &mut Machine) -> Result<()> {
        ensure!(self.set_back == 0, "a queue was set back");
        Ok(())
    }
}

/// A machine whose device goes by a script, which may be written anew.
fn scripted(script: &Path) -> Result<(Counter, Machine)> {
    let subject = Counter::new()?;
    let mut options = options(&subject);
    let argument = format!("--script={}", script.display());
    options.device.arguments.push(argument);
    Ok((subject, Machine::start(options)?))
}

/// Takes the device through its life; each point of a script is passed once.
fn live(subject: &mut Counter, machine: &mut Machine) -> Result<()> {
    let log = DirtyBitmap::new(0x1_0000_0000)?;
    machine.connection.start_logging(&log)?;
    subject.exchange(machine)?;
    machine.stop_rings()?;
    let state = machine.connection.save()?;
    machine.connection.load(&state)?;
    machine.start_rings()
}

#[test]
fn it_fails_and_dies_where_it_is_told_to() -> Result<()> {
    let folder = TempDir::new()?;
    let script = folder.path().join("script");
    for point in ["prepare", "serve", "stop", "save", "load", "start"] {
        for action in ["fail", "die"] {
            std::fs::write(&script, "")?;
            let (mut subject, mut machine) = scripted(&script)?;
            live(&mut subject, &mut machine)?;
            std::fs::write(&script, format!("{point}={action}"))?;
            if point == "serve" {
                subject.load(&mut machine)?;
            } else {
                let lived = live(&mut subject, &mut machine);
                ensure!(lived.is_err(), "{point}={action} had no effect");
            }
            // A device that cannot stop or serve is of no use either.
            let ends = action == "die" || matches!(point, "stop" | "serve");
            if ends {
                ensure!(!machine.process.wait()?.success(), "{point}={action}");
            } else {
                ensure!(!machine.process.has_ended(), "{point}={action}");
            }
            std::fs::write(&script, "")?;
            if ends {
                machine.replace_process()?;
            } else {
                machine.reconnect_roughly()?;
                machine.reset()?;
            }
            subject.pending.clear();
            machine.reset()?;
            subject.exchange(&mut machine)?;
        }
    }
    Ok(())
}

#[test]
fn it_takes_its_time_and_maps_only_so_much() -> Result<()> {
    let folder = TempDir::new()?;
    let script = folder.path().join("script");
    std::fs::write(&script, "stop=200 save=100")?;
    let (mut subject, mut machine) = scripted(&script)?;
    let begin = Instant::now();
    live(&mut subject, &mut machine)?;
    ensure!(begin.elapsed() >= Duration::from_millis(300));

    let mut options = options(&subject);
    options.device.arguments.push("--map-limit=0".to_owned());
    ensure!(Machine::start(options).is_err(), "it has mapped memory");
    Ok(())
}

#[test]
fn a_script_that_is_none_is_refused() -> Result<()> {
    let folder = TempDir::new()?;
    let script = folder.path().join("script");
    let argument = format!("--script={}", script.display());
    let socket = format!("--socket-path={}", folder.path().join("s").display());
    let arguments = [argument, socket];
    for (text, reason) in [("", "No such file"), ("save=sulk", "is not POINT=ACTION")] {
        if !text.is_empty() {
            std::fs::write(&script, text)?;
        }
        let said = refused::<Counter>(&arguments)?;
        ensure!(said.contains(reason), "{said}");
    }
    Ok(())
}
