//! What each writable file takes and what it refuses.
//!
//! The instances share temporally, where every setting has a mechanism, so that
//! what is refused here is refused for its form.

use gcgroup_integration_tests::{Errno, Instance, Launched, Setup, file, wait};
use rustix::fs::OFlags;
use rustix::io::pwrite;
use std::time::Duration;

/// More than 64 bits.
const TOO_BIG: &str = "99999999999999999999";

fn furnished() -> (Instance, Launched) {
    let instance = Setup::new().temporal().start();
    instance.partition("a", 64);
    let workload = instance.launch_fma();
    (instance, workload)
}

/// Writes each text and checks what the file then reads as.
fn accepts(instance: &Instance, path: &str, cases: &[(&str, &str)]) {
    for (text, reads) in cases {
        match instance.write(path, text) {
            Ok(()) => assert_eq!(instance.text(path), *reads, "{path} after {text:?}"),
            Err(errno) => panic!("{path} refused {text:?}: {errno}"),
        }
    }
}

/// Writes each text and checks that it is refused and nothing changes.
fn refuses(instance: &Instance, path: &str, cases: &[(&str, Errno)]) {
    let before = instance.read(path);
    for (text, errno) in cases {
        assert_eq!(instance.write(path, text), Err(*errno), "{path}: {text:?}");
        assert_eq!(instance.read(path), before, "{path} after {text:?}");
    }
}

/// What no file of one number takes.
fn refuses_what_is_no_number(instance: &Instance, path: &str) {
    let cases = [
        "\n", " 1", "1 ", "-1", "+", "++1", "+-1", "0x1", "1.0", "1e1", "one", "1\n\n", "\n1",
        "1\r\n", "1\0", "\u{661}", "1,", "1;1", "1\n1",
    ];
    let cases = cases.map(|text| (text, Errno::INVAL));
    refuses(instance, path, &cases);
    refuses(instance, path, &[(TOO_BIG, Errno::RANGE)]);
    for bytes in [&b"\xff"[..], b"1\xff", b"\x80\n"] {
        assert_eq!(instance.write(path, bytes), Err(Errno::INVAL), "{bytes:?}");
    }
}

/// 31 bytes are read and 32 are not, a newline among them counted.
fn takes_31_bytes(instance: &Instance, path: &str, digit: &str) {
    let padded = |length: usize| format!("{digit:0>length$}");
    accepts(
        instance,
        path,
        &[
            (&padded(31), digit),
            (&format!("{}\n", padded(30)), digit),
            (&format!("+{}", padded(30)), digit),
        ],
    );
    refuses(
        instance,
        path,
        &[
            (&padded(32), Errno::INVAL),
            (&format!("{}\n", padded(31)), Errno::INVAL),
            (&padded(4096), Errno::INVAL),
        ],
    );
}

#[test]
fn priority_is_a_number_from_0_to_15() {
    let (instance, workload) = furnished();
    let path = workload.file("compute.priority");
    accepts(
        &instance,
        &path,
        &[
            ("0", "0"),
            ("15", "15"),
            ("+7", "7"),
            ("8\n", "8"),
            ("+0\n", "0"),
            ("007", "7"),
        ],
    );
    refuses(
        &instance,
        &path,
        &[
            ("16", Errno::INVAL),
            ("255", Errno::INVAL),
            ("256", Errno::INVAL),
        ],
    );
    refuses_what_is_no_number(&instance, &path);
    takes_31_bytes(&instance, &path, "4");
}

#[test]
fn freeze_is_a_switch() {
    let (instance, workload) = furnished();
    let path = workload.file("compute.freeze");
    accepts(
        &instance,
        &path,
        &[("1", "1"), ("0\n", "0"), ("+1", "1"), ("+0\n", "0")],
    );
    refuses(
        &instance,
        &path,
        &[
            ("2", Errno::INVAL),
            ("10", Errno::INVAL),
            ("max", Errno::INVAL),
        ],
    );
    refuses_what_is_no_number(&instance, &path);
    takes_31_bytes(&instance, &path, "1");
}

