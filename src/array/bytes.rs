//! Bytes of arrays where they lie, for threads that call no MLX: on the host, or on the device by way of pinned memory.

use super::Array;
use crate::error::Result;
use crate::ffi::cuda::{self, Runs};
use crate::ffi::{self, DeviceBytes, HostBytes};
use std::marker::PhantomData;

/// Runs shorter than this, unless there is one only, are joined by a copy first.
const SHORT_RUN: usize = 64;

/// Where the row-major bytes of a computed array lie: `n_runs` runs of `run` bytes, `pitch` apart. The array keeps its
/// value for as long as this lives, whatever becomes of the caches that it came from.
pub struct Bytes {
    /// How many runs.
    pub n_runs: usize,
    /// Bytes of each.
    pub run: usize,
    /// Bytes from the start of one to that of the next.
    pub pitch: usize,
    place: Place,
}

enum Place {
    Host(HostBytes),
    Device(DeviceBytes),
    /// Device memory that no array has.
    Copy(cuda::Copy),
}

impl Array {
    /// Its bytes, evaluated first. There is one run, or `n_runs` of them if a number is given: else a copy is made.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if MLX or CUDA fails.
    pub fn bytes(&self, op: &'static str, n_runs: Option<usize>) -> Result<Bytes> {
        super::eval(op, [self])?;
        let fits = |runs: &[usize; 3]| runs[0] == 1 || n_runs.is_none_or(|n| n == runs[0]);
        if let Some(runs) = self.even_runs().filter(fits) {
            return Bytes::new(op, self.clone(), runs);
        }
        let copy = Self(self.0.contiguous()?);
        super::eval(op, [&copy])?;
        let n_bytes = copy.n_bytes();
        Bytes::new(op, copy, [1, n_bytes, n_bytes])
    }

    /// Number, bytes and distance of the runs that a computed array consists of, if they are evenly apart.
    fn even_runs(&self) -> Option<[usize; 3]> {
        let item = self.dtype().size();
        if self.n_bytes() == 0 {
            return Some([1, 0, 0]);
        }
        let axes = self.shape().iter().map(|&dim| dim as usize).zip(self.0.strides().iter().copied());
        // From the last axis on; one of a single element may have any stride.
        let mut axes = axes.rev().filter(|&(dim, _)| dim > 1).peekable();
        let mut run = 1;
        while let Some((dim, _)) = axes.next_if(|&(_, stride)| stride == run) {
            run *= dim;
        }
        let (mut n_runs, mut pitch) = (1, run);
        if let Some((dim, stride)) = axes.next() {
            (n_runs, pitch) = (dim, stride);
        }
        for (dim, stride) in axes {
            if stride != n_runs.checked_mul(pitch)? {
                return None;
            }
            n_runs *= dim;
        }
        // A stride below the run is one of broadcasting, a huge one leads backwards.
        let is_forward = pitch >= run && isize::try_from(n_runs.checked_mul(pitch)?.checked_mul(item)?).is_ok();
        let is_long = n_runs == 1 || run * item >= SHORT_RUN;
        (is_forward && is_long).then_some([n_runs, run * item, pitch * item])
    }
}

impl Bytes {
    fn new(op: &'static str, array: Array, [n_runs, run, pitch]: [usize; 3]) -> Result<Self> {
        let n_bytes = if run == 0 { 0 } else { (n_runs - 1) * pitch + run };
        let of = |place| Self { n_runs, run, pitch, place };
        let mut handle = array.0;
        if n_bytes > 0 && ffi::on_cuda() {
            handle = match DeviceBytes::new(op, handle, n_bytes)? {
                Ok(bytes) => return Ok(of(Place::Device(bytes))),
                Err(unified) => unified,
            };
        }
        HostBytes::new(op, handle, n_bytes).map(|bytes| of(Place::Host(bytes)))
    }

    /// All from the first run to the last, what lies between them too; None if it is on a device.
    pub fn on_host(&self) -> Option<&[u8]> {
        match &self.place {
            Place::Host(bytes) => Some(bytes.bytes()),
            Place::Device(_) | Place::Copy(_) => None,
        }
    }

