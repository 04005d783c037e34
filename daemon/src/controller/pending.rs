//! Settings that wait: for a first context, for a keeper, for another attempt,
//! and for the next service.

use std::sync::Arc;

use gcgroup_fs::Reply;
use gcgroup_model::change::{Caller, Done, Pending, Refusal, Setting};
use gcgroup_model::row::File;
use gcgroup_model::snapshot::NodeId;
use gcgroup_model::value::{Priority, Quota};

use super::Controller;
use super::change::{Ask, window_allows};
use super::process::Proc;
use super::ticket::Commit;
use crate::clock::now_ns;
use crate::remembered::Kept;
use crate::{discover, procfs};

/// Between two attempts at a setting that nobody waits for, nanoseconds.
const WANT_AGAIN_NS: u64 = 1_000_000_000;
/// Settings that may wait at a time.
const PENDING_MOST: usize = 4096;

impl Controller {
    /// What is to be set for a process that is new on a GPU: what was set before
    /// the service was restarted, else what waits for it or an ancestor.
    pub(super) fn wanted(&self, gpu: u32, lineage: &[(u32, u64)]) -> Vec<Setting> {
        let (Some(gpu), Some((pid, start))) = (self.gpus.get(&gpu), lineage.first()) else {
            return Vec::new();
        };
        let uuid = gpu.info.uuid.as_str();
        let mut wanted = self.remembered.waiting_for(lineage, uuid);
        if let Some(Kept { priority, max }) = self.remembered.settings(*pid, *start, uuid) {
            let both = [
                (priority != Priority::default()).then_some(Setting::Priority(priority)),
                (max != Quota::default()).then_some(Setting::Max(max)),
            ];
            for setting in both.into_iter().flatten() {
                wanted.retain(|other| other.file() != setting.file());
                wanted.push(setting);
            }
        }
        wanted
    }

    /// Sets everything that has waited for the keeper of a process.
    pub(super) fn want_all(&mut self, node: NodeId) {
        let attached = self.procs.get_mut(&node).and_then(Proc::attached_mut);
        let wanted = attached.map(|attached| std::mem::take(&mut attached.wanted));
        for setting in wanted.into_iter().flatten() {
            self.want(node, setting);
        }
    }

    /// Sets something that nobody waits for.
    fn want(&mut self, node: NodeId, setting: Setting) {
        let Some(attached) = self.procs.get_mut(&node).and_then(Proc::attached_mut) else {
            return;
        };
        if attached.keeper.is_none() {
            attached.want(setting);
            return;
        }
        match self.order(node, &setting) {
            Ok(Ask::Job(order)) => {
                self.open_ticket(None, None, Commit::Set(node, setting), vec![order]);
            }
            Ok(Ask::Kill) => {}
            Err(refusal) => self.want_again(node, setting, &refusal),
        }
    }

    /// Something that nobody waits for was refused or failed: it is tried again.
    pub(super) fn want_again(&mut self, node: NodeId, setting: Setting, refusal: &Refusal) {
        let Some(proc) = self.procs.get_mut(&node) else {
            return;
        };
        let pid = proc.pid;
        if let Some(attached) = proc.attached_mut() {
            let why = format!("{}: {refusal}", setting.file().name());
            if attached.told.as_ref() != Some(&why) {
                tracing::warn!(pid, why, "a setting that waited is tried again");
                attached.told = Some(why);
            }
            attached.want(setting);
        }
    }

    /// Somebody sets this: nothing older is tried again over it.
    pub(super) fn forget_wanted(&mut self, node: NodeId, file: File) {
        let attached = self.procs.get_mut(&node).and_then(Proc::attached_mut);
        if let Some(attached) = attached {
            attached.wanted.retain(|setting| setting.file() != file);
        }
    }

