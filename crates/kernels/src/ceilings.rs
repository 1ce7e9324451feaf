//! What this machine can do at most: the rates that kernels are compared with.
//!
//! Arithmetic rates come from loops that stay in registers, per second of CPU time of one thread, so that other
//! processes on the machine hardly change them: the best of some runs. Memory bandwidth is wall time with all threads of a
//! team, in the middle one of many passes.

use std::hint::black_box;
use std::time::Instant;

use cpu_time::{ProcessTime, ThreadTime};
use memmap2::MmapOptions;

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::{InstructionSet, ThreadTeam};

/// Measured limits of this machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// f32 multiply-adds, G operations (two each) per second of one core.
    pub f32_rate: f64,
    /// bf16 dot products, G operations per second of one core; the f32 rate where there is no such instruction.
    pub bf16_rate: f64,
    /// 8-bit dot products, G operations per second of one core; the f32 rate where there is no such instruction.
    pub int8_rate: f64,
    /// Memory read by all threads together, GB (10⁹ bytes) per second of wall time.
    pub memory_bandwidth: f64,
    /// Threads that read.
    pub memory_threads: usize,
}

impl Ceilings {
    /// Measures the level in use ([`InstructionSet::current`]) and the memory with the threads of `team`; takes about
    /// a second and 256 MiB.
    ///
    /// # Errors
    /// When the system gives no memory for the measurement.
    pub fn measure(team: &ThreadTeam) -> std::io::Result<Self> {
        let level = InstructionSet::current();
        let f32_rate = arithmetic_rate(level, Arithmetic::F32);
        let bf16 = level >= InstructionSet::Avx512Bf16;
        let int8 = level >= InstructionSet::Avx512Vnni;
        Ok(Self {
            f32_rate,
            bf16_rate: if bf16 { arithmetic_rate(level, Arithmetic::Bf16) } else { f32_rate },
            int8_rate: if int8 { arithmetic_rate(level, Arithmetic::Int8) } else { f32_rate },
            memory_bandwidth: memory_bandwidth(level, team)?,
            memory_threads: team.threads(),
        })
    }
}

/// CPU time this process has used since it started, all threads together, in seconds.
pub fn process_cpu_seconds() -> f64 {
    ProcessTime::now().as_duration().as_secs_f64()
}

#[derive(Clone, Copy)]
enum Arithmetic {
    F32,
    Bf16,
    Int8,
}

/// Best of ten runs of about 20 ms each, G operations per second of CPU time.
fn arithmetic_rate(level: InstructionSet, arithmetic: Arithmetic) -> f64 {
    let mut steps = 10_000;
    let mut best = 0.0_f64;
    let mut runs = 0;
    while runs < 10 {
        let start = ThreadTime::now();
        let operations = arithmetic_loop(level, arithmetic, steps);
        let seconds = start.elapsed().as_secs_f64();
        if seconds < 0.01 {
            steps *= 2;
            continue;
        }
        best = best.max(operations / seconds * 1e-9);
        runs += 1;
    }
    best
}

