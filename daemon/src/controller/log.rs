//! What is told once everybody has an answer.

use gcgroup_model::change::Refusal;
use gcgroup_model::row::File;

use super::Controller;
use super::ticket::{Commit, Ticket};

/// A line for the log.
pub(super) enum LogLine {
    /// A setting came into force.
    Set {
        pid: u32,
        gpu: u32,
        file: File,
        old: String,
        new: String,
        uid: Option<u32>,
    },
    /// A change failed although it was allowed.
    Failed {
        pids: Vec<u32>,
        file: File,
        refusal: Refusal,
        uid: Option<u32>,
    },
}

impl LogLine {
    pub(super) fn write(self) {
        match self {
            Self::Set {
                pid,
                gpu,
                file,
                old,
                new,
                uid,
            } => {
                let setting = file.name();
                tracing::info!(pid, gpu, setting, old, new, uid, "a setting is in force");
            }
            Self::Failed {
                pids,
                file,
                refusal,
                uid,
            } => {
                let setting = file.name();
                tracing::warn!(?pids, setting, %refusal, uid, "a setting did not come into force");
            }
        }
    }
}

impl Controller {
    /// A change failed, or is overdue: the caller gets an errno, the log the
    /// reason. Refusals that the caller could have foreseen are not logged.
    pub(super) fn note_failure(&mut self, ticket: &Ticket, refusal: &Refusal) {
        if !matches!(refusal, Refusal::Failed(_) | Refusal::TimedOut { .. }) {
            return;
        }
        let (nodes, file) = match &ticket.commit {
            Commit::Set(node, setting) => (vec![*node], setting.file()),
            Commit::FreezeMany(nodes, _) => (nodes.clone(), File::FreezeMany),
            Commit::Resize { .. } => (Vec::new(), File::SmCount),
            Commit::Started(_)
            | Commit::Prioritised(..)
            | Commit::RolledBack(..)
            | Commit::Nothing => return,
        };
        let pid = |node| self.procs.get(node).map(|proc| proc.pid);
        self.log.push(LogLine::Failed {
            pids: nodes.iter().filter_map(pid).collect(),
            file,
            refusal: refusal.clone(),
            uid: ticket.caller.map(|caller| caller.uid),
        });
    }
}
