//! What a guest tells of itself, on whichever side it is.

use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use test_framework::machine::DEADLINE;
use test_guest::Report;

use super::Side;

/// Waits until the guest lives on this side, now: for two heartbeats that come after this was
/// called, of a clock that never went back. The number of the last.
pub fn beat_on(side: &mut Side) -> Result<u64> {
    let begin = Instant::now();
    let mut fresh = 0;
    loop {
        let found = side
            .console
            .report("a heartbeat", DEADLINE, |report| match *report {
                Report::Beat { n, back, .. } => Some((n, back)),
                _ => None,
            });
        let (at, (number, back)) =
            found.with_context(|| format!("the core said: {}", side.core().stderr()))?;
        ensure!(back == 0, "the guest's clock went back {back} times");
        fresh += u32::from(at > begin);
        if fresh == 2 {
            return Ok(number);
        }
    }
}

/// Answers that the guest has had of its counting device so far.
pub fn answers(side: &mut Side) -> Result<u64> {
    let answers = |report: &Report| match *report {
        Report::Count { answers, .. } => Some(answers),
        _ => None,
    };
    let found = side.console.ask("counts", DEADLINE, answers);
    Ok(found
        .with_context(|| format!("the core said: {}", side.core().stderr()))?
        .1)
}

/// Waits until a guest has had time for all of its work.
pub fn warm_up(side: &mut Side) -> Result<u64> {
    loop {
        let beat = beat_on(side)?;
        if beat >= 50 {
            return Ok(beat);
        }
    }
}

/// What a guest has done, all of it right.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Pages that were compared.
    pub pages: u64,
    /// Reads compared, and writes.
    pub blocks: (u64, u64),
    /// Packets sent, and answers.
    pub packets: (u64, u64),
    /// Answers of counting devices, and how often a queue began anew.
    pub counts: (u64, u64),
    /// What was done with a balloon.
    pub balloon: Option<Report>,
}

/// Waits for the end of the guest's work, which must have gone well.
pub fn finish(mut side: Side) -> Result<Done> {
    side.console.send(test_guest::command::STOP)?;
    let mut done = Done::default();
    let found = side
        .console
        .report("the end of the work", DEADLINE, |report| {
            match *report {
                Report::Blk {
                    reads,
                    writes,
                    end: true,
                    ..
                } => {
                    done.blocks.0 += reads;
                    done.blocks.1 += writes;
                }
                Report::Net {
                    sent,
                    received,
                    end: true,
                    ..
                } => {
                    done.packets.0 += sent;
                    done.packets.1 += received;
                }
                Report::Count {
                    answers,
                    restarts,
                    end: true,
                    ..
                } => {
                    done.counts.0 += answers;
                    done.counts.1 += restarts;
                }
                Report::Balloon { end: true, .. } => done.balloon = Some(*report),
                Report::Verify { pages: checked, .. } => done.pages += checked,
                Report::Done { ok, .. } => return Some(ok),
                _ => {}
            }
            None
        });
    let (_, ok) = found.with_context(|| format!("the core said: {}", side.core().stderr()))?;
    if !ok {
        bail!(
            "the guest found something wrong: {:#?}",
            side.console.history()
        );
    }
    let status = side.core().wait(DEADLINE)?;
    ensure!(status.success(), "the core said {}", side.core().stderr());
    Ok(done)
}
