//! What goes wrong, and when.
//!
//! A script is words of the form `POINT=ACTION`, separated by white space; a point that it does not
//! name goes well. The file is read again at every point, so that a test may change its mind while
//! the process runs.
//!
//! | point | when |
//! |---|---|
//! | `prepare` | dirty logging begins: a move may follow |
//! | `start` | the first ring is about to start |
//! | `serve` | a request was taken, and is not answered yet |
//! | `stop` | the last ring has stopped |
//! | `save` | its state is asked for |
//! | `load` | a state has come, whole and right |
//!
//! | action | what it does |
//! |---|---|
//! | `fail` | says that it cannot (`serve`: ends with an error) |
//! | `hang` | never answers |
//! | `die` | crashes |
//! | a number | takes so many milliseconds |

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use device_kit::{OptionError, StateError};
use thiserror::Error;

/// Longest script, in bytes.
const MAX_SCRIPT: usize = 512;

/// A point of the device's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    Prepare,
    Start,
    Serve,
    Stop,
    Save,
    Load,
}

/// What happens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fail,
    Hang,
    Die,
    Take(Duration),
}

/// Words that are no script.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{0:?} is not POINT=ACTION with one of prepare, start, serve, stop, save, load and one of fail, \
     hang, die or milliseconds"
)]
struct NoScript(String);

/// The script's file, if there is one.
#[derive(Debug)]
pub(crate) struct Script(Option<File>);

impl Script {
    pub(crate) fn open(path: Option<PathBuf>) -> Result<Self, OptionError> {
        let Some(path) = path else {
            return Ok(Script(None));
        };
        let script = File::open(&path).map(|file| Script(Some(file)));
        let checked = script.and_then(|script| {
            parse(&script.read()?).map_err(io::Error::other)?;
            Ok(script)
        });
        checked.map_err(|error| OptionError {
            option: "--script",
            value: path.display().to_string(),
            problem: error.to_string(),
        })
    }

    /// Does what the script has for this point.
    pub(crate) fn at(&self, point: Point) -> Result<(), StateError> {
        let text = self.read().map_err(|error| StateError(error.to_string()))?;
        let steps = parse(&text).map_err(|error| StateError(error.to_string()))?;
        for (_, action) in steps.into_iter().filter(|(at, _)| *at == point) {
            match action {
                Action::Fail => {
                    return Err(StateError(format!("{point:?} fails, as it was asked to")));
                }
                Action::Hang => loop {
                    thread::sleep(Duration::MAX);
                },
                Action::Die => std::process::abort(),
                Action::Take(time) => thread::sleep(time),
            }
        }
        Ok(())
    }

    /// How long the script lets this point take.
    pub(crate) fn time(&self, point: Point) -> Duration {
        let steps = self.read().map(|text| parse(&text).unwrap_or_default());
        let takes = |(at, action)| match action {
            Action::Take(time) if at == point => time,
            _ => Duration::ZERO,
        };
        steps.unwrap_or_default().into_iter().map(takes).sum()
    }

    fn read(&self) -> io::Result<String> {
        let Some(file) = &self.0 else {
            return Ok(String::new());
        };
        let mut bytes = [0; MAX_SCRIPT];
        let len = file.read_at(&mut bytes, 0)?;
        String::from_utf8(bytes[..len].to_vec()).map_err(io::Error::other)
    }
}

fn parse(text: &str) -> Result<Vec<(Point, Action)>, NoScript> {
    let step = |word: &str| {
        let (point, action) = word.split_once('=')?;
        Some((point.parse().ok()?, action.parse().ok()?))
    };
    text.split_whitespace()
        .map(|word| step(word).ok_or_else(|| NoScript(word.to_owned())))
        .collect()
}

impl FromStr for Point {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "prepare" => Point::Prepare,
            "start" => Point::Start,
            "serve" => Point::Serve,
            "stop" => Point::Stop,
            "save" => Point::Save,
            "load" => Point::Load,
            _ => return Err(()),
        })
    }
}

impl FromStr for Action {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Ok(match text {
            "fail" => Action::Fail,
            "hang" => Action::Hang,
            "die" => Action::Die,
            _ => Action::Take(Duration::from_millis(text.parse().map_err(|_| ())?)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use tempfile::NamedTempFile;

    use super::*;

    #[test]
    fn words_are_understood_or_named() {
        let steps = parse(" save=fail\nload=100").unwrap();
        let slow = Action::Take(Duration::from_millis(100));
        assert_eq!(steps, [(Point::Save, Action::Fail), (Point::Load, slow)]);
        for word in ["save", "rest=fail", "save=sulk", "save=-1", "="] {
            assert_eq!(parse(word), Err(NoScript(word.into())));
        }
    }

    #[test]
    fn a_script_may_change() {
        let mut file = NamedTempFile::new().unwrap();
        let script = Script::open(Some(file.path().into())).unwrap();
        script.at(Point::Save).unwrap();
        file.write_all(b"save=fail start=30").unwrap();
        assert!(script.at(Point::Save).is_err());
        script.at(Point::Stop).unwrap();
        let begin = Instant::now();
        script.at(Point::Start).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(30));
        file.as_file().set_len(0).unwrap();
        script.at(Point::Save).unwrap();
    }
}
