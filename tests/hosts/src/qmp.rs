//! A client for QEMU's machine protocol: one command at a time, events skipped.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::tail;
use crate::{Error, Result};

/// QEMU answers commands at once; work of some length it does in the background.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

/// No answer that hosts need is near this long.
const ANSWER_MAX_BYTES: u64 = 1 << 20;

/// A connection to QEMU. QEMU serves one at a time, so it is held no longer than needed.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket at `socket` and negotiates.
    ///
    /// # Errors
    /// Nobody listens there, or does not answer as QEMU does.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(Error::io("connecting to", socket))?;
        stream
            .set_read_timeout(Some(ANSWER_DEADLINE))
            .and_then(|()| stream.set_write_timeout(Some(ANSWER_DEADLINE)))
            .map_err(Error::io("setting the timeouts of", socket))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.read("its greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(no_answer("its greeting", &greeting.to_string()));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// QEMU refuses it, with its reason, or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .map_err(Error::io("sending to QEMU", Path::new(command)))?;
        loop {
            let mut answer = self.read(command)?;
            if let Some(error) = answer.get("error") {
                return Err(Error::QmpRefused {
                    command: command.to_owned(),
                    description: error["desc"].as_str().unwrap_or("no reason").to_owned(),
                });
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer.get("event").is_none() {
                return Err(no_answer(command, &answer.to_string()));
            }
        }
    }

    fn read(&mut self, command: &str) -> Result<Value> {
        let mut line = String::new();
        (&mut self.stream)
            .take(ANSWER_MAX_BYTES)
            .read_line(&mut line)
            .map_err(Error::io("reading QEMU's answer to", Path::new(command)))?;
        serde_json::from_str(&line).map_err(|_| no_answer(command, &line))
    }
}

fn no_answer(command: &str, answer: &str) -> Error {
    Error::QmpAnswer {
        command: command.to_owned(),
        answer: tail(answer, 1).chars().take(200).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A QEMU that greets, accepts the negotiation and answers one command with `answer`.
    fn serve(answer: &'static str) -> (tempfile::TempDir, JoinHandle<String>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream
                .get_mut()
                .write_all(b"{\"QMP\": {\"version\": {}}}\n")
                .unwrap();
            stream.read_line(&mut line).unwrap();
            stream.get_mut().write_all(b"{\"return\": {}}\n").unwrap();
            line.clear();
            stream.read_line(&mut line).unwrap();
            stream.get_mut().write_all(answer.as_bytes()).unwrap();
            line
        });
        (folder, server)
    }

    #[test]
    fn events_before_the_answer_are_skipped() {
        let (folder, server) = serve("{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"x\"}}\n");
        let mut qmp = Qmp::connect(&folder.path().join("qmp")).unwrap();
        let value = qmp.execute("query-status", json!({"a": 1})).unwrap();
        assert_eq!(value["status"], "x");
        let sent: Value = serde_json::from_str(&server.join().unwrap()).unwrap();
        assert_eq!(
            sent,
            json!({"execute": "query-status", "arguments": {"a": 1}})
        );
    }

    #[test]
    fn a_refusal_is_an_error_with_the_reason() {
        let (folder, _server) = serve("{\"error\": {\"class\": \"X\", \"desc\": \"no bus\"}}\n");
        let mut qmp = Qmp::connect(&folder.path().join("qmp")).unwrap();
        let error = qmp.execute("device_add", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused device_add: no bus");
    }

    #[test]
    fn an_end_without_answer_is_an_error() {
        let (folder, _server) = serve("");
        let mut qmp = Qmp::connect(&folder.path().join("qmp")).unwrap();
        let error = qmp.execute("quit", json!({})).unwrap_err();
        assert!(matches!(error, Error::QmpAnswer { .. }), "{error}");
    }
}
