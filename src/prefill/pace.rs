//! How many tokens a window has: as many as the caller says, or as the memory allows.

use super::plan::fitting_step;
use crate::array::memory::{active_memory, ceiling, peak_memory};
use crate::error::Result;

/// The first windows of [`Step::Auto`], whose memory is measured, and the longest ones.
const FIRST: usize = 512;
const LONGEST: usize = 4096;

/// How many tokens a window may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many; 0 counts as 1.
    Tokens(usize),
    /// 512 at first; then, by the memory that they took, up to 4,096.
    Auto,
}

impl From<usize> for Step {
    fn from(n_tokens: usize) -> Self {
        Self::Tokens(n_tokens)
    }
}

/// The step of one prefill.
#[derive(Debug)]
pub struct Pace {
    step: usize,
    /// Until the memory is known.
    measured: Option<Measured>,
}

#[derive(Debug)]
struct Measured {
    /// Bytes of arrays before the first window.
    active: usize,
    /// The most there had ever been.
    peak: usize,
    /// Most bytes of arrays seen since.
    highest: usize,
}

impl Pace {
    /// Before the first window.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if MLX fails.
    pub fn new(step: Step) -> Result<Self> {
        match step {
            Step::Tokens(step) => Ok(Self { step: step.max(1), measured: None }),
            Step::Auto => {
                let (active, peak) = (active_memory()?, peak_memory()?);
                Ok(Self { step: FIRST, measured: Some(Measured { active, peak, highest: active }) })
            }
        }
    }

    /// Tokens that the next window may have.
    pub const fn step(&self) -> usize {
        self.step
    }

    /// True until the memory of the first windows is known.
    pub const fn is_measuring(&self) -> bool {
        self.measured.is_some()
    }

    /// After a window was handed to the device, where most of its memory is held at once.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn started(&mut self) -> Result<()> {
        if let Some(measured) = &mut self.measured {
            measured.highest = measured.highest.max(active_memory()?);
        }
        Ok(())
    }

    /// After a window was computed, while the next, equally long one is under way.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn computed(&mut self) -> Result<()> {
        if let Some(Measured { active, peak, highest }) = self.measured.take() {
            // The peak counts since the program's start: it tells of these windows only where they raised it.
            let highest = Some(peak_memory()?).filter(|&now| now > peak).unwrap_or(highest);
            let room = ceiling()?.saturating_sub(active_memory()?);
            self.step = fitting_step(FIRST, LONGEST, highest.saturating_sub(active), room);
        }
        Ok(())
    }
}
