//! `gcgroupd demo`, the first command that a newcomer runs.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use gcgroup_integration_tests::{binary, process, wait};

fn demo(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(binary::gcgroupd())
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", directory)
        .output()
        .expect("it starts")
}

fn assert_shown(arguments: &[&str]) -> String {
    let base = tempfile::tempdir().expect("the temporary directory is writable");
    let since = Instant::now();
    let output = demo(base.path(), arguments);
    let took = since.elapsed();
    assert!(output.status.success(), "{output:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    let left: Vec<_> = std::fs::read_dir(base.path()).expect("ours").collect();
    assert!(left.is_empty(), "{left:?}");
    wait::until(Duration::from_secs(5), "no process is left", || {
        process::naming(base.path()).is_empty()
    });
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    assert!(
        !mounts.contains(&*base.path().to_string_lossy()),
        "{mounts}"
    );
    text
}

#[test]
fn it_says_which_gpu_it_uses_and_shows_a_freeze() {
    let text = assert_shown(&["--sim"]);
    let first = text.lines().next().expect("it prints something");
    assert!(first.contains("simulated"), "{first}");
    for word in [
        "nr_submitted_kernels",
        "nr_ended_kernels",
        "nr_pending_kernels",
    ] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    assert!(text.contains("compute.freeze"), "{text}");
}

#[test]
fn it_finds_a_gpu_by_itself() {
    let text = assert_shown(&[]);
    let first = text.lines().next().expect("it prints something");
    let real = Path::new("/dev/nvidiactl").exists();
    assert!(real || first.contains("simulated"), "{first}");
}
