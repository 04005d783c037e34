//! The private MPS servers: one a GPU, started when the first workload needs it
//! and again after it was lost.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use gcgroup_device::{DeviceError, GpuInfo, Host, MpsServer};
use parking_lot::Mutex;

use crate::journal::{Helper, Journal, MpsRecord};

/// Keeps the servers. Calls may block for seconds.
pub(crate) struct MpsKeeper {
    host: Arc<dyn Host>,
    journal: Arc<Journal>,
    state: PathBuf,
    servers: Mutex<Servers>,
}

#[derive(Default)]
struct Servers {
    running: BTreeMap<u32, Running>,
    /// Starts so far, over all GPUs.
    starts: u64,
    /// Losses that nobody has taken notice of yet.
    lost: Vec<Lost>,
}

struct Running {
    server: Box<dyn MpsServer>,
    directory: PathBuf,
    start: u64,
}

/// A server that has ended by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lost {
    /// NVML index of its GPU.
    pub(crate) gpu: u32,
    /// Which start it was; its clients were told the same number.
    pub(crate) start: u64,
}

/// What makes a worker a client.
#[derive(Debug)]
pub(crate) struct Client {
    /// Variables of its environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Which start of the server it is a client of.
    pub(crate) start: u64,
}

impl MpsKeeper {
    /// Keeps servers below the state directory.
    pub(crate) fn new(host: Arc<dyn Host>, journal: Arc<Journal>, state: PathBuf) -> Self {
        Self {
            host,
            journal,
            state,
            servers: Mutex::default(),
        }
    }

    /// What makes a worker a client on this GPU; starts the server where none
    /// serves.
    ///
    /// # Errors
    /// Those of starting it.
    pub(crate) fn client(&self, gpu: &GpuInfo) -> Result<Client, DeviceError> {
        // Held while the server starts, so that two launches start one server.
        let mut servers = self.servers.lock();
        self.end_lost(&mut servers);
        if let Some(running) = servers.running.get(&gpu.index) {
            return Ok(Client {
                environment: running.server.environment(),
                start: running.start,
            });
        }
        let directory = self.state.join(format!("mps-{}", gpu.index));
        fresh_directory(&directory).map_err(|error| {
            DeviceError::Failed(format!("cannot make {}: {error}", directory.display()))
        })?;
        let server = self.host.start(gpu, &directory)?;
        if let Some((pid, start)) = server.process() {
            let record = MpsRecord {
                process: Helper { pid, start },
                directory: directory.clone(),
            };
            if let Err(error) = self.journal.add_mps(record) {
                server.stop();
                return Err(DeviceError::Failed(format!(
                    "cannot note the MPS server in the journal: {error}"
                )));
            }
        }
        let environment = server.environment();
        servers.starts += 1;
        let start = servers.starts;
        let running = Running {
            server,
            directory,
            start,
        };
        servers.running.insert(gpu.index, running);
        tracing::info!(gpu = gpu.index, "private MPS server started");
        Ok(Client { environment, start })
    }

    /// Cleans up after servers that have ended, and remembers them.
    fn end_lost(&self, servers: &mut Servers) {
        let ended: Vec<u32> = servers
            .running
            .iter_mut()
            .filter_map(|(gpu, running)| (!running.server.is_alive()).then_some(*gpu))
            .collect();
        for gpu in ended {
            if let Some(running) = servers.running.remove(&gpu) {
                let start = running.start;
                servers.lost.push(Lost { gpu, start });
                self.end(running);
            }
        }
    }

    /// Looks which servers live. One that never was seen alive cannot be seen to
    /// have ended.
    pub(crate) fn look(&self) {
        self.end_lost(&mut self.servers.lock());
    }

    /// Servers that have ended by themselves since the last look. They are
    /// cleaned up, and the next launch starts a new one.
    pub(crate) fn take_lost(&self) -> Vec<Lost> {
        let mut servers = self.servers.lock();
        self.end_lost(&mut servers);
        std::mem::take(&mut servers.lost)
    }

    /// Ends every server. Their clients must have ended before.
    pub(crate) fn stop_all(&self) {
        for (_, running) in std::mem::take(&mut self.servers.lock().running) {
            self.end(running);
        }
    }

    fn end(&self, running: Running) {
        running.server.stop();
        if let Err(error) = std::fs::remove_dir_all(&running.directory) {
            tracing::warn!(%error, directory = %running.directory.display(), "an MPS directory is left behind");
        }
        if let Err(error) = self.journal.drop_mps(&running.directory) {
            tracing::warn!(%error, "the journal still lists an MPS server that has ended");
        }
    }
}

/// An empty directory that the workers' user can look up sockets in.
fn fresh_directory(directory: &std::path::Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::create_dir(directory)?;
    rustix::fs::chmod(directory, rustix::fs::Mode::from_raw_mode(0o755))?;
    Ok(())
}
