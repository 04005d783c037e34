//! The driver's calls about one process on one GPU, and what is known of it.
//!
//! What a listing found last is kept beside what was done to which part of it.
//! What remains to be done is the difference, so a part that failed is done with
//! the next look.

use std::slice;
use std::sync::Arc;

use gcgroup_device::{ChannelSet, Channels, DeviceError, Handle, Search};
use gcgroup_model::value::Priority;
use gcgroup_policy::lane::Nanos;

use super::{Arm, Fate, Start, Subject};
use crate::clock::now_ns;

/// Times that channels may appear behind a stop before it counts as failed.
const ROUNDS: u32 = 8;

/// Everything is looked up so often where there are settings: after a checkpoint
/// and restore the handles are new, and a listing of what is new may not notice.
/// It takes about 120 ms with 65,536 handles.
const SEARCH_EVERY: Nanos = 60_000_000_000;

/// When a call began and when it had its effect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) begun: Nanos,
    pub(super) ended: Nanos,
}

/// What a process's channels shall be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    /// Whether new channels are to be stopped.
    pub(super) stopped: bool,
    /// Whose timeslice new groups get; `None` leaves them as they are.
    pub(super) priority: Option<Priority>,
    /// Whether anything is set, now or at times.
    pub(super) kept: bool,
}

/// One process on one GPU, as far as the driver is concerned.
pub(super) struct Grip {
    host: Arc<dyn Channels>,
    subject: Subject,
    arm: Arm,
    fate: Arc<Fate>,
    armed: bool,
    /// Whether a listing has succeeded, and what the last one found.
    listed: bool,
    known: ChannelSet,
    /// When everything was looked up last.
    searched: Nanos,
    /// The next look shall look everything up and do everything again.
    stale: bool,
    /// Channels that may be stopped: noted before the call.
    stopped: ChannelSet,
    /// Others may be stopped too, unless everything is.
    unsure: bool,
    /// Groups whose timeslice was set or read.
    timed: Vec<Handle>,
    timeslice_usec: Option<u64>,
}

impl Grip {
    pub(super) fn new(
        subject: Subject,
        host: Arc<dyn Channels>,
        arm: Arm,
        start: Start,
        fate: Arc<Fate>,
    ) -> Self {
        let noted = start == Start::MaybeStopped;
        let nothing = ChannelSet {
            pid: subject.pid,
            ..ChannelSet::default()
        };
        Self {
            host,
            subject,
            arm,
            fate,
            armed: noted,
            listed: false,
            known: nothing.clone(),
            searched: 0,
            stale: false,
            stopped: nothing,
            unsure: noted,
            timed: Vec::new(),
            timeslice_usec: None,
        }
    }

    /// Whether a look is due that does everything again.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Whether something may be stopped that no stop named.
    pub(super) fn is_unsure(&self) -> bool {
        self.unsure
    }

    /// The next look does everything again.
    pub(super) fn distrust(&mut self) {
        self.stale = true;
    }

    pub(super) fn channel_groups(&self) -> Option<u64> {
        let groups = u64::try_from(self.known.groups.len()).ok();
        groups.filter(|_| self.listed)
    }

    pub(super) fn timeslice_usec(&self) -> Option<u64> {
        self.timeslice_usec
    }

    /// Makes sure that the process can be stopped: it is listed, and noted.
    pub(super) fn prepare(&mut self) -> Result<(), DeviceError> {
        if !self.listed {
            self.look(Search::Anew)?;
        }
        if self.armed {
            return Ok(());
        }
        self.may_stop()?;
        (self.arm)(&self.known).map_err(|error| {
            let pid = self.subject.pid;
            DeviceError::Failed(format!(
                "process {pid} could not be noted before its first stop: {error}"
            ))
        })?;
        self.armed = true;
        Ok(())
    }

    /// Stops every channel. After an error some may be stopped.
    pub(super) fn stop(&mut self) -> Result<Call, DeviceError> {
        self.prepare()?;
        let begun = now_ns();
        let ended = self.stop_all().or_else(|error| self.stop_anew(error))?;
        Ok(Call { begun, ended })
    }

    /// Whether there will be somebody to resume what is stopped now.
    fn may_stop(&self) -> Result<(), DeviceError> {
        if self.fate.is_ending() {
            let pid = self.subject.pid;
            return Err(DeviceError::Failed(format!(
                "process {pid} is being let go: it is not stopped any more"
            )));
        }
        Ok(())
    }

    /// Makes sure that nothing runs of a process that was stopped before.
    pub(super) fn confirm(&mut self) -> Result<(), DeviceError> {
        let confirmed = self.stop_new(now_ns());
        let confirmed = confirmed.or_else(|error| self.stop_anew(error));
        self.stale |= confirmed.is_err();
        confirmed.map(drop)
    }