    /// Puts copies that nobody else knows in the place of those on a device, each in one run. Reading an array on the host
    /// moves it, so that its own bytes are safe only as long as nobody can read it.
    ///
    /// The copies are no arrays: MLX may give an array freed memory that it moved off the device before.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if device memory is short; nothing has changed then.
    pub fn snapshot<'a>(all: impl Iterator<Item = &'a mut Self>) -> Result<()> {
        let mut all: Vec<_> = all.filter(|bytes| matches!(bytes.place, Place::Device(_))).collect();
        let sources: Vec<_> = all.iter().filter_map(|bytes| Some((*bytes.device()?, bytes.runs()))).collect();
        if sources.is_empty() {
            return Ok(());
        }
        let copies = cuda::Copy::of(&sources).or_else(|_| {
            // Memory that MLX keeps for later is as good as free.
            ffi::memory::clear_cache()?;
            cuda::Copy::of(&sources)
        })?;
        for bytes in &all {
            bytes.check_in_place("snapshot")?;
        }
        for (bytes, copy) in all.iter_mut().zip(copies) {
            (bytes.pitch, bytes.place) = (bytes.run, Place::Copy(copy));
        }
        Ok(())
    }

    /// All runs, from the first byte on.
    const fn runs(&self) -> Runs {
        Runs { from: 0, n: self.n_runs, run: self.run, pitch: self.pitch }
    }

    /// None if they are on the host.
    const fn device(&self) -> Option<&cuda::Memory> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device(bytes) => Some(bytes.memory()),
            Place::Copy(copy) => Some(copy.memory()),
        }
    }

    /// Fails if the bytes do not lie any more where they did: what was copied meanwhile may be anything.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) then.
    pub fn check_in_place(&self, op: &'static str) -> Result<()> {
        match &self.place {
            Place::Host(_) | Place::Copy(_) => Ok(()),
            Place::Device(bytes) => bytes.check_in_place(op),
        }
    }
}

/// Copies bytes from device memory to the host, on a stream of its own: one piece is on its way while another is used.
///
/// It waits for what it began before it goes, so that the bytes, which live for `'a`, outlive every copy.
pub struct Downloader<'a>(cuda::Downloader, PhantomData<&'a Bytes>);

impl<'a> Downloader<'a> {
    /// Two pinned slots of `slot_bytes` each.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if CUDA fails.
    pub fn new(slot_bytes: usize) -> Result<Self> {
        Ok(Self(cuda::Downloader::new(slot_bytes)?, PhantomData))
    }

    /// True if both slots are on their way: the next one must be [taken](Self::take) first.
    pub const fn is_full(&self) -> bool {
        self.0.is_full()
    }

    /// True if no slot is on its way.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The free slot, for the bytes that the host writes; before any [download](Self::download) into it.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if CUDA failed.
    ///
    /// # Panics
    /// If no slot is free, or a download into it was begun.
    pub fn slot(&mut self) -> Result<&mut [u8]> {
        self.0.slot()
    }

    /// Begins to copy `n_runs` runs of `run` bytes, `from[1]` apart from byte `from[0]` of `bytes` on, into the free slot,
    /// from its byte `to[0]` on and `to[1]` apart.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if CUDA fails.
    ///
    /// # Panics
    /// If the runs do not lie in the array and in the slot, no slot is free, or `bytes` are not on a device.
    pub fn download(
        &mut self,
        bytes: &'a Bytes,
        [n_runs, run]: [usize; 2],
        from: [usize; 2],
        to: [usize; 2],
    ) -> Result<()> {
        let Some(memory) = bytes.device() else { panic!("bytes on a device") };
        let [from, to] = [from, to].map(|[from, pitch]| Runs { from, n: n_runs, run, pitch });
        self.0.download(memory, from, to)
    }

    /// Nothing more goes into the slot.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if CUDA fails.
    pub fn send(&mut self) -> Result<()> {
        self.0.send()
    }

    /// The slot that was sent first, once it is here.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) if a copy failed.
    ///
    /// # Panics
    /// If none is on its way.
    pub fn take(&mut self) -> Result<&[u8]> {
        self.0.take()
    }
}
