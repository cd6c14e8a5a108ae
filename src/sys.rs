//! Calls of Linux that no crate of ours wraps: events of a whole filesystem with names and opens that wait for an answer
//! (fanotify), directories by their handles, and a timer that kills.
//!
//! The only module with `unsafe` code.
#![allow(unsafe_code, reason = "see above; each block says why it is sound")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Longest handle of a directory, with the eight bytes in front of it (`MAX_HANDLE_SZ`).
const LONGEST_HANDLE: usize = 8 + libc::MAX_HANDLE_SZ as usize;

/// What is reported: names that come and go, and files that were written.
const EVENTS: u64 = libc::FAN_CREATE
    | libc::FAN_DELETE
    | libc::FAN_MOVED_FROM
    | libc::FAN_MOVED_TO
    | libc::FAN_CLOSE_WRITE
    | libc::FAN_ONDIR;

/// Events of the filesystem that `directory` lies on, to be read without waiting. For root only.
///
/// Each tells the directory as a handle, and a name in it.
pub(crate) fn filesystem_events(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fanotify(libc::FAN_CLASS_NOTIF | libc::FAN_REPORT_DFID_NAME, libc::FAN_MARK_FILESYSTEM, EVENTS, directory)
}

/// Files that are opened through the mount which `directory` lies on, to be read without waiting; each open waits until
/// it is answered, or until this descriptor is closed. For root only.
///
/// Each event carries a descriptor of the file ([`opened_file`]).
pub(crate) fn mount_opens(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fanotify(libc::FAN_CLASS_CONTENT, libc::FAN_MARK_MOUNT, libc::FAN_OPEN_PERM, directory)
}

/// Opens of one file, whatever name and mount lead to it, to be read without waiting. For root only: nobody else is told who.
///
/// Each event carries a descriptor of the file ([`opened_file`]).
pub(crate) fn file_opens(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fanotify(libc::FAN_CLASS_NOTIF, 0, libc::FAN_OPEN, file)
}

fn fanotify(class: libc::c_uint, kind: libc::c_uint, mask: u64, what: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = class | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as libc::c_uint) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call gave a new descriptor that nobody else has.
    let events = unsafe { OwnedFd::from_raw_fd(fd) };
    let (to, flags) = (events.as_raw_fd(), libc::FAN_MARK_ADD | kind);
    // SAFETY: both descriptors are open; without a path the second one is meant.
    let marked = unsafe { libc::fanotify_mark(to, flags, mask, what.as_raw_fd(), std::ptr::null()) };
    if marked < 0 { Err(io::Error::last_os_error()) } else { Ok(events) }
}

/// The file of an event of [`mount_opens`], by the number that the event says; to be called once for each.
pub(crate) fn opened_file(number: i32) -> Option<OwnedFd> {
    // SAFETY: the kernel opened it for whoever read the event, which nobody else has; an event without one has -1.
    (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens a directory by its handle (`struct file_handle`: length, type, bytes), as events carry it; `filesystem` is
/// any directory on the same filesystem.
pub(crate) fn open_by_handle(filesystem: BorrowedFd<'_>, handle: &[u8]) -> io::Result<OwnedFd> {
    // The kernel reads two numbers and then as many bytes as the first one says.
    let mut aligned = [0u64; LONGEST_HANDLE.div_ceil(8)];
    let is_whole = handle.len() >= 8
        && handle.len() <= LONGEST_HANDLE
        && usize::try_from(u32::from_ne_bytes([handle[0], handle[1], handle[2], handle[3]]))
            .is_ok_and(|length| length == handle.len() - 8);
    if !is_whole {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in aligned.iter_mut().zip(handle.chunks(8)) {
        let mut bytes = [0; 8];
        bytes[..from.len()].copy_from_slice(from);
        *to = u64::from_ne_bytes(bytes);
    }
    // SAFETY: `aligned` is aligned for the two numbers, as long as they say (checked above), and outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            filesystem.as_raw_fd(),
            aligned.as_mut_ptr(),
            libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    match libc::c_int::try_from(fd) {
        // SAFETY: the call gave a new descriptor that nobody else has.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A timer that kills this process unless it is set again in time (timer_create(2)). The kernel does so by itself, so
/// also a process that is stopped or in a debugger ends.
pub(crate) struct DeathTimer(libc::timer_t);

impl DeathTimer {
    /// One that is not set yet.
    pub(crate) fn new() -> io::Result<DeathTimer> {
        // SAFETY: a structure of numbers and a pointer that nobody reads, for which zero is a valid value.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers lead to values that outlive the call.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
            0 => Ok(DeathTimer(timer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// This process has so long to live, whatever it was before.
    pub(crate) fn set(&self, time: Duration) -> io::Result<()> {
        // SAFETY: a structure of numbers, for which zero is a valid value; 0 as the interval means once.
        let mut setting: libc::itimerspec = unsafe { std::mem::zeroed() };
        setting.it_value.tv_sec = time.as_secs().try_into().unwrap_or(libc::time_t::MAX);
        setting.it_value.tv_nsec = time.subsec_nanos().into();
        // SAFETY: the timer is ours, the new setting outlives the call, and the old one is not asked for.
        match unsafe { libc::timer_settime(self.0, 0, &raw const setting, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for DeathTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and nobody uses it after this.
        unsafe { libc::timer_delete(self.0) };
    }
}
