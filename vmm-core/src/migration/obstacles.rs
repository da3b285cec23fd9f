//! What keeps a machine from coming here: all of it, before anything is copied.

use migration::wire::{Definition, Hello, MemoryTransfer, PROTOCOL};

/// Every reason why the machine that `hello` is of cannot become the one here.
pub(super) fn obstacles(
    here: &Definition,
    shared: bool,
    channels: usize,
    hello: &Hello,
) -> Vec<String> {
    if hello.protocol != PROTOCOL {
        return vec![format!(
            "the source speaks version {} of the protocol, the destination {PROTOCOL}",
            hello.protocol
        )];
    }
    let mut reasons = here.obstacles(&hello.definition);
    let wanted = match hello.memory {
        MemoryTransfer::Shared => None,
        MemoryTransfer::Copied { channels } => Some(channels as usize),
    };
    let given = (!shared).then_some(channels);
    if wanted != given {
        let say = |channels: Option<usize>| match channels {
            Some(channels) => format!("copied over {channels} channels"),
            None => "shared".into(),
        };
        reasons.push(format!(
            "memory is {} at the source and {} at the destination",
            say(wanted),
            say(given)
        ));
    }
    reasons
}

/// Says so if the machine uses more than the `room` that there is, if that is known.
pub(super) fn lack_of_memory(hello: &Hello, room: Option<u64>) -> Option<String> {
    let (used, room) = (hello.memory_used, room?);
    let copied = hello.memory != MemoryTransfer::Shared;
    (copied && used > room).then(|| {
        format!(
            "the machine uses {} MiB of memory and the destination has {} MiB free",
            used >> 20,
            room >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_needs_the_memory_that_it_uses() {
        let mut hello = Hello {
            protocol: PROTOCOL,
            definition: Definition {
                cpus: 1,
                cpu_features: Vec::new(),
                processor: None,
                tsc: None,
                memory: Vec::new(),
                units: Vec::new(),
                schemas: Vec::new(),
            },
            memory: MemoryTransfer::Copied { channels: 1 },
            memory_used: 300 << 20,
        };
        assert_eq!(lack_of_memory(&hello, None), None);
        assert_eq!(lack_of_memory(&hello, Some(300 << 20)), None);
        assert_eq!(
            lack_of_memory(&hello, Some(299 << 20)).unwrap(),
            "the machine uses 300 MiB of memory and the destination has 299 MiB free"
        );
        hello.memory = MemoryTransfer::Shared;
        assert_eq!(lack_of_memory(&hello, Some(0)), None);
    }
}
