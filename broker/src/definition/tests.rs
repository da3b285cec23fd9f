//! Definitions that are taken, and those that are refused and how.

use std::collections::HashMap;

use zbus::{OwnedVariant, Variant};

use super::*;

fn from_toml(text: &str) -> Result<Definition, DefinitionError> {
    Definition::from_toml(&MachineName::new("vm").unwrap(), text)
}

fn refused(text: &str) -> String {
    from_toml(text).unwrap_err().to_string()
}

#[test]
fn a_whole_file_is_understood() {
    let definition = from_toml(
        r#"
        kernel = "/boot/vmlinuz"
        cmdline = "console=ttyS0"
        vcpus = 4
        cpu = "x86-64-v3"
        memory = "2G"
        autostart = true
        [[disk]]
        path = "/images/a.img"
        queues = 2
        [[disk]]
        id = "data"
        path = "/images/b.img"
        read-only = true
        [[net]]
        tap = "tap0"
        [[balloon]]
        target = "64M"
        statistics-interval = 60
        [[vhost-user]]
        type = "fs"
        socket = "/run/fs.sock"
        tag = "home"
        [[vfio]]
        host = "01:0A.0"
        [[vfio]]
        synthetic = true
        [[vfio]]
        id = "card"
        socket = "/run/card.sock"
        "#,
    )
    .unwrap();
    assert_eq!((definition.vcpus, definition.memory), (4, 2 << 30));
    assert_eq!(definition.cpu, "x86-64-v3");
    assert!(definition.autostart);
    let ids: Vec<_> = definition.devices.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "disk0",
            "data",
            "net0",
            "balloon0",
            "vhost-user0",
            "vfio0",
            "vfio1",
            "card"
        ]
    );
    let sources: Vec<_> = definition.devices.iter().map(Device::source).collect();
    assert_eq!(sources[2], "tap:tap0");
    assert_eq!(
        sources[5..],
        ["0000:01:0a.0", "synthetic", "/run/card.sock"]
    );
    let DeviceKind::Net(net) = &definition.devices[2].kind else {
        panic!("it is a card");
    };
    assert!(net.mac.starts_with("52:54:00:"), "{}", net.mac);
    let DeviceKind::Balloon(balloon) = &definition.devices[3].kind else {
        panic!("it is a balloon");
    };
    assert_eq!((balloon.target_mib, balloon.statistics_interval), (64, 60));
}

#[test]
fn a_mistake_is_named_with_key_value_and_line() {
    for (text, expected) in [
        ("vcpus = 1", "kernel: it must be given, or firmware"),
        (
            "firmware = \"/f\"\ncmdline = \"quiet\"",
            "line 2: cmdline: not possible with firmware, which boots from a disk",
        ),
        (
            "kernel = \"/k\"\n\nfirmware = \"/f\"",
            "line 1: kernel: not possible with firmware, which boots from a disk",
        ),
        (
            "firmware = \"bios.bin\"",
            "line 1: firmware: \"bios.bin\": give an absolute path",
        ),
        (
            "kernel = \"/k\"\n\nvcpus = 33",
            "line 3: vcpus: 33: give 1 to 32",
        ),
        (
            "kernel = \"/k\"\nvcpus = \"two\"",
            "line 2: vcpus: a string where an integer is expected",
        ),
        (
            "kernel = \"/k\"\ncpu = \"486\"",
            "line 2: cpu: \"486\": give host, x86-64-v1, x86-64-v2, x86-64-v3 or x86-64-v4",
        ),
        (
            "kernel = \"k\"",
            "line 1: kernel: \"k\": give an absolute path",
        ),
        (
            "kernel = \"/a/../b\"",
            "line 1: kernel: \"/a/../b\": give a path without ..",
        ),
        (
            "kernel = \"/k\"\n[[disk]]\npath = \"/d\"\nsize = 3",
            "line 4: disk[0].size: unknown key; there are id, path, read-only, queues, serial",
        ),
        (
            "vcpus = 1\nkernl = \"/k\"",
            "line 2: kernl: unknown key; there are kernel, initrd, cmdline, firmware, vcpus, cpu, memory, \
             hugepages, prefault, uuid, autostart, disk, net, balloon, vhost-user, vfio",
        ),
        (
            "kernel = \"/k\"\n[[vfio]]\nhost = \"../0000:01:00.0\"",
            "line 3: vfio[0].host: \"../0000:01:00.0\": give a PCI address, as 0000:01:00.0",
        ),
        (
            "kernel = \"/k\"\n[[vfio]]\nid = \"a\"",
            "line 2: vfio[0].host: give one of host, socket and synthetic = true",
        ),
        (
            "kernel = \"/k\"\n[[vfio]]\nhost = \"01:00.0\"\nsynthetic = true",
            "line 3: vfio[0].host: give one of host, socket and synthetic = true",
        ),
        (
            "kernel = \"/k\"\n[[vfio]]\nhost = \"01:00.0\"\n[[vfio]]\nhost = \"0000:01:00.0\"",
            "line 2: vfio: 0000:01:00.0: the machine has this device already",
        ),
        (
            "kernel = \"/k\"\n[[disk]]\npth = \"/d\"",
            "line 3: disk[0].pth: unknown key; there are id, path, read-only, queues, serial",
        ),
        (
            "kernel = \"/k\"\n[[disk]]\nqueues = 1",
            "line 2: disk[0].path: it must be given",
        ),
        (
            "kernel = \"/k\"\ndisk = \"/d\"",
            "line 2: disk: a string where a list of dictionaries is expected",
        ),
        (
            "kernel = \"/k\"\n[[net]]\ntap = \"a/b\"",
            "line 3: net[0].tap: \"a/b\": give an interface's name of 1 to 15 characters without \
             '/', ':' or blanks",
        ),
        (
            "kernel = \"/k\"\n[[balloon]]\nstatistics-interval = 3601",
            "line 3: balloon[0].statistics-interval: 3601: give 0 to 3600",
        ),
        (
            "kernel = \"/k\"\nmemory = 1.5",
            "line 2: memory: a fraction where an integer or a string is expected",
        ),
        (
            "kernel = \"/k\"\nmemory = \"1M\"",
            "line 2: memory: 1048576 bytes: give 16M to 1T",
        ),
        (
            "kernel = \"/k\"\n[[disk]]\nid = \"x\"\npath = \"/d\"\n[[net]]\nid = \"x\"\ntap = \"t\"",
            "line 6: net[0].id: x: two devices have this name",
        ),
    ] {
        assert_eq!(refused(text), expected, "{text}");
    }
    let syntax = refused("kernel = \"/k\"\nvcpus = = 2");
    assert!(syntax.starts_with("line 2: "), "{syntax}");
}

