//! Devices whose processes are not the broker's.

use std::collections::HashMap;

use anyhow::Result;
use api::device::State as DeviceState;
use nix::sys::signal::Signal;
use test_broker::*;
use test_framework::machine::DEADLINE;
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
    let path = manager(&bus)
        .await?
        .create_machine("vm", definition, 0)
        .await?;
    let vm = machine(&bus, path).await?;
    let job = vm.start(0).await?;
    let error = format!("{:#}", done(&bus, job).await.unwrap_err());
    assert!(error.contains("start it first"), "{error}");

    let mut process = others()?;
    until("a start", async || {
        let job = vm.start(0).await?;
        Ok(done(&bus, job).await.is_ok())
    })
    .await?;
    let mut console = console(&vm).await?;
    works_on(&mut console, 0)?;
    process.signal(Signal::SIGKILL)?;
    process.wait(DEADLINE)?;
    let disk = device(&bus, "vm", "vhost-user0").await?;
    until("the loss", async || {
        Ok(disk.state().await? == DeviceState::Restarting)
    })
    .await?;
    let _process = others()?;
    until("the connection", async || {
        Ok(disk.state().await? == DeviceState::Running && disk.reconnects().await? == 1)
    })
    .await?;
    works_on(&mut console, 0)?;
    finish(&mut console)
}
