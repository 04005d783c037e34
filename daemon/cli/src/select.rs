//! Which processes `freeze` and `thaw` mean: names, trees and control groups.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::Path;
use std::str::FromStr;

use clap::{ArgGroup, Args};
use gcgroup_model::{File, Place};

use crate::args::OutputArguments;
use crate::failure::Failure;
use crate::proc::{self, Parents};
use crate::tree::{Tree, below};

/// Where the unified hierarchy is mounted; users copy paths from there.
const MOUNT: &str = "/sys/fs/cgroup";
/// The same where the hierarchies of version 1 are mounted beside it.
const MOUNT_BESIDE: &str = "/sys/fs/cgroup/unified";
/// What every group of the unified hierarchy has, and no other.
const UNIFIED: &str = "cgroup.controllers";
/// Control groups that a message lists before it only counts them.
const SHOWN: usize = 5;

/// One or more processes, some of them perhaps to be found.
#[derive(Debug, Args)]
#[command(group(
    ArgGroup::new("processes")
        .args(["target", "tree", "cgroup"])
        .required(true)
        .multiple(true)
))]
pub(crate) struct Selection {
    /// Processes or workloads.
    pub(crate) target: Vec<String>,
    /// A process and all that descend from it; may be given several times.
    #[arg(long, value_name = "PID")]
    tree: Vec<u32>,
    /// The processes of a control group and of those below it, as /proc/PID/cgroup or the path
    /// below /sys/fs/cgroup names it; may be given several times.
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<Group>,
    #[command(flatten)]
    pub(crate) output: OutputArguments,
}

impl Selection {
    /// Whether processes that appear later may belong to it.
    pub(crate) fn grows(&self) -> bool {
        !self.tree.is_empty() || !self.cgroup.is_empty()
    }

    /// The processes of each tree and control group that are on a GPU.
    ///
    /// # Errors
    /// [`Failure::Wrong`] when one of them has none.
    pub(crate) fn first(&self, tree: &Tree) -> Result<Vec<u32>, Failure> {
        let mut found = Vec::new();
        for (selector, pids) in self.matches(tree)? {
            if pids.is_empty() {
                return Err(Failure::Wrong(selector.nothing(tree)?));
            }
            found.extend(pids);
        }
        Ok(found)
    }

    /// As [`Selection::first`], but what was there may have ended.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub(crate) fn later(&self, tree: &Tree) -> Result<Vec<u32>, Failure> {
        let matches = self.matches(tree)?.into_iter();
        Ok(matches.flat_map(|(_, pids)| pids).collect())
    }

    fn matches(&self, tree: &Tree) -> Result<Vec<(Selector<'_>, Vec<u32>)>, Failure> {
        let trees = self.tree.iter().map(|pid| Selector::Tree(*pid));
        let groups = self.cgroup.iter().map(Selector::Group);
        // Each listing looks anew, as processes get new parents.
        let mut parents = Parents::default();
        trees
            .chain(groups)
            .map(|selector| {
                let pids = selector.pids(tree, &mut parents)?;
                Ok((selector, pids))
            })
            .collect()
    }
}

/// What finds processes.
#[derive(Clone, Copy, Debug)]
enum Selector<'a> {
    /// A process and its descendants.
    Tree(u32),
    /// The members of a control group and of those below it.
    Group(&'a Group),
}

