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
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/api/introspection");
    for (name, path) in [
        ("Manager", api::path::MANAGER.to_owned()),
        ("Machine", api::path::machine("vm").to_string()),
        ("Device", api::path::device("vm", "disk0").to_string()),
        ("Balloon", api::path::device("vm", "balloon0").to_string()),
        ("Job", api::path::job(1).to_string()),
        ("Job.Migration", api::path::job(2).to_string()),
    ] {
        let name = format!("org.godwit.Vmm1.{name}");
        let object = IntrospectableProxy::builder(&bus)
            .destination(api::SERVICE)
            .path(path)
            .build()
            .await?;
        let live = interface(&object.introspect().await?, &name)?;
        let file = shipped.join(format!("{name}.xml"));
        if std::env::var_os(WRITE).is_some() {
            fs::write(&file, &live)?;
        }
        let kept = fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(
            live,
            kept,
            "{} differs: look at it, then set {WRITE}=1",
            file.display()
        );
    }
    Ok(())
}
