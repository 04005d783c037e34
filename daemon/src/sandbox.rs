//! What a worker gives up before it touches the GPU.
//!
//! It runs as an unprivileged user already. The driver's library needs many
//! system calls that differ between versions, so the filter names what no
//! worker has any business with, instead of what the driver may need.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// System calls that start programs, look into other processes, change
/// identity, mounts, namespaces or the kernel. Numbers by architecture from the
/// kernel's own tables, through the libc crate's names in seccompiler's form.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const FORBIDDEN: &[(i64, &str)] = &[
    (59, "execve"), (322, "execveat"), (101, "ptrace"), (310, "process_vm_readv"),
    (311, "process_vm_writev"), (438, "pidfd_getfd"), (424, "pidfd_send_signal"), (312, "kcmp"),
    (105, "setuid"), (106, "setgid"), (113, "setreuid"), (114, "setregid"), (117, "setresuid"),
    (119, "setresgid"), (116, "setgroups"), (126, "capset"), (161, "chroot"), (155, "pivot_root"),
    (165, "mount"), (166, "umount2"), (428, "open_tree"), (429, "move_mount"), (430, "fsopen"),
    (431, "fsconfig"), (432, "fsmount"), (442, "mount_setattr"), (272, "unshare"), (308, "setns"),
    (304, "open_by_handle_at"), (175, "init_module"), (313, "finit_module"), (176, "delete_module"),
    (246, "kexec_load"), (320, "kexec_file_load"), (169, "reboot"), (167, "swapon"), (168, "swapoff"),
    (170, "sethostname"), (171, "setdomainname"), (164, "settimeofday"), (227, "clock_settime"),
    (321, "bpf"), (298, "perf_event_open"), (323, "userfaultfd"), (425, "io_uring_setup"),
    (426, "io_uring_enter"), (427, "io_uring_register"), (248, "add_key"), (249, "request_key"),
    (250, "keyctl"), (103, "syslog"), (163, "acct"), (173, "ioperm"), (172, "iopl"), (135, "personality"),
];

/// The same for aarch64 and other architectures of the generic table.
#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
const FORBIDDEN: &[(i64, &str)] = &[
    (221, "execve"), (281, "execveat"), (117, "ptrace"), (270, "process_vm_readv"),
    (271, "process_vm_writev"), (438, "pidfd_getfd"), (424, "pidfd_send_signal"), (272, "kcmp"),
    (146, "setuid"), (144, "setgid"), (145, "setreuid"), (143, "setregid"), (147, "setresuid"),
    (149, "setresgid"), (159, "setgroups"), (91, "capset"), (51, "chroot"), (41, "pivot_root"),
    (40, "mount"), (39, "umount2"), (428, "open_tree"), (429, "move_mount"), (430, "fsopen"),
    (431, "fsconfig"), (432, "fsmount"), (442, "mount_setattr"), (97, "unshare"), (268, "setns"),
    (265, "open_by_handle_at"), (105, "init_module"), (273, "finit_module"), (106, "delete_module"),
    (104, "kexec_load"), (294, "kexec_file_load"), (142, "reboot"), (224, "swapon"), (225, "swapoff"),
    (161, "sethostname"), (162, "setdomainname"), (170, "settimeofday"), (112, "clock_settime"),
    (280, "bpf"), (241, "perf_event_open"), (282, "userfaultfd"), (425, "io_uring_setup"),
    (426, "io_uring_enter"), (427, "io_uring_register"), (217, "add_key"), (218, "request_key"),
    (219, "keyctl"), (116, "syslog"), (89, "acct"), (92, "personality"),
];

#[cfg(target_arch = "x86_64")]
const SOCKET: i64 = 41;
#[cfg(target_arch = "aarch64")]
const SOCKET: i64 = 198;
/// AF_UNIX, the only family that a worker speaks: the MPS server's pipe and the
/// simulated host.
const AF_UNIX: u64 = 1;

/// Enters the sandbox: no new privileges, no core dumps (they would hold the
/// driver's state), and the filter on every thread to come.
///
/// # Errors
/// A kernel without seccomp filters.
pub(crate) fn enter() -> Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none).context("cannot forbid core dumps")?;
    // apply_filter sets no_new_privs before it installs the filter.
    seccompiler::apply_filter(&filter()?).context("cannot install the seccomp filter")?;
    Ok(())
}

fn filter() -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = FORBIDDEN
        .iter()
        .map(|&(number, _)| (number, Vec::new()))
        .collect();
    let other_family =
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, AF_UNIX)?;
    rules.insert(SOCKET, vec![SeccompRule::new(vec![other_family])?]);
    let arch = std::env::consts::ARCH
        .try_into()
        .context("no seccomp filter for this architecture")?;
    let eperm = u32::try_from(rustix::io::Errno::PERM.raw_os_error())?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(eperm),
        arch,
    )?;
    filter
        .try_into()
        .context("the seccomp filter does not compile")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_forbids_programs_and_networks_and_lets_the_rest_through() {
        // A thread of its own: the filter stays on the thread that takes it.
        let seen = std::thread::spawn(|| {
            enter().expect("this kernel has seccomp filters");
            let program = std::process::Command::new("/bin/true").status();
            let network = std::net::TcpListener::bind("127.0.0.1:0");
            let local = std::os::unix::net::UnixStream::pair();
            (program.is_err(), network.is_err(), local.is_ok())
        });
        assert_eq!(seen.join().expect("the thread ends"), (true, true, true));
    }
}
