//! The system calls, each with its error number.
//!
//! Owns nothing but the file descriptor. Refuses to decide: which range becomes what is said by the
//! caller.

#![allow(unsafe_code, reason = "the system calls that map memory")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::driver::Access;
use crate::error::{DriverFailure, Error, ErrorKind, Verb};
use crate::units::{Bytes, DeviceAddr};

/// An error number of the system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Errno(i32);

impl Errno {
    #[cfg(test)]
    pub(super) const NO_MEMORY: Self = Self(libc::ENOMEM);

    fn last() -> Self {
        Self(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    fn name(self) -> &'static str {
        match self.0 {
            libc::ENOMEM => "ENOMEM",
            libc::EINVAL => "EINVAL",
            libc::EMFILE => "EMFILE",
            libc::ENFILE => "ENFILE",
            libc::ENOSPC => "ENOSPC",
            libc::EFBIG => "EFBIG",
            libc::EPERM => "EPERM",
            libc::EACCES => "EACCES",
            libc::EAGAIN => "EAGAIN",
            libc::EOVERFLOW => "EOVERFLOW",
            _ => "errno",
        }
    }

    /// The error of a verb that failed with this number; running out of memory is of the kind `scarce`.
    #[cold]
    pub(super) fn error(self, verb: Verb, size: Option<Bytes>, scarce: ErrorKind, cure: &str) -> Error {
        let kind = if self.0 == libc::ENOMEM { scarce } else { ErrorKind::Driver };
        Error::from_driver(
            kind,
            DriverFailure { verb, code: i64::from(self.0), name: self.name(), size },
            cure,
        )
    }
}

fn len(size: Bytes) -> Result<usize, Errno> {
    usize::try_from(size.get()).map_err(|_| Errno(libc::ENOMEM))
}

fn offset(place: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(place).map_err(|_| Errno(libc::EOVERFLOW))
}

fn pointer(addr: DeviceAddr) -> Result<*mut c_void, Errno> {
    let addr = usize::try_from(addr.get()).map_err(|_| Errno(libc::EINVAL))?;
    Ok(ptr::with_exposed_provenance_mut(addr))
}

fn ok(returned: i32) -> Result<(), Errno> {
    if returned == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// The size of a page.
pub(super) fn page_size() -> Bytes {
    // SAFETY: `sysconf` takes a number and returns one.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Bytes::new(u64::try_from(size).unwrap_or(4096))
}

/// How long `ulimit -f` lets a file of this process become.
fn longest_file() -> Result<u64, Errno> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to one `rlimit`, which the call fills.
    ok(unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) })?;
    // No limit is the largest number.
    Ok(limit.rlim_cur)
}

/// The file whose space is the physical memory.
#[derive(Debug)]
pub(super) struct File(OwnedFd);