impl Selector<'_> {
    fn pids(self, tree: &Tree, parents: &mut Parents) -> Result<Vec<u32>, Failure> {
        let mut found = Vec::new();
        for pid in on_gpu(tree)? {
            let belongs = match self {
                Self::Tree(ancestor) => parents.descends(pid, ancestor),
                Self::Group(group) => cgroup(tree, pid)?.is_some_and(|own| group.holds(&own)),
            };
            if belongs {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Why it finds none, and what would.
    fn nothing(self, tree: &Tree) -> Result<String, Failure> {
        let group = match self {
            Self::Tree(pid) => {
                return Ok(match proc::thread_group(pid) {
                    None => format!("there is no process {pid}"),
                    Some(process) if process != pid => {
                        format!("{pid} is a thread of process {process}; name that")
                    }
                    Some(_) => format!(
                        "neither process {pid} nor one that descends from it is on a GPU; \
                         processes whose parent has ended are found with --cgroup"
                    ),
                });
            }
            Self::Group(group) => group,
        };
        let mut known = BTreeSet::new();
        for pid in on_gpu(tree)? {
            known.extend(cgroup(tree, pid)?);
        }
        let listed: Vec<_> = known.iter().take(SHOWN).map(String::as_str).collect();
        let known = match known.len() {
            0 => "no process is".to_owned(),
            all if all > SHOWN => {
                format!(
                    "those of {} and {} more are",
                    listed.join(", "),
                    all - SHOWN
                )
            }
            _ => format!("those of {} are", listed.join(", ")),
        };
        Ok(format!(
            "no process of control group {} or of one below it is on a GPU; {known}",
            group.0
        ))
    }
}

fn on_gpu(tree: &Tree) -> Result<Vec<u32>, Failure> {
    tree.numbers(&below(Place::Process, &[]))
}

/// The control group of a process, `None` when it has ended.
fn cgroup(tree: &Tree, pid: u32) -> Result<Option<String>, Failure> {
    let directory = below(Place::Process, &[&pid.to_string()]);
    tree.read_if_there(&directory, File::Cgroup.row())
}

/// Path of a control group from the root of the hierarchy, without a slash at
/// its end unless it is the root.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group(String);

impl FromStr for Group {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let is_unified = |mount: &str| Path::new(mount).join(UNIFIED).exists();
        // Where it is mounted at the first, a group may be called as the second.
        Ok(if is_unified(MOUNT) || !is_unified(MOUNT_BESIDE) {
            Self::below(&[MOUNT], text)
        } else {
            Self::below(&[MOUNT_BESIDE, MOUNT], text)
        })
    }
}

impl Group {
    /// The group of a path that may begin with one of these mount points.
    fn below(mounts: &[&str], text: &str) -> Self {
        let inside = mounts.iter().find_map(|mount| {
            let rest = text.strip_prefix(mount)?;
            (rest.is_empty() || rest.starts_with('/')).then_some(rest)
        });
        let parts = inside.unwrap_or(text).split('/');
        let parts: Vec<_> = parts.filter(|part| !part.is_empty()).collect();
        Self(format!("/{}", parts.join("/")))
    }

    /// Whether `other` is this group or one below it.
    fn holds(&self, other: &str) -> bool {
        self.0 == "/"
            || other
                .strip_prefix(self.0.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(text: &str) -> Group {
        text.parse().expect("every text is a path")
    }

    #[test]
    fn a_control_group_is_named_with_and_without_its_mount_point() {
        for text in [
            "/a.slice/b",
            "a.slice/b",
            "/a.slice//b/",
            "/sys/fs/cgroup/a.slice/b",
            "/sys/fs/cgroup/a.slice/b/",
        ] {
            assert_eq!(group(text).0, "/a.slice/b", "{text}");
        }
        for text in ["/", "/sys/fs/cgroup", "/sys/fs/cgroup/"] {
            assert_eq!(group(text).0, "/", "{text}");
        }
        assert_eq!(group("/sys/fs/cgroup2/a").0, "/sys/fs/cgroup2/a");
    }

    #[test]
    fn beside_version_1_the_mount_point_is_a_longer_one() {
        let beside = |text: &str| Group::below(&[MOUNT_BESIDE, MOUNT], text).0;
        assert_eq!(beside("/sys/fs/cgroup/unified/a"), "/a");
        assert_eq!(beside("/sys/fs/cgroup/unified"), "/");
        assert_eq!(beside("/sys/fs/cgroup/a"), "/a");
        assert_eq!(beside("/sys/fs/cgroup/unified2"), "/unified2");
        let alone = Group::below(&[MOUNT], "/sys/fs/cgroup/unified/a");
        assert_eq!(alone.0, "/unified/a");
    }

    #[test]
    fn a_control_group_holds_itself_and_those_below_it() {
        let a = group("/a");
        for (other, held) in [
            ("/a", true),
            ("/a/b", true),
            ("/a/b/c", true),
            ("/ab", false),
            ("/", false),
            ("", false),
            ("/b/a", false),
        ] {
            assert_eq!(a.holds(other), held, "{other}");
            assert!(group("/").holds(other), "{other}");
        }
    }
}
