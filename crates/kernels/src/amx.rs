//! Intel AMX: products of whole tiles, sixteen rows by sixteen columns at a time.
//!
//! The instructions are written as assembly, as Rust has no stable intrinsics for them. The eight tile registers are
//! used one way everywhere: `C[r][p] (+)= A[r] · B[p]` for up to two tiles of rows `r` and two panels `p`, with
//! `C` in registers 0 to 3, `A` in 4 and 5, `B` in 6 and 7. Two by two is the shape in which each tile loaded is used
//! twice, so that loading (8 cycles a tile) hides behind multiplying (16 cycles a product).
//!
//! The layout of the pages of a cache and of the panels of packed weights (sixteen keys or columns side by side, two
//! bf16 or four bytes of each together) is the very layout that the instructions want for `B`.

use std::arch::asm;
use std::sync::OnceLock;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Most rows of a product: two tiles.
pub(crate) const PRODUCT_ROWS: usize = 2 * TILE_ROWS;
/// Bytes of a row of a tile.
pub(crate) const ROW_BYTES: usize = 64;

/// Whether this processor has tiles with bf16 and int8 products and the system lets this process use them. Asks the
/// system for the permission the first time.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && permitted())
}

fn has_instructions() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    let wanted = AMX_BF16 | AMX_TILE | AMX_INT8;
    std::arch::x86_64::__cpuid(0).eax >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & wanted == wanted
}

/// Linux keeps room for the tiles of a thread only in processes that ask for it (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: rows and bytes of a row of each of the eight registers.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, given back when dropped.
pub(crate) struct Tiles {
    /// Rows and bytes of a step that they are configured for.
    shape: Option<(usize, usize)>,
}

impl Tiles {
    /// Registers of no shape yet.
    ///
    /// # Panics
    /// When there are none: see [`available`].
    pub fn new() -> Self {
        assert!(available(), "this machine has no AMX");
        Self { shape: None }
    }

    /// Shapes the registers for products of `rows` (1 to [`PRODUCT_ROWS`]) rows that take `step_bytes` (a multiple of 4
    /// up to [`ROW_BYTES`]) of each row a step. What they held is gone.
    #[inline]
    pub fn configure(&mut self, rows: usize, step_bytes: usize) {
        if self.shape != Some((rows, step_bytes)) {
            // SAFETY: `new` has seen that there are tiles.
            unsafe { configure(rows, step_bytes) }
            self.shape = Some((rows, step_bytes));
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `new` has seen that there are tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }
}

/// # Safety
/// [`available`] said yes.
unsafe fn configure(rows: usize, step_bytes: usize) {
    assert!((1..=PRODUCT_ROWS).contains(&rows) && step_bytes.is_multiple_of(4) && step_bytes <= ROW_BYTES);
    let (first, second) = (rows.min(TILE_ROWS) as u8, rows.saturating_sub(TILE_ROWS) as u8);
    let (whole, step, pairs) = (ROW_BYTES as u16, step_bytes as u16, (step_bytes / 4) as u8);
    let mut configuration =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let registers = [
        (first, whole),
        (first, whole),
        (second, whole),
        (second, whole),
        (first, step),
        (second, step),
        (pairs, whole),
        (pairs, whole),
    ];
    for (register, (rows, bytes)) in registers.into_iter().enumerate() {
        // An unused register has neither rows nor bytes.
        configuration.rows[register] = rows;
        configuration.row_bytes[register] = if rows == 0 { 0 } else { bytes };
    }
    // SAFETY: the configuration is 64 bytes of valid shapes.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const configuration, options(nostack, readonly, preserves_flags)) }
}

/// What one product reads and writes: `C[r][p] (+)= Σ_step A[r, step] · B[p, step]`.
///
/// `A`: row `i` of the product at `a + i · a_row`, step `s` of it `s · a_step` further. `B`: panel `p`, step `s` at
/// `b + p · b_panel + s · b_step`, its rows `b_row` apart. `C`: row `i` of a tile at `c + i · c_row`, panel `p`
/// `p · c_panel` further. All distances are in bytes; tiles of `A` and `B` have the configured shape.
pub(crate) struct Product {
    pub a: *const u8,
    pub a_row: usize,
    /// From the first tile of rows of `A` to the second.
    pub a_tile: usize,
    pub a_step: usize,
    pub b: *const u8,
    pub b_row: usize,
    pub b_panel: usize,
    pub b_step: usize,
    pub c: *mut u8,
    pub c_row: usize,
    /// From the first tile of rows of `C` to the second.
    pub c_tile: usize,
    pub c_panel: usize,
    /// At least one.
    pub steps: usize,
}

/// What elements are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Elements {
    /// Brain floats, f32 sums.
    Bf16,
    /// Signed bytes with unsigned ones, i32 sums.
    Int8,
}

