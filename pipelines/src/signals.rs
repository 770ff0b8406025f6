//! Ctrl-C and the signal that batch queues send before they kill.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The number of the first signal that asked the run to stop; 0 if none did.
static RECEIVED: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on the first SIGINT or SIGTERM asks the program to stop, and a second one ends the process at once.
///
/// # Errors
/// What the operating system says.
pub fn listen() -> std::io::Result<()> {
    if RECEIVED.get().is_some() {
        return Ok(());
    }
    let (received, again) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM] {
        // in this order: the first signal finds `again` unset
        flag::register_conditional_shutdown(signal, exit_code(signal as usize).into(), again.clone())?;
        flag::register(signal, again.clone())?;
        flag::register_usize(signal, received.clone(), signal as usize)?;
    }
    let _ = RECEIVED.set(received);
    Ok(())
}

/// The signal that asks the run to stop, if one did.
pub fn received() -> Option<usize> {
    RECEIVED.get().map(|r| r.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
}

/// The exit code of a process that a signal ended, by the custom of shells.
pub fn exit_code(signal: usize) -> u8 {
    128 + signal as u8
}
