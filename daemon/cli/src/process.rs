//! `freeze`, `thaw` and `kill`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gcgroup_model::File;
use gcgroup_model::value::{FreezeSet, Switch};
use rustix::io::Errno;
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::output::{self, Style};
use crate::select::Selection;
use crate::target::Target;
use crate::tree::{EntryId, Tree};

/// Times that a tree or a control group is listed before it counts as one that
/// does not come to rest. A program that starts workers while it is frozen has
/// started them by the second.
const ROUNDS: usize = 5;

/// Freezes or thaws. One entry is written to its own file; everything else to
/// the file that takes several processes in one step.
///
/// # Errors
/// When a target does not exist, nothing is selected or the service refuses;
/// then none has changed. [`Failure::Partly`] when that befell processes that
/// appeared after the first step.
pub(crate) fn freeze(
    tree: &Tree,
    selection: &Selection,
    state: Switch,
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let alone = match (selection.target.as_slice(), selection.grows()) {
        ([text], false) => match process(tree, text)? {
            (_, Gpus::Some(entry)) => Some(entry),
            (_, Gpus::All { .. }) => None,
        },
        _ => None,
    };
    let pids = if let Some(entry) = alone {
        tree.write(&entry.directory(), File::Freeze.row(), &state.to_string())?;
        vec![entry.pid]
    } else {
        settle(
            |done| {
                if done.is_empty() {
                    let mut pids = named(tree, &selection.target)?;
                    pids.extend(selection.first(tree)?);
                    Ok(pids)
                } else {
                    selection.later(tree)
                }
            },
            |pids| {
                let set = FreezeSet { state, pids };
                tree.write(Path::new(""), File::FreezeMany.row(), &set.to_string())
            },
        )?
    };
    match style {
        Style::Text if selection.grows() => {
            let done = if state.is_on() { "froze" } else { "thawed" };
            output::line(&format!("{done} {}", counted(pids.len())), out)
        }
        Style::Text => Ok(()),
        Style::Json => output::json(
            &json!({"frozen": u8::from(state.is_on()), "pids": pids}),
            out,
        ),
    }
}

fn counted(processes: usize) -> String {
    match processes {
        1 => "1 process".to_owned(),
        several => format!("{several} processes"),
    }
}

/// Pids of the processes that were named, which the step for several takes whole.
fn named(tree: &Tree, targets: &[String]) -> Result<Vec<u32>, Failure> {
    let mut pids = Vec::new();
    for text in targets {
        let (pid, gpus) = process(tree, text)?;
        whole(tree, pid, gpus)?;
        pids.push(pid);
    }
    Ok(pids)
}

/// Lists processes, writes those that are new, and lists again until nothing is
/// new. `list` is given what has been written; pids that it repeats do no harm.
fn settle(
    mut list: impl FnMut(&[u32]) -> Result<Vec<u32>, Failure>,
    mut write: impl FnMut(Vec<u32>) -> Result<(), Failure>,
) -> Result<Vec<u32>, Failure> {
    let mut done: Vec<u32> = Vec::new();
    let partly = |done: &[u32], failure: Failure| match done.len() {
        0 => failure,
        done => Failure::Partly {
            done,
            failure: Box::new(failure),
        },
    };
    let mut ended = None;
    for _ in 0..ROUNDS {
        let mut new: Vec<u32> = Vec::new();
        for pid in list(&done).map_err(|failure| partly(&done, failure))? {
            if !done.contains(&pid) && !new.contains(&pid) {
                new.push(pid);
            }
        }
        if new.is_empty() {
            return Ok(done);
        }
        match write(new.clone()) {
            Ok(()) => {
                done.extend(new);
                ended = None;
            }
            // One ended since it was listed, and so the others were left alone.
            Err(failure) if failure.errno() == Some(Errno::SRCH) => ended = Some(failure),
            Err(failure) => return Err(partly(&done, failure)),
        }
    }
    let restless = || {
        Failure::Wrong("new processes keep appearing; repeat the command to reach them".to_owned())
    };
    Err(partly(&done, ended.unwrap_or_else(restless)))
}

/// Ends each target. A failure does not keep the others from being ended.
///
/// # Errors
/// When one of them could not be ended.
pub(crate) fn kill(
    tree: &Tree,
    targets: &[String],
    style: Style,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut failures = Vec::new();
    let mut killed = Vec::new();
    for text in targets {
        match end(tree, text) {
            Ok(pid) => killed.push(pid),
            Err(failure) => failures.push(failure),
        }
    }
    if style == Style::Json {
        let mut document = Map::new();
        document.insert("killed".into(), killed.into());
        output::json(&Value::Object(document), out)?;
    }
    let failed = failures.len();
    match (failures.pop(), failed) {
        (None, _) => Ok(()),
        (Some(failure), 1) => Err(failure),
        (Some(last), _) => {
            failures.push(last);
            for failure in &failures {
                // There is nowhere left to say that standard error is closed.
                let _ = output::failure(failure, style, &mut io::stderr().lock());
            }
            Err(Failure::Several {
                failed,
                all: targets.len(),
            })
        }
    }
}

