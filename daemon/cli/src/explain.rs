//! Errnos in sentences: what was wrong and what is allowed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use gcgroup_model::change::{Pending, Setting};
use gcgroup_model::value::{FreezeSet, PartitionRef, Quota};
use gcgroup_model::{File, Grammar, Place, Row};
use rustix::io::Errno;

use crate::failure::Failure;
use crate::tree::below;

/// Where users and groups have their names.
const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// Why nothing answers at `root`, and how to start what should.
pub(crate) fn not_serving(root: &Path, error: &io::Error) -> String {
    let why = match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::NOTDIR) => "is not running or is mounted elsewhere",
        Some(Errno::NOTCONN | Errno::CONNABORTED) => "has died",
        Some(Errno::ACCESS) => "cannot be asked: no permission to search the directory",
        _ => {
            return format!(
                "gcgroupd does not answer at {}: {}",
                root.display(),
                system(error)
            );
        }
    };
    format!(
        "gcgroupd, which should serve {root}, {why}; start it with 'systemctl start gcgroupd' or, \
         as root, 'gcgroupd serve --mountpoint {root}', or name its mount point with --root",
        root = root.display()
    )
}

/// A read that failed.
pub(crate) fn read(path: &Path, row: &Row, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    let sentence = match errno {
        Some(Errno::NOENT) if row.place == Place::Workload => {
            "only processes that gcgroupd launched have this file".to_owned()
        }
        Some(Errno::NOENT) => absent(row),
        Some(Errno::ACCESS | Errno::PERM) => not_permitted(path),
        _ => common(errno).unwrap_or_else(|| system(error)),
    };
    Failure::File {
        path: path.to_owned(),
        errno,
        sentence,
    }
}

/// A write that failed.
pub(crate) fn write(path: &Path, row: &Row, value: &str, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    let directory = path.parent().unwrap_or(path);
    let sentence = match errno {
        Some(Errno::INVAL) => invalid(row.grammar, value),
        Some(Errno::RANGE) => format!(
            "{value:?} does not fit; allowed is {}",
            row.grammar.allowed()
        ),
        Some(Errno::OPNOTSUPP) if row.file == File::FreezeMany => several(directory, value),
        Some(Errno::OPNOTSUPP) => unsupported(row, directory),
        Some(Errno::NOENT) if path.exists() => missing(row.grammar, value),
        Some(Errno::NOENT) => absent(row),
        Some(Errno::BUSY) => busy(row.grammar),
        Some(Errno::NOSPC) => no_space(row.grammar),
        Some(Errno::SRCH) => no_process(row.grammar, value),
        Some(Errno::ACCESS | Errno::PERM) => not_permitted(path),
        _ => common(errno).unwrap_or_else(|| system(error)),
    };
    Failure::File {
        path: path.to_owned(),
        errno,
        sentence,
    }
}

/// A directory that cannot be listed.
pub(crate) fn list(path: &Path, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    Failure::File {
        path: path.to_owned(),
        errno,
        sentence: common(errno).unwrap_or_else(|| system(error)),
    }
}

/// A partition that could not be made.
pub(crate) fn make_partition(path: &Path, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    let sentence = match errno {
        Some(Errno::EXIST) => "exists already".to_owned(),
        Some(Errno::NOENT) => "there is no such GPU".to_owned(),
        Some(Errno::INVAL | Errno::NAMETOOLONG) => match file_name(path).parse::<PartitionRef>() {
            Err(wrong) => wrong.to_string(),
            Ok(_) => "is not a name for a partition".to_owned(),
        },
        Some(Errno::OPNOTSUPP) => "this GPU has no SM partitions".to_owned(),
        Some(Errno::ACCESS | Errno::PERM) => not_permitted(path.parent().unwrap_or(path)),
        _ => common(errno).unwrap_or_else(|| system(error)),
    };
    Failure::File {
        path: path.to_owned(),
        errno,
        sentence,
    }
}

