//! What channel control refuses and how it puts sets together, without a GPU.

use std::process::Command;

use super::known::Place;
use super::*;

fn channels() -> DriverChannels {
    DriverChannels::new("580.159.04", Unknown::Refuse)
}

fn gpu(uuid: &str) -> GpuInfo {
    GpuInfo {
        index: 1,
        uuid: uuid.to_owned(),
        name: "Test GPU".to_owned(),
        memory_bytes: 1000,
        refused: None,
    }
}

const HERE: &str = "GPU-01010101-0101-0101-0101-010101010101";

fn whole() -> GpuInfo {
    gpu(HERE)
}

fn set(pid: u32) -> ChannelSet {
    ChannelSet {
        pid,
        groups: vec![Handle {
            client: 0xc1d0_0001,
            object: 0x5c00_0010,
        }],
        channels: Vec::new(),
    }
}

const SEARCHES: [Search; 3] = [
    Search::Since(ClientMark(0xc1d0_0000)),
    Search::Anew,
    Search::Recent,
];

#[test]
fn a_dead_process_is_no_process() {
    let mut child = Command::new("true").spawn().expect("true is everywhere");
    let pid = child.id();
    child.wait().expect("it is our child");
    for search in SEARCHES {
        let listed = channels().list(pid, &whole(), search);
        assert_eq!(listed, Err(DeviceError::NoProcess(pid)));
    }
    let read = channels().timeslices(&set(pid));
    assert_eq!(read, Err(DeviceError::NoProcess(pid)));
}

#[test]
fn a_process_without_the_driver_has_no_channels() {
    let mut child = Command::new("sleep")
        .arg("60")
        .spawn()
        .expect("sleep is everywhere");
    let channels = channels();
    let found = SEARCHES.map(|search| channels.list(child.id(), &whole(), search));
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    let expected = format!("process {} has not opened the driver", child.id());
    for listed in found {
        assert_eq!(listed, Err(DeviceError::NoContext(expected.clone())));
    }
}

#[test]
fn unknown_branches_are_refused_in_each_operation() {
    let channels = DriverChannels::new("610.43.02", Unknown::Refuse);
    let pid = std::process::id();
    let minor: Minor<'_> = &|| panic!("nothing is opened");
    let sets = [set(pid)];
    let errors = [
        channels.mark().err(),
        channels.list(pid, &whole(), Search::Anew).err(),
        channels.timeslices(&sets[0]).err(),
        channels.set_timeslice(&sets[0], 2048).err(),
        channels.stop(&whole(), minor, &sets).err(),
        channels.resume(&whole(), minor, &sets).err(),
    ];
    for error in errors {
        let error = error.expect("the branch is not known");
        assert!(matches!(error, DeviceError::Unsupported(_)), "{error}");
    }
}

#[test]
fn a_gpu_without_a_uuid_of_its_own_is_refused() {
    let channels = channels();
    let part = gpu("MIG-01010101-0101-0101-0101-010101010101");
    let error = channels.list(std::process::id(), &part, Search::Anew);
    let error = error.expect_err("it is no GPU");
    assert_eq!(
        error.to_string(),
        "GPU 1 has the UUID \"MIG-01010101-0101-0101-0101-010101010101\", which is not that of a whole GPU"
    );
}

#[test]
fn timeslices_out_of_range_never_reach_the_driver() {
    for usec in [0, 15, 524_289] {
        let error = channels().set_timeslice(&set(std::process::id()), usec);
        let expected = format!("a timeslice of {usec} us is not within 16 to 524288 us");
        assert_eq!(error, Err(DeviceError::Failed(expected)));
    }
}

#[test]
fn stopping_nothing_opens_no_gpu() {
    let channels = channels();
    let minor: Minor<'_> = &|| panic!("nothing is opened");
    let nothing = [ChannelSet::default()];
    assert_eq!(channels.stop(&whole(), minor, &nothing), Ok(()));
    assert_eq!(channels.resume(&whole(), minor, &[]), Ok(()));
}

#[test]
fn why_a_gpu_does_not_open_is_told() {
    let channels = channels();
    let minor: Minor<'_> = &|| Err(DeviceError::NoGpu(1));
    let mut sets = [set(7)];
    sets[0].channels.clone_from(&sets[0].groups);
    let error = channels.stop(&whole(), minor, &sets);
    assert_eq!(error, Err(DeviceError::NoGpu(1)));
}

fn client(client: u32, base: u32) -> KnownClient {
    let object = |handle, class, parent| Object {
        handle: base + handle,
        class,
        parent: base + parent,
    };
    KnownClient {
        place: Place { fd: 3, client },
        objects: vec![
            object(1, 0x0080, 0),
            object(2, 0x2080, 1),
            object(3, 0x0080, 0),
            object(4, 0x2080, 3),
            object(5, 0xa06c, 1),
            object(6, 0xc86f, 5),
            object(7, 0xcbc0, 6),
            object(8, 0xa06c, 3),
            object(9, 0xc86f, 8),
            object(10, 0xcbc0, 9),
            object(11, 0xc86f, 1),
        ],
        next: base + 12,
        swept: 0,
        gpus: [(base + 1, Uuid([1; 16])), (base + 3, Uuid([2; 16]))].into(),
        lived: std::time::Instant::now(),
    }
}

#[test]
fn a_set_is_of_one_gpu_and_of_all_clients() {
    let clients = [client(0xc1d0_0009, 0x200), client(0xc1d0_0002, 0x100)];
    let uuid = Uuid::parse(HERE).expect("it is one");
    let handle = |client, object| Handle { client, object };
    let here = set_on(7, &clients, uuid);
    assert_eq!(here.pid, 7);
    assert_eq!(
        here.groups,
        [handle(0xc1d0_0002, 0x105), handle(0xc1d0_0009, 0x205)]
    );
    assert_eq!(
        here.channels,
        [
            handle(0xc1d0_0002, 0x106),
            handle(0xc1d0_0002, 0x10b),
            handle(0xc1d0_0009, 0x206),
            handle(0xc1d0_0009, 0x20b),
        ]
    );
    let there = set_on(7, &clients[1..], Uuid([2; 16]));
    assert_eq!(there.groups, [handle(0xc1d0_0002, 0x108)]);
    assert_eq!(there.channels, [handle(0xc1d0_0002, 0x109)]);
    assert!(set_on(7, &clients, Uuid([3; 16])).is_empty());
}
