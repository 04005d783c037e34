//! Stopping and resuming channels, through clients of the service's own.
//!
//! The driver does not check the lists of channels that it is given against the
//! caller (measured), so a stop needs nothing of the process that is stopped: no
//! descriptor that could pin its memory, and only handles to resume it with. The
//! service keeps one client a GPU for it, with a device and a subdevice, opened
//! when it is first needed.
//!
//! A call takes 64 channels, of several processes. What it does with the others
//! when one of them is gone is the firmware's to decide and was not measured, so
//! a stop that fails is an error as a whole, and a resume tries again without
//! those that are gone, then in halves, until each channel was resumed or gave a
//! reason of its own.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use gcgroup_device::{ChannelSet, DeviceError, GpuInfo, Handle};
use parking_lot::Mutex;

use super::layout::Layout;
use super::rm::{
    Ask, CHANNELS_MAX, CONTROL_PATH, Control, Device, Presence, RmError, SUBDEVICE, Status, Switch,
};
use super::uuid::Uuid;

const STOPPING: &str = "stopping channels";
const RESUMING: &str = "resuming channels";

/// Clients of the service's own, one a GPU.
#[derive(Debug, Default)]
pub(super) struct Stations {
    /// By the GPU's UUID. Locked for a lookup only, never during a call to the
    /// driver.
    open: Mutex<HashMap<String, Arc<Station>>>,
}

/// The minor number of a GPU's device, asked for only when it is needed.
pub(super) type Minor<'a> = &'a dyn Fn() -> Result<u32, DeviceError>;

/// A client with a subdevice of one GPU.
#[derive(Debug)]
struct Station {
    control: Control,
    subdevice: Handle,
    /// Whether the driver tells which objects of others are there, as `census`
    /// has it; it does tell so of our own.
    tells: bool,
    /// Keeps the GPU attached and open to our process.
    _device: Device,
}

impl Stations {
    pub(super) fn stop(
        &self,
        layout: &Layout,
        gpu: &GpuInfo,
        minor: Minor<'_>,
        sets: &[ChannelSet],
    ) -> Result<(), DeviceError> {
        for batch in batches(sets) {
            self.with(layout, gpu, minor, STOPPING, |station| {
                let stopped = station.switch(layout, Switch::Stop, &batch);
                stopped.map_err(|error| match station.first_gone(layout, &batch) {
                    Some(gone) if error.is_gone() => Failure::Told(DeviceError::Failed(format!(
                        "{STOPPING}: channel {:#x} of driver client {:#x} is gone",
                        gone.object, gone.client
                    ))),
                    _ => Failure::Rm(error),
                })
            })?;
        }
        Ok(())
    }

    pub(super) fn resume(
        &self,
        layout: &Layout,
        gpu: &GpuInfo,
        minor: Minor<'_>,
        sets: &[ChannelSet],
    ) -> Result<(), DeviceError> {
        let mut outcome = Ok(());
        for batch in batches(sets) {
            let resumed = self.with(layout, gpu, minor, RESUMING, |station| {
                let mut switch =
                    |handles: &[Handle]| station.switch(layout, Switch::Resume, handles);
                let is_gone = |handle| station.is_gone(layout, handle);
                resume_each(&batch, &mut switch, &is_gone).map_err(Failure::Rm)
            });
            // The others are resumed whatever happened to these.
            outcome = outcome.and(resumed);
        }
        outcome
    }

    /// Does something with the station of a GPU. One that turns out to be stale,
    /// after the GPU was reset, is opened anew, once.
    fn with(
        &self,
        layout: &Layout,
        gpu: &GpuInfo,
        minor: Minor<'_>,
        what: &str,
        mut act: impl FnMut(&Station) -> Result<(), Failure>,
    ) -> Result<(), DeviceError> {
        let station = self.of(layout, gpu, minor)?;
        let outcome = act(&station);
        let outcome = if outcome.is_err() && station.is_stale(layout) {
            tracing::info!(gpu = gpu.index, "the driver is opened anew");
            self.drop_if(&gpu.uuid, &station);
            act(&*self.of(layout, gpu, minor)?)
        } else {
            outcome
        };
        outcome.map_err(|failure| match failure {
            Failure::Rm(error) => error.of_gpu(gpu.index, what),
            Failure::Told(error) => error,
        })
    }

    fn of(
        &self,
        layout: &Layout,
        gpu: &GpuInfo,
        minor: Minor<'_>,
    ) -> Result<Arc<Station>, DeviceError> {
        let present = self.open.lock().get(&gpu.uuid).cloned();
        if let Some(station) = present {
            return Ok(station);
        }
        let station = Arc::new(Station::open(layout, gpu, minor()?)?);
        let mut open = self.open.lock();
        let kept = open.entry(gpu.uuid.clone()).or_insert(station);
        Ok(Arc::clone(kept))
    }

