//! How the device's memory is divided, said before it is taken.
//!
//! Owns the table, its print and the answer to "what would fit". Pure: no device.

use std::fmt;

use crate::driver::{DeviceMemory, Part};

/// The driver's own memory for graphs and for what it makes at run time: a share of all, up to
/// [`MAX_DRIVER_BYTES`].
const DRIVER_SHARE: u64 = 32;
/// Most of it.
const MAX_DRIVER_BYTES: u64 = 512 << 20;

/// How much of the device's memory may be taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryOptions {
    /// Share of all memory that may be in use, from above 0 to 1: this process's, its context and its graphs, and what
    /// others use at start.
    pub utilization: f64,
    /// Bytes for the cache; without it all that is left.
    pub cache: Option<u64>,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { utilization: 0.9, cache: None }
    }
}

/// The division of a device's memory. All in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    options: MemoryOptions,
    device: DeviceMemory,
    /// What the driver may take for graphs.
    driver: u64,
    parts: [u64; Part::ALL.len()],
}

/// What the cache is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheNeed {
    /// Bytes beside the pages: recurrent states and snapshots.
    pub fixed: u64,
    /// Bytes of a page, which holds [`mirai_engine::BLOCK_TOKENS`] tokens of one group of layers.
    pub page: u64,
    /// Groups of layers that take pages. How many a sequence needs of each, which depends on windows, is not known here.
    pub groups: u64,
}

/// What does not fit.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BudgetError {
    /// Something other than the cache.
    #[error(
        "GPU memory: {} for {part}, but {} are left under --gpu-memory-utilization {utilization}{}\n{budget}",
        Bytes(*need), Bytes(*left), enough(*share)
    )]
    Part {
        /// What.
        part: &'static str,
        /// Bytes.
        need: u64,
        /// Bytes.
        left: u64,
        /// As configured.
        utilization: f64,
        /// The share that would be enough, if one is.
        share: Option<f64>,
        /// The table.
        budget: Box<Budget>,
    },
    /// The cache does not hold a page of each group of layers.
    #[error(
        "GPU memory: {} for the KV cache hold {blocks} blocks of {}, one for each of {groups} layer groups is the least\n\
         {budget}",
        Bytes(*bytes), Bytes(*block)
    )]
    Cache {
        /// Bytes for the cache.
        bytes: u64,
        /// Blocks that fit.
        blocks: u64,
        /// Bytes of one.
        block: u64,
        /// Groups that take blocks.
        groups: u64,
        /// The table.
        budget: Box<Budget>,
    },
    /// `--kv-cache-memory` is more than there is.
    #[error("GPU memory: --kv-cache-memory {wanted} is more than the {left} bytes that are left\n{budget}")]
    CacheBytes {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        left: u64,
        /// The table.
        budget: Box<Budget>,
    },
}

fn enough(share: Option<f64>) -> String {
    share.map_or_else(
        || " (the device is too small)".to_owned(),
        |share| format!(" (so far, {share:.2} would be enough)"),
    )
}

impl Budget {
    /// Of a device whose context exists and which has allocated nothing yet.
    pub fn new(device: DeviceMemory, options: MemoryOptions) -> Self {
        let driver = (device.total / DRIVER_SHARE).min(MAX_DRIVER_BYTES);
        Self { options, device, driver, parts: [0; Part::ALL.len()] }
    }

    /// Bytes that the arena may have.
    pub fn arena(&self) -> u64 {
        let allowed = (self.device.total as f64 * self.options.utilization.clamp(0.0, 1.0)) as u64;
        // Floating point must not give more than is free.
        allowed.saturating_sub(self.elsewhere()).saturating_sub(self.driver).min(self.device.free)
    }

    /// In use at start: contexts, and other processes.
    fn elsewhere(&self) -> u64 {
        self.device.total.saturating_sub(self.device.free)
    }

    /// Bytes of the arena that no part has.
    pub fn left(&self) -> u64 {
        self.arena().saturating_sub(self.parts.iter().sum())
    }

    /// Adds to a part.
    ///
    /// # Errors
    /// [`BudgetError::Part`] if it is more than is left.
    pub fn add(&mut self, part: Part, bytes: u64) -> Result<(), BudgetError> {
        let left = self.left();
        if bytes > left {
            return Err(BudgetError::Part {
                part: part.name(),
                need: bytes,
                left,
                utilization: self.options.utilization,
                share: self.share_for(bytes),
                budget: Box::new(self.clone()),
            });
        }
        self.parts[part as usize] += bytes;
        Ok(())
    }

    /// The utilization under which `bytes` more fit, in steps of a hundredth.
    fn share_for(&self, bytes: u64) -> Option<f64> {
        let taken: u64 = self.parts.iter().sum();
        let need = taken.saturating_add(bytes).saturating_add(self.driver).saturating_add(self.elsewhere());
        let share = (need as f64 / self.device.total as f64 * 100.0).ceil() / 100.0;
        (share <= 1.0).then_some(share)
    }