fn dictionary<const N: usize>(entries: [(&str, Variant<'static>); N]) -> Dictionary {
    entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), OwnedVariant::try_from(value).unwrap()))
        .collect()
}

#[test]
fn a_dictionary_says_the_same_as_a_file() {
    let disk: HashMap<String, Variant<'static>> = HashMap::from([
        ("path".to_owned(), "/d".into()),
        ("queues".to_owned(), 4u8.into()),
    ]);
    let interval = ("statistics-interval".to_owned(), 0u32.into());
    let balloon: HashMap<String, Variant<'static>> = HashMap::from([interval]);
    let definition = Definition::from_dictionary(dictionary([
        ("kernel", "/k".into()),
        ("memory", (64u64 << 20).into()),
        ("vcpus", 2i64.into()),
        ("disk", vec![disk].into()),
        ("balloon", vec![balloon].into()),
    ]))
    .unwrap();
    let file = from_toml(&format!(
        "kernel = \"/k\"\nmemory = \"64M\"\nvcpus = 2\nuuid = \"{}\"\n[[disk]]\npath = \"/d\"\nqueues = 4\n\
         [[balloon]]\nstatistics-interval = 0",
        definition.uuid
    ))
    .unwrap();
    assert_eq!(definition, file);
    let again = Definition::from_dictionary(definition.to_dictionary()).unwrap();
    assert_eq!(again, definition);
}

#[test]
fn a_firmware_is_in_every_form_of_a_definition() {
    let definition = from_toml("firmware = \"/f\"").unwrap();
    let files = definition.boot.files();
    assert_eq!(files, [("firmware", "/f")]);
    assert_eq!(from_toml(&definition.to_toml()).unwrap(), definition);
    let shown = definition.to_dictionary();
    assert!(!shown.contains_key("cmdline"));
    assert_eq!(Definition::from_dictionary(shown).unwrap(), definition);
    for definition in [definition, from_toml("kernel = \"/k\"").unwrap()] {
        let kept = serde_json::to_string(&definition).unwrap();
        let again: Definition = serde_json::from_str(&kept).unwrap();
        assert_eq!(again, definition);
    }
}

#[test]
fn a_hostile_dictionary_is_refused() {
    let refused = |entries| Definition::from_dictionary(entries).unwrap_err();
    let huge = "x".repeat(1 << 20);
    let long = refused(dictionary([("kernel", format!("/{huge}").into())]));
    assert_eq!(long.key, "kernel");
    assert!(
        long.problem.len() < 200,
        "an error does not repeat a megabyte"
    );
    let unknown = refused(dictionary([
        ("kernel", "/k".into()),
        ("rm -rf", 1u32.into()),
    ]));
    assert_eq!(unknown.key, "rm -rf");
    let many: Dictionary = (0..1000)
        .map(|n| (format!("key{n}"), OwnedVariant::from(1u32)))
        .collect();
    assert!(refused(many).problem.contains("at most 256"));
    let control = refused(dictionary([
        ("kernel", "/k".into()),
        ("cmdline", "a\nb".into()),
    ]));
    assert_eq!(control.key, "cmdline");
    let autostart = refused(dictionary([
        ("kernel", "/k".into()),
        ("autostart", true.into()),
    ]));
    assert_eq!(autostart.key, "autostart");
}

#[test]
fn pci_addresses_are_those_of_sysfs() {
    let address = |text: &str| values::pci_address(text).ok();
    assert_eq!(address("01:1F.7").as_deref(), Some("0000:01:1f.7"));
    assert_eq!(address("ffff:ff:00.0").as_deref(), Some("ffff:ff:00.0"));
    for bad in [
        "",
        "1",
        "0000:01:20.0",
        "0000:01:00.8",
        "0000:01:00",
        "0000.01:00:0",
        "0000:01:00.0.0",
        "0000:+1:00.0",
        "0000:01:00.0/",
        "/sys:01:00.0",
        "00000:01:00.0",
    ] {
        assert_eq!(address(bad), None, "{bad}");
    }
}

#[test]
fn a_machine_with_a_pci_device_stays() {
    let name = MachineName::new("vm").unwrap();
    let with = |device: &str| from_toml(&format!("kernel = \"/k\"\n{device}")).unwrap();
    assert!(with("").must_be_movable(&name).is_ok());
    let refused = with("[[vfio]]\nsynthetic = true").must_be_movable(&name);
    let text = refused.unwrap_err().to_string();
    assert!(
        text.starts_with("vm has the PCI device vfio0 (synthetic)"),
        "{text}"
    );
}
