//! Keys of a machine's definition: of the dictionary that CreateMachine takes, and of a
//! file `NAME.toml` in the broker's configuration folder. Both mean the same.
//!
//! | key | type | meaning | default |
//! |---|---|---|---|
//! | `kernel` | string | path of a bzImage, or an ELF file with a PVH note | it or `firmware` must be given |
//! | `initrd` | string | path of the initial RAM disk | none |
//! | `cmdline` | string | kernel command line | empty |
//! | `firmware` | string | path of a ROM image that the machine starts in and that boots from its disk, as SeaBIOS; in the place of `kernel`, `initrd` and `cmdline` | none |
//! | `vcpus` | integer | number of vCPUs, 1 to 32 | 1 |
//! | `cpu` | string | what vCPUs show of the host's processor: `host`, or no more than a level of the x86-64 psABI, `x86-64-v1`, `x86-64-v2`, `x86-64-v3` or `x86-64-v4`, with which the machine can move to other processors | `host` |
//! | `memory` | integer or string | bytes of RAM, or with a unit as `"512M"` | 512M |
//! | `hugepages` | string | `2M` or `1G` | none |
//! | `prefault` | boolean | make all RAM present before the guest starts | false |
//! | `uuid` | string | UUID of the machine | made up |
//! | `autostart` | boolean | start it with the broker; in files only | false |
//! | `disk` | list of dictionaries | block devices | none |
//! | `net` | list of dictionaries | network devices | none |
//! | `balloon` | list of dictionaries | a memory balloon, one at most | none |
//! | `vhost-user` | list of dictionaries | devices served by somebody else's process | none |
//! | `vfio` | list of dictionaries | PCI devices that the machine is given; it cannot move as long as it has one | none |
//!
//! Paths are absolute. Every device has an `id` (string, unique in the machine; by default
//! `disk0`, `net0`, `vhost-user0` and so on), and besides:
//!
//! | of | key | type | meaning | default |
//! |---|---|---|---|---|
//! | `disk` | `path` | string | raw image or block device | must be given |
//! | | `read-only` | boolean | let the guest only read | false |
//! | | `queues` | integer | virtqueues, 1 to 64 | 1 |
//! | | `serial` | string | serial number, up to 20 printable characters | empty |
//! | `net` | `tap` | string | name of a tap interface; made for as long as the machine runs, when there is none and the broker may | must be given |
//! | | `mac` | string | address of the guest's card | made of the machine's UUID |
//! | | `queue-pairs` | integer | queue pairs, 1 to 32 | 1 |
//! | | `mtu` | integer | MTU that the guest is told, 68 to 65535 | none |
//! | `balloon` | `target` | integer or string | bytes that the guest shall give from the beginning, whole MiB | 0 |
//! | | `statistics-interval` | integer | seconds after which the guest is asked for its statistics again, up to 3600; 0: never | 5 |
//! | `vhost-user` | `type` | string | kind of the device, as `fs` | must be given |
//! | | `socket` | string | where its back-end listens | must be given |
//! | | `queues` | integer | virtqueues, 1 to 64 | the back-end's |
//! | | `tag` | string | tag of a file system | none |
//! | `vfio` | `host` | string | PCI address of a device of the host that is bound to `vfio-pci`, as `0000:01:00.0` | one of these three must be given |
//! | | `socket` | string | where a vfio-user server listens | |
//! | | `synthetic` | boolean | a device made of nothing that copies the guest's memory, for tests and demonstrations | |
//!
//! In a dictionary integers may have any integer type, and lists are `aa{sv}`.

/// Path of the kernel.
pub const KERNEL: &str = "kernel";
/// Path of the initial RAM disk.
pub const INITRD: &str = "initrd";
/// Kernel command line.
pub const CMDLINE: &str = "cmdline";
/// Path of the firmware.
pub const FIRMWARE: &str = "firmware";
/// Number of vCPUs.
pub const VCPUS: &str = "vcpus";
/// What vCPUs show of the host's processor.
pub const CPU: &str = "cpu";
/// RAM.
pub const MEMORY: &str = "memory";
/// Size of huge pages.
pub const HUGEPAGES: &str = "hugepages";
/// All RAM is made present.
pub const PREFAULT: &str = "prefault";
/// UUID.
pub const UUID: &str = "uuid";
/// Started with the broker.
pub const AUTOSTART: &str = "autostart";
/// Block devices.
pub const DISK: &str = "disk";
/// Network devices.
pub const NET: &str = "net";
/// Memory balloon.
pub const BALLOON: &str = "balloon";
/// Devices of other back-ends.
pub const VHOST_USER: &str = "vhost-user";

/// PCI devices that the machine is given.
pub const VFIO: &str = "vfio";

/// Name of a device in its machine.
pub const ID: &str = "id";
/// Path of an image.
pub const PATH: &str = "path";
/// The guest may only read.
pub const READ_ONLY: &str = "read-only";
/// Number of virtqueues.
pub const QUEUES: &str = "queues";
/// Serial number of a disk.
pub const SERIAL: &str = "serial";
/// Name of a tap interface.
pub const TAP: &str = "tap";
/// MAC address.
pub const MAC: &str = "mac";
/// Number of queue pairs.
pub const QUEUE_PAIRS: &str = "queue-pairs";
/// MTU.
pub const MTU: &str = "mtu";
/// Bytes that a balloon is to have.
pub const TARGET: &str = "target";
/// Seconds between two reports of a guest's memory.
pub const STATISTICS_INTERVAL: &str = "statistics-interval";
/// Kind of a vhost-user device.
pub const TYPE: &str = "type";
/// Socket of a vhost-user back-end, or of a vfio-user server.
pub const SOCKET: &str = "socket";
/// Tag of a file system.
pub const TAG: &str = "tag";
/// PCI address of a device of the host.
pub const HOST: &str = "host";
/// A PCI device that is made of nothing.
pub const SYNTHETIC: &str = "synthetic";
