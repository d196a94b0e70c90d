//! Spare memory: what dropped arrays leave to the next restore.
//!
//! MLX keeps the buffers of dropped arrays for arrays of the same size: on GPUs up to its whole memory limit, on CPUs 32
//! MiB. What is beyond goes back to the system, which has to find and zero every page anew when the next cache is
//! restored; that takes about as long as reading them. So a restore raises the limit to what it takes itself.
//!
//! The memory stays MLX's: a buffer of our own, with a deleter, would be copied whole at the first update, since MLX 0.32.4
//! writes in place only into what its allocator owns.

use super::memory::SHARE;
use crate::error::{Error, Result};
use crate::ffi::{self, memory};
use std::sync::{Mutex, PoisonError};

/// MLX's limit on CPUs as long as nobody set another.
const MLX_KEEPS: usize = 32 << 20;

/// The variable that bounds in bytes what MLX is told to keep; 0 leaves its limit alone.
const SPARE: &str = "MLXRS_PY_SPARE";

/// The limit that MLX has by our doing; None once the program was seen to have set one, which then stands.
static LIMIT: Mutex<Option<usize>> = Mutex::new(Some(MLX_KEEPS));

/// Runs `take`, which makes buffers of `n_bytes` in all, such that MLX will keep as much.
pub(super) fn take<T>(op: &'static str, n_bytes: usize, take: impl FnOnce() -> Result<T>) -> Result<T> {
    let most = most(op)?;
    let taken = take()?;
    if n_bytes > MLX_KEEPS && is_mlx_on_cpu() {
        let mut limit = LIMIT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = keep(&mut limit, n_bytes, most) {
            tracing::debug!(%error, "no spare memory");
        }
    }
    Ok(taken)
}

/// Raises the limit so that buffers of `n_bytes` are kept when they are dropped, and makes room for them.
fn keep(limit: &mut Option<usize>, n_bytes: usize, most: Option<usize>) -> Result<()> {
    let Some(was) = *limit else { return Ok(()) };
    let most = most.map_or_else(|| Ok(memory::limit()? / SHARE), Ok::<_, Error>)?;
    let raised = was.max((n_bytes + MLX_KEEPS).min(most));
    // Kept buffers of other sizes did not serve, and would be in the way: the oldest go.
    let room = raised.saturating_sub(n_bytes).max(MLX_KEEPS);
    if memory::cached()? > room {
        set(limit, room)?;
    }
    set(limit, raised)
}

/// Sets the limit, unless it is not what we made it: then the program has its own.
fn set(limit: &mut Option<usize>, bytes: usize) -> Result<()> {
    let Some(ours) = limit.filter(|&ours| ours != bytes) else { return Ok(()) };
    let found = memory::set_cache_limit(bytes)?;
    *limit = Some(bytes);
    if found != ours {
        *limit = None;
        memory::set_cache_limit(found)?;
    }
    Ok(())
}

/// Elsewhere MLX keeps more by itself; and a forked child has none of the threads that it would wait for.
fn is_mlx_on_cpu() -> bool {
    cfg!(target_os = "linux") && !ffi::has_cuda() && ffi::check_not_forked("restore").is_ok()
}

/// What the variable says.
fn most(op: &'static str) -> Result<Option<usize>> {
    let Ok(text) = std::env::var(SPARE) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Error::value(op, format!("{SPARE} in bytes"), text))
}
