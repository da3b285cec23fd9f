//! A back-end made of bytes, for answers that no library would give.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// What it was sent.
pub(super) struct Request {
    pub(super) code: u32,
    pub(super) body: Vec<u8>,
    pub(super) file: Option<File>,
}

/// Answers each request with what `answer` returns; hangs up at [`Answer::HangUp`].
pub(super) enum Answer {
    /// Nothing, or that all is well if it was asked.
    None,
    Body(Vec<u8>),
    Bytes(Vec<u8>),
    HangUp,
}

/// The front-end's end of a connection to `answer`.
pub(super) fn serve(answer: impl FnMut(&mut Request) -> Answer + Send + 'static) -> OwnedFd {
    let (ours, theirs) = UnixStream::pair().unwrap();
    serve_on(theirs, answer);
    ours.into()
}

/// Answers on a connection, in a thread.
pub(super) fn serve_on(
    mut theirs: UnixStream,
    mut answer: impl FnMut(&mut Request) -> Answer + Send + 'static,
) {
    thread::spawn(move || {
        loop {
            let mut header = [0; 12];
            let Ok((12, file)) = theirs.recv_with_fd(&mut header) else {
                return;
            };
            let word = |i: usize| u32::from_ne_bytes(header[i..i + 4].try_into().unwrap());
            let mut body = vec![0; word(8) as usize];
            theirs.read_exact(&mut body).unwrap();
            let code = word(0);
            let sent = match answer(&mut Request { code, body, file }) {
                Answer::None if word(4) & 8 != 0 => theirs.write_all(&message(code, 5, &[0; 8])),
                Answer::None => Ok(()),
                Answer::Body(body) => theirs.write_all(&message(code, 5, &body)),
                Answer::Bytes(bytes) => theirs.write_all(&bytes),
                Answer::HangUp => return,
            };
            if sent.is_err() {
                return;
            }
        }
    });
}

/// A message with its header.
pub(super) fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let words = [code, flags, u32::try_from(body.len()).unwrap()];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    bytes.extend(body);
    bytes
}

/// What a plain block back-end answers, with these protocol features.
pub(super) fn blk(request: &mut Request, protocol: u64) -> Answer {
    let number = |value: u64| Answer::Body(value.to_ne_bytes().to_vec());
    match request.code {
        1 => number(1 << 32 | 1 << 30 | 1 << 26),
        15 => number(protocol),
        17 => number(1),
        24 => Answer::Body(request.body.clone()),
        _ => Answer::None,
    }
}