#[test]
fn max_is_a_quota_and_a_period() {
    let (instance, workload) = furnished();
    let path = workload.file("compute.max");
    accepts(
        &instance,
        &path,
        &[
            ("20000", "20000 100000"),
            ("20000 50000", "20000 50000"),
            ("max", "max 100000"),
            ("max\n", "max 100000"),
            ("+1000 +10000\n", "1000 10000"),
            ("1000000 1000000", "1000000 1000000"),
            ("max 100000", "max 100000"),
        ],
    );
    let invalid = [
        "999",
        "0",
        "20000 9999",
        "20000 1000001",
        "20000 0",
        "20000  100000",
        " 20000",
        "20000 ",
        "20000 100000 1",
        "max max",
        "20000 max",
        "maximum",
        "MAX",
        "-1",
        "20000,100000",
        "20000\t100000",
        "20000 100000\n\n",
        "+",
        "",
        "\n",
    ];
    for text in invalid.iter().filter(|text| !text.is_empty()) {
        refuses(&instance, &path, &[(text, Errno::INVAL)]);
    }
    let period_too_big = format!("20000 {TOO_BIG}");
    refuses(
        &instance,
        &path,
        &[(TOO_BIG, Errno::RANGE), (&period_too_big, Errno::RANGE)],
    );
    refuses(
        &instance,
        &path,
        &[("00000000000000000020000 00100000", Errno::INVAL)],
    );
}

#[test]
fn partition_is_a_name_or_none() {
    let (instance, workload) = furnished();
    instance.partition("0.b_c-d", 8);
    std::fs::create_dir(instance.path("partitions/0/empty")).expect("the name is free");
    let path = workload.file("compute.partition");
    accepts(
        &instance,
        &path,
        &[
            ("a", "a"),
            ("0.b_c-d\n", "0.b_c-d"),
            ("none", "none"),
            ("none\n", "none"),
        ],
    );
    refuses(
        &instance,
        &path,
        &[
            ("nosuch", Errno::NOENT),
            ("empty", Errno::INVAL),
            ("A", Errno::INVAL),
            ("+a", Errno::INVAL),
            ("a/b", Errno::INVAL),
            ("../a", Errno::INVAL),
            (".", Errno::INVAL),
            ("a b", Errno::INVAL),
            ("a\n\n", Errno::INVAL),
            ("\n", Errno::INVAL),
            ("a\0", Errno::INVAL),
            (&"a".repeat(32), Errno::INVAL),
            (&"a".repeat(31), Errno::NOENT),
        ],
    );
}

#[test]
fn sm_count_is_a_number_or_max() {
    let (instance, _workload) = furnished();
    let path = "partitions/0/a/sm.count";
    accepts(
        &instance,
        path,
        &[
            ("8", "8"),
            ("1", "8"),
            ("9", "16"),
            ("60\n", "64"),
            ("+64", "64"),
            ("0", "0"),
            ("128", "128"),
            ("129", "132"),
            ("max", "132"),
            ("8", "8"),
        ],
    );
    refuses(
        &instance,
        path,
        &[("maximum", Errno::INVAL), ("8 8", Errno::INVAL)],
    );
    refuses_what_is_no_number(&instance, path);
    takes_31_bytes(&instance, path, "8");
}

#[test]
fn more_sms_than_the_gpu_has_are_refused() {
    let (instance, _workload) = furnished();
    let path = "partitions/0/a/sm.count";
    for text in ["133", "1000", "4294967295"] {
        let errno = instance.write(path, text).expect_err(text);
        assert!(
            matches!(errno, Errno::INVAL | Errno::NOSPC),
            "{text}: {errno}"
        );
        assert_eq!(instance.number(path), 64);
    }
}

#[test]
fn kill_takes_1_only() {
    let (instance, workload) = furnished();
    let path = workload.file("gcgroup.kill");
    for text in ["0", "2", "9", "15", "\n", "kill", "-1", "1 1", "1\n\n"] {
        assert_eq!(instance.write(&path, text), Err(Errno::INVAL), "{text:?}");
    }
    assert_eq!(instance.write(&path, TOO_BIG), Err(Errno::RANGE));
    assert!(instance.has_entry(workload.pid));
    instance.set(&path, "+1\n");
    wait::until(Duration::from_secs(3), "a killed workload is gone", || {
        !instance.has_entry(workload.pid)
    });
}

