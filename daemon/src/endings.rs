//! Ends of processes of others: one thread that waits for all of their pidfds.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::epoll::{self, CreateFlags, Event as Ready, EventData, EventFlags};
use tokio::sync::mpsc::UnboundedSender;

use crate::controller::Event;

/// Ends that are taken at a time.
const AT_ONCE: usize = 64;

/// Whose end is waited for. The thread lives as long as this process.
#[derive(Clone, Debug)]
pub(crate) struct Endings {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    /// By the number that the kernel gives back. A descriptor stays open until
    /// its process has ended, so no number means another process.
    watched: Mutex<Watched>,
}

#[derive(Debug, Default)]
struct Watched {
    next: u64,
    processes: HashMap<u64, Process>,
}

#[derive(Debug)]
struct Process {
    pidfd: Arc<OwnedFd>,
    pid: u32,
    start: u64,
}

impl Endings {
    /// Starts the thread; it tells of each end by [`Event::ProcessEnded`].
    ///
    /// # Errors
    /// Those of epoll_create(2) and of starting a thread.
    pub(crate) fn start(events: UnboundedSender<Event>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            watched: Mutex::default(),
        });
        let endings = Self {
            shared: shared.clone(),
        };
        std::thread::Builder::new()
            .name("endings".to_owned())
            .spawn(move || wait(&shared, &events))?;
        Ok(endings)
    }

    /// Waits for the end of a process, which may have come already.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn watch(&self, pidfd: Arc<OwnedFd>, pid: u32, start: u64) -> io::Result<()> {
        let mut watched = self.shared.watched.lock();
        let key = watched.next;
        watched.next += 1;
        let data = EventData::new_u64(key);
        epoll::add(&self.shared.epoll, &pidfd, data, EventFlags::IN)?;
        let process = Process { pidfd, pid, start };
        watched.processes.insert(key, process);
        Ok(())
    }
}

fn wait(shared: &Shared, events: &UnboundedSender<Event>) {
    let mut ready: Vec<Ready> = Vec::with_capacity(AT_ONCE);
    loop {
        ready.clear();
        match epoll::wait(
            &shared.epoll,
            rustix::buffer::spare_capacity(&mut ready),
            None,
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "ends of processes are not seen any more");
                return;
            }
        }
        for event in &ready {
            let key = event.data.u64();
            let Some(process) = shared.watched.lock().processes.remove(&key) else {
                continue;
            };
            // Its entry holds the pidfd too, for as long as it wants.
            if let Err(error) = epoll::delete(&shared.epoll, &process.pidfd) {
                tracing::debug!(pid = process.pid, %error, "a pidfd was not watched");
            }
            let (pid, start) = (process.pid, process.start);
            if events.send(Event::ProcessEnded { pid, start }).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn each_end_is_told_once_also_one_that_was_before() {
        let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
        let endings = Endings::start(sender).expect("a thread starts");
        let mut children: Vec<_> = (0..3)
            .map(|_| {
                let mut command = std::process::Command::new("sleep");
                command.arg("60").spawn().expect("sleep(1) exists")
            })
            .collect();
        let mut expected = Vec::new();
        for (index, child) in children.iter_mut().enumerate() {
            let start = crate::procfs::start_time(child.id()).expect("it runs");
            let pidfd = crate::discover::open(child.id(), start).expect("it runs");
            if index == 0 {
                child.kill().expect("it is our child");
            }
            let watched = endings.watch(Arc::new(pidfd), child.id(), start);
            watched.expect("a pidfd can be watched");
            expected.push((child.id(), start));
        }
        for child in &mut children {
            child.kill().expect("it is our child");
            child.wait().expect("it is our child");
        }
        let give_up = Instant::now() + Duration::from_secs(5);
        let mut ended = Vec::new();
        while ended.len() < expected.len() && Instant::now() < give_up {
            match events.try_recv() {
                Ok(Event::ProcessEnded { pid, start }) => ended.push((pid, start)),
                Ok(_) => panic!("nothing else is told"),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        ended.sort_unstable();
        expected.sort_unstable();
        assert_eq!(ended, expected);
        std::thread::sleep(Duration::from_millis(20));
        assert!(events.try_recv().is_err(), "an end was told twice");
        assert!(endings.shared.watched.lock().processes.is_empty());
    }
}
