//! Ctrl-C: the first cancels the work in hand, a second, or one without work in hand, ends the program.

use std::sync::Mutex;

use iceformer_engine::Cancel;

/// What the next Ctrl-C cancels.
static WORK: Mutex<Option<Cancel>> = Mutex::new(None);

/// Takes over Ctrl-C.
pub fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let work = WORK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match work.as_ref().filter(|cancel| !cancel.is_cancelled()) {
            Some(cancel) => cancel.cancel(),
            None => std::process::exit(130),
        }
    })?;
    Ok(())
}

/// While it lives, Ctrl-C cancels a session instead of ending the program.
pub struct Guard;

/// Lets Ctrl-C cancel `cancel`'s session.
pub fn guard(cancel: Cancel) -> Guard {
    cancel.reset();
    *WORK.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(cancel);
    Guard
}

impl Drop for Guard {
    fn drop(&mut self) {
        *WORK.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
    }
}
