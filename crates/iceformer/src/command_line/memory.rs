//! How much memory this process took.

/// Peak resident size of this process in bytes, where the system tells (Linux).
pub fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_peak_grows_with_a_touched_buffer() {
        let before = super::peak_resident_bytes().unwrap();
        let buffer = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(super::peak_resident_bytes().unwrap() >= before + (48 << 20));
        drop(buffer);
    }
}