impl File {
    pub(super) fn new() -> Result<Self, Errno> {
        // SAFETY: the name is a C string that outlives the call.
        let fd = unsafe { libc::memfd_create(c"vattn".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: the descriptor was just made, so it is open and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes the file that long.
    pub(super) fn set_len(&self, len: u64) -> Result<(), Errno> {
        // Past this limit the kernel sends SIGXFSZ, which ends the process before anybody sees EFBIG.
        if len > longest_file()? {
            return Err(Errno(libc::EFBIG));
        }
        // SAFETY: the descriptor is open; a shorter file takes nothing that is mapped, since the caller
        // only grows it.
        ok(unsafe { libc::ftruncate(self.0.as_raw_fd(), offset(len)?) })
    }

    /// Gives the system the memory of a range.
    pub(super) fn punch(&self, place: u64, size: Bytes) -> Result<(), Errno> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (place, size) = (offset(place)?, offset(size.get())?);
        loop {
            // SAFETY: the descriptor is open; that nobody maps the range is what the caller's books say, and
            // if it were mapped its contents would become zero, nothing worse.
            match ok(unsafe { libc::fallocate(self.0.as_raw_fd(), mode, place, size) }) {
                Err(Errno(libc::EINTR)) => {}
                result => return result,
            }
        }
    }

    /// How much memory the system has given to it.
    pub(super) fn resident(&self) -> Result<Bytes, Errno> {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the descriptor is open and the pointer is to room for one `stat`.
        ok(unsafe { libc::fstat(self.0.as_raw_fd(), stat.as_mut_ptr()) })?;
        // SAFETY: `fstat` succeeded, so it has filled it.
        let blocks = unsafe { stat.assume_init() }.st_blocks;
        // `st_blocks` counts 512 bytes, whatever the block size.
        Ok(Bytes::new(u64::try_from(blocks).unwrap_or(0) * 512))
    }

    /// Shows a piece of the file at a range.
    ///
    /// # Safety
    /// - the range lies in a reservation made by [`reserve`], and its owner wants to see the file there;
    /// - the piece lies in the file.
    pub(super) unsafe fn show(
        &self,
        addr: DeviceAddr,
        size: Bytes,
        place: u64,
        access: Access,
    ) -> Result<(), Errno> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: replaces only addresses of the caller's own reservation, as this function's conditions say.
        let at = unsafe {
            libc::mmap(
                pointer(addr)?,
                len(size)?,
                protection,
                libc::MAP_SHARED | libc::MAP_FIXED,
                self.0.as_raw_fd(),
                offset(place)?,
            )
        };
        if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
    }
}

const NOTHING: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Takes addresses that start on a multiple of `align`, a power of two. Touching them faults.
pub(super) fn reserve(size: Bytes, align: Bytes) -> Result<DeviceAddr, Errno> {
    // The kernel aligns to pages, so a multiple of `align` lies within the first `align` bytes of more.
    let slack = align.saturating_sub(page_size());
    let whole = size.checked_add(slack).ok_or(Errno(libc::ENOMEM))?;
    // SAFETY: without MAP_FIXED the kernel picks addresses that nobody uses.
    let at = unsafe { libc::mmap(ptr::null_mut(), len(whole)?, libc::PROT_NONE, NOTHING, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let start = Bytes::new(crate::units::wide(at.expose_provenance()));
    let aligned = start.checked_next_multiple_of(align).ok_or(Errno(libc::ENOMEM))?;
    let (addr, head) = (DeviceAddr::new(aligned.get()), aligned - start);
    let tail = slack - head;
    for (trim, size) in [(DeviceAddr::new(start.get()), head), (addr + size, tail)] {
        if !size.is_zero() {
            // SAFETY: both ends belong to the mapping that was just made, and nobody knows of them yet. A
            // refusal (too many mappings) leaves addresses unused until the process ends, which harms nobody.
            let _ = unsafe { free(trim, size) };
        }
    }
    Ok(addr)
}

/// Gives addresses back.
///
/// # Safety
/// - the range belongs to a mapping made by [`reserve`] and nobody uses it.
pub(super) unsafe fn free(addr: DeviceAddr, size: Bytes) -> Result<(), Errno> {
    // SAFETY: the caller's condition.
    ok(unsafe { libc::munmap(pointer(addr)?, len(size)?) })
}

/// Shows nothing at a range: touching it faults.
///
/// # Safety
/// - the range lies in a reservation made by [`reserve`] and nobody uses what it shows.
pub(super) unsafe fn hide(addr: DeviceAddr, size: Bytes) -> Result<(), Errno> {
    // SAFETY: replaces only addresses of the caller's own reservation, as this function's conditions say.
    let at =
        unsafe { libc::mmap(pointer(addr)?, len(size)?, libc::PROT_NONE, NOTHING | libc::MAP_FIXED, -1, 0) };
    if at == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Whether every address of a range still belongs to some mapping. A failed `mmap` over a range has
/// changed nothing, unless it got as far as taking the old mapping away.
pub(super) fn is_intact(addr: DeviceAddr, size: Bytes) -> bool {
    let (Ok(at), Ok(len)) = (pointer(addr), len(size)) else { return false };
    // SAFETY: MS_ASYNC changes nothing; the kernel answers ENOMEM where an address is not mapped.
    ok(unsafe { libc::msync(at, len, libc::MS_ASYNC) }).is_ok()
}
