//! Memory of the device and the pinned memory of the host that copies go through.
//!
//! Owns the arena, which is the only allocation on the device, and the rings for uploads and read-backs, in which no
//! byte is touched by both sides at once. Never decides what memory is for.

use std::ptr::NonNull;

use cudarc::driver::sys;

use super::error::{CudaError, Result, check};
#[cfg(feature = "test-hooks")]
use super::redzone::Redzones;
use super::stream::{Event, Gpu};

/// Every region of the arena starts on a multiple of this.
pub const ALIGNMENT: u64 = 256;
/// Weights go to the device through this many pieces of pinned memory, one filled while another is copied.
const LOADING_PIECES: usize = 2;
/// Bytes of one.
const LOADING_BYTES: usize = 16 << 20;

/// An address on the device. Comes from the [`Arena`]; whoever adds to it stays inside its region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct DevicePtr(u64);

impl DevicePtr {
    /// What kernels take for "none".
    pub const NULL: Self = Self(0);

    /// The address `bytes` further.
    #[must_use]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    /// Whether it is none.
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }

    /// As a number.
    pub const fn address(self) -> u64 {
        self.0
    }
}

/// What memory is for; the rows of the budget's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Weights and their scales.
    Weights,
    /// Pages of keys and values, recurrent states, snapshots.
    Cache,
    /// What a step computes, and its upload.
    Activations,
    /// Scratch of matmuls and split attention.
    Workspace,
    /// Slots: tables, sampling parameters, counts.
    Slots,
}

impl Part {
    /// All, in the table's order.
    pub const ALL: [Self; 5] = [Self::Weights, Self::Cache, Self::Activations, Self::Workspace, Self::Slots];

    /// As it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Cache => "KV cache",
            Self::Activations => "activations",
            Self::Workspace => "workspace",
            Self::Slots => "slots",
        }
    }
}

/// The one allocation on the device, taken at start and given out piece by piece. Nothing is given back.
pub struct Arena {
    gpu: Gpu,
    base: DevicePtr,
    bytes: u64,
    used: u64,
    parts: [u64; Part::ALL.len()],
    #[cfg(feature = "test-hooks")]
    redzones: Redzones,
}

impl Arena {
    /// Takes `bytes` of the device's memory.
    ///
    /// # Errors
    /// The driver's, for instance that there is not so much.
    pub fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let mut address = 0;
        // SAFETY: a place for one address, in the current context.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes as usize) };
        check(result, std::ptr::null_mut(), || format!("allocate {bytes} bytes of device memory"))?;
        Ok(Self {
            gpu: gpu.clone(),
            base: DevicePtr(address),
            bytes,
            used: 0,
            parts: Default::default(),
            #[cfg(feature = "test-hooks")]
            redzones: Redzones::find(),
        })
    }

    /// Bytes of the arena that a region of `bytes` takes; none if it is no number of bytes.
    pub fn taken(&self, bytes: u64) -> Option<u64> {
        bytes.checked_next_multiple_of(ALIGNMENT)?.checked_add(self.gap())
    }

    /// Most bytes that a region takes beside its own.
    pub fn rounding(&self) -> u64 {
        ALIGNMENT + self.gap()
    }

    #[cfg(feature = "test-hooks")]
    const fn gap(&self) -> u64 {
        self.redzones.gap()
    }

    #[cfg(not(feature = "test-hooks"))]
    #[allow(clippy::unused_self, reason = "there are gaps in tests alone")]
    const fn gap(&self) -> u64 {
        0
    }

    /// A region of at least `bytes`, on a multiple of [`ALIGNMENT`]. Its content is whatever was there.
    ///
    /// # Errors
    /// [`CudaError::Arena`] if it does not fit.
    pub fn take(&mut self, part: Part, bytes: u64) -> Result<DevicePtr> {
        let taken = self.taken(bytes).filter(|&taken| taken <= self.left());
        let Some(taken) = taken else {
            return Err(CudaError::Arena {
                part: part.name(),
                wanted: bytes,
                left: self.left(),
                arena: self.bytes,
            });
        };
        let at = self.base.add(self.used);
        #[cfg(feature = "test-hooks")]
        self.redzones.watch(at.add(bytes).address(), taken - bytes);
        self.used += taken;
        self.parts[part as usize] += taken;
        Ok(at)
    }

    /// Bytes that are not given out.
    pub const fn left(&self) -> u64 {
        self.bytes - self.used
    }

    /// Bytes in all.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes given out for a part.
    pub const fn part(&self, part: Part) -> u64 {
        self.parts[part as usize]
    }

    /// The part that is not given out yet, for scratch during start: whoever uses it is done before the next
    /// [`Self::take`].
    pub const fn rest(&self) -> (DevicePtr, u64) {
        (self.base.add(self.used), self.left())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // What still runs may use it; what fails here fails because the context is lost.
        let _ = self.gpu.synchronize();
        // SAFETY: allocated in `new`, freed once, and nothing runs.
        unsafe { sys::cuMemFree_v2(self.base.0) };
    }
}

