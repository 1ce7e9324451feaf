//! How much memory this process took, and what it may still take.

use std::path::Path;

use iceformer_attention::KeyValueType;

use super::text::bytes;

/// Peak resident size of this process in bytes, where the system tells (Linux).
pub fn peak_resident_bytes() -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Bytes of a key/value cache of `numbers` keys and as many values, without what little its scales take.
pub fn cache_bytes(kv_type: KeyValueType, numbers: usize) -> u64 {
    let each = match kv_type {
        KeyValueType::F32 => 4,
        KeyValueType::Bf16 => 2,
        KeyValueType::Int8 => 1,
    };
    2 * each * numbers as u64
}

/// Refuses work that takes more memory than there is, which the system would end without a word; `what` is how the error
/// calls it.
pub fn ensure_room(needed: u64, what: &str) -> anyhow::Result<()> {
    room(needed, available_bytes(), what)
}

fn room(needed: u64, available: Option<u64>, what: &str) -> anyhow::Result<()> {
    if let Some(available) = available.filter(|&available| available < needed) {
        anyhow::bail!("{what} takes {} of memory; {} are available: ask for less", bytes(needed), bytes(available));
    }
    Ok(())
}

/// Memory that the system has for this process, where it tells (Linux): what is free or can be freed, and no more than
/// its control group allows.
fn available_bytes() -> Option<u64> {
    let free = field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    // A limit of a group holds for the groups in it.
    let limits = Path::new(group).ancestors().filter_map(|group| {
        let file = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
        std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()
    });
    Some(limits.fold(free, u64::min))
}

/// A size that the system tells in kibibytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_grows_with_a_touched_buffer() {
        let before = peak_resident_bytes().unwrap();
        let buffer = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_resident_bytes().unwrap() >= before + (48 << 20));
        drop(buffer);
    }

    #[test]
    fn more_than_there_is_is_refused() {
        assert!(room(2 << 30, Some(2 << 30), "a matrix").is_ok());
        assert!(room(u64::MAX, None, "a matrix").is_ok());
        let error = room(3 << 30, Some(2 << 30), "a matrix").unwrap_err().to_string();
        assert_eq!(error, "a matrix takes 3.00 GiB of memory; 2.00 GiB are available: ask for less");
        assert!(!cfg!(target_os = "linux") || available_bytes().is_some());
    }
}
