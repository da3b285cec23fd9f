use super::*;
use crate::platform::testing::Line;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

struct Rig {
    port: Arc<SerialPort>,
    line: Arc<Line>,
    output: Arc<OutputBuffer>,
}

fn rig() -> Rig {
    let line = Arc::new(Line::default());
    let output = OutputBuffer::new(8);
    let port = Arc::new(SerialPort::new(line.clone(), Arc::clone(&output)).unwrap());
    Rig { port, line, output }
}

impl Rig {
    fn get(&self, register: u64) -> u8 {
        let mut data = [0];
        self.port.read(register, &mut data);
        data[0]
    }

    fn set(&self, register: u64, value: u8) {
        self.port.write(register, &[value]);
    }

    fn sent(&self) -> (String, Taken) {
        let mut bytes = Vec::new();
        let taken = self.output.take(&mut bytes, 100, Duration::ZERO);
        (String::from_utf8(bytes).unwrap(), taken)
    }
}

#[test]
fn output_reaches_the_buffer() {
    let rig = rig();
    for byte in *b"hello" {
        assert_eq!(rig.get(LSR) & 0x60, 0x60, "always ready to send");
        rig.set(DATA, byte);
    }
    assert_eq!(rig.sent(), ("hello".to_owned(), Taken::Bytes(5)));
    assert_eq!(rig.sent(), (String::new(), Taken::TimedOut));
}

#[test]
fn output_that_nobody_takes_loses_its_oldest() {
    let rig = rig();
    for byte in *b"0123456789" {
        rig.set(DATA, byte);
    }
    assert_eq!(rig.output.dropped(), 2);
    assert_eq!(rig.sent(), ("23456789".to_owned(), Taken::Bytes(8)));
}

#[test]
fn a_closed_buffer_gives_what_it_has_first() {
    let rig = rig();
    rig.set(DATA, b'x');
    rig.output.close();
    assert_eq!(rig.sent(), ("x".to_owned(), Taken::Bytes(1)));
    assert_eq!(rig.sent(), (String::new(), Taken::Closed));
}

#[test]
fn a_waiting_thread_is_woken() {
    let rig = rig();
    let output = Arc::clone(&rig.output);
    let taker = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        output.take(&mut bytes, 1, Duration::from_secs(60));
        output.take(&mut bytes, 1, Duration::from_secs(60));
        (
            bytes,
            output.take(&mut Vec::new(), 1, Duration::from_secs(60)),
        )
    });
    rig.set(DATA, b'a');
    rig.set(DATA, b'b');
    rig.output.close();
    assert_eq!(taker.join().unwrap(), (b"ab".to_vec(), Taken::Closed));
}

#[test]
fn input_interrupts_and_is_read() {
    let rig = rig();
    rig.set(IER, 1);
    let input = rig.port.input();
    assert_eq!(input.push(b"ab"), 2);
    assert_eq!(rig.line.edges(), 1);
    assert_eq!(rig.get(IIR) & 0x0f, 4);
    assert_eq!(rig.get(LSR) & 1, 1);
    assert_eq!([rig.get(DATA), rig.get(DATA)], *b"ab");
    assert_eq!(rig.get(LSR) & 1, 0);
    assert_eq!(rig.get(IIR) & 0x0f, 1);
}

#[test]
fn a_full_receiver_takes_no_more_until_it_is_read() {
    let rig = rig();
    let input = rig.port.input();
    assert_eq!(input.push(&[7; 60]), 60);
    assert_eq!(input.push(&[8; 60]), 4);
    assert_eq!(input.push(&[9]), 0);
    assert!(input.room().read().is_err(), "nothing was read yet");
    for _ in 0..64 {
        rig.get(DATA);
    }
    assert_eq!(input.room().read().unwrap(), 1);
    assert_eq!(input.push(&[9]), 1);
    assert_eq!(rig.get(DATA), 9);
}

#[test]
fn input_waits_for_the_end_of_the_loop() {
    let rig = rig();
    let input = rig.port.input();
    rig.set(MCR, 0x10);
    let _ = input.room().read();
    assert_eq!(input.push(b"a"), 0);
    rig.set(DATA, b'l');
    assert_eq!(rig.get(DATA), b'l');
    let _ = input.room().read();
    rig.set(MCR, 0x08);
    assert!(input.room().read().is_ok());
    assert_eq!(input.push(b"a"), 1);
}

#[test]
fn an_empty_transmitter_interrupts_when_enabled() {
    let rig = rig();
    rig.set(IER, 2);
    assert_eq!(rig.line.edges(), 1);
    assert_eq!(rig.get(IIR) & 0x0f, 2);
    rig.set(DATA, b'x');
    assert_eq!(rig.line.edges(), 1);
}

#[test]
fn state_travels_with_what_was_received() {
    let from = rig();
    from.set(LCR, 0x83);
    from.port.write(0, &[1, 2]);
    from.set(LCR, 0x03);
    from.set(7, 0x5a);
    from.set(MCR, 0x0b);
    from.set(IER, 1);
    from.port.input().push(b"abc");
    let state = from.port.save();
    assert_eq!(state.divisor, 0x0201);

    let to = rig();
    to.port.restore(&state).unwrap();
    assert_eq!(to.port.save(), state);
    assert_eq!(to.line.edges(), 1, "the pending interrupt comes again");
    assert_eq!(to.get(LSR), 0x61);
    assert_eq!([to.get(DATA), to.get(DATA), to.get(DATA)], *b"abc");

    to.port.reset();
    assert_eq!(to.port.save(), rig().port.save());
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    let rig = rig();
    let good = rig.port.save();
    for (bad, field) in [
        (
            SerialSavedState {
                received: vec![0; 65],
                ..good.clone()
            },
            "received is 0x41",
        ),
        (
            SerialSavedState {
                interrupt_enable: 0x10,
                ..good.clone()
            },
            "interrupt_enable is 0x10",
        ),
        (
            SerialSavedState {
                interrupt_identification: 3,
                ..good.clone()
            },
            "interrupt_identification is 0x3",
        ),
    ] {
        let error = rig.port.restore(&bad).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
        assert_eq!(rig.port.save(), good);
    }
}

#[test]
fn registers_beyond_the_range_are_not_there() {
    let rig = rig();
    rig.port.write(0x100, &[1]);
    let mut data = [0];
    rig.port.read(0x100, &mut data);
    assert_eq!(data, [0xff]);
    assert_eq!(rig.sent().0, "");
}
