//! Where there is no CUDA nothing of it can be made.

use super::Runs;
use crate::error::Result;
use crate::ffi::ArrayHandle;
use std::convert::Infallible;
use std::ops::Range;

pub(crate) const fn is_there() -> bool {
    false
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) is_on_device: bool,
    never: Infallible,
}

impl Memory {
    pub(crate) fn of(op: &'static str, _array: &ArrayHandle, _n_bytes: usize) -> Result<Self> {
        Err(absent(op))
    }
}

pub(crate) struct Uploader(Infallible);

impl Uploader {
    pub(crate) fn new(_slot_bytes: usize) -> Result<Self> {
        Err(absent("upload"))
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        match self.0 {}
    }

    pub(crate) fn upload(&mut self, memory: &Memory, _: &Range<usize>, _: [usize; 2], _: [usize; 2]) -> Result<()> {
        match memory.never {}
    }

    pub(crate) fn send(&mut self) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.0 {}
    }
}

pub(crate) struct Downloader(Infallible);

impl Downloader {
    pub(crate) fn new(_slot_bytes: usize) -> Result<Self> {
        Err(absent("download"))
    }

    pub(crate) const fn is_full(&self) -> bool {
        match self.0 {}
    }

    pub(crate) const fn is_empty(&self) -> bool {
        match self.0 {}
    }

    pub(crate) fn slot(&mut self) -> Result<&mut [u8]> {
        match self.0 {}
    }

    pub(crate) fn download(&mut self, memory: &Memory, _: Runs, _: Runs) -> Result<()> {
        match memory.never {}
    }

    pub(crate) fn send(&mut self) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn take(&mut self) -> Result<&[u8]> {
        match self.0 {}
    }
}

pub(crate) struct Copy(Infallible);

impl Copy {
    pub(crate) fn of(_sources: &[(Memory, Runs)]) -> Result<Vec<Self>> {
        Err(absent("snapshot"))
    }

    pub(crate) const fn memory(&self) -> &Memory {
        match self.0 {}
    }
}

fn absent(op: &'static str) -> crate::Error {
    crate::Error::Mlx { op, message: "there is no CUDA on this system".to_owned() }
}