    /// Gives the cache what was configured, or all that is left; says how many bytes.
    ///
    /// # Errors
    /// More configured than left, or less than one page a group.
    pub fn cache(&mut self, need: CacheNeed) -> Result<u64, BudgetError> {
        let left = self.left();
        let bytes = self.options.cache.unwrap_or(left);
        if bytes > left {
            return Err(BudgetError::CacheBytes { wanted: bytes, left, budget: Box::new(self.clone()) });
        }
        // One page is everybody's: padding writes there.
        let blocks = (bytes.saturating_sub(need.fixed) / need.page.max(1)).saturating_sub(1);
        if blocks < need.groups {
            let (block, groups, budget) = (need.page, need.groups, Box::new(self.clone()));
            return Err(BudgetError::Cache { bytes, blocks, block, groups, budget });
        }
        self.parts[Part::Cache as usize] += bytes;
        Ok(bytes)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, bytes: u64| writeln!(f, "  {name:<20}{:>12}", Bytes(bytes).to_string());
        row("device", self.device.total)?;
        row("in use at start", self.elsewhere())?;
        row("driver and graphs", self.driver)?;
        for part in Part::ALL {
            row(part.name(), self.parts[part as usize])?;
        }
        write!(f, "  {:<20}{:>12}", "left", Bytes(self.left()).to_string())
    }
}

/// Bytes, in the unit that leaves a readable number.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..0x10_0000 => write!(f, "{:.1} KiB", self.0 as f64 / 1024.0),
            0x10_0000..0x4000_0000 => write!(f, "{:.1} MiB", self.0 as f64 / f64::from(1 << 20)),
            _ => write!(f, "{:.2} GiB", self.0 as f64 / f64::from(1 << 30)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn device() -> DeviceMemory {
        DeviceMemory { free: 140 * GIB, total: 141 * GIB }
    }

    const NEED: CacheNeed = CacheNeed { fixed: 0, page: 1 << 20, groups: 2 };

    #[test]
    fn the_arena_leaves_room_for_others_and_the_driver() {
        let budget = Budget::new(device(), MemoryOptions { utilization: 0.5, cache: None });
        assert_eq!(budget.arena(), 141 * GIB / 2 - GIB - (512 << 20));
        let all = Budget::new(device(), MemoryOptions { utilization: 1.0, cache: None });
        assert_eq!(all.arena(), 140 * GIB - (512 << 20));
        let none = Budget::new(device(), MemoryOptions { utilization: 0.001, cache: None });
        assert_eq!(none.arena(), 0, "more is in use already");
    }

    #[test]
    fn the_cache_gets_what_is_left_or_what_was_said() {
        let mut budget = Budget::new(device(), MemoryOptions::default());
        budget.add(Part::Weights, 15 * GIB).unwrap();
        budget.add(Part::Activations, GIB).unwrap();
        let left = budget.left();
        assert_eq!(left, budget.arena() - 16 * GIB);
        assert_eq!(budget.clone().cache(NEED).unwrap(), left);
        budget.options.cache = Some(4 * GIB);
        assert_eq!(budget.cache(NEED).unwrap(), 4 * GIB);
        assert_eq!(budget.left(), left - 4 * GIB);
    }

    #[test]
    fn weights_that_do_not_fit_show_the_table_and_the_share_that_would_do() {
        let mut budget = Budget::new(device(), MemoryOptions { utilization: 0.5, cache: None });
        let error = budget.add(Part::Weights, 80 * GIB).unwrap_err().to_string();
        assert!(error.contains("80.00 GiB for weights, but 69.00 GiB are left"), "{error}");
        // 80 and 1.5 of 141 are 57.8 of 100.
        assert!(error.contains("utilization 0.5 (so far, 0.58 would be enough)"), "{error}");
        assert!(error.contains("\n  device                141.00 GiB\n"), "{error}");
        assert!(error.contains("\n  left                   69.00 GiB"), "{error}");
        let mut enough = Budget::new(device(), MemoryOptions { utilization: 0.58, cache: None });
        enough.add(Part::Weights, 80 * GIB).unwrap();
        let error = budget.add(Part::Weights, 150 * GIB).unwrap_err().to_string();
        assert!(error.contains("the device is too small"), "{error}");
    }

    #[test]
    fn a_cache_has_a_page_of_each_group_beside_the_reserved_one() {
        let of = |bytes| Budget::new(device(), MemoryOptions { utilization: 0.9, cache: Some(bytes) });
        let error = of((3 << 20) - 1).cache(NEED).unwrap_err();
        let BudgetError::Cache { blocks, groups, .. } = &error else { panic!("{error}") };
        assert_eq!((*blocks, *groups), (1, 2));
        assert!(error.to_string().contains("hold 1 blocks of 1.0 MiB, one for each of 2 layer"), "{error}");
        assert_eq!(of(3 << 20).cache(NEED).unwrap(), 3 << 20);
        let options = MemoryOptions { utilization: 0.9, cache: Some(200 * GIB) };
        let error = Budget::new(device(), options).cache(NEED).unwrap_err();
        assert!(matches!(error, BudgetError::CacheBytes { .. }), "{error}");
        assert!(error.to_string().contains("--kv-cache-memory"), "{error}");
    }

    #[test]
    fn a_model_without_pages_needs_none() {
        let mut budget = Budget::new(device(), MemoryOptions { utilization: 0.9, cache: Some(0) });
        let none = CacheNeed { fixed: 0, page: 0, groups: 0 };
        assert_eq!(budget.cache(none).unwrap(), 0);
    }

    #[test]
    fn bytes_read_well() {
        let texts = [5, 2048, 3 << 20, 5 * GIB / 2].map(|b| Bytes(b).to_string());
        assert_eq!(texts, ["5 B", "2.0 KiB", "3.0 MiB", "2.50 GiB"]);
    }
}
