//! Making a machine of its definition.
//!
//! Back-ends are reached all at once, while KVM makes the VM: each takes its time to
//! answer, and none waits for another.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, ScopedJoinHandle};

use api::core::State;
use kvm_ioctls::Cap;
use migration::wire::Tsc;
use tokio::sync::watch;

use super::boot::Boot;
use super::config::{KvmSource, MachineConfig};
use super::console::Console;
use super::control::{self, News, Owner};
use super::devices::Devices;
use super::error::MachineError;
use super::event::Events;
use super::migrate::{Incoming, Moving, Parts};
use super::platform::Platform;
use super::request::RequestSink;
use super::{Machine, VCPU_DEADLINE};
use crate::boot::acpi::AcpiConfig;
use crate::bus::Bus;
use crate::hypervisor::{
    Interrupts, MemorySlots, Vcpu, VcpuBuses, VcpuEvents, VcpuSet, Vm, guest_cpuid, open_kvm,
};
use crate::memory::{HugePages, Memory, Ram, prefault};
use crate::migration::definition::{cpu_features, processor};
use crate::migration::ram::CoreWrites;
use crate::migration::unit::Unit;
use crate::pci::{BarAllocator, HostBridge, PciAddress, Root};
use crate::remote::Endpoint;
use crate::remote::device1::DeviceLinks;
use crate::remote::vfio_user::{Found, VfioUserConfig, VfioUserDevice, VfioUserError};
use crate::remote::vhost_user::{VhostUserConfig, VhostUserDevice, VhostUserError, Watchdog};
use crate::transport::{TroubleSink, VirtioPciDevice, Wiring};

impl Machine {
    /// Makes a machine whose guest has not run yet, under the control of `owner`.
    ///
    /// # Errors
    /// The definition is impossible, or something that it names is not to be had; then
    /// nothing is left behind.
    pub fn new(config: MachineConfig, owner: Option<Owner>) -> Result<Self, MachineError> {
        config.check()?;
        let boot = Boot::open(config.boot)?;
        let page = config.hugepages.map_or(1, HugePages::bytes);
        let ram_and_rom = config.memory + boot.rom().next_multiple_of(page);
        let kvm = match config.kvm {
            KvmSource::Path(path) => open_kvm(&path, None)?,
            KvmSource::Fd(fd) => open_kvm(Path::new("the inherited descriptor"), Some(fd))?,
        };

        let (sender, inbox) = channel();
        let events = Events::new(sender);
        let requests: Arc<dyn RequestSink> = Arc::new(events.clone());
        let memory = Arc::new(Memory::default());
        let shared_ram = config.incoming.as_ref().and_then(Incoming::memory);
        let shared_ram = shared_ram.map(OwnedFd::try_clone).transpose();
        let shared_ram = shared_ram.map_err(|source| MachineError::Map {
            what: "taken over",
            source,
        })?;
        let ((vm, ram), devices, found) = thread::scope(|scope| {
            let devices = scope.spawn(|| connect(config.vhost_user, &memory));
            let found = scope.spawn(|| find(config.vfio_user));
            let vm = Vm::new(&kvm).map_err(MachineError::from);
            let ram = match shared_ram {
                Some(file) => Ram::adopt(file.into(), ram_and_rom),
                None => Ram::allocate(ram_and_rom, config.hugepages),
            };
            let ram = ram.map(|ram| ram.with_rom(config.memory, boot.rom()));
            let ram = ram.map_err(MachineError::from);
            let devices = devices.join().unwrap_or_else(|panic| resume_unwind(panic));
            let found = found.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok::<_, MachineError>(((vm?, ram?), devices?, found?))
        })?;
        let vm = Arc::new(vm);
        let slots = Arc::new(MemorySlots::new(&vm));
        memory.subscribe(Arc::clone(&slots) as _)?;
        for device in &devices {
            memory.subscribe(Arc::clone(device) as _)?;
        }
        for device in &found {
            memory.subscribe(device.listener())?;
        }
        lay_out(&memory, &ram, config.prefault)?;

        let interrupts = Arc::new(Interrupts::new(&vm)?);
        let buses = VcpuBuses {
            ports: Arc::new(Bus::default()),
            mmio: Arc::new(Bus::default()),
        };
        let acpi = AcpiConfig {
            apic_ids: (0..config.cpus).collect(),
            mmio64: None,
        };
        let core_writes = CoreWrites::default();
        let fw_cfg = boot.fw_cfg(&acpi, &memory, &core_writes)?;
        let platform = Platform::new(&buses.ports, &interrupts, &requests, config.memory, fw_cfg)?;
        let root = Arc::new(Root::new(Arc::clone(&requests)));
        root.install(&buses.ports, &buses.mmio)?;
        let bridge = Arc::new(HostBridge::default());
        root.insert(PciAddress::HOST_BRIDGE, Arc::clone(&bridge) as _)?;
        let wiring = Wiring {
            bars: Arc::new(BarAllocator::new().map_err(crate::transport::TransportError::from)?),
            mmio: Arc::clone(&buses.mmio),
            router: interrupts,
            doorbells: Arc::clone(&vm) as _,
            trouble: Arc::new(events.clone()) as Arc<dyn TroubleSink>,
        };
        let backends = devices.clone();
        let devices = plug(devices, &root, &wiring)?;
        let pci_devices = plug_pci(found, devices.len(), &root, &wiring, &memory)?;
        let unit = |(pci, remote): (&Arc<VirtioPciDevice>, _)| {
            Arc::new(Unit {
                id: pci.name().to_owned(),
                pci: Arc::clone(pci),
                remote,
            })
        };
        let units = devices.iter().zip(backends.clone()).map(unit).collect();

        let msrs = Vm::msrs(&kvm)?;
        let mut vcpus = Vec::new();
        let shown = guest_cpuid(&kvm, config.cpu, 0, config.cpus)?;
        for id in 0..config.cpus {
            let cpuid = guest_cpuid(&kvm, config.cpu, id, config.cpus)?;
            vcpus.push(Vcpu::new(&kvm, &vm, id, &cpuid, &msrs)?);
        }
        let tsc = vcpus.first().and_then(Vcpu::tsc_khz).map(|khz| Tsc {
            khz,
            scales: kvm.check_extension(Cap::TscControl),
        });
        let vcpu_events: Arc<dyn VcpuEvents> = Arc::new(events.clone());
        let vcpus = VcpuSet::start(vcpus, &buses, &vcpu_events)?;
        let mut pristine = (vm.save()?, vcpus.each(VCPU_DEADLINE, |vcpu| vcpu.save())?);
        // Time goes on across a reset.
        pristine.0.clock = None;

        let console = Console::start(&config.serial, &platform.serial, &platform.output)?;
        let (links, changes) = DeviceLinks::new();
        let links = Arc::new(links);
        for (device, socket) in config.links {
            links
                .attach(&device, socket)
                .map_err(|source| MachineError::Link { device, source })?;
        }
        let (state, watcher) = watch::channel(State::Paused);
        let news = News {
            state: watcher,
            devices: changes,
        };
        let moving = Moving::new(Parts {
            events: events.clone(),
            slots,
            units,
            cpus: config.cpus,
            cpu_features: cpu_features(&shown),
            processor: processor(config.cpu, &shown),
            tsc,
            core_writes,
            links: Arc::clone(&links),
            incoming: config.incoming,
            end: config.end,
            without: config.without,
        });
        let mover = moving.watcher(ram.file());
        let devices_told = Devices::new(&backends, &pci_devices, links);
        let control = control::serve(owner, events, news, devices_told, mover)
            .map_err(MachineError::Control)?;
        let machine = Self {
            events: inbox,
            deferred: VecDeque::new(),
            moving,
            state,
            memory,
            vm,
            vcpus,
            devices,
            backends,
            pci_devices,
            root,
            bridge,
            platform,
            console,
            control,
            boot,
            acpi,
            pristine,
        };
        // What arrives has booted elsewhere, and its memory may be in use there.
        if machine.moving.parts.incoming.is_none() {
            machine.boot.fill_rom(&machine.memory)?;
            machine.load()?;
        }
        Ok(machine)
    }
}