    fn drop_if(&self, uuid: &str, stale: &Arc<Station>) {
        let mut open = self.open.lock();
        if open.get(uuid).is_some_and(|kept| Arc::ptr_eq(kept, stale)) {
            open.remove(uuid);
        }
    }
}

/// Why something with a station failed.
enum Failure {
    Rm(RmError),
    /// What the caller is to be told instead.
    Told(DeviceError),
}

impl Station {
    /// Opens the GPU. The device's number in the driver is not the one in its
    /// path, so the driver is asked for it by UUID, and the subdevice for its
    /// UUID in the end.
    fn open(layout: &Layout, gpu: &GpuInfo, minor: u32) -> Result<Self, DeviceError> {
        let uuid = parse_uuid(gpu)?;
        let control = Control::open().map_err(|error| error.of_open(CONTROL_PATH))?;
        let device = Device::open(minor).map_err(|error| error.of_open(&Device::path(minor)))?;
        let opened = device.register(&control).and_then(|()| {
            let client = control.new_client()?;
            let (instance, below) = control.instances(layout, client, uuid.0)?;
            let device = control.new_device(client, instance)?;
            let object = control.new_subdevice(client, device, below)?;
            let found = control.uuid(layout, client, object)?;
            Ok((Handle { client, object }, Uuid(found)))
        });
        let what = format!("opening GPU {} in the driver", gpu.index);
        let (subdevice, found) = opened.map_err(|error| error.of_gpu(gpu.index, &what))?;
        if found != uuid {
            return Err(DeviceError::Failed(format!("{what}: it is {found}")));
        }
        let presence = control.presence(layout, subdevice.client, subdevice);
        Ok(Self {
            control,
            subdevice,
            tells: presence == Ok(Presence::Object),
            _device: device,
        })
    }

    fn switch(&self, layout: &Layout, switch: Switch, handles: &[Handle]) -> Result<(), RmError> {
        self.control
            .switch_channels(layout, self.subdevice, switch, handles)
    }

    /// Whether the driver no longer knows what this was opened with.
    fn is_stale(&self, layout: &Layout) -> bool {
        let Handle { client, object } = self.subdevice;
        self.control.handle_info(layout, client, object, Ask::Class) != Ok(SUBDEVICE)
    }

    /// Whether a channel is known to be gone, its client with it or not.
    fn is_gone(&self, layout: &Layout, handle: Handle) -> bool {
        if !self.tells {
            return false;
        }
        let own = self.subdevice.client;
        let presence = self.control.presence(layout, own, handle);
        matches!(presence, Ok(Presence::NoClient | Presence::NoObject))
    }

    fn first_gone(&self, layout: &Layout, handles: &[Handle]) -> Option<Handle> {
        let mut handles = handles.iter().copied();
        handles.find(|handle| self.is_gone(layout, *handle))
    }
}

pub(super) fn parse_uuid(gpu: &GpuInfo) -> Result<Uuid, DeviceError> {
    Uuid::parse(&gpu.uuid).ok_or_else(|| {
        DeviceError::Failed(format!(
            "GPU {} has the UUID {:?}, which is not that of a whole GPU",
            gpu.index, gpu.uuid
        ))
    })
}

/// Splits channels into what one call takes. Those of one process stay in one
/// call where they fit, and a call takes several processes where there is room,
/// so that they stop together.
fn batches(sets: &[ChannelSet]) -> Vec<Vec<Handle>> {
    let mut listed = HashSet::new();
    let mut batches: Vec<Vec<Handle>> = Vec::new();
    for set in sets {
        let channels = set.channels.iter().copied();
        let channels: Vec<Handle> = channels.filter(|handle| listed.insert(*handle)).collect();
        for part in channels.chunks(CHANNELS_MAX) {
            let room = |batch: &&mut Vec<Handle>| batch.len() + part.len() <= CHANNELS_MAX;
            match batches.iter_mut().find(room) {
                Some(batch) => batch.extend(part),
                None => batches.push(part.to_vec()),
            }
        }
    }
    batches
}

