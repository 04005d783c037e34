//! The server's life, with a control daemon compiled for these tests.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

#[test]
fn a_directory_too_long_for_a_socket_is_refused_with_the_limit() {
    let fits = Places::below(Path::new(&format!("/{}", "d".repeat(82))));
    assert_eq!(fits.check_length(), Ok(()));
    let long = Places::below(Path::new(&format!("/{}", "d".repeat(83))));
    let error = long.check_length().expect_err("one byte too many");
    let message = error.to_string();
    assert!(message.contains("at most 108 bytes"), "{message}");
    assert!(message.contains("leaves 83 for"), "{message}");
}

#[test]
fn only_what_clients_need_is_opened_to_them() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let places = Places::below(directory.path());
    places.prepare().expect("it is ours");
    for name in ["control", "control_privileged"] {
        let path = places.pipe.join(name);
        fs::write(&path, "").expect("it is ours");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("it is ours");
    }
    places.open_to_clients().expect("it is ours");
    let mode = |name: &str| {
        let meta = fs::metadata(places.pipe.join(name)).expect("just made");
        meta.permissions().mode() & 0o777
    };
    assert_eq!(mode("control"), 0o666);
    assert_eq!(mode("control_privileged"), 0o600);
}

#[test]
fn directories_that_others_cannot_pass_are_found() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let closed = directory.path().join("closed");
    let places = Places::below(&closed.join("mps"));
    places.prepare().expect("it is ours");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("it is ours");
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).expect("it is ours");
    assert!(places.closed_ancestors().contains(&closed));
    fs::set_permissions(&closed, Permissions::from_mode(0o755)).expect("it is ours");
    assert!(!places.closed_ancestors().contains(&closed));
}

/// A directory with a control program and a server program that behave like
/// NVIDIA's as far as this module sees them; `None` without a C compiler.
fn programs() -> Option<tempfile::TempDir> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let control = directory.path().join(control::CONTROL_PROGRAM);
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/mps.c");
    let compiled = Command::new("cc")
        .arg("-o")
        .arg(&control)
        .arg(source)
        .status();
    if let Err(error) = &compiled {
        println!("skipped: no C compiler: {error}");
        return None;
    }
    let status = compiled.expect("checked above");
    assert_eq!(status, std::process::ExitStatus::from_raw(0), "{source}");
    fs::hard_link(&control, directory.path().join(SERVER_PROGRAM)).expect("it is ours");
    Some(directory)
}

fn start(programs: &Path, directory: &Path) -> Result<Server, DeviceError> {
    let program = Program(programs.join(control::CONTROL_PROGRAM));
    Server::start(program, "GPU-1234", directory)
}

/// Starts what a first client would make the control daemon start.
fn bring_client(server: &mut Server) -> Process {
    server.command("client").expect("the daemon listens");
    let deadline = Instant::now() + Duration::from_secs(5);
    while server.serving.is_none() {
        assert!(Instant::now() < deadline, "no server was seen");
        assert!(server.is_alive());
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = server.serving.as_ref().map(Process::pid);
    Process::open(pid.expect("seen above")).expect("it runs")
}

#[test]
fn a_server_runs_until_it_is_stopped() {
    let Some(programs) = programs() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut server = start(programs.path(), directory.path()).expect("it becomes ready");
    let pipe = directory.path().join("pipe");
    let environment = server.environment();
    assert_eq!(
        environment,
        [
            (PIPE_VARIABLE.to_owned(), pipe.display().to_string()),
            (
                LOG_VARIABLE.to_owned(),
                directory.path().join("log").display().to_string()
            ),
        ]
    );
    for name in ["control", "log"] {
        let meta = fs::metadata(pipe.join(name)).expect("the daemon made it");
        assert_eq!(meta.permissions().mode() & 0o666, 0o666, "{name}");
    }
    let devices = fs::read_to_string(pipe.join("devices")).expect("the daemon made it");
    assert_eq!(devices, "GPU-1234");
    let (pid, start_time) = server.process().expect("it is a process of ours");
    assert_eq!(process::start_time(pid), Some(start_time));
    assert!(server.is_alive());
    let serving = bring_client(&mut server);
    Box::new(server).stop();
    assert_eq!(process::start_time(pid), None);
    assert!(serving.has_ended());
    assert!(!pipe.exists());
}

#[test]
fn a_deaf_control_daemon_is_killed() {
    let Some(programs) = programs() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut server = start(programs.path(), directory.path()).expect("it becomes ready");
    let (pid, _) = server.process().expect("it is a process of ours");
    let serving = bring_client(&mut server);
    server.command("deafen").expect("the daemon still listens");
    Box::new(server).stop();
    assert_eq!(process::start_time(pid), None);
    assert!(serving.has_ended());
}

#[test]
fn a_lost_server_is_noticed_though_the_control_daemon_lives() {
    let Some(programs) = programs() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut server = start(programs.path(), directory.path()).expect("it becomes ready");
    let serving = bring_client(&mut server);
    assert!(server.is_alive());
    serving.signal(rustix::process::Signal::KILL);
    assert!(serving.wait(Duration::from_secs(5)));
    assert!(!server.is_alive());
    assert!(!server.process.has_ended());
    assert!(!server.is_alive(), "lost clients do not come back");
}

#[test]
fn a_control_daemon_that_ends_at_once_is_quoted() {
    let Some(programs) = programs() else { return };
    fs::write(programs.path().join("broken"), "").expect("it is ours");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let error = start(programs.path(), directory.path()).expect_err("it is broken");
    let message = error.to_string();
    assert!(message.contains("exit status: 3"), "{message}");
    assert!(message.contains("it said: no usable device"), "{message}");
}

#[test]
fn an_orphan_is_asked_before_it_is_ended() {
    let Some(programs) = programs() else { return };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut server = start(programs.path(), directory.path()).expect("it becomes ready");
    let serving = bring_client(&mut server);
    let (pid, start_time) = server.process().expect("it is a process of ours");
    let ended = orphan::end_orphan(pid, start_time, directory.path());
    assert_eq!(ended, Ok(orphan::Orphan::Ended));
    assert!(serving.has_ended());
    assert!(!server.is_alive());
}
