//! The level in use is the one asked for, and the highest of the machine when none is.

use iceformer_kernels::InstructionSet;

#[test]
fn the_level_asked_for_is_in_use() {
    let current = InstructionSet::current();
    match std::env::var("ICEFORMER_ISA") {
        Ok(wanted) => assert_eq!(current.name(), wanted),
        Err(_) => assert_eq!(current, InstructionSet::detected()),
    }
    // `cargo xtask test` fails when a level of the machine leaves no file.
    if let Some(folder) = std::env::var_os("ICEFORMER_TEST_RECORD") {
        std::fs::write(std::path::Path::new(&folder).join(current.name()), "").unwrap();
    }
}

/// Asks the processor without the code under test: a level that detection overlooks would never be tested.
#[test]
#[cfg(target_os = "linux")]
fn detection_agrees_with_the_system() {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let Some(flags) = processor.lines().find_map(|line| line.strip_prefix("flags")) else { return };
    let has = |names: &[&str]| names.iter().all(|name| flags.split_whitespace().any(|flag| flag == *name));
    let avx2 = has(&["avx2", "fma", "f16c"]);
    let avx512 = avx2 && has(&["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi"]);
    let vnni = avx512 && has(&["avx512_vnni"]);
    let bf16 = vnni && has(&["avx512_bf16"]);
    let amx = bf16 && has(&["amx_tile", "amx_bf16", "amx_int8"]);
    let expected = match (avx2, avx512, vnni, bf16) {
        _ if amx => InstructionSet::Amx,
        (_, _, _, true) => InstructionSet::Avx512Bf16,
        (_, _, true, _) => InstructionSet::Avx512Vnni,
        (_, true, _, _) => InstructionSet::Avx512,
        (true, ..) => InstructionSet::Avx2,
        _ => InstructionSet::Portable,
    };
    assert_eq!(InstructionSet::detected(), expected);
}

#[test]
fn names_are_distinct_and_ordered() {
    let names = InstructionSet::ALL.map(InstructionSet::name);
    let distinct: std::collections::BTreeSet<_> = names.into_iter().collect();
    assert_eq!(distinct.len(), names.len());
    assert!(InstructionSet::ALL.is_sorted());
}
