//! Every row is where it belongs, with the mode that it says, and nothing else
//! is anywhere.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use gcgroup_integration_tests::{Errno, Instance, Launched, Setup};
use gcgroup_model::row::{GroupWrites, rows_of};
use gcgroup_model::{Grammar, Place, ROWS, Row};

const PLACES: [Place; 6] = [
    Place::Root,
    Place::Gpu,
    Place::Partition,
    Place::Processes,
    Place::Process,
    Place::Workload,
];

/// An instance that has one directory of each kind.
fn furnished(setup: Setup) -> (Instance, Launched) {
    let instance = setup.start();
    instance.partition("a", 64);
    let workload = instance.launch_fma();
    (instance, workload)
}

/// The directory of a kind in a furnished instance.
fn directory(place: Place, workload: &Launched) -> String {
    place
        .pattern()
        .replace("<pid>", &workload.pid.to_string())
        .replace("<name>", "a")
        .replace("<gpu>", "0")
}

/// What stands in a directory beside its rows.
fn beside(place: Place, workload: &Launched) -> Vec<String> {
    match place {
        Place::Root => ["devices", "partitions", "processes", "workloads"]
            .map(str::to_owned)
            .to_vec(),
        Place::Processes => vec![workload.pid.to_string()],
        Place::Process => vec!["0".to_owned()],
        Place::Gpu | Place::Partition | Place::ProcessGpu | Place::Workload => Vec::new(),
    }
}

fn each_row(workload: &Launched, mut visit: impl FnMut(&Row, &str)) {
    for place in PLACES {
        let directory = directory(place, workload);
        for row in rows_of(place) {
            visit(row, format!("{directory}/{}", row.name).trim_matches('/'));
        }
    }
}

#[test]
fn every_row_is_where_it_belongs_and_nothing_else_is() {
    let (instance, workload) = furnished(Setup::new());
    for place in PLACES {
        let expected: BTreeSet<String> = rows_of(place)
            .map(|row| row.name.to_owned())
            .chain(beside(place, &workload))
            .collect();
        let listed = instance.names(directory(place, &workload));
        let found: BTreeSet<String> = listed.iter().cloned().collect();
        assert_eq!(found, expected, "{place:?}");
        assert_eq!(
            listed.len(),
            found.len(),
            "a name stands twice in {place:?}"
        );
    }
    for (directory, only) in [
        ("devices", "0"),
        ("partitions", "0"),
        ("partitions/0", "a"),
        ("workloads", workload.name.as_str()),
    ] {
        assert_eq!(instance.names(directory), [only], "{directory}");
    }
}

#[test]
fn a_name_is_found_in_its_own_directory_only() {
    let (instance, workload) = furnished(Setup::new());
    for place in PLACES {
        let directory = directory(place, &workload);
        let own: BTreeSet<_> = rows_of(place).map(|row| row.name).collect();
        let foreign = ROWS.iter().map(|row| row.name);
        for name in foreign.chain(["nosuch", "1", "none", "compute.freezer", ".hidden"]) {
            if own.contains(name) {
                continue;
            }
            let path = instance.path(&directory).join(name);
            let error = fs::symlink_metadata(&path).expect_err("it does not belong here");
            assert_eq!(error.raw_os_error(), Some(2), "{}", path.display());
        }
    }
}

#[test]
fn a_file_is_regular_and_has_no_size() {
    let (instance, workload) = furnished(Setup::new());
    each_row(&workload, |_, path| {
        let metadata = fs::symlink_metadata(instance.path(path)).expect(path);
        assert!(metadata.is_file(), "{path}");
        assert_eq!(metadata.size(), 0, "{path}");
    });
}

fn assert_modes(instance: &Instance, workload: &Launched, writes: GroupWrites, gid: u32) {
    each_row(workload, |row, path| {
        let metadata = fs::metadata(instance.path(path)).expect(path);
        let expected = u32::from(row.mode.bits(writes));
        assert_eq!(metadata.mode() & 0o7777, expected, "{path}");
        assert_eq!((metadata.uid(), metadata.gid()), (0, gid), "{path}");
    });
    let partitions = match writes {
        GroupWrites::No => 0o755,
        GroupWrites::Yes => 0o775,
    };
    let process = format!("processes/{}", workload.pid);
    for (directory, expected) in [
        ("", 0o755),
        ("devices", 0o755),
        ("devices/0", 0o755),
        ("partitions", 0o755),
        ("partitions/0", partitions),
        ("partitions/0/a", 0o755),
        ("processes", 0o755),
        (process.as_str(), 0o755),
        (workload.file("").as_str(), 0o755),
        ("workloads", 0o755),
    ] {
        let metadata = fs::metadata(instance.path(directory)).expect(directory);
        assert!(metadata.is_dir(), "{directory:?}");
        assert_eq!(metadata.mode() & 0o7777, expected, "{directory:?}");
        assert_eq!((metadata.uid(), metadata.gid()), (0, gid), "{directory:?}");
    }
}

#[test]
fn modes_are_those_of_the_rows() {
    let setup = Setup::new().setting("group", "\"root\"");
    let (instance, workload) = furnished(setup);
    assert_modes(&instance, &workload, GroupWrites::No, 0);
}

#[test]
fn modes_let_the_group_write_where_it_is_configured() {
    // Group 1 is `daemon` on every Linux system.
    let setup = Setup::new()
        .setting("group", "\"daemon\"")
        .setting("writable_by_group", "true");
    let (instance, workload) = furnished(setup);
    assert_modes(&instance, &workload, GroupWrites::Yes, 1);
}