fn end(tree: &Tree, text: &str) -> Result<u32, Failure> {
    let (pid, gpus) = process(tree, text)?;
    // A process ends as a whole, so any of its directories will do.
    let directory: PathBuf = match gpus {
        Gpus::Some(entry) => entry.directory(),
        Gpus::All { first } => EntryId { pid, gpu: first }.directory(),
    };
    tree.write(&directory, File::Kill.row(), "1")?;
    Ok(pid)
}

/// Which of its GPUs a process was named with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gpus {
    /// One, because it was named or because there is only that one.
    Some(EntryId),
    /// All of several.
    All {
        /// One of them.
        first: u32,
    },
}

fn process(tree: &Tree, text: &str) -> Result<(u32, Gpus), Failure> {
    match Target::find(tree, text)? {
        Target::Entry(entry) => Ok((entry.pid, Gpus::Some(entry))),
        Target::Process { pid, gpus } => match gpus.as_slice() {
            [gpu] => Ok((pid, Gpus::Some(EntryId { pid, gpu: *gpu }))),
            [first, ..] => Ok((pid, Gpus::All { first: *first })),
            [] => Err(Failure::Wrong(format!("process {pid} is on no GPU"))),
        },
        _ => Err(Failure::Wrong(format!(
            "{text:?} is not a process; name a pid, PID/GPU or a workload"
        ))),
    }
}

/// The step for several processes takes them whole, which a user who named one
/// of several GPUs did not ask for.
fn whole(tree: &Tree, pid: u32, gpus: Gpus) -> Result<(), Failure> {
    if let Gpus::Some(entry) = gpus
        && tree.gpus_of(pid)?.len() > 1
    {
        return Err(Failure::Wrong(format!(
            "several targets change whole processes, and {pid} is not on GPU {} alone; name it \
             as {pid}, or alone",
            entry.gpu
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// What `settle` writes, and how it ends, where each listing and each write
    /// gives the next of these.
    fn settled(
        listings: &[&[u32]],
        writes: &[Result<(), Errno>],
    ) -> (Vec<Vec<u32>>, Result<Vec<u32>, Failure>) {
        let mut listings: VecDeque<_> = listings.iter().map(|pids| pids.to_vec()).collect();
        let mut writes: VecDeque<_> = writes.iter().copied().collect();
        let mut written = Vec::new();
        let outcome = settle(
            |_| {
                Ok(listings
                    .pop_front()
                    .expect("no more listings than expected"))
            },
            |pids| {
                written.push(pids);
                let errno = writes.pop_front().unwrap_or(Ok(()));
                errno.map_err(|errno| Failure::File {
                    path: PathBuf::new(),
                    errno: Some(errno),
                    sentence: "refused".into(),
                })
            },
        );
        (written, outcome)
    }

    #[test]
    fn what_appears_meanwhile_is_written_until_nothing_is_new() {
        let (written, outcome) = settled(&[&[1, 2], &[1, 2, 3], &[3, 2]], &[]);
        assert_eq!(written, [vec![1, 2], vec![3]]);
        assert_eq!(outcome.expect("it comes to rest"), [1, 2, 3]);
    }

    #[test]
    fn a_process_named_twice_is_written_once() {
        let (written, outcome) = settled(&[&[7, 5, 7], &[]], &[]);
        assert_eq!(written, [[7, 5]]);
        assert_eq!(outcome.expect("it comes to rest"), [7, 5]);
    }

    #[test]
    fn one_that_ends_between_listing_and_write_is_left_out() {
        let (written, outcome) = settled(&[&[1, 2], &[2], &[2]], &[Err(Errno::SRCH)]);
        assert_eq!(written, [vec![1, 2], vec![2]]);
        assert_eq!(outcome.expect("it comes to rest"), [2]);
        // One that is listed for good and never there is not waited for.
        let (written, outcome) = settled(&[&[1][..]; ROUNDS], &[Err(Errno::SRCH); ROUNDS]);
        assert_eq!(written.len(), ROUNDS);
        let failure = outcome.expect_err("it was never written");
        assert_eq!(failure.errno(), Some(Errno::SRCH));
        assert!(!matches!(failure, Failure::Partly { .. }), "{failure:?}");
    }

    #[test]
    fn a_refusal_changes_none_or_says_how_many() {
        let (written, outcome) = settled(&[&[1, 2]], &[Err(Errno::OPNOTSUPP)]);
        assert_eq!(written.len(), 1);
        assert!(matches!(outcome, Err(Failure::File { .. })), "{outcome:?}");
        let (_, outcome) = settled(&[&[1, 2], &[3]], &[Ok(()), Err(Errno::OPNOTSUPP)]);
        let failure = outcome.expect_err("the second write failed");
        assert_eq!(failure.errno(), Some(Errno::OPNOTSUPP));
        assert!(failure.to_string().starts_with("2 of "), "{failure}");
    }

    #[test]
    fn what_never_comes_to_rest_is_told() {
        let listings: Vec<Vec<u32>> = (1..=5).map(|pid| vec![pid]).collect();
        let listings: Vec<&[u32]> = listings.iter().map(Vec::as_slice).collect();
        assert_eq!(listings.len(), ROUNDS);
        let (written, outcome) = settled(&listings, &[]);
        assert_eq!(written.len(), ROUNDS);
        let failure = outcome.expect_err("something was new each time");
        assert!(failure.to_string().starts_with("5 of "), "{failure}");
    }
}
