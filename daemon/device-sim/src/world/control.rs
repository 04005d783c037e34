//! What the driver does for who controls processes from outside, and what the
//! simulated host tells tests about its contexts.

use std::collections::BTreeMap;

use gcgroup_device::{ChannelSet, Handle};
use gcgroup_kernels::engine::EngineError;

use super::{Context, ContextId, World};
use crate::fault_client::ClientState;
use crate::wire::{Kind, Listed, Onward, ProcessLine, Reached};

/// Why a process has nothing to control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The process has no context on this GPU that is younger than the mark.
    NoContext,
    /// It has, but as a client of an MPS server, whose groups are the server's.
    Mps,
}

/// No client has an object of this handle, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone(pub(crate) Handle);

impl World {
    /// The counter of driver clients. Who opens the GPU later has a handle above.
    pub(crate) fn mark(&self) -> u32 {
        self.next_client
    }

    /// What a process has on a GPU, of all its driver clients above a mark.
    pub(crate) fn list(&self, pid: u32, gpu: u32, above: u32) -> Result<ChannelSet, Missing> {
        let mut set = ChannelSet {
            pid,
            ..ChannelSet::default()
        };
        let mut under_mps = false;
        for context in self.contexts.values() {
            if context.pid != pid || context.gpu != gpu || context.client.handle <= above {
                continue;
            }
            context.client.list(&mut set);
            under_mps |= context.mps.is_some();
        }
        set.groups.sort_unstable();
        set.channels.sort_unstable();
        match (set.is_empty(), under_mps) {
            (false, _) => Ok(set),
            (true, true) => Err(Missing::Mps),
            (true, false) => Err(Missing::NoContext),
        }
    }

    /// What a process has on a GPU behind what was found of it before. Nothing
    /// where that does not stand any more: one of its clients is new, or gone.
    /// Objects that were found and are gone are not looked at.
    pub(crate) fn list_onward(&self, pid: u32, gpu: u32, onward: &Onward) -> Option<Listed> {
        let of_process = |context: &&Context| {
            context.pid == pid && context.gpu == gpu && context.client.count().0 > 0
        };
        let contexts: Vec<_> = self.contexts.values().filter(of_process).collect();
        if contexts.is_empty() || contexts.len() != onward.reached.len() {
            return None;
        }
        let mut found = Listed {
            set: ChannelSet {
                pid,
                ..ChannelSet::default()
            },
            reached: Vec::new(),
            whole: false,
        };
        for context in contexts {
            let client = &context.client;
            let mut before = onward.reached.iter();
            let before = before.find(|reached| reached.client == client.handle)?;
            let reached = client.list_behind(before.next, onward.gap, &mut found.set);
            found.reached.push(reached);
        }
        Some(found)
    }

    /// How far a list of everything on a GPU has looked.
    pub(crate) fn reached(&self, set: &ChannelSet) -> Vec<Reached> {
        let named = |client: u32| set.channels.iter().any(|handle| handle.client == client);
        let clients = self.contexts.values().map(|context| &context.client);
        clients
            .filter(|client| named(client.handle))
            .map(super::channel::Client::reached)
            .collect()
    }

    /// Whether all these channels are there, on this GPU.
    pub(crate) fn has(&self, gpu: u32, channels: &[Handle]) -> bool {
        let is_there = |channel: &Handle| {
            let mut contexts = self.contexts.values();
            contexts.any(|context| {
                let client = &context.client;
                context.gpu == gpu
                    && client.handle == channel.client
                    && client.has_channel(channel.object)
            })
        };
        channels.iter().all(is_there)
    }

    /// The processes with a context on a GPU.
    pub(crate) fn processes(&self, gpu: u32) -> Vec<ProcessLine> {
        let mut lines: BTreeMap<u32, ProcessLine> = BTreeMap::new();
        for context in self.contexts.values() {
            if context.gpu != gpu || context.broken.is_some() {
                continue;
            }
            let kind = match context.mps {
                Some(_) => Kind::MpsClient,
                None if context.is_server => Kind::MpsServer,
                None => Kind::Program,
            };
            let line = lines.entry(context.pid).or_insert(ProcessLine {
                pid: context.pid,
                kind,
                memory_bytes: 0,
            });
            line.kind = line.kind.max(kind);
            line.memory_bytes += context.overhead + context.allocated;
        }
        lines.into_values().collect()
    }

    /// The GPU of a driver client.
    pub(crate) fn gpu_of_client(&self, client: u32) -> Option<u32> {
        let mut contexts = self.contexts.values();
        let context = contexts.find(|context| context.client.handle == client)?;
        Some(context.gpu)
    }

