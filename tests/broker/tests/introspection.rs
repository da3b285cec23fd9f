//! What the bus says of itself is what is shipped.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use api::Dictionary;
use test_broker::*;
use test_guest::Workload;
use zbus::fdo::IntrospectableProxy;

/// One interface of what an object says of itself.
fn interface(xml: &str, name: &str) -> Result<String> {
    let start = format!("  <interface name=\"{name}\">");
    let from = xml
        .find(&start)
        .with_context(|| format!("no {name} in {xml}"))?;
    let to = xml[from..].find("</interface>").context("no end")? + from;
    Ok(format!("<node>\n{}</interface>\n</node>\n", &xml[from..to]))
}

/// The name of an interface, its file as it was when this was built, and an object that has it.
macro_rules! shipped {
    ($name:literal, $path:expr) => {
        (
            $name,
            include_str!(concat!(
                "../../../crates/api/introspection/org.godwit.Vmm1.",
                $name,
                ".xml"
            )),
            $path.to_string(),
        )
    };
}

/// Set this to write the files anew when an interface has grown.
const WRITE: &str = "GODWIT_WRITE_INTROSPECTION";

#[tokio::test(flavor = "multi_thread")]
async fn the_shipped_interfaces_are_those_on_the_bus() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 1)?];
    let mut definition = with_disks(definition(&Workload::default()), &images, 1);
    definition.insert("balloon".into(), value(vec![Dictionary::new()]));
    let vm = running(&bus, "vm", definition).await?;
    // How it ends is of no interest here.
    ended(&bus, vm.migrate("local:", Dictionary::new(), 0).await?).await?;
    for (name, kept, path) in [
        shipped!("Manager", api::path::MANAGER),
        shipped!("Machine", api::path::machine("vm")),
        shipped!("Device", api::path::device("vm", "disk0")),
        shipped!("Balloon", api::path::device("vm", "balloon0")),
        shipped!("Job", api::path::job(1)),
        shipped!("Job.Migration", api::path::job(2)),
    ] {
        let name = format!("org.godwit.Vmm1.{name}");
        let object = IntrospectableProxy::builder(&bus)
            .destination(api::SERVICE)
            .path(path)
            .build()
            .await?;
        let live = interface(&object.introspect().await?, &name)?;
        if std::env::var_os(WRITE).is_some() {
            let folder =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/api/introspection");
            fs::write(folder.join(format!("{name}.xml")), &live)?;
            continue;
        }
        assert_eq!(
            live, kept,
            "{name}.xml differs: set {WRITE}=1, and look at it"
        );
    }
    Ok(())
}