/// Reaches all back-ends at once; the first failure, in the order of the definition, counts.
fn connect(
    devices: Vec<(VhostUserConfig, Endpoint)>,
    memory: &Arc<Memory>,
) -> Result<Vec<Arc<VhostUserDevice>>, MachineError> {
    let watchdog = &Arc::new(Watchdog::start().map_err(MachineError::Control)?);
    thread::scope(|scope| {
        let connect = |(config, endpoint)| {
            scope.spawn(move || VhostUserDevice::connect(config, endpoint, memory, watchdog))
        };
        let workers: Vec<_> = devices.into_iter().map(connect).collect();
        let join = |worker: ScopedJoinHandle<'_, Result<_, VhostUserError>>| {
            worker
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
                .map_err(MachineError::from)
        };
        workers.into_iter().map(join).collect()
    })
}

/// Reaches all processes of PCI devices at once.
fn find(devices: Vec<(VfioUserConfig, Endpoint)>) -> Result<Vec<Found>, MachineError> {
    thread::scope(|scope| {
        let connect = |(config, endpoint)| scope.spawn(|| Found::connect(config, endpoint));
        let workers: Vec<_> = devices.into_iter().map(connect).collect();
        let join = |worker: ScopedJoinHandle<'_, Result<_, VfioUserError>>| {
            worker
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
                .map_err(MachineError::from)
        };
        workers.into_iter().map(join).collect()
    })
}

/// Makes the RAM the guest's, in one transaction.
fn lay_out(memory: &Memory, ram: &Ram, all_present: bool) -> Result<(), MachineError> {
    let regions = ram.regions().map_err(|source| MachineError::Map {
        what: "mapped",
        source,
    })?;
    if all_present {
        prefault(&regions).map_err(|source| MachineError::Map {
            what: "prefaulted",
            source,
        })?;
    }
    let mut layout = memory.begin();
    for region in regions {
        layout.add(region)?;
    }
    Ok(layout.commit()?)
}

/// Puts the devices on the PCI bus.
fn plug(
    devices: Vec<Arc<VhostUserDevice>>,
    root: &Root,
    wiring: &Wiring,
) -> Result<Vec<Arc<VirtioPciDevice>>, MachineError> {
    let mut plugged = Vec::with_capacity(devices.len());
    for (index, device) in devices.into_iter().enumerate() {
        let address = PciAddress::of_device(index).ok_or(MachineError::TooManyDevices)?;
        let device = VirtioPciDevice::new(device, wiring)?;
        root.insert(address, Arc::clone(&device) as _)?;
        plugged.push(device);
    }
    Ok(plugged)
}

/// Puts PCI devices behind the first `taken` ones.
fn plug_pci(
    found: Vec<Found>,
    taken: usize,
    root: &Root,
    wiring: &Wiring,
    memory: &Arc<Memory>,
) -> Result<Vec<VfioUserDevice>, MachineError> {
    let mut plugged = Vec::with_capacity(found.len());
    for (index, device) in (taken..).zip(found) {
        let address = PciAddress::of_device(index).ok_or(MachineError::TooManyDevices)?;
        let device = VfioUserDevice::new(device, wiring, memory)?;
        root.insert(address, device.function())?;
        plugged.push(device);
    }
    Ok(plugged)
}