/// Resumes channels of which some may be gone; those count as resumed.
fn resume_each(
    handles: &[Handle],
    switch: &mut impl FnMut(&[Handle]) -> Result<(), RmError>,
    is_gone: &impl Fn(Handle) -> bool,
) -> Result<(), RmError> {
    let Err(error) = switch(handles) else {
        return Ok(());
    };
    // These are about the GPU and not about a channel.
    if matches!(
        error,
        RmError::Os(_)
            | RmError::Rm(Status::GpuLost | Status::Timeout | Status::Denied | Status::Unsupported)
    ) {
        return Err(error);
    }
    let present: Vec<Handle> = handles
        .iter()
        .copied()
        .filter(|handle| !is_gone(*handle))
        .collect();
    match present.len() {
        0 => Ok(()),
        count if count < handles.len() => resume_each(&present, switch, is_gone),
        1 if error.is_gone() => Ok(()),
        1 => Err(error),
        count => {
            let (left, right) = present.split_at(count / 2);
            let left = resume_each(left, switch, is_gone);
            let right = resume_each(right, switch, is_gone);
            left.and(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(client: u32, object: u32) -> Handle {
        Handle { client, object }
    }

    fn set(pid: u32, count: u32) -> ChannelSet {
        ChannelSet {
            pid,
            groups: Vec::new(),
            channels: (0..count).map(|object| handle(pid, object)).collect(),
        }
    }

    fn shape(sets: &[ChannelSet]) -> Vec<Vec<(u32, usize)>> {
        let split = batches(sets);
        assert!(split.iter().all(|batch| batch.len() <= CHANNELS_MAX));
        let all: HashSet<Handle> = split.iter().flatten().copied().collect();
        let given: HashSet<Handle> = sets.iter().flat_map(|set| set.channels.clone()).collect();
        assert_eq!(all, given);
        let runs = |batch: &Vec<Handle>| {
            let runs = batch.chunk_by(|one, other| one.client == other.client);
            runs.map(|run| (run[0].client, run.len())).collect()
        };
        split.iter().map(runs).collect()
    }

    #[test]
    fn a_call_takes_as_many_whole_processes_as_fit() {
        assert_eq!(shape(&[set(1, 20), set(2, 20)]), [[(1, 20), (2, 20)]]);
        assert_eq!(
            shape(&[set(1, 20), set(2, 50), set(3, 20), set(4, 14)]),
            [vec![(1, 20), (3, 20), (4, 14)], vec![(2, 50)]]
        );
        assert_eq!(shape(&[]), [] as [Vec<(u32, usize)>; 0]);
        assert_eq!(shape(&[set(1, 0)]), [] as [Vec<(u32, usize)>; 0]);
    }

    #[test]
    fn a_process_with_more_than_a_call_takes_is_split() {
        assert_eq!(
            shape(&[set(1, 130), set(2, 62), set(3, 64)]),
            [
                vec![(1, 64)],
                vec![(1, 64)],
                vec![(1, 2), (2, 62)],
                vec![(3, 64)]
            ]
        );
    }

    #[test]
    fn a_channel_that_is_listed_twice_is_switched_once() {
        let split = batches(&[set(1, 5), set(1, 7)]);
        assert_eq!(split.len(), 1);
        assert_eq!(split[0].len(), 7);
    }

    /// A driver that resumes nothing of a call in which one of `bad` is.
    fn resume_beside(
        bad: &[u32],
        answer: Status,
        gone: &[u32],
    ) -> (Result<(), RmError>, Vec<u32>, usize) {
        let mut resumed = Vec::new();
        let mut calls = 0;
        let handles = set(1, 20).channels;
        let mut switch = |handles: &[Handle]| {
            calls += 1;
            if handles.iter().any(|handle| bad.contains(&handle.object)) {
                return Err(RmError::Rm(answer));
            }
            resumed.extend(handles.iter().map(|handle| handle.object));
            Ok(())
        };
        let is_gone = |handle: Handle| gone.contains(&handle.object);
        let outcome = resume_each(&handles, &mut switch, &is_gone);
        resumed.sort_unstable();
        (outcome, resumed, calls)
    }

    #[test]
    fn channels_that_are_gone_do_not_keep_the_others_stopped() {
        let all_but = |bad: &[u32]| (0..20).filter(|o| !bad.contains(o)).collect::<Vec<u32>>();
        let bad = [3, 17];
        // The driver tells which they are.
        let (outcome, resumed, calls) = resume_beside(&bad, Status::InvalidClient, &bad);
        assert_eq!((outcome, resumed, calls), (Ok(()), all_but(&bad), 2));
        // It does not.
        let (outcome, resumed, _) = resume_beside(&bad, Status::NoObject, &[]);
        assert_eq!((outcome, resumed), (Ok(()), all_but(&bad)));
        // All of them are.
        let everything: Vec<u32> = (0..20).collect();
        let (outcome, resumed, calls) =
            resume_beside(&everything, Status::InvalidClient, &everything);
        assert_eq!((outcome, resumed, calls), (Ok(()), Vec::new(), 1));
    }

    #[test]
    fn a_channel_that_does_not_resume_is_an_error_beside_those_that_do() {
        let (outcome, resumed, _) = resume_beside(&[5], Status::Other(0x40), &[]);
        assert_eq!(outcome, Err(RmError::Rm(Status::Other(0x40))));
        assert_eq!(resumed.len(), 19);
    }

    #[test]
    fn a_lost_gpu_is_asked_once() {
        let (outcome, resumed, calls) = resume_beside(&[5], Status::GpuLost, &[]);
        assert_eq!(outcome, Err(RmError::Rm(Status::GpuLost)));
        assert_eq!((resumed.len(), calls), (0, 1));
    }
}