/// A partition that could not be removed.
pub(crate) fn remove_partition(path: &Path, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    let sentence = match errno {
        Some(Errno::BUSY) => {
            let members = fs::read_to_string(path.join(File::PartitionMembers.name()));
            match members {
                Ok(pids) if !pids.trim().is_empty() => format!(
                    "still has members: {}; move them out through {} or end them",
                    pids.split_whitespace().collect::<Vec<_>>().join(" "),
                    File::Partition.name()
                ),
                _ => "still has members".to_owned(),
            }
        }
        Some(Errno::NOENT) => "there is no such partition".to_owned(),
        Some(Errno::ACCESS | Errno::PERM) => not_permitted(path.parent().unwrap_or(path)),
        _ => common(errno).unwrap_or_else(|| system(error)),
    };
    Failure::File {
        path: path.to_owned(),
        errno,
        sentence,
    }
}

/// A program that could not be executed, with the status that shells end with.
pub(crate) fn not_started(program: &OsStr, error: &io::Error) -> Failure {
    let program = program.to_string_lossy();
    if error.kind() == io::ErrorKind::NotFound {
        Failure::NotStarted {
            status: 127,
            sentence: format!("command {program:?} was not found"),
        }
    } else {
        Failure::NotStarted {
            status: 126,
            sentence: format!("command {program:?} cannot be executed: {}", system(error)),
        }
    }
}

/// Errnos that mean the same whatever was done.
fn common(errno: Option<Errno>) -> Option<String> {
    let sentence = match errno? {
        Errno::NODEV => "the process or the GPU is gone".to_owned(),
        Errno::NOMEM => "not enough host memory".to_owned(),
        Errno::NOSPC => "no room on the GPU".to_owned(),
        Errno::IO => {
            "the mechanism failed; the service's log has the reason (journalctl -u gcgroupd)".into()
        }
        Errno::TIMEDOUT => format!(
            "was not done in time; where {} says 'pending 1' it has begun and still runs to its end",
            File::Events.name()
        ),
        Errno::NOTCONN | Errno::CONNABORTED => {
            "gcgroupd has died; start it again (systemctl start gcgroupd)".into()
        }
        Errno::NOTSUP => "nothing can do this here".into(),
        _ => return None,
    };
    Some(sentence)
}

/// A file that the table has and this directory has not.
fn absent(row: &Row) -> String {
    match row.place {
        Place::Root => "this gcgroupd has no such file; it is older than this gcgroup".to_owned(),
        Place::Gpu
        | Place::Partition
        | Place::Processes
        | Place::Process
        | Place::ProcessGpu
        | Place::Workload => "is not there (any more)".to_owned(),
    }
}

fn no_process(grammar: Grammar, value: &str) -> String {
    match grammar {
        Grammar::Pending => format!("there is no process {}", first_word(value)),
        _ => format!("one of the processes in {value:?} is not on a GPU; none was changed"),
    }
}

fn first_word(text: &str) -> &str {
    text.split(' ').next().unwrap_or_default()
}

/// The value may be well formed and still be refused for what it names.
fn invalid(grammar: Grammar, value: &str) -> String {
    if grammar == Grammar::PartitionRef
        && let Ok(PartitionRef::Named(name)) = value.parse()
    {
        return format!(
            "partition {name} cannot take members while its {} is 0",
            File::SmCount.name()
        );
    }
    // A quota that the model takes was refused for its period, which only a
    // worker keeps when it is short.
    let is_quota = match grammar {
        Grammar::Quota => value.parse::<Quota>().is_ok(),
        Grammar::Pending => value
            .parse()
            .is_ok_and(|pending: Pending| matches!(pending.setting, Setting::Max(_))),
        _ => false,
    };
    let more = if is_quota {
        "; of a process that gcgroupd did not launch the period is 50000 at least"
    } else {
        ""
    };
    format!(
        "{value:?} is not allowed; allowed is {}{more}",
        grammar.allowed()
    )
}

fn missing(grammar: Grammar, value: &str) -> String {
    match grammar {
        Grammar::PartitionRef => format!("there is no partition {value:?} on this GPU"),
        _ => format!("what {value:?} names does not exist"),
    }
}

