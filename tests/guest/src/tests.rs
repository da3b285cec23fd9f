//! Tests of the command line and the report lines.

use crate::{Activate, BlkMode, Idle, Ipv4, NetMode, Report, Text, Workload};

#[test]
fn default_workload_is_an_empty_line() {
    assert_eq!(Workload::default().to_string(), "");
    assert_eq!(Workload::parse("").unwrap(), Workload::default());
}

#[test]
fn every_kind_of_value_survives_the_command_line() {
    let workload = Workload {
        cpus: 3,
        idle: Idle::Halt,
        poweroff: true,
        event_idx: false,
        activate: Activate::All,
        blk: BlkMode::Loop,
        net: NetMode::Udp,
        ip: Ipv4([192, 168, 7, 20]),
        tsc_khz: 2_596_122,
        slp_typ: 5,
        ..Workload::default()
    };
    let line = workload.to_string();
    assert_eq!(
        line,
        "cpus=3 tsc_khz=2596122 idle=halt poweroff=1 slp_typ=5 activate=all event_idx=0 blk=loop \
         net=udp ip=192.168.7.20"
    );
    assert_eq!(Workload::parse(&line).unwrap(), workload);
}

#[test]
fn readme_names_every_keyword_and_report() {
    let readme = include_str!("../README.md");
    for key in Workload::KEYWORDS {
        assert!(
            readme.contains(&format!("`{key}=")),
            "README.md has no {key}="
        );
    }
    for name in Report::NAMES {
        assert!(
            readme.contains(&format!("`@{name}")),
            "README.md has no @{name}"
        );
    }
}

#[test]
fn words_that_do_not_fit_are_named() {
    for line in [
        "colour=red",
        "cpus",
        "cpus=-1",
        "cpus=x",
        "blk=maybe",
        "poweroff=2",
        "ip=1.2.3",
        "ip=1.2.3.4.5",
        "queues=65536",
    ] {
        let bad = Workload::parse(line).unwrap_err();
        assert_eq!(bad.word.as_str(), line);
        assert!(bad.to_string().contains(line));
    }
}

#[test]
fn words_that_qemu_adds_are_passed_over() {
    let line = "cpus=2 virtio_mmio.device=512@0xfeb00000:5";
    assert_eq!(Workload::parse(line).unwrap().cpus, 2);
}

#[test]
fn reports_survive_the_console() {
    let reports = [
        Report::First {},
        Report::Beat {
            n: 1,
            gap_us: 2,
            max_us: 3,
            back: 0,
            t_us: 18_446_744_073_709_551_615,
        },
        Report::Disk {
            dev: 0,
            queues: 1,
            offered: 4,
            sectors: 9,
            read_only: true,
            id: Text::new("root"),
        },
        Report::Done {
            ok: true,
            irqs: 7,
            max_us: 1,
            t_us: 9,
        },
        Report::Fail {
            reason: Text::new("panic"),
            a: 1,
            b: 2,
            what: Text::new("src/x.rs"),
        },
    ];
    for report in reports {
        assert_eq!(Report::parse(&report.to_string()), Ok(Some(report)));
    }
    assert_eq!(Report::First {}.to_string(), "@first");
}

#[test]
fn other_output_is_no_report() {
    assert_eq!(Report::parse("SeaBIOS (version 1.16)"), Ok(None));
    assert_eq!(Report::parse(""), Ok(None));
}

#[test]
fn damaged_reports_are_errors() {
    for (line, part) in [
        ("@", ""),
        ("@bea", "bea"),
        ("@beat", "n"),
        ("@beat n=1 gap=2", "gap=2"),
        ("@beat n=x gap_us=2 max_us=3 back=0 t_us=1", "n=x"),
        ("@firstread t_us=1 more=2", "more=2"),
        ("@done ok=2 irqs=0 max_us=0 t_us=0", "ok=2"),
    ] {
        assert_eq!(
            Report::parse(line).unwrap_err().part.as_str(),
            part,
            "{line}"
        );
    }
}

#[test]
fn text_is_cut_and_cleaned() {
    assert_eq!(Text::new("a b\n=").as_str(), "a_b_=");
    assert_eq!(Text::new(&"x".repeat(100)).as_str().len(), Text::CAPACITY);
    let empty = Report::Fail {
        reason: Text::new("r"),
        a: 0,
        b: 0,
        what: Text::new(""),
    };
    assert_eq!(empty.to_string(), "@fail reason=r a=0 b=0 what=-");
}
