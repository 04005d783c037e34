//! What the processes that NVML lists are to the driver.
//!
//! The list is read several times a second, so what a process is gets looked up
//! once and remembered as long as it is on the list.

use std::collections::HashMap;

use gcgroup_device::{GpuProcess, ProcessKind};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use parking_lot::Mutex;

use crate::process;

/// File name of the program that serves MPS clients.
const MPS_SERVER: &str = "nvidia-cuda-mps-server";

/// Its name in `comm`, of which the kernel keeps 15 bytes. The control daemon
/// has the same there, but no context on a GPU.
const MPS_SERVER_COMM: &str = "nvidia-cuda-mps";

/// Whether a process is an MPS server, by pid and start time.
type Servers = HashMap<(u32, u64), bool>;

/// What was found out of the processes on each GPU, by its UUID.
#[derive(Debug, Default)]
pub(super) struct Kinds(Mutex<HashMap<String, Servers>>);

impl Kinds {
    /// The processes of two lists of NVML, each once; those that have ended are
    /// left out. NVML lists an MPS server beside its clients or instead of them,
    /// by version.
    pub(super) fn of(
        &self,
        uuid: &str,
        computing: &[ProcessInfo],
        clients: &[ProcessInfo],
    ) -> Vec<GpuProcess> {
        let mut before = self.0.lock().remove(uuid).unwrap_or_default();
        let mut servers = Servers::new();
        let mut processes: Vec<GpuProcess> = Vec::with_capacity(computing.len() + clients.len());
        for (info, plain) in
            with(clients, ProcessKind::MpsClient).chain(with(computing, ProcessKind::Program))
        {
            if processes.iter().any(|process| process.pid == info.pid) {
                continue;
            }
            let Some(start_time) = process::start_time(info.pid) else {
                continue;
            };
            let key = (info.pid, start_time);
            let is_server = before
                .remove(&key)
                .unwrap_or_else(|| is_mps_server(info.pid));
            servers.insert(key, is_server);
            processes.push(GpuProcess {
                pid: info.pid,
                kind: if is_server {
                    ProcessKind::MpsServer
                } else {
                    plain
                },
                memory_bytes: match info.used_gpu_memory {
                    UsedGpuMemory::Used(bytes) => Some(bytes),
                    UsedGpuMemory::Unavailable => None,
                },
            });
        }
        self.0.lock().insert(uuid.to_owned(), servers);
        processes
    }
}

fn with(
    list: &[ProcessInfo],
    kind: ProcessKind,
) -> impl Iterator<Item = (&ProcessInfo, ProcessKind)> {
    list.iter().map(move |info| (info, kind))
}

fn is_mps_server(pid: u32) -> bool {
    match process::program_name(pid) {
        Some(name) => name == MPS_SERVER,
        // Another user's, for a service that may not look.
        None => process::comm(pid).is_some_and(|comm| comm == MPS_SERVER_COMM),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::process::{Child, Command};

    use super::*;

    fn info(pid: u32, used_gpu_memory: UsedGpuMemory) -> ProcessInfo {
        ProcessInfo {
            pid,
            used_gpu_memory,
            gpu_instance_id: None,
            compute_instance_id: None,
        }
    }

    fn end(mut child: Child) {
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    }

    #[test]
    fn servers_clients_and_programs_are_told_apart() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let server = directory.path().join(MPS_SERVER);
        let sleep = fs::canonicalize("/bin/sleep").expect("sleep is everywhere");
        // A copy, as the name of a link's target would be the program's; some
        // systems have one program for all, which goes by its first argument.
        fs::copy(&sleep, &server).expect("the directory is ours");
        let by_name = directory.path().join("sleep");
        symlink(&server, &by_name).expect("the directory is ours");
        let run = |program: &std::path::Path| {
            let mut command = Command::new(program);
            command.arg("60").spawn().expect("it can be run")
        };
        let (serving, program) = (run(&by_name), run(&sleep));
        let used = |bytes| UsedGpuMemory::Used(bytes);
        let computing = [
            info(serving.id(), used(10)),
            info(program.id(), UsedGpuMemory::Unavailable),
            info(program.id(), used(3)),
            info(std::process::id(), used(20)),
            info(u32::MAX, used(30)),
        ];
        let clients = [
            info(std::process::id(), used(21)),
            info(serving.id(), used(11)),
        ];
        let kinds = Kinds::default();
        // The child has its program only after the exec.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !is_mps_server(serving.id()) && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let first = kinds.of("GPU-0", &computing, &clients);
        let again = kinds.of("GPU-0", &computing, &clients);
        let (server_pid, program_pid) = (serving.id(), program.id());
        end(serving);
        let without = kinds.of("GPU-0", &computing, &clients);
        end(program);
        let process = |pid, kind, memory_bytes| GpuProcess {
            pid,
            kind,
            memory_bytes,
        };
        let rest = [
            process(std::process::id(), ProcessKind::MpsClient, Some(21)),
            process(program_pid, ProcessKind::Program, None),
        ];
        let serves = process(server_pid, ProcessKind::MpsServer, Some(11));
        assert_eq!(first, [rest[0].clone(), serves, rest[1].clone()]);
        assert_eq!(again, first);
        assert_eq!(without, rest);
        let remembered = kinds.0.lock().get("GPU-0").map(HashMap::len);
        assert_eq!(remembered, Some(2));
    }
}
