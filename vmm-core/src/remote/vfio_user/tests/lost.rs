//! A process that goes away, and another one that comes.

use super::*;
use crate::remote::Health;

impl Machine {
    fn is_connected(&self) -> bool {
        self.device.remote().health().connected
    }

    /// A device at work, whose process then ends.
    fn abandoned() -> Self {
        let mut machine = Self::new();
        machine.set_config(COMMAND, &[6, 0]);
        machine.set_up_vector(1, 0x31);
        machine.enable_msix();
        machine.server = None;
        eventually(|| !machine.troubles.0.lock().unwrap().is_empty());
        machine.told();
        machine
    }

    fn succeed(&mut self, made: Made) -> Result<(), VfioUserError> {
        let (server, stream) = Server::start(made, &self.log);
        self.server = Some(server);
        self.device.reconnect_with(stream.into())
    }
}

#[test]
fn a_lost_process_is_reported_and_its_device_is_gone() {
    let machine = Machine::abandoned();
    let health = machine.device.remote().health();
    assert!(!health.connected);
    assert!(health.trouble.contains("hung up"), "{}", health.trouble);
    let troubles = machine.troubles.0.lock().unwrap().clone();
    assert_eq!(troubles.len(), 1, "{troubles:?}");
    assert!(troubles[0].starts_with("device gpu0 has lost its process"));
    assert!(machine.mapped().is_empty());
    assert_eq!(machine.config(0), u32::MAX);
    let bar0 = 0xc000_0000;
    machine.write(bar0, 1);
    assert_eq!(machine.read(bar0), u32::MAX);
    machine.set_config(COMMAND, &[0, 0]);
    machine.device.reset();
    let mut layout = machine.memory.begin();
    layout.add(region(4 * MIB)).unwrap();
    layout.commit().unwrap();
}

#[test]
fn a_device_that_does_not_answer_is_given_up() {
    let machine = Machine::with(
        VfioUserConfig {
            deadline: Duration::from_millis(200),
            ..config()
        },
        Made::default(),
    );
    machine.set_config(COMMAND, &[6, 0]);
    machine.server().gate.set_closed(true);
    let bar0 = 0xc000_0000;
    assert_eq!(machine.read(bar0), u32::MAX);
    eventually(|| !machine.is_connected());
    let trouble = machine.device.remote().health().trouble;
    assert!(trouble.contains("waited 200 ms for "), "{trouble}");
    assert_eq!(machine.read(bar0), u32::MAX, "it is not waited for again");
}

#[test]
fn a_successor_finds_everything_where_it_was() {
    let mut machine = Machine::abandoned();
    let mut layout = machine.memory.begin();
    layout.add(region(4 * MIB)).unwrap();
    layout.commit().unwrap();
    machine.succeed(Made::default()).unwrap();
    let told = machine.told();
    let (reach, rest) = told.split_at(2);
    assert_eq!(reach, ["reach 0x0+0x100000", "reach 0x400000+0x100000"]);
    assert_eq!(rest[0], "config 0x4 [06, 00]");
    assert_eq!(machine.mapped().len(), 3);
    assert!(machine.server().interrupt(1));
    assert_eq!(machine.router.fired(), [0x31]);
    let health = machine.device.remote().health();
    let expected = Health {
        connected: true,
        reconnects: 1,
        trouble: String::new(),
    };
    assert_eq!(health, expected);
    // It is watched, too.
    machine.server = None;
    eventually(|| !machine.is_connected());
}

#[test]
fn one_takes_the_place_of_another_that_is_there() {
    let mut machine = Machine::new();
    machine.set_config(COMMAND, &[6, 0]);
    let before = machine.server.take();
    machine.succeed(Made::default()).unwrap();
    drop(before);
    assert_eq!(machine.read(machine.bar(0)), 0);
    assert!(machine.is_connected());
    assert_eq!(machine.mapped().len(), 3);
}

#[test]
fn another_device_does_not_take_its_place() {
    let mut machine = Machine::abandoned();
    let mut other = Made::default();
    other.registers[2] = 1;
    for made in [
        other,
        Made {
            bar0_size: 0x2000,
            ..Made::default()
        },
    ] {
        let error = machine.succeed(made).unwrap_err();
        assert!(matches!(error, VfioUserError::Another { .. }), "{error}");
        assert!(!machine.is_connected());
    }
    machine.succeed(Made::default()).unwrap();
}
