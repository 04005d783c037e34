//! What the driver's branches have in common and where they differ, as data.
//!
//! The driver's control interface is not a stable one. A branch is listed here
//! after its headers and the code behind the calls were compared, and a branch
//! that is not listed is refused with that reason, unless the configuration
//! takes any newer one for the newest that is listed.

use gcgroup_device::DeviceError;

/// What becomes of a driver branch that is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// It is refused.
    Refuse,
    /// A newer one is taken for the newest that is listed; one between
    /// the listed ones was left out of them, and is refused.
    TakeNewer,
}

/// Numbers of one driver branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// First component of the driver's version.
    pub(super) branch: u32,
    /// RS_CLIENT_HANDLE_BASE (src/nvidia/inc/libraries/resserv/resserv.h).
    pub(super) client_base: u32,
    /// RS_CLIENT_HANDLE_MAX - 1 (same header): client handles wrap there.
    pub(super) client_mask: u32,
    /// First handle that libcuda gives to an object of its client. Measured
    /// with 580.159.04; libcuda is not published.
    pub(super) object_base: u32,
    /// How many handles in a row may be unused before a search ends. 81,000
    /// looks take 150 ms (measured); a context's channels are among the first
    /// hundreds, those of a context made later lie behind what was allocated
    /// before.
    pub(super) object_window: u32,
    /// NV0000_CTRL_CMD_CLIENT_GET_HANDLE_INFO
    /// (src/common/sdk/nvidia/inc/ctrl/ctrl0000/ctrl0000client.h).
    pub(super) get_handle_info: u32,
    /// NV0000_CTRL_CMD_CLIENT_GET_ACCESS_RIGHTS (same header).
    pub(super) get_access_rights: u32,
    /// NV0000_CTRL_CMD_GPU_GET_UUID_INFO
    /// (src/common/sdk/nvidia/inc/ctrl/ctrl0000/ctrl0000gpu.h).
    pub(super) get_uuid_info: u32,
    /// NV2080_CTRL_CMD_GPU_GET_GID_INFO
    /// (src/common/sdk/nvidia/inc/ctrl/ctrl2080/ctrl2080gpu.h).
    pub(super) get_gid_info: u32,
    /// NV2080_CTRL_CMD_FIFO_DISABLE_CHANNELS
    /// (src/common/sdk/nvidia/inc/ctrl/ctrl2080/ctrl2080fifo.h).
    pub(super) disable_channels: u32,
    /// NVA06C_CTRL_CMD_GET_TIMESLICE
    /// (src/common/sdk/nvidia/inc/ctrl/ctrla06c.h).
    pub(super) get_timeslice: u32,
    /// NVA06C_CTRL_CMD_SET_TIMESLICE (same header).
    pub(super) set_timeslice: u32,
}

const R580: Layout = Layout {
    branch: 580,
    client_base: 0xc1d0_0000,
    client_mask: 0x000f_ffff,
    object_base: 0x5c00_0000,
    object_window: 0x1_0000,
    get_handle_info: 0x0d02,
    get_access_rights: 0x0d03,
    get_uuid_info: 0x0274,
    get_gid_info: 0x2080_014a,
    disable_channels: 0x2080_110b,
    get_timeslice: 0xa06c_0104,
    set_timeslice: 0xa06c_0103,
};

/// 580 was measured; of the others the headers were compared with it.
const LAYOUTS: [Layout; 5] = [
    Layout {
        branch: 550,
        ..R580
    },
    Layout {
        branch: 570,
        ..R580
    },
    R580,
    Layout {
        branch: 590,
        ..R580
    },
    Layout {
        branch: 595,
        ..R580
    },
];

impl Layout {
    /// The layout of a driver version such as `580.159.04`.
    pub(super) fn of_driver(version: &str, unknown: Unknown) -> Result<Self, DeviceError> {
        let branch = branch(version).ok_or_else(|| {
            DeviceError::Unsupported(format!("driver version {version:?} has no branch number"))
        })?;
        let newest = LAYOUTS[LAYOUTS.len() - 1];
        match (LAYOUTS.iter().find(|known| known.branch == branch), unknown) {
            (Some(known), _) => Ok(*known),
            (None, Unknown::TakeNewer) if branch > newest.branch => {
                tracing::warn!(
                    branch,
                    known = newest.branch,
                    "channel control takes an unknown driver branch for the newest known one"
                );
                Ok(newest)
            }
            (None, Unknown::TakeNewer | Unknown::Refuse) => {
                let branches = LAYOUTS.map(|layout| layout.branch.to_string()).join(", ");
                Err(DeviceError::Unsupported(format!(
                    "channel control knows the driver branches {branches}, not {branch}"
                )))
            }
        }
    }

    /// How many client handles were given out from one to the other, counted
    /// through the wrap.
    pub(super) fn clients_between(&self, from: u32, to: u32) -> u32 {
        to.wrapping_sub(from) & self.client_mask
    }

    /// The client handle that was given out `steps` after `from`.
    pub(super) fn client_after(&self, from: u32, steps: u32) -> u32 {
        self.client_base | (from.wrapping_add(steps) & self.client_mask)
    }

    /// How many client handles there are.
    pub(super) fn client_count(&self) -> u32 {
        self.client_mask + 1
    }
}

fn branch(version: &str) -> Option<u32> {
    let (branch, _) = version.trim().split_once('.')?;
    branch.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_lead_to_their_branch() {
        for (version, branch) in [
            ("580.159.04", 580),
            ("595.45.04", 595),
            ("550.54.14\n", 550),
        ] {
            let layout = Layout::of_driver(version, Unknown::Refuse).expect("a known branch");
            assert_eq!(layout.branch, branch);
        }
    }

    #[test]
    fn unknown_branches_are_refused_with_the_known_ones() {
        let error = Layout::of_driver("610.43.02", Unknown::Refuse).expect_err("not compared");
        assert_eq!(
            error.to_string(),
            "channel control knows the driver branches 550, 570, 580, 590, 595, not 610"
        );
        for nonsense in ["", "580", "x.1", "-580.1"] {
            let error = Layout::of_driver(nonsense, Unknown::TakeNewer).expect_err("no branch");
            assert!(matches!(error, DeviceError::Unsupported(_)), "{nonsense:?}");
        }
    }

    #[test]
    fn only_newer_branches_are_taken_for_the_newest_known_one() {
        let layout = Layout::of_driver("610.43.02", Unknown::TakeNewer);
        assert_eq!(layout.expect("it is allowed").branch, 595);
        for version in ["535.288.01", "560.35.03"] {
            let error = Layout::of_driver(version, Unknown::TakeNewer).expect_err("too old");
            assert!(matches!(error, DeviceError::Unsupported(_)), "{version}");
        }
    }

    #[test]
    fn client_handles_wrap_within_their_range() {
        assert_eq!(R580.client_after(0xc1d0_0010, 1), 0xc1d0_0011);
        assert_eq!(R580.client_after(0xc1df_ffff, 1), 0xc1d0_0000);
        assert_eq!(R580.clients_between(0xc1d0_0010, 0xc1d0_0013), 3);
        assert_eq!(R580.clients_between(0xc1df_fffe, 0xc1d0_0001), 3);
    }
}
