//! A stand-in for the hypervisor's interrupt routes, for tests.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{Gsi, InterruptError, MsiMessage, MsiRouter};

/// What KVM would know. An attached eventfd is drained by [`Self::fired`].
#[derive(Default)]
pub(crate) struct FakeRouter {
    state: Mutex<FakeRoutes>,
}
#[derive(Default)]
struct FakeRoutes {
    next: u32,
    routes: BTreeMap<Gsi, MsiMessage>,
    route_calls: usize,
    attached: Vec<(Gsi, EventFd, i32)>,
}

impl FakeRouter {
    /// Messages that have arrived since the last call.
    pub(crate) fn fired(&self) -> Vec<u32> {
        let state = self.state.lock().unwrap();
        let fired = state.attached.iter().filter(|(_, e, _)| e.read().is_ok());
        fired.map(|(gsi, ..)| state.routes[gsi].data).collect()
    }
    /// Eventfds attached now.
    pub(crate) fn attached(&self) -> usize {
        self.state.lock().unwrap().attached.len()
    }
    /// Times that routes were set.
    pub(crate) fn route_calls(&self) -> usize {
        self.state.lock().unwrap().route_calls
    }
}

impl MsiRouter for FakeRouter {
    fn allocate(&self, count: usize) -> Result<Vec<Gsi>, InterruptError> {
        let mut state = self.state.lock().unwrap();
        let first = state.next;
        state.next += u32::try_from(count).unwrap();
        Ok((first..state.next).map(Gsi).collect())
    }
    fn free(&self, gsis: &[Gsi]) {
        let state = self.state.lock().unwrap();
        assert!(gsis.iter().all(|g| !state.routes.contains_key(g)));
        assert!(state.attached.iter().all(|(g, ..)| !gsis.contains(g)));
    }
    fn route(&self, changes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
        let mut state = self.state.lock().unwrap();
        state.route_calls += 1;
        for &(gsi, message) in changes {
            match message {
                Some(message) => state.routes.insert(gsi, message),
                None => state.routes.remove(&gsi),
            };
        }
        Ok(())
    }
    fn attach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError> {
        let mut state = self.state.lock().unwrap();
        assert!(state.routes.contains_key(&gsi), "{gsi:?} leads nowhere");
        let fd = event.as_raw_fd();
        assert!(state.attached.iter().all(|a| a.2 != fd), "attached twice");
        state.attached.push((gsi, event.try_clone().unwrap(), fd));
        Ok(())
    }
    fn detach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError> {
        let mut state = self.state.lock().unwrap();
        let fd = event.as_raw_fd();
        let before = state.attached.len();
        state.attached.retain(|a| (a.0, a.2) != (gsi, fd));
        assert_eq!(state.attached.len() + 1, before, "was not attached");
        Ok(())
    }
}
