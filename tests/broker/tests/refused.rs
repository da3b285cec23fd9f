//! What the broker refuses: callers without the right, and requests that are wrong.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::Result;
use api::Error;
use api::manager::START;
use test_broker::*;
use test_guest::Workload;
use zbus::Variant;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_are_refused_with_a_name() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let manager = manager(&bus).await?;
    let before = broker.files();
    let good = || definition(&Workload::default());
    for name in [
        "",
        ".",
        "..",
        "../../etc/x",
        "a/b",
        "a b",
        "a\nb",
        &"x".repeat(65),
        &"x".repeat(200_000),
    ] {
        let error = manager
            .create_machine(name, good(), START)
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgs(_)),
            "{name:?}: {error:?}"
        );
        assert!(error.to_string().len() < 500, "an error does not repeat it");
    }
    let huge = format!("/{}", "x".repeat(200_000));
    let nested = (0..20).fold(Variant::from(1u32), |inner, _| {
        Variant::Variant(Box::new(inner))
    });
    let wrong: [(&str, Variant<'static>); 12] = [
        ("kernel", 3u32.into()),
        ("kernel", huge.into()),
        ("kernel", "/a/../../etc/shadow".into()),
        ("kernel", "relative".into()),
        ("vcpus", "many".into()),
        ("vcpus", (-1i64).into()),
        ("vcpus", u64::MAX.into()),
        ("memory", 1.5f64.into()),
        ("memory", u64::MAX.into()),
        ("disk", nested),
        ("cmdline", "a\u{1b}[2J".into()),
        ("unknown", true.into()),
    ];
    for (key, bad) in wrong {
        let mut definition = good();
        definition.insert(key.into(), value(bad));
        let error = manager
            .create_machine("vm", definition, START)
            .await
            .unwrap_err();
        assert!(
            matches!(error, Error::InvalidDefinition(_)),
            "{key}: {error:?}"
        );
        assert!(error.to_string().starts_with(key), "{error}");
        assert!(error.to_string().len() < 500, "an error does not repeat it");
    }
    let mut huge = good();
    huge.insert("cmdline".into(), value("x".repeat(1 << 20)));
    let error = manager.create_machine("vm", huge, START).await.unwrap_err();
    // A bus of the system lets more pass, and the broker says what is too long.
    let is_named = match broker.manner() {
        Manner::SystemBus => matches!(error, Error::InvalidDefinition(_)),
        Manner::Direct | Manner::Units => matches!(error, Error::LimitsExceeded(_)),
    };
    assert!(is_named, "{error:?}");
    let error = manager
        .create_machine("vm", good(), 1 << 40)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::InvalidArgs(_)), "{error:?}");
    for error in [
        manager.get_machine("nobody").await.unwrap_err(),
        manager.get_machine(&"x".repeat(64)).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::NoSuchMachine(_)), "{error:?}");
    }
    assert!(matches!(
        manager.get_job(77).await.unwrap_err(),
        Error::NoSuchJob(_)
    ));
    assert!(manager.list_machines().await?.is_empty());
    assert_eq!(broker.files(), before, "nothing is left behind");

    let path = manager.create_machine("vm", good(), 0).await?;
    let again = manager.create_machine("vm", good(), 0).await.unwrap_err();
    assert!(matches!(again, Error::MachineExists(_)), "{again:?}");
    let vm = machine(&bus, path).await?;
    for error in [
        vm.pause(0).await.unwrap_err(),
        vm.terminate(0).await.map(drop).unwrap_err(),
        vm.open_console("", 0).await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::InvalidState(_)), "{error:?}");
    }
    for source in ["../../etc/passwd", "core/../../x", ""] {
        let error = vm.open_log(source, 0).await.map(drop).unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgs(_)),
            "{source}: {error:?}"
        );
    }
    let error = vm.open_log("disk7", 0).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::NoSuchDevice(_)), "{error:?}");
    Ok(())
}

#[test]
fn another_user_is_refused() -> Result<()> {
    let broker = Broker::start()?;
    // Even if the administrator lets everybody reach the socket.
    for (path, mode) in [
        (broker.folder().to_owned(), 0o755),
        (broker.run(), 0o755),
        (broker.bus(), 0o666),
    ] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    let address = format!("--address={}", broker.address());
    let list = [
        "call",
        "org.godwit.Vmm1",
        "/org/godwit/Vmm1",
        "org.godwit.Vmm1.Manager",
        "ListMachines",
    ];
    let mut words = vec![
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "busctl",
        &address,
    ];
    words.extend(list);
    let error = said(run("setpriv", "util-linux", &words)?)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("Access denied") || error.contains("may not call"),
        "{error}"
    );
    assert_eq!(broker.busctl(&list)?.trim(), "a(ssso) 0");
    Ok(())
}