impl Product {
    /// Runs the product for one or two `panels` of `B` and `rows` rows, continuing the sums that `C` holds if
    /// `accumulate`.
    ///
    /// # Safety
    /// The tiles are configured for `rows` rows and steps of the size that the distances of `A` mean; all addresses
    /// that follow from the fields are valid, those of `C` for writing too.
    #[inline(always)]
    pub unsafe fn run(&self, elements: Elements, rows: usize, panels: usize, accumulate: bool) {
        // SAFETY: forwarded from the caller.
        unsafe {
            match (elements, accumulate) {
                (Elements::Bf16, false) => self.bf16(rows, panels),
                (Elements::Bf16, true) => self.bf16_more(rows, panels),
                (Elements::Int8, false) => self.int8(rows, panels),
                (Elements::Int8, true) => unreachable!("sums of integers are never continued"),
            }
        }
    }
}

/// Runs `steps` rounds of four products that need nothing from memory, and returns how many operations that was: what
/// the tiles can do at most.
pub(crate) fn products_alone(elements: Elements, steps: usize) -> f64 {
    let mut tiles = Tiles::new();
    tiles.configure(PRODUCT_ROWS, ROW_BYTES);
    macro_rules! rounds {
        ($multiply:literal) => {
            // SAFETY: the tiles are configured, and the registers written are named.
            unsafe {
                asm!(
                    concat!(
                        "tilezero tmm4\ntilezero tmm5\ntilezero tmm6\ntilezero tmm7\n2:\n",
                        $multiply, " tmm0, tmm4, tmm6\n", $multiply, " tmm1, tmm4, tmm7\n",
                        $multiply, " tmm2, tmm5, tmm6\n", $multiply, " tmm3, tmm5, tmm7\n",
                        "dec {steps}\njnz 2b\n",
                    ),
                    steps = inout(reg) steps.max(1) => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem)
                )
            }
        };
    }
    let depth = match elements {
        Elements::Bf16 => {
            rounds!("tdpbf16ps");
            32
        }
        Elements::Int8 => {
            rounds!("tdpbsud");
            64
        }
    };
    (steps.max(1) * 4 * TILE_ROWS * TILE_ROWS * depth * 2) as f64
}

/// A line of assembly for each tile of `C` that a product of so many tiles of rows and panels has.
macro_rules! each_sum {
    (zero 1 1) => { "tilezero tmm0\n" };
    (zero 1 2) => { "tilezero tmm0\ntilezero tmm1\n" };
    (zero 2 1) => { "tilezero tmm0\ntilezero tmm2\n" };
    (zero 2 2) => { "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3\n" };
    (load 1 1) => { "tileloadd tmm0, [{c} + {c_row}]\n" };
    (load 1 2) => { "tileloadd tmm0, [{c} + {c_row}]\ntileloadd tmm1, [{cp} + {c_row}]\n" };
    (load 2 1) => { "tileloadd tmm0, [{c} + {c_row}]\ntileloadd tmm2, [{c1} + {c_row}]\n" };
    (load 2 2) => {
        "tileloadd tmm0, [{c} + {c_row}]\ntileloadd tmm1, [{cp} + {c_row}]\ntileloadd tmm2, [{c1} + {c_row}]\ntileloadd tmm3, [{c1p} + {c_row}]\n"
    };
    (store 1 1) => { "tilestored [{c} + {c_row}], tmm0\n" };
    (store 1 2) => { "tilestored [{c} + {c_row}], tmm0\ntilestored [{cp} + {c_row}], tmm1\n" };
    (store 2 1) => { "tilestored [{c} + {c_row}], tmm0\ntilestored [{c1} + {c_row}], tmm2\n" };
    (store 2 2) => {
        "tilestored [{c} + {c_row}], tmm0\ntilestored [{cp} + {c_row}], tmm1\ntilestored [{c1} + {c_row}], tmm2\ntilestored [{c1p} + {c_row}], tmm3\n"
    };
}

