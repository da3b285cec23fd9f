//! Free page hints: rounds, numbers, STOP and DONE in every order.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use anyhow::{Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use test_framework::frontend::Machine;
use vm_memory::GuestAddress;

use super::memory::{ask, config, linked};
use super::*;
use crate::cases::link::Core;

const STOP: u32 = 0;
const DONE: u32 = 1;

/// The core's map of free pages.
struct Map(File);

impl Map {
    fn new() -> Result<Self> {
        let file = File::from(memfd_create("map", MFdFlags::MFD_CLOEXEC)?);
        // For 128 MiB.
        file.set_len(4096 + (128 << 20) / PAGE / 8)?;
        Ok(Self(file))
    }

    fn word(&self, at: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn has(&self, page: GuestAddress) -> Result<bool> {
        let page = page.0 / PAGE;
        Ok(self.word(4096 + page / 64 * 8)? >> (page % 64) & 1 != 0)
    }

    fn count(&self) -> Result<u32> {
        let words = (0..(128 << 20) / PAGE / 64).map(|word| self.word(4096 + word * 8));
        words.map(|word| Ok(word?.count_ones())).sum()
    }
}

fn start(core: &Core, map: &Map) -> Result<u32> {
    ask(core, async |b| {
        Ok(b.start_hints(map.0.as_fd().into()).await?)
    })
}

fn stop(core: &Core) -> Result<()> {
    ask(core, async |b| Ok(b.stop_hints().await?))
}

fn end(core: &Core) -> Result<()> {
    ask(core, async |b| Ok(b.end_hints().await?))
}

/// The guest names its round.
fn say(machine: &mut Machine, command: u32) -> Result<()> {
    name_pages(machine, HINTS, &[command])?;
    finish(machine, HINTS)
}

/// The guest names a page; where it is.
fn hint(machine: &mut Machine) -> Result<GuestAddress> {
    let page = used_pages(machine, 1)?;
    lend(machine, HINTS, page, u32::try_from(PAGE)?)?;
    finish(machine, HINTS)?;
    ensure!(!is_zero(machine, page)?, "a hinted page was taken away");
    Ok(page)
}

#[test]
fn a_round_is_told_marked_and_ended() -> Result<()> {
    let (mut machine, core) = linked(FEATURES, 4)?;
    let map = Map::new()?;
    assert_eq!(config(&mut machine, COMMAND_AT)?, STOP);
    let round = start(&core, &map)?;
    assert_eq!(config(&mut machine, COMMAND_AT)?, round);
    say(&mut machine, round)?;
    let page = hint(&mut machine)?;
    ensure!(map.has(page)?);
    assert_eq!((map.count()?, map.word(0)?), (1, 0));
    say(&mut machine, STOP)?;
    assert_eq!(map.word(0)?, u64::from(round));
    stop(&core)?;
    assert_eq!(config(&mut machine, COMMAND_AT)?, STOP);
    end(&core)?;
    assert_eq!(config(&mut machine, COMMAND_AT)?, DONE);
    Ok(())
}

#[test]
fn numbers_stop_and_done_in_every_order() -> Result<()> {
    let (mut machine, core) = linked(FEATURES, 4)?;
    let map = Map::new()?;
    // What the core does, then what the guest says (its newest round, one before, none): whether
    // a hint then counts.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        Start,
        Stop,
        End,
        SayNew,
        SayOld,
        SayStop,
    }
    use Act::{End, SayNew, SayOld, SayStop, Start, Stop};
    let acts = [Start, Stop, End, SayNew, SayOld, SayStop];
    let (mut round, mut said, mut runs) = (0, 0, false);
    // Every pair of acts comes about, one after the other.
    for first in acts {
        for second in acts {
            for act in [first, second] {
                match act {
                    Start => {
                        let next = start(&core, &map)?;
                        ensure!(next > round, "round {next} after {round}");
                        (round, runs) = (next, true);
                    }
                    Stop => {
                        stop(&core)?;
                        runs = false;
                    }
                    End => {
                        end(&core)?;
                        runs = false;
                    }
                    SayNew | SayOld | SayStop => {
                        said = match act {
                            SayNew => round,
                            SayOld => round.saturating_sub(1),
                            _ => STOP,
                        };
                        say(&mut machine, said)?;
                    }
                }
                let page = hint(&mut machine)?;
                let expected = runs && said == round;
                ensure!(
                    map.has(page)? == expected,
                    "after {act:?}: round {round}, said {said}, runs {runs}"
                );
            }
        }
    }
    let late = core.statistics()?["late_hints"];
    ensure!(late > 0, "no hint was late");
    Ok(())
}

#[test]
fn pages_in_the_balloon_need_not_be_named() -> Result<()> {
    let (mut machine, core) = linked(FEATURES, 4)?;
    let pages = used_pages(&mut machine, 8)?;
    name_pages(&mut machine, INFLATE, &numbers(pages, 8)?)?;
    finish(&mut machine, INFLATE)?;
    name_pages(&mut machine, DEFLATE, &numbers(pages, 2)?)?;
    finish(&mut machine, DEFLATE)?;
    let map = Map::new()?;
    start(&core, &map)?;
    assert_eq!((map.count()?, map.has(pages)?), (6, false));
    Ok(())
}

#[test]
fn what_cannot_be_hinted_is_refused() -> Result<()> {
    let map = Map::new()?;
    let (_machine, core) = linked(FEATURES & !FREE_PAGE_HINT, 3)?;
    let refused = start(&core, &map).map_err(|e| e.to_string());
    ensure!(refused.is_err_and(|e| e.contains("no driver")));
    let (mut machine, core) = linked(FEATURES, 4)?;
    machine.connection.set_config(POISON_AT, &[0xaa; 4])?;
    let refused = start(&core, &map).map_err(|e| e.to_string());
    ensure!(refused.is_err_and(|e| e.contains("relies on")));
    machine.connection.set_config(POISON_AT, &[0; 4])?;
    let empty = Map(File::from(memfd_create("map", MFdFlags::MFD_CLOEXEC)?));
    ensure!(start(&core, &empty).is_err(), "a map without room");
    let round = start(&core, &map)?;
    // Poisoned since: what it names is not free to be anything any more.
    machine.connection.set_config(POISON_AT, &[0xaa; 4])?;
    say(&mut machine, round)?;
    hint(&mut machine)?;
    assert_eq!(map.count()?, 0);
    Ok(())
}

#[test]
fn a_round_ends_with_the_link_and_with_a_move() -> Result<()> {
    let map = Map::new()?;
    let (mut machine, core) = linked(FEATURES, 4)?;
    start(&core, &map)?;
    drop(core);
    machine.process.wait_log("the control link is over")?;
    assert_eq!(config(&mut machine, COMMAND_AT)?, DONE);
    let (mut machine, core) = linked(FEATURES, 4)?;
    let round = start(&core, &map)?;
    let state = machine.move_to(Balloon::new()?.twin_spec())?;
    ensure!(!state.is_empty());
    assert_eq!(config(&mut machine, COMMAND_AT)?, DONE);
    // A hint that was on its way is late.
    say(&mut machine, round)?;
    hint(&mut machine)?;
    assert_eq!(map.count()?, 0);
    Ok(())
}