fn busy(grammar: Grammar) -> String {
    match grammar {
        Grammar::SmRequest => "a change of this partition or of a member is under way".into(),
        Grammar::PartitionRef | Grammar::Spec => {
            "an earlier change is under way, or no MPS client slot is free".into()
        }
        _ => format!(
            "an earlier change is under way; {} tells when it is done",
            File::Events.name()
        ),
    }
}

fn no_space(grammar: Grammar) -> String {
    match grammar {
        Grammar::SmRequest => "not so many SMs are free; 'max' takes what is".into(),
        _ => "no room on the GPU".into(),
    }
}

/// The reason that the entry itself gives for a file that nothing enforces.
fn unsupported(row: &Row, directory: &Path) -> String {
    match reason(row, directory) {
        Some(reason) => format!("nothing can enforce it here: {reason}"),
        None => format!(
            "nothing can enforce it here; {} has the reason",
            File::Enforcers.name()
        ),
    }
}

/// What stands behind `none` for a file in the enforcers of its directory.
fn reason(row: &Row, directory: &Path) -> Option<String> {
    let told = fs::read_to_string(directory.join(File::Enforcers.name())).ok()?;
    told.lines().find_map(|line| {
        let line = line.strip_prefix(row.name)?;
        let line = line.trim_start_matches(':').strip_prefix(' ')?;
        line.trim_start().strip_prefix("none ").map(str::to_owned)
    })
}

/// Which of several processes cannot be frozen, and why; `root` is the mount
/// point.
fn several(root: &Path, value: &str) -> String {
    let pids = value.parse::<FreezeSet>().map(|set| set.pids);
    for pid in pids.unwrap_or_default() {
        let process = root.join(below(Place::Process, &[&pid.to_string()]));
        let gpus = fs::read_dir(process).into_iter().flatten().flatten();
        for gpu in gpus {
            if let Some(reason) = reason(File::Freeze.row(), &gpu.path()) {
                return format!("nothing can freeze process {pid}: {reason}; none was changed");
            }
        }
    }
    "nothing can freeze one of the processes; none was changed".to_owned()
}

/// Whose the file is, so that the caller knows which group to ask for.
fn not_permitted(path: &Path) -> String {
    let Ok(metadata) = fs::metadata(path) else {
        return "not permitted".to_owned();
    };
    let user = name_of(metadata.uid().into(), USERS);
    let group = name_of(metadata.gid().into(), GROUPS);
    if metadata.mode() & 0o020 == 0 {
        format!("not permitted: the files belong to {user}:{group} and only {user} writes them")
    } else {
        format!("not permitted: the files belong to {user}:{group}")
    }
}

/// Name of a user, or the number where it has none.
pub(crate) fn user(uid: u64) -> String {
    name_of(uid, USERS)
}

/// Name of a user or group id in a file whose third field is the id, or the
/// number itself.
fn name_of(id: u64, database: &str) -> String {
    let id = id.to_string();
    fs::read_to_string(database)
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)? == id).then(|| name.to_owned())
            })
        })
        .unwrap_or(id)
}

fn file_name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("")
}

