//! A few instructions of 16-bit code on the real KVM.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::{Bus, BusDevice};
use crate::memory::{Memory, Ram};

const DEADLINE: Duration = Duration::from_secs(10);
const CODE: u64 = 0x1000;
const COUNTER: GuestAddress = GuestAddress(0x2000);

#[derive(Default)]
struct Witness {
    written: Mutex<Vec<u8>>,
    ended: Mutex<Vec<(u32, Ended)>>,
}

impl BusDevice for Witness {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.written.lock().unwrap().extend(data);
    }
}

impl VcpuEvents for Witness {
    fn ended(&self, vcpu: u32, ended: Ended) {
        self.ended.lock().unwrap().push((vcpu, ended));
    }
}

struct Bench {
    memory: Memory,
    witness: Arc<Witness>,
    vcpus: VcpuSet,
    vm: Vm,
}

/// A VM whose only vCPU starts `code` at 0x1000, 16-bit, without an interrupt table.
fn bench(code: &[u8]) -> Bench {
    let kvm = open_kvm(Path::new("/dev/kvm"), None).unwrap();
    let vm = Vm::new(&kvm).unwrap();
    let memory = Memory::default();
    memory.subscribe(Arc::new(MemorySlots::new(&vm))).unwrap();
    let mut tx = memory.begin();
    for region in Ram::allocate(2 << 20, None).unwrap().regions().unwrap() {
        tx.add(region).unwrap();
    }
    tx.commit().unwrap();
    memory
        .guest()
        .write_slice(code, GuestAddress(CODE))
        .unwrap();

    let witness = Arc::new(Witness::default());
    let buses = VcpuBuses {
        ports: Arc::new(Bus::default()),
        mmio: Arc::new(Bus::default()),
    };
    buses.ports.insert(0x10, 2, witness.clone()).unwrap();
    buses
        .mmio
        .insert(0xd0_0000, 0x1000, witness.clone())
        .unwrap();
    let msrs = Vm::msrs(&kvm).unwrap();
    let vcpu = Vcpu::new(
        &kvm,
        &vm,
        0,
        &guest_cpuid(&kvm, CpuLevel::Host, 0, 1).unwrap(),
        &msrs,
    )
    .unwrap();
    let mut sregs = vcpu.fd.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= 1;
    vcpu.fd.set_sregs(&sregs).unwrap();
    let regs = kvm_bindings::kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.fd.set_regs(&regs).unwrap();
    let vcpus = VcpuSet::start(
        vec![vcpu],
        &buses,
        &(witness.clone() as Arc<dyn VcpuEvents>),
    )
    .unwrap();
    Bench {
        memory,
        witness,
        vcpus,
        vm,
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not come about");
}

/// `inc word [0x2000]; jmp` for ever.
const COUNT: [u8; 6] = [0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa];

#[test]
fn port_accesses_reach_their_device_and_a_triple_fault_is_told() {
    // in al, 0x10; out 0x11, al; ud2 without an interrupt table.
    let mut bench = bench(&[0xe4, 0x10, 0xe6, 0x11, 0x0f, 0x0b]);
    bench.vcpus.run();
    eventually("the end", || {
        !bench.witness.ended.lock().unwrap().is_empty()
    });
    assert_eq!(*bench.witness.written.lock().unwrap(), [0x5a]);
    let ended = bench.witness.ended.lock().unwrap().clone();
    assert!(
        matches!(ended[..], [(0, Ended::TripleFault { .. })]),
        "{ended:?}"
    );
    bench.vcpus.pause(DEADLINE).unwrap();
}

#[test]
fn a_paused_vcpu_stands_still_and_resumes_every_time() {
    let mut bench = bench(&COUNT);
    let count = |bench: &Bench| bench.memory.guest().read_obj::<u16>(COUNTER).unwrap();
    for round in 0..50 {
        let before = count(&bench);
        bench.vcpus.run();
        eventually("progress", || count(&bench) != before);
        bench.vcpus.pause(DEADLINE).unwrap();
        let stopped = count(&bench);
        thread::sleep(Duration::from_millis(1));
        assert_eq!(count(&bench), stopped, "round {round}");
    }
    // Pausing what is paused, and running what runs, changes nothing.
    bench.vcpus.pause(DEADLINE).unwrap();
    bench.vcpus.run();
    bench.vcpus.run();
    bench.vcpus.pause(DEADLINE).unwrap();
}

#[test]
fn a_saved_state_continues_in_another_vm() {
    let mut source = bench(&COUNT);
    source.vcpus.run();
    let count = |bench: &Bench| bench.memory.guest().read_obj::<u16>(COUNTER).unwrap();
    eventually("progress", || count(&source) > 3);
    source.vcpus.pause(DEADLINE).unwrap();
    let vcpu = source
        .vcpus
        .each(DEADLINE, |vcpu| vcpu.save())
        .unwrap()
        .remove(0);
    let vm = source.vm.save().unwrap();
    let stopped = count(&source);

    // The other VM would end at once, did it start where it was made to.
    let mut destination = bench(&[0x0f, 0x0b]);
    destination
        .memory
        .guest()
        .write_slice(&COUNT, GuestAddress(CODE))
        .unwrap();
    destination
        .memory
        .guest()
        .write_obj(stopped, COUNTER)
        .unwrap();
    destination.vm.restore(&vm).unwrap();
    let regs = vcpu.regs;
    destination
        .vcpus
        .each(DEADLINE, move |other| other.restore(&vcpu))
        .unwrap();
    let restored = destination
        .vcpus
        .each(DEADLINE, |vcpu| vcpu.save())
        .unwrap()
        .remove(0);
    assert_eq!(restored.regs, regs);
    destination.vcpus.run();
    eventually("progress", || count(&destination) > stopped + 3);
    destination.vcpus.pause(DEADLINE).unwrap();
    assert!(destination.witness.ended.lock().unwrap().is_empty());
}

#[test]
fn clocks_go_on_while_a_state_is_on_its_way() {
    let bench = bench(&COUNT);
    let mut vm = bench.vm.save().unwrap();
    let vcpus = bench.vcpus.each(DEADLINE, |vcpu| vcpu.save());
    let mut vcpu = vcpus.unwrap().remove(0);
    vcpu.tsc_khz = Some(2_000_000);
    vcpu.msrs = vec![(0x10, 7), (0x11, 7)];
    let clock = vm.clock.unwrap().clock;
    vm.catch_up(Duration::from_micros(1500));
    vcpu.catch_up(Duration::from_micros(1500));
    assert_eq!(vm.clock.unwrap().clock - clock, 1_500_000);
    assert_eq!(vcpu.msrs, [(0x10, 7 + 3_000_000), (0x11, 7)]);
    vcpu.leave_counter_out();
    assert_eq!(vcpu.msrs, [(0x11, 7)]);
}

#[test]
fn hostile_saved_states_are_refused_by_name() {
    let bench = bench(&COUNT);
    let mut vm = bench.vm.save().unwrap();
    for chip in &mut vm.irqchips {
        chip.chip_id = 7;
    }
    if !vm.irqchips.is_empty() {
        let error = bench.vm.restore(&vm).unwrap_err().to_string();
        assert_eq!(
            error,
            "saved interrupt controllers is not valid: number 7, the last is 2"
        );
    }
    let mut vcpu = bench
        .vcpus
        .each(DEADLINE, |vcpu| vcpu.save())
        .unwrap()
        .remove(0);
    vcpu.msrs = vec![(0, 0); 5000];
    let refused = bench
        .vcpus
        .each(DEADLINE, move |other| other.restore(&vcpu));
    assert!(matches!(
        refused,
        Err(VcpuError::Hypervisor { vcpu: 0, .. })
    ));
}

#[test]
fn what_is_no_kvm_is_named() {
    let error = open_kvm(Path::new("/nonexistent/kvm"), None)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.starts_with("/nonexistent/kvm cannot be opened; is KVM there"),
        "{error}"
    );
    let error = open_kvm(Path::new("/dev/null"), None)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        error,
        "/dev/null is not a KVM device: API version -1, expected 12"
    );
}
