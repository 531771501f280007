//! Gaps between the regions of the arena that nobody may touch, where an emulated driver watches memory.
//!
//! Owns how such a driver is told of them. In tests alone: a real driver cannot be told, and then no gap is left.

use cudarc::driver::sys;

/// Bytes behind a region.
const GAP: u64 = 256;
/// `void mirai_emu_redzone(unsigned long long address, size_t bytes)`: whoever touches them ends the process. Only a driver
/// that was built with AddressSanitizer has it.
const SYMBOL: &[u8] = b"mirai_emu_redzone";

/// A driver that watches memory, or none.
pub(super) struct Redzones(Option<unsafe extern "C" fn(u64, usize)>);

impl Redzones {
    /// Of the loaded driver.
    pub(super) fn find() -> Self {
        // SAFETY: the library is loaded, since whoever asks has a context; the symbol is looked up, not called.
        let found = unsafe { sys::culib().get::<unsafe extern "C" fn(u64, usize)>(SYMBOL) };
        Self(found.ok().map(|symbol| *symbol))
    }

    /// Bytes that are left behind a region.
    pub(super) const fn gap(&self) -> u64 {
        if self.0.is_some() { GAP } else { 0 }
    }

    /// Has the driver watch what lies behind a region.
    pub(super) fn watch(&self, address: u64, bytes: u64) {
        if let Some(watch) = self.0 {
            // SAFETY: bytes of the arena that are given to nobody.
            unsafe { watch(address, bytes as usize) };
        }
    }
}
