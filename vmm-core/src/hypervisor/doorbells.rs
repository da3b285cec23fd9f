//! Doorbells as ioeventfds.

use std::io;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::Vm;
use crate::costs;
use crate::interrupt::{Doorbells, InterruptError};

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> InterruptError {
    move |errno| InterruptError::Kvm {
        what,
        source: io::Error::from_raw_os_error(errno.errno()),
    }
}

impl Doorbells for Vm {
    fn register(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        costs::DOORBELLS.add();
        self.fd()
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(refused("register a doorbell"))
    }

    fn unregister(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        costs::DOORBELLS.add();
        self.fd()
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(refused("unregister a doorbell"))
    }
}