    /// Tries again what has failed before: keepers, and settings.
    pub(super) fn retry_wanted(&mut self) {
        let now = now_ns();
        if now.saturating_sub(self.wanted_tried_ns) < WANT_AGAIN_NS {
            return;
        }
        self.wanted_tried_ns = now;
        let mut without = Vec::new();
        let mut with = Vec::new();
        for proc in self.procs.values() {
            match proc.attached() {
                Some(attached) if attached.keeper.is_none() => without.push(proc.entry),
                Some(attached) if !attached.wanted.is_empty() => with.push(proc.entry),
                Some(_) | None => {}
            }
        }
        for node in without {
            self.begin_keeping(node);
        }
        for node in with {
            self.want_all(node);
        }
    }

    /// Watches the processes for which something waited when the last service
    /// ended.
    pub(super) fn adopt_pending(&mut self) {
        let mut waiting: Vec<_> = self
            .remembered
            .pending()
            .map(|(pending, start)| (pending.pid, start))
            .collect();
        waiting.sort_unstable();
        waiting.dedup();
        for (pid, start) in waiting {
            match discover::open(pid, start) {
                Some(pidfd) => self.watch(Arc::new(pidfd), pid, start),
                None => self.remembered.unpend(pid, start),
            }
        }
        self.stale_pending = true;
    }

    /// gcgroup.pending.
    pub(super) fn ask_pending(&mut self, caller: Caller, pending: Pending, reply: Reply) {
        let answer = self.pend(caller, pending);
        self.answer(reply, answer);
    }

    fn pend(&mut self, caller: Caller, pending: Pending) -> Result<Done, Refusal> {
        self.of_others(Ok(())).map_err(Refusal::Unsupported)?;
        if let Setting::Max(quota) = &pending.setting {
            window_allows(*quota)?;
        }
        let pid = pending.pid;
        let missing = || Refusal::NoProcess(pid);
        let start = procfs::process_start(pid).ok_or_else(missing)?;
        let pidfd = discover::open(pid, start).ok_or_else(missing)?;
        let known = self
            .remembered
            .pending()
            .any(|(other, since)| other.pid == pid && since == start);
        if self.remembered.pending().count() >= PENDING_MOST {
            return Err(Refusal::NoSpace(format!(
                "{PENDING_MOST} settings wait already"
            )));
        }
        if !known {
            self.watch(Arc::new(pidfd), pid, start);
        }
        tracing::info!(pid, setting = %pending, uid = caller.uid, "a setting waits");
        self.remembered.pend(pid, start, pending.clone());
        self.stale_pending = true;
        // Whoever is on a GPU already gets it now.
        let entries: Vec<_> = self
            .by_pid(pid)
            .filter(|proc| proc.attached().is_some())
            .map(|proc| proc.entry)
            .collect();
        for entry in entries {
            self.want(entry, pending.setting.clone());
        }
        Ok(Done::Quiet)
    }

    /// Brings gcgroup.pending up to date.
    pub(super) fn render_pending(&mut self) {
        let lines: Vec<_> = self
            .remembered
            .pending()
            .map(|(pending, _)| pending.to_string())
            .collect();
        if self.snapshot.pending != lines {
            self.snapshot.pending = lines;
            self.dirty = true;
        }
    }

    /// Notes what was set for a process of somebody else, for the next service.
    pub(super) fn keep_setting(&mut self, node: NodeId, file: File) {
        self.forget_wanted(node, file);
        let Some(proc) = self.procs.get(&node) else {
            return;
        };
        let (Some(attached), Some(gpu)) = (proc.attached(), self.gpus.get(&proc.gpu)) else {
            return;
        };
        let (pid, start, uuid) = (proc.pid, attached.start, &gpu.info.uuid);
        // What waits for it does not come back over this.
        self.remembered.settle(pid, start, uuid, file);
        // What else was remembered may not be in force again yet.
        let mut kept = self
            .remembered
            .settings(pid, start, uuid)
            .unwrap_or_default();
        match file {
            File::Priority => kept.priority = proc.settings.priority,
            File::Max => kept.max = proc.settings.max,
            _ => return,
        }
        self.remembered.keep(pid, start, uuid, kept);
    }
}
