//! How much memory there is, so that a cache that cannot fit is refused at start instead of killed later.
//!
//! Owns the reading of `/proc/meminfo` and of the control group's limit. It decides nothing about what is
//! allocated.

use std::fs;

use mirai_model::backend::BackendError;

/// Bytes that can still be taken: what the system has, or what the control group allows if that is less. `None`
/// where neither can be told.
pub(crate) fn available() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group = match (read("memory.max"), read("memory.current")) {
        (Some(max), Some(current)) => group_left(&max, &current),
        _ => None,
    };
    match (system, group) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (one, other) => one.or(other),
    }
}

/// The field `MemAvailable`, in bytes.
fn mem_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What a control group (version 2) has left; `None` without a limit.
fn group_left(max: &str, current: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    Some(max.saturating_sub(current))
}

/// Makes room for `len` elements in all.
pub(crate) fn reserve<T>(what: &str, data: &mut Vec<T>, len: usize) -> Result<(), BackendError> {
    data.try_reserve_exact(len.saturating_sub(data.len()))
        .map_err(|_| out_of_memory(what, len, size_of::<T>()))
}

/// The error for `len` elements of `size` bytes that do not fit.
pub(crate) fn out_of_memory(what: &str, len: usize, size: usize) -> BackendError {
    BackendError::OutOfMemory {
        what: what.to_owned(),
        need: (len as u64).saturating_mul(size as u64),
        have: available().unwrap_or(0),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12345678 kB\n";
        assert_eq!(mem_available(text), Some(12_345_678 * 1024));
        assert_eq!(mem_available("MemFree: 1 kB"), None);
        assert_eq!(mem_available("MemAvailable: x kB"), None);
        assert_eq!(group_left("max\n", "5\n"), None);
        assert_eq!(group_left("100\n", "40\n"), Some(60));
        assert_eq!(group_left("100\n", "140\n"), Some(0));
        if cfg!(target_os = "linux") {
            assert!(available().unwrap() > 0);
        }
    }

    #[test]
    fn what_cannot_fit_is_an_error_with_numbers() {
        let error = reserve::<f32>("a test", &mut Vec::new(), usize::MAX / 8).unwrap_err();
        let BackendError::OutOfMemory { what, need, .. } = error else { panic!("{error}") };
        assert_eq!((what.as_str(), need), ("a test", (usize::MAX / 8) as u64 * 4));
        let mut some = vec![1u8, 2];
        reserve("a test", &mut some, 300).unwrap();
        assert!(some.capacity() >= 300 && some == [1, 2]);
    }
}