    fn of_client(&mut self, client: u32) -> Option<(ContextId, &mut Context)> {
        self.contexts
            .iter_mut()
            .find(|(_, context)| context.client.handle == client)
            .map(|(&id, context)| (id, context))
    }

    fn timeslice_of(&mut self, group: Handle) -> Result<&mut u64, Gone> {
        let (_, context) = self.of_client(group.client).ok_or(Gone(group))?;
        let usec = context.client.timeslice_of(group.object);
        usec.ok_or(Gone(group))
    }

    /// Timeslices of channel groups, microseconds.
    pub(crate) fn timeslices(&mut self, groups: &[Handle]) -> Result<Vec<u64>, Gone> {
        let groups = groups.iter();
        groups
            .map(|&group| self.timeslice_of(group).map(|usec| *usec))
            .collect()
    }

    /// Sets the timeslices of channel groups one after another, up to the first
    /// that is gone.
    pub(crate) fn set_timeslices(&mut self, groups: &[Handle], usec: u64) -> Result<(), Gone> {
        self.stale = true;
        for &group in groups {
            *self.timeslice_of(group)? = usec;
        }
        Ok(())
    }

    /// Disables channels on a GPU one after another, up to the first that is not
    /// there: those before it stay disabled. Whose they are is not asked.
    pub(crate) fn stop(
        &mut self,
        gpu: u32,
        channels: impl IntoIterator<Item = Handle>,
    ) -> Result<(), Gone> {
        for channel in channels {
            if !self.switch(gpu, channel, false) {
                return Err(Gone(channel));
            }
        }
        Ok(())
    }

    /// Enables channels on a GPU, those of them that are there.
    pub(crate) fn resume(&mut self, gpu: u32, channels: impl IntoIterator<Item = Handle>) {
        for channel in channels {
            self.switch(gpu, channel, true);
        }
    }

    fn switch(&mut self, gpu: u32, channel: Handle, enabled: bool) -> bool {
        let Some((id, context)) = self.of_client(channel.client) else {
            return false;
        };
        let found = context.gpu == gpu && context.client.switch(channel.object, enabled);
        if found {
            self.channels_changed(id);
        }
        found
    }

    /// Its launch may have to stand from now on, or to go on.
    fn channels_changed(&mut self, id: ContextId) {
        self.settle(id);
        self.stale = true;
    }

    /// Adds a channel group to a context, into which it launches from now on.
    pub(crate) fn add_group(&mut self, id: ContextId) -> Result<(), EngineError> {
        let context = self.context(id)?;
        if context.mps.is_some() {
            return Err(EngineError::Unsupported(
                "an MPS client has no channel groups of its own".to_owned(),
            ));
        }
        context.client.add_group();
        self.channels_changed(id);
        Ok(())
    }

    /// Adds a channel to the group that a context launches into.
    pub(crate) fn add_channel(&mut self, id: ContextId) -> Result<(), EngineError> {
        if !self.context(id)?.client.add_channel() {
            return Err(EngineError::Unsupported(
                "an MPS client has no channel groups of its own".to_owned(),
            ));
        }
        self.channels_changed(id);
        Ok(())
    }

    /// Makes the next object of a context one that lies far off.
    pub(crate) fn skip_handles(&mut self, id: ContextId) -> Result<(), EngineError> {
        self.context(id)?.client.skip_handles();
        Ok(())
    }

    /// Removes the channel group that was added last.
    pub(crate) fn remove_group(&mut self, id: ContextId) -> Result<(), EngineError> {
        if !self.context(id)?.client.remove_group() {
            return Err(EngineError::Unsupported(
                "no channel group was added".to_owned(),
            ));
        }
        self.channels_changed(id);
        Ok(())
    }

    /// Makes a context that of an MPS server in the list of processes.
    pub(crate) fn call_server(&mut self, id: ContextId) {
        if let Some(context) = self.contexts.get_mut(&id) {
            context.is_server = true;
        }
    }

    /// All contexts, the oldest first, as tests see them.
    pub(crate) fn clients(&self) -> Vec<ClientState> {
        self.contexts.values().map(state_of).collect()
    }
}

fn state_of(context: &Context) -> ClientState {
    let (groups, channels, disabled_channels) = context.client.count();
    ClientState {
        pid: context.pid,
        gpu: context.gpu,
        mps: context.mps.is_some(),
        memory_bytes: context.overhead + context.allocated,
        launched: context.launched,
        in_flight: context.in_flight() as u64,
        complete: context.complete,
        units: context.cursor,
        stopped: context.is_stopped(),
        timeslice_usec: context.client.timeslice_usec(),
        groups,
        channels,
        disabled_channels,
        channels_stopped: context.client.stands(),
        broken: context.broken.is_some(),
    }
}
