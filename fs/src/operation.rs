//! The operations of the filesystem, without FUSE: numbers, bytes and errnos in,
//! numbers, bytes and errnos out.

use std::ffi::OsStr;
use std::sync::Arc;

use gcgroup_model::change::{Caller, Done};
use gcgroup_model::row::GroupWrites;
use gcgroup_model::spec::WorkloadSpec;
use gcgroup_model::value::{self, PartitionName};
use gcgroup_model::{Change, Refusal, Snapshot, Target};
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::handle::{Handles, Listed, Open, Rendered, Text, part};
use crate::launch::{Step, Stream};
use crate::poll::{Wake, Watchers};
use crate::service::Service;
use crate::table::{self, Source, Store, Whole};
use crate::tree::{self, Directory, Inodes, Kind, Lasting, Object};
use crate::waiting::{Outcome, Waiting};
use crate::{caller, errno};

/// What stat(2) says, as far as it differs between files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Inode number.
    pub(crate) ino: u64,
    /// Directory, file or link.
    pub(crate) kind: Kind,
    /// Permission bits.
    pub(crate) mode: u16,
}

/// A name that was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// What it is.
    pub(crate) attributes: Attributes,
    /// For how long the name holds.
    pub(crate) lasting: Lasting,
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// O_RDONLY.
    Read,
    /// O_WRONLY.
    Write,
    /// O_RDWR.
    Both,
}

/// What poll(2) reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// The file does not report changes, so it is always ready.
    Always,
    /// The text differs from what was last read at offset 0.
    Changed,
    /// It does not.
    Unchanged,
}

/// The filesystem.
pub(crate) struct Operations {
    group_writes: GroupWrites,
    version: String,
    inodes: Inodes,
    handles: Handles,
    watchers: Watchers,
    waiting: Arc<Waiting>,
    service: Arc<dyn Service>,
}

impl Operations {
    /// # Errors
    /// A thread cannot be started.
    pub(crate) fn new(
        service: Arc<dyn Service>,
        group_writes: GroupWrites,
        version: String,
    ) -> std::io::Result<Self> {
        Ok(Self {
            group_writes,
            version,
            inodes: Inodes::new(),
            handles: Handles::default(),
            watchers: Watchers::default(),
            waiting: Waiting::start()?,
            service,
        })
    }

    /// The service behind it.
    pub(crate) fn service(&self) -> &dyn Service {
        &*self.service
    }

    fn found(&self, object: &Object, snapshot: &Snapshot) -> Found {
        let attributes = Attributes {
            ino: self.inodes.found(object, snapshot),
            kind: object.kind(),
            mode: object.mode(self.group_writes),
        };
        Found {
            attributes,
            lasting: object.lasting(),
        }
    }

    fn directory(&self, ino: u64) -> Result<Directory, Errno> {
        match self.inodes.object(ino) {
            Some(Object::Directory(directory)) => Ok(directory),
            Some(_) => Err(Errno::NOTDIR),
            None => Err(Errno::NOENT),
        }
    }

    /// Thread-group id of the caller, where that process has an entry.
    fn own_process(tid: u32, snapshot: &Snapshot) -> Option<u32> {
        caller::thread_group(tid).filter(|pid| snapshot.processes.contains_key(pid))
    }

    /// Looks `name` up for the thread `tid`.
    pub(crate) fn lookup(&self, tid: u32, parent: u64, name: &OsStr) -> Result<Found, Errno> {
        let directory = self.directory(parent)?;
        let name = name.to_str().ok_or(Errno::NOENT)?;
        let snapshot = self.service.snapshot();
        let object = if tree::is_self(&directory, name) {
            Self::own_process(tid, &snapshot).map(|_| Object::SelfLink)
        } else {
            directory.child(&snapshot, name)
        };
        let object = object.ok_or(Errno::NOENT)?;
        Ok(self.found(&object, &snapshot))
    }

    // An inode whose directory is gone is ESTALE below. The kernel then walks the
    // caller's path once more without believing its cache: the caller sees ENOENT,
    // or the process that has got the name since.

