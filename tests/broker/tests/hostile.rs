//! Clients of the same user that send anything: they end and bloat neither broker nor core.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result};
use api::machine::State;
use test_broker::*;
use test_framework::machine::DEADLINE;
use test_guest::Workload;

/// KiB that a process may have grown by.
const MAX_GROWTH: u64 = 16 << 10;

/// What ends in a hang-up.
fn hostile() -> Vec<Vec<u8>> {
    let own = nix::unistd::geteuid().to_string();
    let hex: String = own.bytes().map(|byte| format!("{byte:02x}")).collect();
    let shaken = format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n");
    // A call that says of itself that 127 MiB follow.
    let mut head = vec![b'l', 1, 0, 1];
    for word in [127u32 << 20, 1, 0] {
        head.extend(word.to_le_bytes());
    }
    let after = |bytes: &[u8]| [shaken.as_bytes(), bytes].concat();
    vec![
        b"\n".to_vec(),
        b"\0\n".to_vec(),
        vec![0xff; 8192],
        after(&head),
        after(&[0; 64]),
        after(&[0xff; 64]),
    ]
}

fn hung_up_on(socket: &Path, bytes: &[u8]) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    // It may hang up in the middle.
    let _ = stream.write_all(bytes);
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => {
            Err(error).with_context(|| format!("{} keeps a bad client", socket.display()))
        }
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_nonsense_harms_nobody() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&Workload::default())).await?;
    let core = vm.process().await?;
    // A connection takes its time in an emulated host.
    let times = if broker.manner().has_units() { 5 } else { 20 };
    let control = broker.run().join("machines/vm/control");
    for (socket, process) in [(broker.bus(), broker.id()), (control, core)] {
        let before = own_memory(process)?;
        for _ in 0..times {
            for bytes in hostile() {
                let socket = socket.clone();
                tokio::task::spawn_blocking(move || hung_up_on(&socket, &bytes)).await??;
            }
        }
        let grown = own_memory(process)?.saturating_sub(before);
        assert!(grown < MAX_GROWTH, "{grown} KiB for nothing");
    }
    assert!(lives(core));
    vm.pause(0).await?;
    assert_eq!(vm.state().await?, State::Paused);
    Ok(())
}
