//! gcgroup.launch as a stream.

use std::fs::{File as OsFile, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use gcgroup_model::change::Done;
use gcgroup_model::{Change, File, Refusal};
use rustix::io::Errno;

use crate::fixture::{Fixture, Mood, errno, eventually, shell, write};

fn open(fixture: &Fixture) -> OsFile {
    let path = fixture.root().join(File::Launch.name());
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.expect("it is read-write")
}

fn answer(file: &mut OsFile) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).expect("an answer is text");
    text
}

#[test]
fn lines_gather_until_the_object_is_complete_and_the_answer_follows() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let mut file = open(&fixture);
    for line in ["{\n", "  \"kernel\": \"sleep\",\n", "  \"name\": \"a}\"\n"] {
        file.write_all(line.as_bytes()).expect("it is gathered");
        assert_eq!(answer(&mut file), "");
    }
    assert!(fixture.keeper.changes.lock().is_empty());
    // The name is refused; the object was complete only with this brace.
    assert_eq!(errno(file.write_all(b"}\n")), Some(Errno::INVAL));
    assert!(answer(&mut file).ends_with("\"field\":\"name\"}\n"));
    file.write_all(b"{\"kernel\": \"sleep\",\n")
        .expect("a new object");
    file.write_all(b"\"gpu\": 0}").expect("it is launched");
    assert!(matches!(fixture.last_change(), Change::Launch(_)));
    let launched = "{\"pid\":77,\"gpu\":0,\"name\":\"sleep-1\"}\n";
    assert_eq!(answer(&mut file), launched);
    assert_eq!(answer(&mut file), "", "an answer is read once");
}

#[test]
fn a_shell_launches_with_echo_and_reads_the_answer_on_the_same_descriptor() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.root().join(File::Launch.name());
    let path = path.display();
    assert!(shell(&format!("echo '{{\"kernel\": \"sleep\"}}' > {path}")));
    assert!(shell(&format!(
        "! (echo '{{\"kernle\": 1}}' > {path}) 2>/dev/null"
    )));
    assert!(shell(&format!(
        "exec 3<>{path}; printf '{{\\n\"kernel\": \"sleep\"\\n}}\\n' >&3; \
         read answer <&3; [ \"$answer\" = '{{\"pid\":77,\"gpu\":0,\"name\":\"sleep-1\"}}' ]"
    )));
}

#[test]
fn a_field_that_is_wrong_is_named() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    for (text, field) in [
        ("{}", "kernel"),
        ("{\"kernel\": \"sleep\", \"gpu\": -1}", "gpu"),
        ("{\"kernel\": \"sleep\", \"colour\": 1}", "colour"),
        ("{kernel}", ""),
    ] {
        let mut file = open(&fixture);
        assert_eq!(errno(file.write_all(text.as_bytes())), Some(Errno::INVAL));
        let answer = answer(&mut file);
        assert!(answer.starts_with("{\"error\":\""), "{answer}");
        assert!(
            answer.ends_with(&format!("\"field\":\"{field}\"}}\n")),
            "{answer}"
        );
    }
    assert!(fixture.keeper.changes.lock().is_empty());
}

#[test]
fn what_the_service_refuses_is_the_answer_too() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.mood(Mood::Refuses(Refusal::Busy("no client slot".to_owned())));
    let mut file = open(&fixture);
    let result = file.write_all(b"{\"kernel\": \"sleep\"}");
    assert_eq!(errno(result), Some(Errno::BUSY));
    assert_eq!(
        answer(&mut file),
        "{\"error\":\"no client slot\",\"field\":\"\"}\n"
    );
}

#[test]
fn it_is_a_stream_and_empty_for_readers() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let path = fixture.root().join(File::Launch.name());
    let mut file = OsFile::open(&path).expect("a read-only open is allowed");
    assert_eq!(answer(&mut file), "");
    assert_eq!(errno(file.read_at(&mut [0], 0)), Some(Errno::SPIPE));
    assert_eq!(errno(write(&path, "[]")), Some(Errno::INVAL));
}

#[test]
fn an_object_beyond_64_kib_is_refused() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    let mut file = open(&fixture);
    let line = [b' '; 1024];
    file.write_all(b"{").expect("it is gathered");
    for _ in 0..63 {
        file.write_all(&line).expect("it is gathered");
    }
    assert_eq!(errno(file.write_all(&line)), Some(Errno::INVAL));
}

#[test]
fn launches_do_not_wait_for_each_other() {
    let Some(fixture) = Fixture::mount() else {
        return;
    };
    fixture.mood(Mood::Hangs);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let path = fixture.root().join(File::Launch.name());
                write(&path, "{\"kernel\": \"sleep\"}").expect("it is answered");
            });
        }
        let all = || fixture.keeper.held.lock().len() == 8;
        let arrived = eventually(Duration::from_secs(5), all);
        // A writer that was not among them is not to hang either.
        fixture.mood(Mood::Obeys);
        let held = std::mem::take(&mut *fixture.keeper.held.lock());
        for reply in held {
            reply(Ok(Done::Quiet));
        }
        assert!(arrived, "a launch waited for another");
    });
}