    /// What stat(2) says of an inode.
    pub(crate) fn attributes(&self, ino: u64) -> Result<Attributes, Errno> {
        let object = self.inodes.object(ino).ok_or(Errno::STALE)?;
        if !object.exists(&self.service.snapshot()) {
            return Err(Errno::STALE);
        }
        Ok(Attributes {
            ino,
            kind: object.kind(),
            mode: object.mode(self.group_writes),
        })
    }

    /// Text of a symlink, for the thread `tid`.
    pub(crate) fn read_link(&self, tid: u32, ino: u64) -> Result<String, Errno> {
        let object = self.inodes.object(ino).ok_or(Errno::STALE)?;
        let snapshot = self.service.snapshot();
        match object {
            Object::SelfLink => object
                .link(Self::own_process(tid, &snapshot))
                .ok_or(Errno::NOENT),
            Object::WorkloadLink(_, _, _) if !object.exists(&snapshot) => Err(Errno::STALE),
            Object::WorkloadLink(_, _, _) => object.link(None).ok_or(Errno::INVAL),
            Object::Directory(_) | Object::File(_, _) => Err(Errno::INVAL),
        }
    }

    /// Opens a file and says whether it is a stream, without offsets. Root passes
    /// the kernel's check of the mode, so what no row provides is refused here.
    pub(crate) fn open(&self, ino: u64, access: Access) -> Result<(u64, bool), Errno> {
        let (directory, file) = match self.inodes.object(ino) {
            Some(Object::File(directory, file)) => (directory, file),
            Some(Object::Directory(_)) => return Err(Errno::ISDIR),
            Some(Object::SelfLink | Object::WorkloadLink(_, _, _)) => return Err(Errno::LOOP),
            None => return Err(Errno::STALE),
        };
        let mode = file.row().mode;
        let reads = matches!(access, Access::Read | Access::Both);
        let writes = matches!(access, Access::Write | Access::Both);
        if reads && !mode.readable() || writes && !mode.writable() {
            return Err(Errno::ACCESS);
        }
        if directory.subject(&self.service.snapshot()).is_none() {
            return Err(Errno::STALE);
        }
        let is_stream = matches!(table::behaviour(file).store, Store::Gather);
        let open = if is_stream {
            Open::Stream(Arc::new(Stream::default()))
        } else {
            Open::Rendered(Arc::new(Rendered {
                directory,
                file,
                text: Mutex::new(Text::default()),
            }))
        };
        Ok((self.handles.add(open), is_stream))
    }

    /// Renders a file as it is now into `out`, in place of what is there. False,
    /// and nothing done, when its directory is gone.
    fn render(&self, file: &Rendered, snapshot: &Snapshot, out: &mut String) -> bool {
        let Some(subject) = file.directory.subject(snapshot) else {
            return false;
        };
        let behaviour = table::behaviour(file.file);
        if let (Source::Sampled, Some(node)) = (behaviour.source, subject.node()) {
            self.service.touched(node);
        }
        let whole = Whole {
            snapshot,
            version: &self.version,
        };
        out.clear();
        behaviour.show.render(&whole, subject, out);
        true
    }

    /// Hands the bytes of a read to `send`.
    pub(crate) fn read<R>(
        &self,
        handle: u64,
        offset: u64,
        size: usize,
        send: impl FnOnce(Result<&[u8], Errno>) -> R,
    ) -> R {
        let file = match self.handles.get(handle) {
            Some(Open::Rendered(file)) => file,
            Some(Open::Stream(stream)) => return send(Ok(&stream.read(size))),
            Some(Open::Directory(_, _)) => return send(Err(Errno::ISDIR)),
            None => return send(Err(Errno::BADF)),
        };
        let mut text = file.text.lock();
        if offset == 0 || text.read.is_none() {
            let was_read = text.read.is_some();
            let mut out = text.read.take().unwrap_or_default();
            let there = self.render(&file, &self.service.snapshot(), &mut out);
            text.read = (there || was_read).then_some(out);
            if !there {
                return send(Err(Errno::NODEV));
            }
        }
        let kept = text.read.as_deref().unwrap_or_default();
        send(Ok(part(kept.as_bytes(), offset, size)))
    }

