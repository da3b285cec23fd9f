//! D-Bus clients that nobody here wrote drive the whole life of a machine.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use test_broker::*;
use test_framework::machine::DEADLINE;

const MANAGER: [&str; 3] = [
    "org.godwit.Vmm1",
    "/org/godwit/Vmm1",
    "org.godwit.Vmm1.Manager",
];
const MACHINE: &str = "/org/godwit/Vmm1/machine/vm";

/// Runs `look` until it says what is wanted.
fn until_said(wanted: &str, look: impl Fn() -> Result<String>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let said = look()?;
        if said.contains(wanted) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{wanted:?} does not come, but {said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn busctl_drives_a_machine() -> Result<()> {
    let broker = Broker::start()?;
    let image = broker.image("disk", 8)?.display().to_string();
    let kernel = test_guest::program().display().to_string();
    let busctl = |arguments: &[&str]| broker.busctl(arguments);
    let call = |path: &str, interface: &str, rest: &[&str]| {
        let mut words = vec!["call", "org.godwit.Vmm1", path, interface];
        words.extend(rest);
        broker.busctl(&words)
    };
    let state = || {
        busctl(&[
            "get-property",
            MANAGER[0],
            MACHINE,
            "org.godwit.Vmm1.Machine",
            "State",
        ])
    };
    let made = call(
        MANAGER[1],
        MANAGER[2],
        &[
            "CreateMachine",
            "sa{sv}t",
            "vm",
            "4",
            "kernel",
            "s",
            &kernel,
            "cmdline",
            "s",
            "heartbeat=50",
            "memory",
            "s",
            "64M",
            "disk",
            "aa{sv}",
            "1",
            "1",
            "path",
            "s",
            &image,
            "1",
        ],
    )?;
    assert_eq!(made.trim(), format!("o \"{MACHINE}\""));
    until_said("running", state)?;
    let tree = busctl(&["tree", MANAGER[0]])?;
    assert!(tree.contains("machine/vm/device/disk0"), "{tree}");
    let listed = call(MANAGER[1], MANAGER[2], &["ListMachines"])?;
    assert!(listed.contains("\"vm\" \"running\""), "{listed}");
    let known = busctl(&["introspect", MANAGER[0], MACHINE])?;
    assert!(known.contains(".OpenConsole"), "{known}");
    let disk = format!("{MACHINE}/device/disk0");
    let reconnects = || {
        busctl(&[
            "get-property",
            MANAGER[0],
            &disk,
            "org.godwit.Vmm1.Device",
            "Reconnects",
        ])
    };
    call(&disk, "org.godwit.Vmm1.Device", &["Restart", "t", "0"])?;
    until_said("u 1", reconnects)?;
    for (method, wanted) in [
        ("Pause", "paused"),
        ("Resume", "running"),
        ("Terminate", "off"),
    ] {
        call(MACHINE, "org.godwit.Vmm1.Machine", &[method, "t", "0"])?;
        until_said(wanted, state)?;
    }
    let again = call(MACHINE, "org.godwit.Vmm1.Machine", &["Pause", "t", "0"]).unwrap_err();
    assert!(again.to_string().contains("vm is off"), "{again}");
    // The job ends a moment after the machine.
    let job = || {
        busctl(&[
            "get-property",
            MANAGER[0],
            MACHINE,
            "org.godwit.Vmm1.Machine",
            "Job",
        ])
    };
    until_said("o \"/\"", job)?;
    call(MACHINE, "org.godwit.Vmm1.Machine", &["Remove", "t", "0"])?;
    let listed = call(MANAGER[1], MANAGER[2], &["ListMachines"])?;
    assert_eq!(listed.trim(), "a(ssso) 0");
    Ok(())
}

/// The script in the documentation.
fn documented() -> Result<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/dbus.md");
    let text = std::fs::read_to_string(path)?;
    let script = text.split("```sh\n").nth(1);
    let script = script.and_then(|rest| rest.split("```").next());
    Ok(script.context("docs/dbus.md has no script")?.to_owned())
}

#[test]
fn what_is_documented_for_busctl_works() -> Result<()> {
    let broker = Broker::start()?;
    let output = Command::new("timeout")
        .args(["170", "sh", "-eu", "-c", &documented()?])
        .env("BUS", broker.address())
        .env("KERNEL", test_guest::program())
        .env("DISK", broker.image("disk", 64)?)
        .output()?;
    let told = said(output)?;
    for wanted in [
        "/machine/first/device/disk0",
        ".Statistics",
        "u 1",
        "\"off\"",
    ] {
        ensure!(told.contains(wanted), "no {wanted} in {told}");
    }
    let left = broker.left()?;
    ensure!(left.is_empty(), "{left:?} are left");
    Ok(())
}

#[test]
fn gdbus_finds_and_calls_the_manager() -> Result<()> {
    let broker = Broker::start()?;
    let address = broker.address();
    let gdbus = |verb: &str, rest: &[&str]| {
        let mut words = vec![verb, "--address", &address, "--dest", MANAGER[0]];
        words.extend(["--object-path", MANAGER[1]]);
        words.extend(rest);
        said(run("gdbus", "libglib2.0-bin", &words)?)
    };
    let known = gdbus("introspect", &[])?;
    assert!(
        known.contains("interface org.godwit.Vmm1.Manager"),
        "{known}"
    );
    let kernel = test_guest::program().display().to_string();
    let definition = format!("{{'kernel': <'{kernel}'>, 'vcpus': <2>, 'memory': <'64M'>}}");
    let method = "org.godwit.Vmm1.Manager.CreateMachine";
    let made = gdbus("call", &["--method", method, "vm", &definition, "0"])?;
    assert_eq!(made.trim(), format!("(objectpath '{MACHINE}',)"));
    let twice = gdbus("call", &["--method", method, "vm", &definition, "0"]).unwrap_err();
    let twice = twice.to_string();
    assert!(
        twice.contains("org.godwit.Vmm1.Error.MachineExists"),
        "{twice}"
    );
    Ok(())
}

const SCRIPT: &str = r#"
import dbus, os, sys, time
import dbus.bus, dbus.mainloop

address, kernel, image = sys.argv[1:]
bus = dbus.bus.BusConnection(address)
root = bus.get_object("org.godwit.Vmm1", "/org/godwit/Vmm1")
manager = dbus.Interface(root, "org.godwit.Vmm1.Manager")
definition = dbus.Dictionary({
    "kernel": kernel, "cmdline": "heartbeat=50", "memory": dbus.UInt64(64 << 20),
    "disk": dbus.Array([dbus.Dictionary({"path": image}, signature="sv")], signature="a{sv}"),
}, signature="sv")
path = manager.CreateMachine("vm", definition, dbus.UInt64(0))
vm = bus.get_object("org.godwit.Vmm1", path)
machine = dbus.Interface(vm, "org.godwit.Vmm1.Machine")
properties = dbus.Interface(vm, "org.freedesktop.DBus.Properties")

def becomes(state):
    end = time.monotonic() + 60
    while properties.Get("org.godwit.Vmm1.Machine", "State") != state:
        assert time.monotonic() < end, state
        time.sleep(0.02)

machine.Start(dbus.UInt64(0))
becomes("running")
console = machine.OpenConsole("serial0", dbus.UInt64(4)).take()
text = b""
while b"@beat" not in text:
    piece = os.read(console, 4096)
    assert piece, text
    text += piece
log = machine.OpenLog("disk0", dbus.UInt64(0)).take()
assert os.fstat(log).st_size >= 0
os.write(console, b"poweroff\n")
becomes("off")
objects = dbus.Interface(root, "org.freedesktop.DBus.ObjectManager").GetManagedObjects()
assert "org.godwit.Vmm1.Device" in objects[path + "/device/disk0"], objects.keys()
try:
    manager.GetMachine("nobody")
    raise SystemExit("a machine that is not there was found")
except dbus.exceptions.DBusException as error:
    assert error.get_dbus_name() == "org.godwit.Vmm1.Error.NoSuchMachine", error
machine.Remove(dbus.UInt64(0))
print("all is well")
"#;

#[test]
fn python_drives_a_machine_and_its_console() -> Result<()> {
    let broker = Broker::start()?;
    let image = broker.image("disk", 8)?.display().to_string();
    let kernel = test_guest::program().display().to_string();
    let words = ["-c", SCRIPT, &broker.address(), &kernel, &image];
    // Debian's own Python is the one that finds Debian's library.
    let told = said(run("/usr/bin/python3", "python3-dbus", &words)?)?;
    assert_eq!(told.trim(), "all is well");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_is_a_bus_too() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    running(&bus, "vm", definition(&test_guest::Workload::default())).await?;
    let control = broker.run().join("machines/vm/control");
    let address = format!("--address=unix:path={}", control.display());
    let words = [
        "get-property",
        "org.godwit.Core1",
        "/org/godwit/Core1",
        "org.godwit.Core1",
        "State",
    ];
    let mut arguments = vec![address.as_str()];
    arguments.extend(words);
    let told = said(run("busctl", "systemd", &arguments)?)?;
    assert_eq!(told.trim(), "s \"running\"");
    Ok(())
}
