//! MLX's errors become `Result`s: mlx-c reports them through a handler whose default ends the process.

use super::raw;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Once;

thread_local! {
    /// The message of the last failing call on this thread; mlx-c calls the handler on the failing thread.
    static MESSAGE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Installs our handler, once, before the first call that can fail.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `keep` has the handler's type, needs no data and never unwinds; Once orders this before every call.
        unsafe { raw::mlx_set_error_handler(Some(keep), std::ptr::null_mut(), None) };
    });
}

/// Keeps the message for [`last_error`].
extern "C" fn keep(message: *const c_char, _data: *mut c_void) {
    if message.is_null() {
        return;
    }
    // SAFETY: mlx-c passes a NUL-terminated string that lives until this returns.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    // mlx-c appends where in its own sources it caught the exception: that is no news to a user.
    let text = text.rfind(" at ").filter(|&at| text[at..].contains(".cpp:")).map_or(&*text, |at| &text[..at]);
    // During thread exit the slot may be gone; the status code still reports the failure.
    let _ = MESSAGE.try_with(|slot| slot.replace(Some(text.to_owned())));
}

/// The error that `op` just met on this thread.
pub(super) fn last_error(op: &'static str) -> Error {
    let message = MESSAGE.try_with(RefCell::take).ok().flatten();
    Error::Mlx { op, message: message.unwrap_or_else(|| "MLX failed without a message".to_owned()) }
}

/// Turns mlx-c's status into a `Result`.
pub(crate) fn check(op: &'static str, status: c_int) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(last_error(op)) }
}