    /// Takes the bytes of one write. `send` is called at once or, from another
    /// thread, when the service has answered.
    pub(crate) fn write(
        &self,
        caller: Caller,
        handle: u64,
        bytes: &[u8],
        send: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let change = match self.handles.get(handle) {
            Some(Open::Rendered(file)) => self.change(&file, bytes),
            Some(Open::Stream(stream)) => return self.write_stream(caller, &stream, bytes, send),
            Some(Open::Directory(_, _)) => Err(Errno::ISDIR),
            None => Err(Errno::BADF),
        };
        match change {
            Ok(change) => self.submit(caller, change, move |outcome| send(quietly(&outcome))),
            Err(errno) => send(Err(errno)),
        }
    }

    /// The change that a write to a rendered file asks for.
    fn change(&self, file: &Rendered, bytes: &[u8]) -> Result<Change, Errno> {
        let snapshot = self.service.snapshot();
        let subject = file.directory.subject(&snapshot).ok_or(Errno::NODEV)?;
        let grammar = file.file.row().grammar;
        value::text(bytes, grammar.longest(), grammar.allowed())
            .and_then(|text| match table::behaviour(file.file).store {
                Store::Whole(store) => store(text).map(Some),
                Store::Node(store) => match subject.node() {
                    Some(node) => store(Target(node), text).map(Some),
                    None => Ok(None),
                },
                Store::Never | Store::Gather => Ok(None),
            })
            .map_err(|error| {
                tracing::debug!(file = file.file.name(), %error, "a write was refused");
                errno::of_value(&error)
            })?
            .ok_or(Errno::ACCESS)
    }

    fn write_stream(
        &self,
        caller: Caller,
        stream: &Arc<Stream>,
        bytes: &[u8],
        send: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let text = match stream.write(bytes) {
            Step::Gathered => return send(Ok(())),
            Step::Refused(refusal) => return send(Err(errno::of_refusal(&refusal))),
            Step::Complete(text) => text,
        };
        match WorkloadSpec::parse(&text) {
            Ok(spec) => {
                let stream = Arc::clone(stream);
                let change = Change::Launch(Box::new(spec));
                self.submit(caller, change, move |outcome| {
                    // Before the write returns: its caller reads the answer next.
                    stream.answer(match &outcome {
                        Outcome::Answered(result) => result,
                        Outcome::Killed => &Ok(Done::Quiet),
                    });
                    send(quietly(&outcome));
                });
            }
            Err(error) => {
                let refusal = Refusal::from(error);
                let errno = errno::of_refusal(&refusal);
                stream.answer(&Err(refusal));
                send(Err(errno));
            }
        }
    }

    fn submit(
        &self,
        caller: Caller,
        change: Change,
        finish: impl FnOnce(Outcome) + Send + 'static,
    ) {
        let reply = self.waiting.reply(caller.tid, Box::new(finish));
        self.service.submit(caller, change, reply);
    }

    /// Says whether a file has changed since it was read, and keeps `wake`, where
    /// there is one, for when it does.
    pub(crate) fn poll(&self, handle: u64, wake: Option<Wake>) -> Result<Ready, Errno> {
        let file = match self.handles.get(handle) {
            Some(Open::Rendered(file)) if file.file.row().polls => file,
            Some(_) => return Ok(Ready::Always),
            None => return Err(Errno::BADF),
        };
        if let Some(wake) = wake {
            self.watchers.watch(handle, Arc::clone(&file), wake);
        }
        let mut text = file.text.lock();
        let now = self.text_now(&file, &self.service.snapshot());
        let ready = if now.is_some() && now == text.read {
            Ready::Unchanged
        } else {
            Ready::Changed
        };
        text.polled = Some(now);
        Ok(ready)
    }

    fn text_now(&self, file: &Rendered, snapshot: &Snapshot) -> Option<String> {
        let mut out = String::new();
        self.render(file, snapshot, &mut out).then_some(out)
    }

    /// Wakes the pollers of files that changed. Called after each publication; it
    /// renders one text a polled file and never waits for a caller.
    pub(crate) fn published(&self) {
        let snapshot = self.service.snapshot();
        self.watchers.wake_if(|file| {
            let now = Some(self.text_now(file, &snapshot));
            let mut text = file.text.lock();
            let changed = text.polled != now;
            text.polled = now;
            changed
        });
    }

