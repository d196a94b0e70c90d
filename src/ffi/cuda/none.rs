//! Where there is no CUDA nothing of it can be made.

use crate::error::Result;
use crate::ffi::ArrayHandle;
use std::convert::Infallible;
use std::ops::Range;

pub(crate) const fn is_there() -> bool {
    false
}

pub(crate) struct Memory(Infallible);

impl Memory {
    pub(crate) fn of(_array: &ArrayHandle, _n_bytes: usize) -> Result<Self> {
        Err(absent())
    }
}

pub(crate) struct Uploader(Infallible);

impl Uploader {
    pub(crate) fn new(_slot_bytes: usize) -> Result<Self> {
        Err(absent())
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        match self.0 {}
    }

    pub(crate) fn upload(&mut self, memory: &Memory, _: &Range<usize>, _: [usize; 2], _: usize) -> Result<()> {
        match memory.0 {}
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.0 {}
    }
}

fn absent() -> crate::Error {
    crate::Error::Mlx { op: "upload", message: "there is no CUDA on this system".to_owned() }
}