#[test]
fn a_file_is_read_and_written_as_its_mode_says() {
    let (instance, workload) = furnished(Setup::new());
    each_row(&workload, |row, path| {
        match (row.mode.readable(), instance.read(path)) {
            (true, read) => drop(read.unwrap_or_else(|errno| panic!("{path}: {errno}"))),
            (false, read) => assert_eq!(read, Err(Errno::ACCESS), "{path}"),
        }
        // Root passes the permission bits, so this is the row's own refusal. A
        // writable one gets as far as its grammar, where there is a bound to
        // exceed that a single write reaches.
        let refused = instance.write(path, [b'x'; 32]);
        match row.grammar {
            Grammar::None => assert_eq!(refused, Err(Errno::ACCESS), "{path}"),
            _ => assert_eq!(refused, Err(Errno::INVAL), "{path}"),
        }
    });
}

#[test]
fn a_default_is_what_a_fresh_file_reads_as() {
    // Temporal sharing, so that no setting is refused for want of a mechanism.
    let instance = Setup::new().temporal().start();
    fs::create_dir(instance.path("partitions/0/a")).expect("the name is free");
    let workload = instance.launch_fma();
    each_row(&workload, |row, path| {
        if !row.default.is_empty() {
            assert_eq!(instance.text(path), row.default, "{path}");
        }
    });
}

#[test]
fn each_gpu_has_directories_of_its_own() {
    let instance = Setup::new().gpus(2).start();
    assert_eq!(instance.names("devices"), ["0", "1"]);
    assert_eq!(instance.names("partitions"), ["0", "1"]);
    assert_ne!(
        instance.text("devices/0/uuid"),
        instance.text("devices/1/uuid")
    );
    for gpu in 0..2 {
        fs::create_dir(instance.path(format!("partitions/{gpu}/a"))).expect("the name is free");
    }
    instance.set("partitions/1/a/sm.count", "max");
    assert_eq!(instance.number("partitions/0/a/sm.count"), 0);
    let workload = instance.launch(&serde_json::json!({
        "kernel": "fma_fp32", "gpu": 1, "partition": "a"
    }));
    assert_eq!(workload.gpu, 1);
    assert_eq!(
        instance.text("partitions/1/a/members"),
        workload.pid.to_string()
    );
    assert_eq!(instance.text("partitions/0/a/members"), "");
    let process = instance.names(format!("processes/{}", workload.pid));
    assert!(process.contains(&"1".to_owned()) && !process.contains(&"0".to_owned()));
}

#[test]
fn a_device_tells_what_it_is() {
    let instance = Instance::new();
    assert_eq!(instance.number("devices/0/sm.capacity"), 132);
    assert_eq!(instance.number("devices/0/sm.granularity"), 8);
    assert_eq!(instance.number("devices/0/memory.capacity"), 141 << 30);
    assert!(instance.text("devices/0/name").contains("H200"));
    assert!(instance.text("devices/0/uuid").starts_with("GPU-"));
    let events = instance.keyed("devices/0/device.events");
    let keys: Vec<_> = events.keys().map(String::as_str).collect();
    assert_eq!(keys, ["gpu_lost", "mps_lost", "xid"]);
    assert!(events.values().all(|&count| count == 0), "{events:?}");
    let version = instance.text("gcgroup.version");
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version:?}");
    assert_eq!(version.lines().count(), 1);
}

#[test]
fn utilization_has_only_known_keys_and_follows_the_load() {
    const KEYS: [&str; 13] = [
        "gpu_percent",
        "memory_percent",
        "sm_active_percent",
        "sm_occupancy_percent",
        "tensor_percent",
        "dram_percent",
        "pcie_tx_bytes_per_sec",
        "pcie_rx_bytes_per_sec",
        "power_milliwatt",
        "temperature_celsius",
        "sm_clock_hertz",
        "memory_clock_hertz",
        "throttle_reasons",
    ];
    let instance = Instance::new();
    for key in instance.keyed("devices/0/utilization.stat").keys() {
        assert!(KEYS.contains(&key.as_str()), "{key:?}");
    }
    let _busy = instance.launch_fma();
    let busy = || {
        let found = instance.keyed("devices/0/utilization.stat");
        found.get("gpu_percent").is_none_or(|&percent| percent > 50)
    };
    gcgroup_integration_tests::wait::until(
        std::time::Duration::from_secs(5),
        "a busy GPU shows as busy",
        busy,
    );
}

#[test]
fn every_writable_file_has_a_line_in_enforcers() {
    for setup in [Setup::new(), Setup::new().temporal()] {
        let (instance, workload) = furnished(setup);
        let text = instance.text(workload.file("gcgroup.enforcers"));
        let lines = gcgroup_integration_tests::keyed::lines(&text).expect("a keyed file");
        let found: Vec<_> = lines.iter().map(|(key, _)| *key).collect();
        let writable: Vec<_> = rows_of(Place::ProcessGpu)
            .filter(|row| row.mode.writable())
            .map(|row| row.name)
            .collect();
        assert_eq!(found, writable);
        for (key, mechanism) in lines {
            let known = ["worker", "channel", "channel-window", "checkpoint", "cap"];
            let reason = mechanism.strip_prefix("none ");
            assert!(
                known.contains(&mechanism) || reason.is_some_and(|reason| !reason.is_empty()),
                "{key} {mechanism}"
            );
        }
        let device = instance.text("devices/0/gcgroup.enforcers");
        gcgroup_integration_tests::keyed::lines(&device).expect("a keyed file");
    }
}
