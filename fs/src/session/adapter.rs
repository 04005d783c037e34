//! FUSE requests in, replies out.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use gcgroup_model::change::Caller;

use crate::operation::{Access, Attributes, Found, Operations, Ready};
use crate::poll::Wake;
use crate::tree::{Kind, Lasting};

/// How long the kernel may believe what never changes: names of files in their
/// directory, modes and owners.
const LONG: Duration = Duration::from_secs(3600);

/// How long it may believe the name of what comes and goes. A process that ended
/// is gone from its path so much later, of the 200 ms that are allowed.
const SHORT: Duration = Duration::from_millis(100);

/// Largest write that is taken in one request; gcgroup.launch takes 64 KiB.
const MAX_WRITE: u32 = 128 * 1024;

/// Answers FUSE requests from the operations.
pub(super) struct Adapter {
    core: Arc<Operations>,
    look: Look,
}

/// What all files have in common to stat(2).
#[derive(Clone, Copy)]
struct Look {
    gid: u32,
    since: SystemTime,
}

/// Ends the process when the handler that holds it panics. The panic hook has
/// printed the message by then.
struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn caller(request: &Request) -> Caller {
    Caller {
        tid: request.pid(),
        uid: request.uid(),
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

impl Look {
    /// Attributes in FUSE's form. Sizes are 0, as in /proc: what a read shows is
    /// not known before. A link count of 1 says that directories are not counted.
    fn attr(self, attributes: Attributes) -> FileAttr {
        FileAttr {
            ino: INodeNo(attributes.ino),
            size: 0,
            blocks: 0,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind: file_type(attributes.kind),
            perm: attributes.mode,
            nlink: 1,
            uid: 0,
            gid: self.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn send_entry(self, reply: ReplyEntry, found: Result<Found, rustix::io::Errno>) {
        match found {
            Ok(found) => {
                let name = match found.lasting {
                    Lasting::Always => LONG,
                    Lasting::Shortly => SHORT,
                    Lasting::Never => Duration::ZERO,
                };
                reply.entry_with_ttls(&LONG, &name, &self.attr(found.attributes), Generation(0));
            }
            Err(error) => reply.error(errno(error)),
        }
    }
}

fn send_empty(reply: ReplyEmpty, result: Result<(), rustix::io::Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

impl Adapter {
    pub(super) fn new(core: Arc<Operations>, gid: u32) -> Self {
        let since = SystemTime::now();
        Self {
            core,
            look: Look { gid, since },
        }
    }

    fn send_attr(&self, reply: ReplyAttr, ino: INodeNo) {
        match self.core.attributes(ino.0) {
            Ok(attributes) => reply.attr(&LONG, &self.look.attr(attributes)),
            Err(error) => reply.error(errno(error)),
        }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each is a gain where the kernel knows it, and needed nowhere.
        for wanted in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _end = EndOnPanic;
        let found = self.core.lookup(request.pid(), parent.0, name);
        self.look.send_entry(reply, found);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _end = EndOnPanic;
        self.send_attr(reply, ino);
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _end = EndOnPanic;
        // Sizes and times are nobody's: `>` truncates, and touch does no harm.
        if mode.is_some() || uid.is_some() || gid.is_some() {
            reply.error(Errno::EPERM);
        } else {
            self.send_attr(reply, ino);
        }
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let _end = EndOnPanic;
        match self.core.read_link(request.pid(), ino.0) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mknod(
        &self,
        _: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _end = EndOnPanic;
        let look = self.look;
        self.core
            .make_directory(caller(request), parent.0, name, move |made| {
                look.send_entry(reply, made);
            });
    }

    fn unlink(&self, _: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _end = EndOnPanic;
        self.core
            .remove_directory(caller(request), parent.0, name, move |removed| {
                send_empty(reply, removed);
            });
    }

    fn symlink(
        &self,
        _: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _: &Request,
        _ino: INodeNo,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _end = EndOnPanic;
        let access = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => Access::Read,
            OpenAccMode::O_WRONLY => Access::Write,
            OpenAccMode::O_RDWR => Access::Both,
        };
        match self.core.open(ino.0, access) {
            Ok((handle, is_stream)) => {
                let mut flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
                if is_stream {
                    flags |= FopenFlags::FOPEN_STREAM | FopenFlags::FOPEN_NONSEEKABLE;
                }
                reply.opened(FileHandle(handle), flags);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _end = EndOnPanic;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.core.read(handle.0, offset, size, |bytes| match bytes {
            Ok(bytes) => reply.data(bytes),
            Err(error) => reply.error(errno(error)),
        });
    }

    fn write(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _end = EndOnPanic;
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.core.write(
            caller(request),
            handle.0,
            data,
            move |result| match result {
                Ok(()) => reply.written(length),
                Err(error) => reply.error(errno(error)),
            },
        );
    }

    fn flush(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _end = EndOnPanic;
        self.core.release(handle.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _end = EndOnPanic;
        match self.core.open_directory(ino.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _end = EndOnPanic;
        let list = match self.core.list(handle.0, offset) {
            Ok(list) => list,
            Err(error) => return reply.error(errno(error)),
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, listed) in (1_u64..).zip(list.iter()).skip(from) {
            if reply.add(
                INodeNo(listed.ino),
                next,
                file_type(listed.kind),
                &listed.name,
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _end = EndOnPanic;
        self.core.release(handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    // ENOSYS tells the kernel never to ask again; callers get EOPNOTSUPP.

    fn setxattr(
        &self,
        _: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _ino_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        notifier: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let _end = EndOnPanic;
        let wake = flags
            .contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY)
            .then(|| -> Wake {
                Box::new(move || {
                    // The file was closed meanwhile, or the mount is gone.
                    let _ = notifier.notify();
                })
            });
        match self.core.poll(handle.0, wake) {
            Ok(Ready::Always) => reply.poll(
                PollEvents::POLLIN
                    | PollEvents::POLLRDNORM
                    | PollEvents::POLLOUT
                    | PollEvents::POLLWRNORM,
            ),
            Ok(Ready::Changed) => reply.poll(
                PollEvents::POLLIN
                    | PollEvents::POLLRDNORM
                    | PollEvents::POLLPRI
                    | PollEvents::POLLERR,
            ),
            Ok(Ready::Unchanged) => reply.poll(PollEvents::empty()),
            Err(error) => reply.error(errno(error)),
        }
    }
}
