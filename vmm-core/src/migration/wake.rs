//! What it costs to wake somebody and to be woken in turn.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

/// Pairs of threads: it is chance which processors the two of one get. Half of them are slower than
/// what is said.
const PAIRS: usize = 7;
/// Turns that each pair takes; half of them are slower than what counts.
const TURNS: usize = 9;

/// One turn between two threads over a socket, as it is at the moment.
pub fn wake_up() -> io::Result<Duration> {
    let mut pairs = [Duration::ZERO; PAIRS];
    for pair in &mut pairs {
        *pair = turn()?;
    }
    pairs.sort();
    Ok(pairs[PAIRS / 2])
}

fn turn() -> io::Result<Duration> {
    let (mut here, mut there) = UnixStream::pair()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut byte = [0];
            // It ends with the other end, which is dropped here whatever happens.
            while there.read_exact(&mut byte).is_ok() && there.write_all(&byte).is_ok() {}
        });
        let mut turns = [Duration::ZERO; TURNS];
        for turn in &mut turns {
            let begin = Instant::now();
            here.write_all(&[1])?;
            here.read_exact(&mut [0])?;
            *turn = begin.elapsed();
        }
        drop(here);
        turns.sort();
        Ok(turns[TURNS / 2])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_takes_time_and_ends() {
        assert_ne!(wake_up().unwrap(), Duration::ZERO);
    }
}