/// The body of the loop over steps.
macro_rules! step {
    ($multiply:literal 1 1) => {
        concat!("tileloadd tmm4, [{a} + {a_row}]\ntileloadd tmm6, [{b} + {b_row}]\n", $multiply, " tmm0, tmm4, tmm6\n")
    };
    ($multiply:literal 1 2) => {
        concat!(
            "tileloadd tmm4, [{a} + {a_row}]\ntileloadd tmm6, [{b} + {b_row}]\ntileloadd tmm7, [{b1} + {b_row}]\n",
            $multiply,
            " tmm0, tmm4, tmm6\n",
            $multiply,
            " tmm1, tmm4, tmm7\n"
        )
    };
    ($multiply:literal 2 1) => {
        concat!(
            "tileloadd tmm4, [{a} + {a_row}]\ntileloadd tmm6, [{b} + {b_row}]\ntileloadd tmm5, [{a1} + {a_row}]\n",
            $multiply,
            " tmm0, tmm4, tmm6\n",
            $multiply,
            " tmm2, tmm5, tmm6\n"
        )
    };
    ($multiply:literal 2 2) => {
        concat!(
            "tileloadd tmm4, [{a} + {a_row}]\ntileloadd tmm6, [{b} + {b_row}]\n",
            $multiply,
            " tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{b1} + {b_row}]\n",
            $multiply,
            " tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{a1} + {a_row}]\n",
            $multiply,
            " tmm2, tmm5, tmm6\n",
            $multiply,
            " tmm3, tmm5, tmm7\n"
        )
    };
}

/// One product of so many tiles of rows and panels, as assembly.
macro_rules! product {
    ($self:ident, $start:ident, $multiply:literal, $rows:tt $panels:tt) => {
        asm!(
            // What a product of one tile or panel does not need is named all the same.
            "# {a1} {b1} {cp} {c1} {c1p}",
            concat!(
                each_sum!($start $rows $panels),
                "2:\n",
                step!($multiply $rows $panels),
                "add {a}, {a_step}\nadd {a1}, {a_step}\nadd {b}, {b_step}\nadd {b1}, {b_step}\ndec {steps}\njnz 2b\n",
                each_sum!(store $rows $panels),
            ),
            a = inout(reg) $self.a => _,
            a1 = inout(reg) $self.a.wrapping_add($self.a_tile) => _,
            a_row = in(reg) $self.a_row,
            a_step = in(reg) $self.a_step,
            b = inout(reg) $self.b => _,
            b1 = inout(reg) $self.b.wrapping_add($self.b_panel) => _,
            b_row = in(reg) $self.b_row,
            b_step = in(reg) $self.b_step,
            c = in(reg) $self.c,
            cp = in(reg) $self.c.wrapping_add($self.c_panel),
            c1 = in(reg) $self.c.wrapping_add($self.c_tile),
            c1p = in(reg) $self.c.wrapping_add($self.c_tile + $self.c_panel),
            c_row = in(reg) $self.c_row,
            steps = inout(reg) $self.steps => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// Products of one kind, of every shape.
macro_rules! products {
    ($name:ident, $start:ident, $multiply:literal) => {
        /// # Safety
        /// As [`Product::run`].
        #[inline]
        unsafe fn $name(&self, rows: usize, panels: usize) {
            // SAFETY: the tiles that the caller promises; each register written is named.
            unsafe {
                match (rows > TILE_ROWS, panels > 1) {
                    (true, true) => product!(self, $start, $multiply, 2 2),
                    (true, false) => product!(self, $start, $multiply, 2 1),
                    (false, true) => product!(self, $start, $multiply, 1 2),
                    (false, false) => product!(self, $start, $multiply, 1 1),
                }
            }
        }
    };
}

impl Product {
    products!(bf16, zero, "tdpbf16ps");
    products!(bf16_more, load, "tdpbf16ps");
    products!(int8, zero, "tdpbsud");
}