/// Host memory that the device can copy from and to by itself. Private to this module, since whoever touches it has to
/// know what the device is doing.
struct Pinned {
    start: NonNull<u8>,
    bytes: usize,
}

impl Pinned {
    /// Zeroed.
    fn new(bytes: usize) -> Result<Self> {
        let mut start = std::ptr::null_mut();
        // SAFETY: a place for one pointer, in the current context.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes.max(1), 0) };
        check(result, std::ptr::null_mut(), || format!("allocate {bytes} bytes of pinned memory"))?;
        let Some(start) = NonNull::new(start.cast::<u8>()) else {
            return Err(CudaError::Room { what: "pinned memory", bytes, room: 0 });
        };
        // SAFETY: as many bytes as were allocated.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { start, bytes })
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: initialised in `new`, and the ring that owns it has waited for the device.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; its owner has waited for the copies from and to it.
        unsafe { sys::cuMemFreeHost(self.start.as_ptr().cast()) };
    }
}

/// A piece of pinned memory, and the event behind the last copy from or to it.
struct Piece {
    pinned: Pinned,
    copied: Event,
}

impl Piece {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Ok(Self { pinned: Pinned::new(bytes)?, copied: Event::new(gpu)? })
    }

    fn send(&self, gpu: &Gpu, to: DevicePtr, bytes: usize) -> Result<()> {
        room("upload", bytes, self.pinned.bytes)?;
        // SAFETY: the host side is as long as checked and is not written before `copied` is done.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, self.pinned.start.as_ptr().cast(), bytes, gpu.stream())
        };
        check(result, gpu.stream(), || format!("upload of {bytes} bytes"))?;
        self.copied.record()
    }
}

fn room(what: &'static str, bytes: usize, room: usize) -> Result<()> {
    if bytes > room { Err(CudaError::Room { what, bytes, room }) } else { Ok(()) }
}

/// Pinned memory for what goes up every step: filled by the host while the device may still copy the previous one.
pub struct UploadRing {
    gpu: Gpu,
    pieces: Vec<Piece>,
    next: usize,
}

impl UploadRing {
    /// `depth` pieces of `bytes`; two are enough for one step of look-ahead.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(gpu: &Gpu, bytes: usize, depth: usize) -> Result<Self> {
        let pieces = (0..depth.max(1)).map(|_| Piece::new(gpu, bytes)).collect::<Result<_>>()?;
        Ok(Self { gpu: gpu.clone(), pieces, next: 0 })
    }

    /// The next piece, for the host to fill. Waits until the device has copied what it last held. It still has the
    /// bytes of that time.
    ///
    /// # Errors
    /// Also those of kernels issued before.
    pub fn fill(&mut self) -> Result<&mut [u8]> {
        let piece = &mut self.pieces[self.next];
        piece.copied.wait()?;
        Ok(piece.pinned.as_mut_slice())
    }

    /// Copies the first `bytes` of what was filled. Returns at once.
    ///
    /// # Errors
    /// More bytes than a piece has; the driver's.
    pub fn send(&mut self, to: DevicePtr, bytes: usize) -> Result<()> {
        self.pieces[self.next].send(&self.gpu, to, bytes)?;
        self.next = (self.next + 1) % self.pieces.len();
        Ok(())
    }
}

impl Drop for UploadRing {
    fn drop(&mut self) {
        // What fails here fails because the context is lost, and then nothing copies.
        let _ = self.gpu.synchronize();
    }
}

/// Which read-back to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// Pinned memory for what comes down every step: the device may write one piece while the host reads another.
pub struct ReadBack {
    gpu: Gpu,
    pieces: Vec<Piece>,
    started: u64,
}