/// The system's words without the number that Rust puts behind them.
fn system(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_lowercase().chain(letters).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sentence for `errno` of a write of `value` to `file`.
    fn sentence(file: File, value: &str, errno: Errno) -> String {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join(file.name());
        fs::write(&path, "").expect("a control file");
        fs::write(
            directory.path().join(File::Enforcers.name()),
            format!(
                "{} none no stream priority across clients\n{} worker\n",
                File::Priority.name(),
                File::Freeze.name()
            ),
        )
        .expect("an enforcers file");
        match write(&path, file.row(), value, &errno.into()) {
            Failure::File { sentence, .. } => sentence,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_invalid_value_names_itself_and_what_is_allowed() {
        for row in gcgroup_model::ROWS.iter().filter(|row| row.mode.writable()) {
            let told = sentence(row.file, "?", Errno::INVAL);
            assert!(told.contains("\"?\""), "{told}");
            assert!(told.contains(row.grammar.allowed()), "{told}");
        }
    }

    #[test]
    fn a_partition_without_sms_is_told_apart_from_a_bad_name() {
        let told = sentence(File::Partition, "a", Errno::INVAL);
        assert!(told.contains(File::SmCount.name()), "{told}");
        let told = sentence(File::Partition, "b", Errno::NOENT);
        assert_eq!(told, "there is no partition \"b\" on this GPU");
    }

    #[test]
    fn an_unsupported_file_carries_the_reason_of_its_entry() {
        assert_eq!(
            sentence(File::Priority, "4", Errno::OPNOTSUPP),
            "nothing can enforce it here: no stream priority across clients"
        );
        let told = sentence(File::Freeze, "1", Errno::OPNOTSUPP);
        assert!(told.contains(File::Enforcers.name()), "{told}");
    }

    #[test]
    fn of_several_processes_the_one_that_cannot_be_frozen_is_named() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let path = root.path().join(File::FreezeMany.name());
        let told = |value: &str| {
            let error = Errno::OPNOTSUPP.into();
            write(&path, File::FreezeMany.row(), value, &error).to_string()
        };
        assert!(told("1 5 6").contains("one of the processes"));
        for (pid, line) in [("5", "channel"), ("6", "none it is a client")] {
            let entry = root.path().join(below(Place::ProcessGpu, &[pid, "0"]));
            fs::create_dir_all(&entry).expect("a directory");
            let text = format!("{} {line}\n", File::Freeze.name());
            fs::write(entry.join(File::Enforcers.name()), text).expect("an enforcers file");
        }
        let told = told("1 5 6");
        assert!(
            told.contains("process 6: it is a client; none was"),
            "{told}"
        );
    }

    #[test]
    fn a_period_that_only_workers_keep_is_told_apart() {
        let period = "50000";
        for (file, value, told) in [
            (File::Max, "5000 10000", true),
            (File::Max, "5000 1", false),
            (File::Pending, "7 compute.max 5000 10000", true),
            (File::Pending, "7 compute.priority 3", false),
            (File::Pending, "7 compute.max 5", false),
        ] {
            let sentence = sentence(file, value, Errno::INVAL);
            assert_eq!(sentence.contains(period), told, "{value}: {sentence}");
        }
    }

    #[test]
    fn a_setting_that_waits_for_nobody_names_the_process() {
        let told = sentence(File::Pending, "7 compute.priority 3", Errno::SRCH);
        assert_eq!(told, "there is no process 7");
    }

    #[test]
    fn a_program_that_does_not_start_ends_as_in_a_shell() {
        for (errno, status) in [(Errno::NOENT, 127), (Errno::ACCESS, 126)] {
            let failure = not_started(OsStr::new("fly"), &errno.into());
            assert_eq!(failure.exit_status(), status);
            assert!(failure.to_string().contains("\"fly\""), "{failure}");
        }
    }

    #[test]
    fn permission_names_the_owner_and_its_group() {
        let told = sentence(File::Freeze, "1", Errno::ACCESS);
        assert!(
            told.starts_with("not permitted: the files belong to "),
            "{told}"
        );
        assert!(told.contains(':'), "{told}");
    }

    #[test]
    fn ids_without_a_name_stay_numbers() {
        assert_eq!(name_of(0, USERS), "root");
        assert_eq!(user(4_294_967_294), "4294967294");
    }

    #[test]
    fn errnos_that_differ_have_sentences_that_differ() {
        let told: Vec<_> = [
            Errno::INVAL,
            Errno::RANGE,
            Errno::OPNOTSUPP,
            Errno::BUSY,
            Errno::NOSPC,
            Errno::SRCH,
            Errno::ACCESS,
            Errno::NODEV,
            Errno::NOMEM,
            Errno::IO,
            Errno::TIMEDOUT,
            Errno::NOTCONN,
        ]
        .into_iter()
        .map(|errno| sentence(File::FreezeMany, "1 2", errno))
        .collect();
        for (index, one) in told.iter().enumerate() {
            assert!(!one.is_empty());
            assert!(!told[..index].contains(one), "{one} stands for two errnos");
        }
    }
}
