//! Which instruction set the kernels use, decided once per process.

use std::sync::OnceLock;

/// A level of vector instructions. Ordered: a later level includes the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// Plain Rust that the compiler may vectorise for the baseline of the target.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (8 lanes of f32).
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VBMI (16 lanes of f32), without BF16 or VNNI.
    Avx512,
    /// [`InstructionSet::Avx512`] with VNNI (int8 dot products).
    Avx512Vnni,
    /// [`InstructionSet::Avx512Vnni`] with BF16 dot products.
    Avx512Bf16,
    /// [`InstructionSet::Avx512Bf16`] with AMX: products of whole tiles of bf16 and int8.
    Amx,
}

impl InstructionSet {
    /// Every level, lowest first.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16, Self::Amx];

    /// The name that `ICEFORMER_ISA` takes and reports print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }

    /// The highest level this processor (and its operating system) runs.
    #[cfg(target_arch = "x86_64")]
    pub fn detected() -> Self {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi");
        let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
        let bf16 = vnni && is_x86_feature_detected!("avx512bf16");
        match (avx2, avx512, vnni, bf16) {
            (_, _, _, true) if crate::amx::available() => Self::Amx,
            (_, _, _, true) => Self::Avx512Bf16,
            (_, _, true, _) => Self::Avx512Vnni,
            (_, true, _, _) => Self::Avx512,
            (true, ..) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    /// The highest level this processor (and its operating system) runs.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detected() -> Self {
        Self::Portable
    }

    /// [`InstructionSet::detected`], asked once per process.
    pub(crate) fn detected_once() -> Self {
        static DETECTED: OnceLock<InstructionSet> = OnceLock::new();
        *DETECTED.get_or_init(Self::detected)
    }

    /// Whether bf16 dot products are slower than f32 on this processor, although it has them. Measured: a Xeon (Emerald
    /// Rapids) does 86 G operations a second and core with `vdpbf16ps` and 177 in f32, a Zen 5 550 and 276. Intel's
    /// processors are fast at bf16 with AMX alone, which a virtual machine may hide.
    pub(crate) fn brain_dots_are_slow() -> bool {
        Self::is_intel()
    }

    /// Whether the processor is one of Intel's.
    #[inline]
    pub(crate) fn is_intel() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            static INTEL: OnceLock<bool> = OnceLock::new();
            *INTEL.get_or_init(|| {
                let vendor = std::arch::x86_64::__cpuid(0);
                [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The level in use: the detected one, or the lower one that `ICEFORMER_ISA` names. Read once per process.
    ///
    /// # Panics
    /// When `ICEFORMER_ISA` names no level, or one this machine does not have: a test that asks for a path must not
    /// silently run another. Command-line programs call [`InstructionSet::from_environment`] first for a plain error.
    pub fn current() -> Self {
        static CURRENT: OnceLock<InstructionSet> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::from_environment().unwrap_or_else(|message| panic!("{message}")))
    }

    /// The level `ICEFORMER_ISA` asks for, or the detected one when it is unset or empty.
    ///
    /// # Errors
    /// A sentence for the user when the variable names no level or one above this machine's.
    pub fn from_environment() -> Result<Self, String> {
        let detected = Self::detected();
        let wanted = std::env::var_os("ICEFORMER_ISA").filter(|wanted| !wanted.is_empty());
        let Some(wanted) = wanted else { return Ok(detected) };
        let names = Self::ALL.map(Self::name).join(", ");
        let level = Self::ALL
            .into_iter()
            .find(|level| wanted.to_str() == Some(level.name()))
            .ok_or_else(|| format!("ICEFORMER_ISA is {wanted:?}; expected one of {names}"))?;
        if level > detected {
            return Err(format!("ICEFORMER_ISA is {}; this machine has only {}", level.name(), detected.name()));
        }
        Ok(level)
    }
}
