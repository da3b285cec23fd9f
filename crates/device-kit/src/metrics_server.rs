//! Serves the counters as OpenMetrics text, by HTTP on a Unix socket.
//!
//! One answer for every request, one connection at a time, each with a deadline: enough for
//! `curl --unix-socket` and for scrapers, and nothing that can be misused.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

/// A scraper that is slower than this is let go.
const DEADLINE: Duration = Duration::from_secs(2);
/// Longest request that is read.
const MAX_REQUEST: usize = 8192;

/// Starts the thread.
pub(crate) fn start(listener: UnixListener, registry: Registry) -> io::Result<()> {
    let work = move || {
        for connection in listener.incoming() {
            let answered = connection.and_then(|stream| answer(stream, &registry));
            if let Err(error) = answered {
                tracing::debug!(%error, "metrics request failed");
            }
        }
    };
    thread::Builder::new().name("metrics".into()).spawn(work)?;
    Ok(())
}

fn answer(mut stream: UnixStream, registry: &Registry) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    read_request(&mut stream)?;
    let mut text = String::new();
    encode(&mut text, registry).map_err(io::Error::other)?;
    write!(
        stream,
        "HTTP/1.0 200 OK\r\n\
         Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
         Content-Length: {}\r\n\r\n{text}",
        text.len()
    )
}

/// Reads up to the empty line that ends a request's head.
fn read_request(stream: &mut UnixStream) -> io::Result<()> {
    let mut request = Vec::new();
    let mut part = [0; 512];
    while request.len() < MAX_REQUEST {
        let got = stream.read(&mut part)?;
        request.extend_from_slice(&part[..got]);
        if got == 0 || request.windows(4).any(|window| window == b"\r\n\r\n") {
            return Ok(());
        }
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("request longer than {MAX_REQUEST} bytes"),
    ))
}
