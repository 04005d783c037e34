//! Which mechanism makes a setting true, decided in one place.

use gcgroup_model::row::{File, Place, rows_of};
use gcgroup_model::snapshot::{Enforcer, Enforcers};

/// How the workers on a GPU share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// As clients of the private MPS server, side by side.
    Spatial,
    /// One after the other, as the driver slices time.
    Temporal,
}

impl std::fmt::Display for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Spatial => "spatial",
            Self::Temporal => "temporal",
        })
    }
}

/// What a GPU allows. Each `Err` carries the reason that users read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// How workers share it.
    pub sharing: Sharing,
    /// Whether a context can be bound to SM groups.
    pub green_contexts: Result<(), String>,
    /// Whether stream priorities order the work of different processes.
    pub stream_priorities: Result<(), String>,
    /// Whether timeslices order the workloads of the service.
    pub channels: Result<(), String>,
    /// Whether channel control has proved itself on processes of our own, so that
    /// those of others may be touched.
    pub attach: Result<(), String>,
}

/// Who started a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The service: a worker of ours runs in it.
    Launched,
    /// Somebody else: a program, or an MPS server that stands for its clients.
    Attached,
    /// Somebody else, as a client of an MPS server that is not the service's.
    MpsClient,
}

/// The mechanism behind one writable file of a process.
#[must_use]
pub fn enforcer(origin: Origin, file: File, can: &Capabilities) -> Enforcer {
    match (origin, file) {
        (Origin::Launched, File::Freeze | File::Max | File::Kill) => Enforcer::Worker,
        (Origin::Launched, File::Partition) => match (&can.green_contexts, can.sharing) {
            (Err(reason), _) => Enforcer::None(reason.clone()),
            (Ok(()), Sharing::Spatial) => Enforcer::Worker,
            (Ok(()), Sharing::Temporal) => Enforcer::Cap,
        },
        (Origin::Launched, File::Priority) => match can.sharing {
            Sharing::Spatial => chosen(&can.stream_priorities, Enforcer::Worker),
            Sharing::Temporal => chosen(&can.channels, Enforcer::Channel),
        },
        (Origin::Attached | Origin::MpsClient, File::Kill) => Enforcer::Signal,
        (Origin::Attached, File::Freeze | File::Priority) => chosen(&can.attach, Enforcer::Channel),
        (Origin::Attached, File::Max) => chosen(&can.attach, Enforcer::ChannelWindow),
        (Origin::MpsClient, File::Freeze | File::Priority | File::Max) => Enforcer::None(
            "its channels are in its MPS server's group: the server's entry acts on all clients"
                .to_owned(),
        ),
        (Origin::Attached | Origin::MpsClient, File::Partition) => Enforcer::None(
            "the SMs of a process that this service did not launch cannot be chosen".to_owned(),
        ),
        (Origin::Launched | Origin::Attached | Origin::MpsClient, _) => {
            Enforcer::None("the file is read-only".to_owned())
        }
    }
}

fn chosen(capability: &Result<(), String>, enforcer: Enforcer) -> Enforcer {
    match capability {
        Ok(()) => enforcer,
        Err(reason) => Enforcer::None(reason.clone()),
    }
}

/// The lines of gcgroup.enforcers: every writable file of a process.
#[must_use]
pub fn enforcers(origin: Origin, can: &Capabilities) -> Enforcers {
    rows_of(Place::ProcessGpu)
        .filter(|row| row.mode.writable())
        .map(|row| (row.file, enforcer(origin, row.file, can)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spatial() -> Capabilities {
        Capabilities {
            sharing: Sharing::Spatial,
            green_contexts: Ok(()),
            stream_priorities: Err("no order across clients".to_owned()),
            channels: Err("not under MPS".to_owned()),
            attach: Ok(()),
        }
    }

    #[test]
    fn every_writable_file_has_a_line_and_none_is_called_read_only() {
        let lines = enforcers(Origin::Launched, &spatial());
        let writable = rows_of(Place::ProcessGpu)
            .filter(|row| row.mode.writable())
            .count();
        assert_eq!(lines.len(), writable);
        for (file, enforcer) in lines {
            assert_ne!(
                enforcer.to_string(),
                "none the file is read-only",
                "{}",
                file.name()
            );
        }
    }

    #[test]
    fn temporal_sharing_caps_partitions_and_sets_timeslices() {
        let temporal = Capabilities {
            sharing: Sharing::Temporal,
            channels: Ok(()),
            ..spatial()
        };
        let of = |file| enforcer(Origin::Launched, file, &temporal);
        assert_eq!(of(File::Partition), Enforcer::Cap);
        assert_eq!(of(File::Priority), Enforcer::Channel);
        assert_eq!(of(File::Freeze), Enforcer::Worker);
    }

    #[test]
    fn processes_of_others_are_controlled_by_their_channels() {
        let of = |origin, file, can: &Capabilities| enforcer(origin, file, can).to_string();
        let can = spatial();
        assert_eq!(of(Origin::Attached, File::Freeze, &can), "channel");
        assert_eq!(of(Origin::Attached, File::Priority, &can), "channel");
        assert_eq!(of(Origin::Attached, File::Max, &can), "channel-window");
        assert_eq!(of(Origin::Attached, File::Kill, &can), "signal");
        assert!(of(Origin::Attached, File::Partition, &can).starts_with("none "));
        assert!(of(Origin::MpsClient, File::Freeze, &can).starts_with("none "));
        assert_eq!(of(Origin::MpsClient, File::Kill, &can), "signal");
        let unproved = Capabilities {
            attach: Err("not tried yet".to_owned()),
            ..spatial()
        };
        assert_eq!(
            of(Origin::Attached, File::Max, &unproved),
            "none not tried yet"
        );
        assert_eq!(of(Origin::Attached, File::Kill, &unproved), "signal");
    }

    #[test]
    fn what_nothing_enforces_says_why() {
        let priority = enforcer(Origin::Launched, File::Priority, &spatial());
        assert_eq!(priority.to_string(), "none no order across clients");
        let blind = Capabilities {
            green_contexts: Err("driver 535".to_owned()),
            ..spatial()
        };
        let partition = enforcer(Origin::Launched, File::Partition, &blind);
        assert_eq!(partition.to_string(), "none driver 535");
    }
}