/// Runs `steps` rounds of independent chains and returns how many operations that was.
fn arithmetic_loop(level: InstructionSet, arithmetic: Arithmetic, steps: usize) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if level == InstructionSet::Amx {
        match arithmetic {
            Arithmetic::F32 => {}
            Arithmetic::Bf16 => return amx::products_alone(amx::Elements::Bf16, steps),
            Arithmetic::Int8 => return amx::products_alone(amx::Elements::Int8, steps),
        }
    }
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx2 {
        // SAFETY: a level is only in use when this machine has it; the caller asks for bf16 and int8 from the levels
        // on that have them.
        return unsafe {
            match arithmetic {
                Arithmetic::F32 if level >= InstructionSet::Avx512 => x86::f32_avx512(steps),
                Arithmetic::F32 => x86::f32_avx2(steps),
                Arithmetic::Bf16 => x86::bf16(steps),
                Arithmetic::Int8 => x86::int8(steps),
            }
        };
    }
    let _ = (level, arithmetic);
    const CHAINS: usize = 32;
    let (a, b) = (black_box(0.999_f32), black_box(1e-3_f32));
    let mut sums = [0.0_f32; CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    black_box(sums);
    (2 * CHAINS * steps) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Chains that hide the latency of an instruction and still fit the registers.
    const CHAINS: usize = 24;

    #[target_feature(enable = "avx2,fma")]
    pub fn f32_avx2(steps: usize) -> f64 {
        const CHAINS: usize = 12;
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (CHAINS * 8 * 2 * steps) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub fn f32_avx512(steps: usize) -> f64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
        (CHAINS * 16 * 2 * steps) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(steps: usize) -> f64 {
        let one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(1.0)));
        let small = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1e-3)), _mm512_set1_ps(black_box(1e-3)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, one, small);
            }
        }
        black_box(sums);
        (CHAINS * 32 * 2 * steps) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8(steps: usize) -> f64 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-1)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        (CHAINS * 64 * 2 * steps) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub fn read_avx512(words: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        for chunk in words.chunks_exact(64) {
            for (sum, words) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
                // SAFETY: `words` holds 8 words.
                *sum = _mm512_xor_si512(*sum, unsafe { _mm512_loadu_si512(words.as_ptr().cast()) });
            }
        }
        let sum = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_xor_si512(a, b));
        _mm512_reduce_or_epi64(sum) as u64
    }
}

/// Middle of the passes over 256 MiB within half a second (three at least), GB/s: what the memory sustains. The best of
/// them is a twentieth faster on a shared machine, which the mean over many decode steps cannot be.
fn memory_bandwidth(level: InstructionSet, team: &ThreadTeam) -> std::io::Result<f64> {
    const BYTES: usize = 256 << 20;
    const TASK: usize = 1 << 20;
    let mut memory = MmapOptions::new().len(BYTES).map_anon()?;
    #[cfg(target_os = "linux")]
    // As for packed weights; without huge pages the measurement still holds.
    let _ = memory.advise(memmap2::Advice::HugePage);
    team.run_chunks(&mut memory, TASK, |index, bytes, _| bytes.fill(index as u8 | 1));
    let words: &[u64] = bytemuck::cast_slice(&memory);
    let begin = Instant::now();
    let mut passes = Vec::new();
    while passes.len() < 3 || begin.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        team.run(BYTES / TASK, |task, _| {
            black_box(read(level, &words[task * TASK / 8..][..TASK / 8]));
        });
        passes.push(start.elapsed());
    }
    passes.sort();
    Ok(BYTES as f64 / passes[passes.len() / 2].as_secs_f64() * 1e-9)
}

fn read(level: InstructionSet, words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if level >= InstructionSet::Avx512 {
        // SAFETY: a level is only in use when this machine has it.
        return unsafe { x86::read_avx512(words) };
    }
    let _ = level;
    words.iter().fold(0, |sum, word| sum ^ word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_plausible() {
        let ceilings = Ceilings::measure(&ThreadTeam::new(2)).unwrap();
        assert!(ceilings.f32_rate > 0.1 && ceilings.f32_rate < 2_000.0, "{ceilings:?}");
        // bf16 dot products of some processors take two cycles: half the rate of f32.
        assert!(ceilings.bf16_rate >= ceilings.f32_rate * 0.3 && ceilings.int8_rate >= ceilings.f32_rate * 0.3);
        assert!(ceilings.memory_bandwidth > 0.1 && ceilings.memory_bandwidth < 5_000.0, "{ceilings:?}");
        assert_eq!(ceilings.memory_threads, 2);
        let before = process_cpu_seconds();
        arithmetic_loop(InstructionSet::current(), Arithmetic::F32, 100_000);
        assert!(process_cpu_seconds() > before);
    }
}