    /// As [`Grip::confirm`], whatever was known.
    pub(super) fn stop_again(&mut self) -> Result<(), DeviceError> {
        let stopped = self.look(Search::Anew).and_then(|()| self.stop_all());
        self.stale |= stopped.is_err();
        self.forget_gone_after(stopped.is_ok());
        stopped.map(drop)
    }

    /// Lets everything run again. Where nothing was stopped there is no call.
    pub(super) fn resume(&mut self) -> Result<Call, DeviceError> {
        let begun = now_ns();
        if self.stopped.channels.is_empty() && !self.unsure {
            return Ok(Call {
                begun,
                ended: begun,
            });
        }
        let stopped = self.stopped.clone();
        if self.unsure || self.resume_these(&stopped).is_err() {
            self.resume_all()?;
            let ended = now_ns();
            return Ok(Call { begun, ended });
        }
        let ended = now_ns();
        self.stopped.channels.clear();
        self.resume_behind(&stopped)?;
        Ok(Call { begun, ended })
    }

    /// A channel made within a stopped group may stand although nobody named it.
    fn resume_behind(&mut self, resumed: &ChannelSet) -> Result<(), DeviceError> {
        match self.look(Search::Next) {
            Ok(()) => {
                let new = self.known.beyond(resumed);
                self.stopped.channels.clone_from(&new.channels);
                self.resume_these(&new)?;
                self.stopped.channels.clear();
            }
            // What was named runs; for the rest everything is resumed with the
            // next look.
            Err(error) if !matches!(error, DeviceError::NoProcess(_)) => self.doubt(),
            Err(_) => {}
        }
        Ok(())
    }

    /// Lets everything run again that there is, whatever was known. What cannot
    /// be listed does not keep what was stopped from running.
    pub(super) fn resume_all(&mut self) -> Result<(), DeviceError> {
        let Err(error) = self.look(Search::Anew) else {
            self.resume_known()?;
            let resumed = self.known.clone();
            return self.resume_behind(&resumed);
        };
        let stopped = self.stopped.clone();
        if matches!(error, DeviceError::NoContext(_)) {
            // For certain: it has nothing that could be stopped.
            let _ = self.resume_these(&stopped);
        } else if self.listed && !matches!(error, DeviceError::NoProcess(_)) {
            self.resume_these(&stopped)?;
            self.doubt();
        } else {
            return Err(error);
        }
        self.stopped.channels.clear();
        Ok(())
    }

    /// Resumes what a search from scratch found.
    fn resume_known(&mut self) -> Result<(), DeviceError> {
        let known = self.known.clone();
        self.resume_these(&known)?;
        let left = self.stopped.beyond(&known);
        // Gone, most likely, and then this may fail; or the search did not see
        // them, and then nothing else would resume them.
        let _ = self.resume_these(&left);
        self.stopped.channels.clear();
        self.unsure = false;
        Ok(())
    }

    /// Something may be stopped that nobody named.
    fn doubt(&mut self) {
        self.unsure = true;
        self.stale = true;
    }

    /// Sets the timeslice of all groups. After an error they are what they were.
    pub(super) fn prioritise(&mut self, priority: Priority) -> Result<(), DeviceError> {
        let set = |grip: &mut Self| {
            let all = grip.known.clone();
            grip.set_timeslices(&all, priority)?;
            grip.timed = all.groups;
            Ok(())
        };
        let done = self.look(Search::Recent).and_then(|()| set(self));
        done.or_else(|error| {
            self.search_after(error)?;
            set(self)
        })
    }

    /// Looks what there is, and gives what is new its settings; what was looked
    /// up from scratch gets all of them again.
    pub(super) fn keep_up(&mut self, wish: Wish) -> Result<(), DeviceError> {
        let due = wish.kept && now_ns().saturating_sub(self.searched) >= SEARCH_EVERY;
        let mut anew = due || self.stale || !self.listed;
        // Until it is known that nothing failed.
        self.stale = true;
        if anew {
            self.look(Search::Anew)?;
        } else if let Err(error) = self.look(Search::Recent) {
            self.search_after(error)?;
            anew = true;
        }
        let known = self.known.clone();
        if anew {
            self.timed.clear();
        }
        let stopped = match (wish.stopped, anew) {
            (true, true) => {
                let stopped = self.stop_these(&known);
                self.forget_gone_after(stopped.is_ok());
                stopped
            }
            (true, false) => self.stop_these(&known.beyond(&self.stopped)),
            (false, true) if self.unsure => self.resume_known(),
            (false, _) => Ok(()),
        };
        let timed = self.time_new(&known, wish.priority);
        let done = stopped.and(timed);
        self.stale = done.is_err();
        done
    }