impl ReadBack {
    /// `depth` pieces of `bytes`; two are enough for one step of look-ahead.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(gpu: &Gpu, bytes: usize, depth: usize) -> Result<Self> {
        let pieces = (0..depth.max(1)).map(|_| Piece::new(gpu, bytes)).collect::<Result<_>>()?;
        Ok(Self { gpu: gpu.clone(), pieces, started: 0 })
    }

    /// Starts the copy of `bytes` behind all that was issued. The ticket is good until as many copies were started
    /// behind it as there are pieces.
    ///
    /// # Errors
    /// More bytes than a piece has; the driver's.
    pub fn start(&mut self, from: DevicePtr, bytes: usize) -> Result<Ticket> {
        let count = self.pieces.len() as u64;
        let piece = &self.pieces[(self.started % count) as usize];
        room("read-back", bytes, piece.pinned.bytes)?;
        // SAFETY: the host side is as long as checked, borrowed alone, and not read before `copied` is done.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(piece.pinned.start.as_ptr().cast(), from.0, bytes, self.gpu.stream())
        };
        check(result, self.gpu.stream(), || format!("read-back of {bytes} bytes"))?;
        piece.copied.record()?;
        self.started += 1;
        Ok(Ticket(self.started - 1))
    }

    /// Waits for a copy and shows the whole piece that it went to.
    ///
    /// # Errors
    /// Also those of kernels issued before; [`CudaError::Room`] for a ticket that is too old.
    pub fn wait(&mut self, ticket: Ticket) -> Result<&[u8]> {
        let piece = self.piece(ticket)?;
        piece.copied.wait()?;
        Ok(piece.pinned.as_slice())
    }

    /// Whether a copy is done.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn is_done(&self, ticket: Ticket) -> Result<bool> {
        self.piece(ticket)?.copied.is_done()
    }

    fn piece(&self, ticket: Ticket) -> Result<&Piece> {
        let count = self.pieces.len() as u64;
        if ticket.0 >= self.started || ticket.0 + count < self.started {
            let behind = self.started.saturating_sub(ticket.0) as usize;
            return Err(CudaError::Room { what: "read-backs", bytes: behind, room: count as usize });
        }
        Ok(&self.pieces[(ticket.0 % count) as usize])
    }
}

impl Drop for ReadBack {
    fn drop(&mut self) {
        // As in `UploadRing`.
        let _ = self.gpu.synchronize();
    }
}

/// Takes weights to the device through pinned memory, one piece filled while another is copied.
pub struct Loader {
    ring: UploadRing,
}

impl Loader {
    /// Allocates its pinned memory, which goes with it.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self { ring: UploadRing::new(gpu, LOADING_BYTES, LOADING_PIECES)? })
    }

    /// Copies all of `from`, which may be changed afterwards; the device may still be copying when it returns.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload(&mut self, to: DevicePtr, from: &[u8]) -> Result<()> {
        for (index, chunk) in from.chunks(LOADING_BYTES).enumerate() {
            self.ring.fill()?[..chunk.len()].copy_from_slice(chunk);
            self.ring.send(to.add((index * LOADING_BYTES) as u64), chunk.len())?;
        }
        Ok(())
    }
}

impl Gpu {
    /// Copies host memory and waits for it. For small things at start, and for tests.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload_now(&self, to: DevicePtr, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` is borrowed until the copy is done.
        let result =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), self.stream()) };
        check(result, self.stream(), || format!("upload of {} bytes", from.len()))?;
        self.synchronize()
    }

    /// Copies device memory to `to` and waits for it. For tests and what is rarely asked.
    ///
    /// # Errors
    /// Also those of kernels issued before.
    pub fn download_now(&self, to: &mut [u8], from: DevicePtr) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is borrowed alone until the copy is done.
        let result =
            unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), self.stream()) };
        check(result, self.stream(), || format!("download of {} bytes", to.len()))?;
        self.synchronize()
    }

    /// Copies on the device, behind all that was issued. The regions do not overlap.
    ///
    /// # Errors
    /// The driver's.
    pub fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: addresses of the device; a wrong one fails there.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes as usize, self.stream()) };
        check(result, self.stream(), || format!("copy of {bytes} bytes"))
    }

    /// Sets every byte of a region, behind all that was issued.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, at: DevicePtr, byte: u8, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: an address of the device; a wrong one fails there.
        let result = unsafe { sys::cuMemsetD8Async(at.0, byte, bytes as usize, self.stream()) };
        check(result, self.stream(), || format!("fill of {bytes} bytes"))
    }
}