#[test]
fn freeze_of_several_takes_a_switch_and_pids() {
    let (instance, one) = furnished();
    let two = instance.launch_fma();
    let path = "gcgroup.freeze";
    let both = format!("1 {} {}", one.pid, two.pid);
    let mut pids = [one.pid, two.pid];
    pids.sort_unstable();
    accepts(
        &instance,
        path,
        &[(&both, &format!("{}\n{}", pids[0], pids[1]))],
    );
    accepts(
        &instance,
        path,
        &[(&format!("+0 +{}\n", one.pid), &two.pid.to_string())],
    );
    accepts(
        &instance,
        path,
        &[(&format!("0 {} {}", one.pid, two.pid), "")],
    );
    let pid = one.pid;
    for text in [
        "1".to_owned(),
        "\n".to_owned(),
        "1 ".to_owned(),
        format!("2 {pid}"),
        format!("1  {pid}"),
        format!("1 {pid} "),
        format!("1 {pid} {pid}"),
        format!("1 {pid},{}", two.pid),
        format!("1\n{pid}"),
        format!("1 {pid}\n{}", two.pid),
        format!("1 -{pid}"),
        format!("{pid}"),
        "1 self".to_owned(),
    ] {
        refuses(&instance, path, &[(&text, Errno::INVAL)]);
    }
    refuses(&instance, path, &[(&format!("1 {TOO_BIG}"), Errno::RANGE)]);
}

#[test]
fn offsets_append_and_truncation_do_not_matter() {
    let (instance, workload) = furnished();
    let relative = workload.file("compute.max");
    let path = instance.path(&relative);
    let descriptor = file::open_with(&path, OFlags::WRONLY).expect("it is writable");
    for (offset, text) in [
        (0, "20000 100000"),
        (1, "30000"),
        (31, "40000"),
        (1 << 40, "50000"),
    ] {
        assert_eq!(
            pwrite(&descriptor, text.as_bytes(), offset),
            Ok(text.len()),
            "at {offset}"
        );
        assert!(
            instance.text(&relative).starts_with(&text[..5]),
            "at {offset}"
        );
    }
    for flags in [
        OFlags::TRUNC,
        OFlags::APPEND,
        OFlags::TRUNC | OFlags::APPEND,
    ] {
        file::write_with(&path, OFlags::WRONLY | flags, "20000").expect("flags do not matter");
        assert_eq!(instance.text(&relative), "20000 100000");
        let opened = file::open_with(&path, OFlags::WRONLY | flags).expect("flags do not matter");
        drop(opened);
        assert_eq!(
            instance.text(&relative),
            "20000 100000",
            "an open alone is no command"
        );
    }
    for length in [0, 1, 4096] {
        rustix::fs::ftruncate(&descriptor, length).expect("truncation is harmless");
        assert_eq!(instance.text(&relative), "20000 100000");
    }
}

#[test]
fn one_write_is_one_command() {
    let (instance, workload) = furnished();
    let relative = workload.file("compute.freeze");
    let descriptor = file::open_with(&instance.path(&relative), OFlags::WRONLY).expect("writable");
    for text in ["1", "0\n", "1"] {
        file::write_to(&descriptor, text).expect("each write is taken");
        assert_eq!(instance.text(&relative), text.trim());
    }
    // Half a command is not kept for the next write.
    assert_eq!(file::write_to(&descriptor, "\n"), Err(Errno::INVAL));
    assert_eq!(instance.text(&relative), "1");
    let status = std::process::Command::new("sh")
        .args(["-c", "(echo 0; echo 1; echo 0) > \"$0\""])
        .arg(instance.path(&relative))
        .status()
        .expect("sh is there");
    assert!(status.success());
    assert_eq!(instance.text(&relative), "0");
    assert_eq!(
        instance.figure(workload.file("gcgroup.stat"), "nr_freezes"),
        3
    );
}

#[test]
fn the_present_value_is_a_success() {
    let (instance, workload) = furnished();
    for (name, value) in [
        ("compute.freeze", "0"),
        ("compute.freeze", "1"),
        ("compute.freeze", "1"),
        ("compute.priority", "8"),
        ("compute.max", "max 100000"),
        ("compute.partition", "none"),
        ("compute.freeze", "0"),
        ("compute.freeze", "0"),
    ] {
        let path = workload.file(name);
        instance.set(&path, value);
        instance.set(&path, value);
        assert_eq!(instance.text(&path), value);
    }
    instance.set("partitions/0/a/sm.count", "64");
    assert_eq!(instance.number("partitions/0/a/sm.count"), 64);
}

#[test]
fn a_value_that_was_read_can_be_written_back() {
    let (instance, workload) = furnished();
    instance.set(workload.file("compute.partition"), "a");
    instance.set(workload.file("compute.max"), "20000 50000");
    for path in [
        "compute.priority",
        "compute.freeze",
        "compute.max",
        "compute.partition",
    ]
    .map(|name| workload.file(name))
    .into_iter()
    .chain(["partitions/0/a/sm.count".to_owned()])
    {
        let text = instance.read(&path).expect("it is readable");
        instance
            .write(&path, &text)
            .expect("what it shows it takes");
        assert_eq!(instance.read(&path), Ok(text), "{path}");
    }
}
