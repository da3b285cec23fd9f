//! Devices whose processes are not the broker's.

use std::collections::HashMap;

use anyhow::Result;
use test_broker::*;
use test_framework::process::Launch;
use test_framework::programs::program;
use zbus::Variant;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_back_end_of_others_is_reached_again() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let image = broker.image("a", 32)?;
    let socket = broker.folder().join("blk.sock");
    let others = || {
        Launch::new(&program("godwit-blk")?)
            .option("--socket-path", &socket)
            .option("--blk-file", &image)
            .start()
    };
    let mut definition = definition(&busy());
    let back_end: HashMap<String, Variant<'static>> = HashMap::from([
        ("type".to_owned(), "blk".into()),
        ("socket".to_owned(), socket.display().to_string().into()),
    ]);
    definition.insert("vhost-user".into(), value(vec![back_end]));
    let (vm, process) = starts_after(&bus, definition, others).await?;
    let mut console = console(&vm).await?;
    works_on(&mut console, 0)?;
    let _process = is_reached_again(&bus, "vhost-user0", process, others).await?;
    works_on(&mut console, 0)?;
    finish(&mut console)
}