    /// Sets or reads the timeslices of groups that are new.
    fn time_new(
        &mut self,
        known: &ChannelSet,
        priority: Option<Priority>,
    ) -> Result<(), DeviceError> {
        let new = |group: &Handle| !self.timed.contains(group);
        let groups: Vec<Handle> = known.groups.iter().copied().filter(new).collect();
        if groups.is_empty() {
            return Ok(());
        }
        if let Some(priority) = priority {
            let new = ChannelSet {
                pid: known.pid,
                groups,
                channels: Vec::new(),
            };
            return self.set_timeslices(&new, priority);
        }
        let read = self.host.timeslices(known);
        let read = read.map_err(|error| self.heed(error))?;
        self.timeslice_usec = read.usec.into_iter().max();
        self.timed.clone_from(&known.groups);
        Ok(())
    }

    fn set_timeslices(&mut self, set: &ChannelSet, to: Priority) -> Result<(), DeviceError> {
        if set.groups.is_empty() {
            return Ok(());
        }
        let read = self.host.set_timeslice(set, to.timeslice_usec());
        let read = read.map_err(|error| self.heed(error))?;
        self.timeslice_usec = read.usec.into_iter().max();
        self.timed.extend(&set.groups);
        Ok(())
    }

    /// Stops everything known, then what appeared meanwhile. Returns when the
    /// last call ended that stopped something.
    fn stop_all(&mut self) -> Result<Nanos, DeviceError> {
        let known = self.known.clone();
        self.stop_these(&known)?;
        self.stop_new(now_ns())
    }

    /// Looks everything up after a failed stop, and tries once more.
    fn stop_anew(&mut self, error: DeviceError) -> Result<Nanos, DeviceError> {
        self.may_stop()?;
        self.search_after(error)?;
        let stopped = self.stop_all();
        self.forget_gone_after(stopped.is_ok());
        stopped
    }

    /// Stops what is new until nothing is. Returns when the last call ended, or
    /// what it was given.
    fn stop_new(&mut self, mut ended: Nanos) -> Result<Nanos, DeviceError> {
        for _ in 0..ROUNDS {
            self.look(Search::Next)?;
            let new = self.known.beyond(&self.stopped);
            if new.channels.is_empty() {
                return Ok(ended);
            }
            self.stop_these(&new)?;
            ended = now_ns();
        }
        Err(DeviceError::Failed(format!(
            "process {} makes channels faster than they are stopped",
            self.subject.pid
        )))
    }

    fn stop_these(&mut self, set: &ChannelSet) -> Result<(), DeviceError> {
        if set.channels.is_empty() {
            return Ok(());
        }
        self.may_stop()?;
        let new = set.beyond(&self.stopped).channels;
        self.stopped.channels.extend(new);
        let stopped = self.host.stop(&self.subject.gpu, slice::from_ref(set));
        stopped.map_err(|error| self.heed(error))
    }

    fn resume_these(&mut self, set: &ChannelSet) -> Result<(), DeviceError> {
        if set.channels.is_empty() {
            return Ok(());
        }
        let resumed = self.host.resume(&self.subject.gpu, slice::from_ref(set));
        resumed.map_err(|error| self.heed(error))
    }

    /// Drops channels that a listing from scratch did not find from what is to
    /// be resumed, once everything that it found was stopped.
    fn forget_gone_after(&mut self, all_stopped: bool) {
        if !all_stopped {
            return;
        }
        self.unsure = false;
        let there = &self.known.channels;
        self.stopped
            .channels
            .retain(|handle| there.contains(handle));
    }

    fn look(&mut self, search: Search) -> Result<(), DeviceError> {
        let search = if self.listed { search } else { Search::Anew };
        let begun = now_ns();
        let (pid, gpu) = (self.subject.pid, &self.subject.gpu);
        let listed = self.host.list(pid, gpu, search).map_err(|error| {
            if search == Search::Anew && matches!(error, DeviceError::NoContext(_)) {
                self.forget_all();
            }
            self.heed(error)
        })?;
        if search == Search::Anew {
            self.searched = begun;
        }
        self.known = listed;
        self.listed = true;
        Ok(())
    }

    /// It has no context any more, for certain.
    fn forget_all(&mut self) {
        self.known.groups.clear();
        self.known.channels.clear();
        self.timed.clear();
        self.timeslice_usec = None;
        self.unsure = false;
    }

    /// Looks everything up because a call failed: it may have named what is gone.
    /// Returns that call's error where this does not work either.
    fn search_after(&mut self, error: DeviceError) -> Result<(), DeviceError> {
        if matches!(error, DeviceError::NoProcess(_)) {
            return Err(error);
        }
        self.look(Search::Anew).map_err(|second| match second {
            DeviceError::NoProcess(_) | DeviceError::NoContext(_) => second,
            DeviceError::NoDriver(_)
            | DeviceError::NoGpu(_)
            | DeviceError::Unsupported(_)
            | DeviceError::Denied(_)
            | DeviceError::Failed(_) => error,
        })
    }

    /// Nothing of a process that has ended is stopped.
    fn heed(&mut self, error: DeviceError) -> DeviceError {
        if matches!(error, DeviceError::NoProcess(_)) {
            self.stopped.channels.clear();
            self.unsure = false;
        }
        error
    }
}
