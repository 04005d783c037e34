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
    servers: Mutex<BTreeMap<u32, Running>>,
}

struct Running {
    server: Box<dyn MpsServer>,
    directory: PathBuf,
}

impl MpsKeeper {
    /// Keeps servers below the state directory.
    pub(crate) fn new(host: Arc<dyn Host>, journal: Arc<Journal>, state: PathBuf) -> Self {
        Self {
            host,
            journal,
            state,
            servers: Mutex::new(BTreeMap::new()),
        }
    }

    /// Variables that make a worker a client on this GPU; starts the server
    /// where none serves.
    ///
    /// # Errors
    /// Those of starting it.
    pub(crate) fn environment(&self, gpu: &GpuInfo) -> Result<Vec<(String, String)>, DeviceError> {
        // Held while the server starts, so that two launches start one server.
        let mut servers = self.servers.lock();
        if let Some(running) = servers.get_mut(&gpu.index) {
            if running.server.is_alive() {
                return Ok(running.server.environment());
            }
            if let Some(lost) = servers.remove(&gpu.index) {
                self.end(lost);
            }
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
        servers.insert(gpu.index, Running { server, directory });
        tracing::info!(gpu = gpu.index, "private MPS server started");
        Ok(environment)
    }

    /// GPUs whose server has ended by itself since the last look; it is cleaned
    /// up, and the next launch starts a new one.
    pub(crate) fn take_lost(&self) -> Vec<u32> {
        let mut servers = self.servers.lock();
        let lost: Vec<u32> = servers
            .iter_mut()
            .filter_map(|(gpu, running)| (!running.server.is_alive()).then_some(*gpu))
            .collect();
        for gpu in &lost {
            if let Some(running) = servers.remove(gpu) {
                self.end(running);
            }
        }
        lost
    }

    /// Ends every server. Their clients must have ended before.
    pub(crate) fn stop_all(&self) {
        for (_, running) in std::mem::take(&mut *self.servers.lock()) {
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
