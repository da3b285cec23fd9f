//! What devices are connected to in tests.

use std::sync::Mutex;

use crate::interrupt::{InterruptError, IrqLine};
use crate::machine::request::{Request, RequestSink};

/// An interrupt line that remembers its levels.
#[derive(Default)]
pub(super) struct Line(Mutex<Vec<bool>>);

impl Line {
    pub(super) fn level(&self) -> bool {
        self.0.lock().unwrap().last().copied().unwrap_or(false)
    }

    pub(super) fn history(&self) -> Vec<bool> {
        self.0.lock().unwrap().clone()
    }

    /// Edges since the last call.
    pub(super) fn edges(&self) -> usize {
        let levels = std::mem::take(&mut *self.0.lock().unwrap());
        levels.iter().filter(|&&high| high).count()
    }
}

impl IrqLine for Line {
    fn set_level(&self, high: bool) -> Result<(), InterruptError> {
        self.0.lock().unwrap().push(high);
        Ok(())
    }
}

/// Requests that have been made.
#[derive(Default)]
pub(super) struct Requests(Mutex<Vec<Request>>);

impl Requests {
    /// Those since the last call.
    pub(super) fn taken(&self) -> Vec<Request> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl RequestSink for Requests {
    fn request(&self, request: Request) {
        self.0.lock().unwrap().push(request);
    }
}
