//! What the host makes of NVML's answers, with a library compiled for these
//! tests (`fake/nvml.c` says what is wrong with each of its GPUs).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use gcgroup_device::{
    ChannelSet, Channels, DeviceError, GpuInfo, GpuProcess, Handle, Host, ProcessKind, Search,
    Telemetry,
};
use gcgroup_device_nvidia::{NvidiaHost, Options};
use tempfile::TempDir;

/// A library whose nvmlInit returns `init`; `None` without a C compiler.
fn library(init: u32) -> Option<(TempDir, PathBuf)> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("libnvidia-ml.so.1");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/nvml.c");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-DINIT={init}"), "-o"])
        .arg(&path)
        .arg(source)
        .status();
    match compiled {
        Ok(status) => assert!(status.success(), "{source} does not compile"),
        Err(error) => {
            println!("skipped: no C compiler: {error}");
            return None;
        }
    }
    Some((directory, path))
}

fn open(library: &Path) -> Result<NvidiaHost, DeviceError> {
    NvidiaHost::open_library(library, Options::default())
}

fn gpu(index: u32) -> GpuInfo {
    GpuInfo {
        index,
        uuid: format!("GPU-{index}"),
        name: format!("Test GPU {index}"),
        memory_bytes: 1000,
        refused: None,
    }
}

#[test]
fn a_host_without_the_library_has_no_driver() {
    let error = open(Path::new("/nonexistent/libnvidia-ml.so.1"));
    let error = error.expect_err("there is no such library");
    assert!(matches!(error, DeviceError::NoDriver(_)), "{error:?}");
}

#[test]
fn a_library_without_a_driver_is_no_driver() {
    // NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    // NVML_ERROR_UNKNOWN (nvml.h).
    for init in [9, 18, 999] {
        let Some((_directory, path)) = library(init) else {
            return;
        };
        let error = open(&path).expect_err("no driver answers");
        assert!(matches!(error, DeviceError::NoDriver(_)), "{error:?}");
    }
}

#[test]
fn a_lack_of_permission_is_told_apart() {
    let Some((_directory, path)) = library(4) else {
        return;
    };
    let error = open(&path).expect_err("not permitted");
    assert!(matches!(error, DeviceError::Denied(_)), "{error:?}");
}

#[test]
fn gpus_are_listed_with_the_reason_why_one_is_refused() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    assert_eq!(host.describe(), "NVIDIA driver 580.159.04, CUDA 13.0");
    assert_eq!(host.worker_address(&gpu(0)), "cuda:GPU-0");
    let refused = |index, reason: &str| GpuInfo {
        refused: Some(reason.to_owned()),
        ..gpu(index)
    };
    let expected = [
        gpu(0),
        refused(1, "MIG mode is enabled"),
        refused(2, "a vGPU"),
    ];
    assert_eq!(host.gpus().expect("the driver answers"), expected);
}

#[test]
fn figures_come_in_order_and_gpm_figures_once_they_are_known() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    let first = host.sample(&gpu(0)).expect("it is there");
    let plain_tail = [
        ("power_milliwatt", 350_123),
        ("temperature_celsius", 41),
        ("sm_clock_hertz", 1_980_000_000),
        ("memory_clock_hertz", 2_619_000_000),
        ("throttle_reasons", 4),
    ];
    let plain_head = [("gpu_percent", 97), ("memory_percent", 12)];
    assert_eq!(first.memory_used, 300);
    assert_eq!(first.utilization, [&plain_head[..], &plain_tail].concat());

    let at_once = host.sample(&gpu(0)).expect("it is there");
    assert_eq!(at_once.utilization, first.utilization);

    // The metric that this GPU does not have, tensor_percent, stays away.
    let gpm = [
        ("sm_active_percent", 42),
        ("sm_occupancy_percent", 20),
        ("dram_percent", 100),
        ("pcie_tx_bytes_per_sec", 1_572_864),
        ("pcie_rx_bytes_per_sec", 2_097_152),
    ];
    let all = [&plain_head[..], &gpm, &plain_tail].concat();
    std::thread::sleep(Duration::from_millis(110));
    let second = host.sample(&gpu(0)).expect("it is there");
    assert_eq!(second.utilization, all);
    let between = host.sample(&gpu(0)).expect("it is there");
    assert_eq!(between.utilization, all);
}

#[test]
fn a_gpu_with_few_figures_gives_those_it_has() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    let sample = host.sample(&gpu(2)).expect("it is there");
    assert_eq!(sample.memory_used, 302);
    assert_eq!(sample.utilization, [("temperature_celsius", 41)]);
}

#[test]
fn lost_and_unknown_gpus_are_gone() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    assert_eq!(host.sample(&gpu(3)), Err(DeviceError::NoGpu(3)));
    assert_eq!(host.sample(&gpu(7)), Err(DeviceError::NoGpu(7)));
}

#[test]
fn xids_are_counted_for_their_gpu_beside_one_that_refuses_events() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    let deadline = Instant::now() + Duration::from_secs(5);
    let xids = |index| host.sample(&gpu(index)).expect("it is there").xids;
    while xids(0) < 2 {
        assert!(Instant::now() < deadline, "the events were not counted");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((xids(0), xids(1)), (2, 0));
}

#[test]
fn closing_the_host_takes_the_library_down() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    host.sample(&gpu(0)).expect("it is there");
    let loaded = || {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc is mounted");
        maps.contains(path.to_str().expect("a temporary path is plain"))
    };
    assert!(loaded());
    drop(host);
    assert!(!loaded(), "a driver upgrade would find it in use");
}

#[test]
fn processes_are_listed_by_kind_without_those_that_have_ended() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    let ourselves = |kind, memory_bytes| GpuProcess {
        pid: std::process::id(),
        kind,
        memory_bytes,
    };
    let program = ourselves(ProcessKind::Program, None);
    assert_eq!(host.processes(&gpu(0)), Ok(vec![program]));
    let client = ourselves(ProcessKind::MpsClient, Some(4096));
    assert_eq!(host.processes(&gpu(1)), Ok(vec![client]));
    // Its library does not list MPS clients.
    assert_eq!(host.processes(&gpu(2)), Ok(vec![]));
    assert_eq!(host.processes(&gpu(3)), Err(DeviceError::NoGpu(3)));
    assert_eq!(host.processes(&gpu(7)), Err(DeviceError::NoGpu(7)));
}

#[test]
fn channels_of_a_lost_gpu_are_not_stopped() {
    let Some((_directory, path)) = library(0) else {
        return;
    };
    let host = open(&path).expect("the library answers");
    let set = ChannelSet {
        pid: std::process::id(),
        groups: Vec::new(),
        channels: vec![Handle {
            client: 0xc1d0_0001,
            object: 0x5c00_0010,
        }],
    };
    let sets = [set];
    assert_eq!(host.stop(&gpu(7), &sets), Err(DeviceError::NoGpu(7)));
    assert_eq!(host.resume(&gpu(7), &sets), Err(DeviceError::NoGpu(7)));
    // The UUIDs of these GPUs have no bytes.
    let error = host.list(std::process::id(), &gpu(0), Search::Anew);
    let error = error.expect_err("it is not that of a GPU");
    assert!(error.to_string().contains("\"GPU-0\""), "{error}");
}