    /// A file or directory was closed for good.
    pub(crate) fn release(&self, handle: u64) {
        self.watchers.forget(handle);
        self.handles.remove(handle);
    }

    /// Opens a directory for listing.
    pub(crate) fn open_directory(&self, ino: u64) -> Result<u64, Errno> {
        let directory = self.directory(ino)?;
        if directory.subject(&self.service.snapshot()).is_none() {
            return Err(Errno::STALE);
        }
        let listing = Arc::new(Mutex::new(Arc::from([])));
        Ok(self.handles.add(Open::Directory(directory, listing)))
    }

    /// What an open directory holds, `.` and `..` first. It is listed anew for a
    /// read from the beginning; a longer reading goes on in the same list.
    pub(crate) fn list(&self, handle: u64, offset: u64) -> Result<Arc<[Listed]>, Errno> {
        let Some(Open::Directory(directory, listing)) = self.handles.get(handle) else {
            return Err(Errno::BADF);
        };
        let mut listing = listing.lock();
        if offset == 0 {
            let snapshot = self.service.snapshot();
            let children = directory.children(&snapshot).ok_or(Errno::NOENT)?;
            let own = |name: &str| Listed {
                ino: Object::Directory(directory.clone()).ino(),
                kind: Kind::Directory,
                name: name.to_owned(),
            };
            let children = children.into_iter().map(|(name, object)| Listed {
                ino: object.ino(),
                kind: object.kind(),
                name,
            });
            *listing = [own("."), own("..")].into_iter().chain(children).collect();
        }
        Ok(Arc::clone(&listing))
    }

    /// mkdir: makes a partition in `partitions/<gpu>`, EPERM elsewhere.
    pub(crate) fn make_directory(
        self: &Arc<Self>,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        send: impl FnOnce(Result<Found, Errno>) + Send + 'static,
    ) {
        let (directory, gpu, name) = match self.partition(parent, name, Errno::INVAL) {
            Ok(partition) => partition,
            Err(errno) => return send(Err(errno)),
        };
        let change = Change::MakePartition {
            gpu,
            name: name.clone(),
        };
        let this = Arc::clone(self);
        self.submit(caller, change, move |outcome| {
            send(quietly(&outcome).and_then(|()| {
                let snapshot = this.service.snapshot();
                let made = directory.child(&snapshot, name.as_str());
                let made = made.ok_or(Errno::NOENT)?;
                Ok(this.found(&made, &snapshot))
            }));
        });
    }

    /// rmdir: removes a partition from `partitions/<gpu>`, EPERM elsewhere.
    pub(crate) fn remove_directory(
        &self,
        caller: Caller,
        parent: u64,
        name: &OsStr,
        send: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        match self.partition(parent, name, Errno::NOENT) {
            Ok((_, gpu, name)) => {
                let change = Change::RemovePartition { gpu, name };
                self.submit(caller, change, move |outcome| send(quietly(&outcome)));
            }
            Err(errno) => send(Err(errno)),
        }
    }

    /// The directory, GPU and name of a partition to make or remove; `misnamed`
    /// is the errno for what cannot be a partition's name.
    fn partition(
        &self,
        parent: u64,
        name: &OsStr,
        misnamed: Errno,
    ) -> Result<(Directory, u32, PartitionName), Errno> {
        let directory = self.directory(parent)?;
        let Directory::GpuPartitions(_, gpu) = directory else {
            return Err(Errno::PERM);
        };
        if directory.subject(&self.service.snapshot()).is_none() {
            return Err(Errno::NOENT);
        }
        let name = name.to_str().ok_or(misnamed)?;
        let name = name.parse().map_err(|_| misnamed)?;
        Ok((directory, gpu, name))
    }
}

/// The outcome of a change that has nothing to say beyond its success.
fn quietly(outcome: &Outcome) -> Result<(), Errno> {
    match outcome {
        Outcome::Answered(Ok(_)) => Ok(()),
        Outcome::Answered(Err(refusal)) => {
            tracing::debug!(%refusal, "a change was refused");
            Err(errno::of_refusal(refusal))
        }
        Outcome::Killed => Err(Errno::INTR),
    }
}
