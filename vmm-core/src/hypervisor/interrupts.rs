//! Interrupt routes, and what fires them.
//!
//! The table is ours; KVM gets it whole at each change ([`MsiRouter::route`] and
//! nothing else), because one call with all routes costs no more than one with one.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::Vm;
use crate::costs;
use crate::interrupt::{Gsi, InterruptError, IrqLine, MsiMessage, MsiRouter};
use crate::layout::FIRST_MSI_GSI;

/// The interrupt routes of one VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    most: u32,
    /// Every taken message-signalled route and where it leads.
    routes: Mutex<BTreeMap<Gsi, Option<MsiMessage>>>,
}

impl Interrupts {
    /// The routes that every PC has, and no others.
    pub fn new(vm: &Vm) -> Result<Self, InterruptError> {
        let vm = Arc::clone(vm.fd());
        let most = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        let interrupts = Self {
            vm,
            most,
            routes: Mutex::default(),
        };
        interrupts.write(&interrupts.routes())?;
        Ok(interrupts)
    }

    /// One input of the interrupt controllers.
    pub fn line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Line {
            vm: Arc::clone(&self.vm),
            gsi,
        })
    }

    fn routes(&self) -> MutexGuard<'_, BTreeMap<Gsi, Option<MsiMessage>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, routes: &BTreeMap<Gsi, Option<MsiMessage>>) -> Result<(), InterruptError> {
        let messages = routes
            .iter()
            .filter_map(|(gsi, message)| Some(msi(*gsi, (*message)?)));
        let entries: Vec<_> = pc_routes().chain(messages).collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_| InterruptError::Exhausted {
                wanted: entries.len(),
                free: self.most as usize,
            })?;
        costs::ROUTES.add();
        self.vm
            .set_gsi_routing(&table)
            .map_err(refused("route interrupts"))
    }

    fn gsis(&self) -> Range<u32> {
        FIRST_MSI_GSI..self.most
    }
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> InterruptError {
    move |errno| InterruptError::Kvm {
        what,
        source: io::Error::from_raw_os_error(errno.errno()),
    }
}

/// ISA interrupts go to both the 8259 pair and the I/O APIC; the timer, interrupt 0, is
/// the I/O APIC's input 2, as the ACPI tables say.
fn pc_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let chip = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let master = (0..8)
        .filter(|gsi| *gsi != 2)
        .map(move |g| chip(g, KVM_IRQCHIP_PIC_MASTER, g));
    let slave = (8..16).map(move |g| chip(g, KVM_IRQCHIP_PIC_SLAVE, g - 8));
    let io_apic = (0..FIRST_MSI_GSI)
        .filter(|gsi| *gsi != 2)
        .map(move |g| chip(g, KVM_IRQCHIP_IOAPIC, if g == 0 { 2 } else { g }));
    master.chain(slave).chain(io_apic)
}

fn msi(gsi: Gsi, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: gsi.0,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..Default::default()
    };
    entry
}

impl MsiRouter for Interrupts {
    fn allocate(&self, count: usize) -> Result<Vec<Gsi>, InterruptError> {
        let mut routes = self.routes();
        let free = self.gsis().map(Gsi).filter(|gsi| !routes.contains_key(gsi));
        let taken: Vec<_> = free.take(count).collect();
        if taken.len() < count {
            return Err(InterruptError::Exhausted {
                wanted: count,
                free: taken.len(),
            });
        }
        routes.extend(taken.iter().map(|gsi| (*gsi, None)));
        Ok(taken)
    }

    fn free(&self, gsis: &[Gsi]) {
        self.routes().retain(|gsi, _| !gsis.contains(gsi));
    }

    fn route(&self, changes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
        let mut routes = self.routes();
        routes.extend(changes.iter().copied());
        self.write(&routes)
    }

    fn attach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError> {
        costs::INTERRUPTS.add();
        self.vm
            .register_irqfd(event, gsi.0)
            .map_err(refused("attach an interrupt's eventfd"))
    }

    fn detach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError> {
        costs::INTERRUPTS.add();
        self.vm
            .unregister_irqfd(event, gsi.0)
            .map_err(refused("detach an interrupt's eventfd"))
    }
}

struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine for Line {
    fn set_level(&self, high: bool) -> Result<(), InterruptError> {
        self.vm
            .set_irq_line(self.gsi, high)
            .map_err(refused("set an interrupt line"))
    }
}
