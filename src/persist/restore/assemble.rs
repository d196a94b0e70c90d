//! Buffers put together from rows that lie in many places: the blocks of a store.

use super::plan::SPAN;
use crate::array::{Array, DeviceBuffer, DeviceMemory, Dtype, HostBuffer, Uploader};
use crate::error::{Error, Result};
use crate::persist::threads::{self, share};
use std::mem::MaybeUninit;
use std::num::NonZero;
use std::ops::Range;

/// Where the bytes of tensors lie.
pub trait Source: Sync {
    /// The bytes at `at`, if they are in memory.
    fn bytes(&self, at: u64, n_bytes: usize) -> Option<&[u8]>;

    /// Fills `bytes` with those at `at`.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails, [`Error::Format`] at the end of the source.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()>;
}

/// One tensor of a source, and which of its rows go where.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Place of the source.
    pub source: usize,
    /// Its first byte there.
    pub at: u64,
    /// Its bytes.
    pub n_bytes: usize,
    /// What the checksum of its bytes must be; None for bytes that never left memory.
    pub checksum: Option<u64>,
    /// The rows that are wanted.
    pub rows: Range<usize>,
    /// Row of the buffer that the first of them goes to.
    pub to: usize,
}

/// A buffer `(B, H, L, D)`, or of another shape if it consists of one piece with all its bytes; what no piece fills is
/// zero.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// Shape of the buffer.
    pub shape: Vec<i32>,
    /// Element type.
    pub dtype: Dtype,
    /// Its pieces.
    pub pieces: Vec<Piece>,
}

/// What went wrong, and in which source if it was one.
#[derive(Debug)]
pub struct Damage {
    /// Place of the source; None if it is MLX that failed.
    pub source: Option<usize>,
    /// The failure.
    pub error: Error,
}

impl From<Error> for Damage {
    fn from(error: Error) -> Self {
        Self { source: None, error }
    }
}

/// Bytes of heads and rows of an assembly.
#[derive(Clone, Copy)]
struct Sizes {
    n_heads: usize,
    row: usize,
    /// Bytes of a head in the buffer.
    head: usize,
}

impl Assembly {
    fn sizes(&self) -> Sizes {
        let dims: Vec<_> = self.shape.iter().map(|&dim| dim as usize).collect();
        if let [batch, heads, rows, width] = dims[..] {
            let row = width * self.dtype.size();
            return Sizes { n_heads: batch * heads, row, head: rows * row };
        }
        // One head of single bytes: a piece is then all of them.
        Sizes { n_heads: 1, row: 1, head: dims.iter().product::<usize>() * self.dtype.size() }
    }

    /// Fails unless every piece has whole heads and lies in the buffer.
    fn check(&self) -> Result<(), Damage> {
        let Sizes { n_heads, row, head } = self.sizes();
        for piece in &self.pieces {
            let in_piece = piece.n_bytes.checked_div(n_heads * row).unwrap_or(0);
            let fits = in_piece * n_heads * row == piece.n_bytes
                && piece.rows.start <= piece.rows.end
                && piece.rows.end <= in_piece
                && (piece.to + piece.rows.len()) * row <= head;
            if !fits {
                let error = Error::value("restore", format!("rows of a buffer {:?}", self.shape), format!("{piece:?}"));
                return Err(Damage { source: Some(piece.source), error });
            }
        }
        Ok(())
    }
}

/// Reads all pieces to their places, on `threads` threads; `checksum` is compared for each. On CUDA the buffers lie in
/// device memory.
///
/// # Errors
/// The first damage; nothing is left of the buffers then.
pub fn assemble(
    sources: &[&dyn Source],
    assemblies: &[Assembly],
    threads: Option<NonZero<usize>>,
    checksum: &(dyn Fn(&[u8]) -> u64 + Sync),
) -> Result<Vec<Array>, Damage> {
    assemblies.iter().try_for_each(Assembly::check)?;
    let threads = threads::number("restore", threads)?;
    let reader = Reader { sources, checksum };
    let shapes = assemblies.iter().map(|assembly| (assembly.shape.as_slice(), assembly.dtype));
    match DeviceBuffer::zeros(shapes)? {
        Some(buffers) => on_device(&reader, assemblies, buffers, threads),
        None => on_host(&reader, assemblies, threads),
    }
}

struct Reader<'a> {
    sources: &'a [&'a dyn Source],
    checksum: &'a (dyn Fn(&[u8]) -> u64 + Sync),
}

impl Reader<'_> {
    /// Hands `take` the checked bytes of a piece, which are read into `scratch` unless they are in memory.
    fn with<T>(&self, piece: &Piece, scratch: &mut Vec<u8>, take: impl FnOnce(&[u8]) -> T) -> Result<T, Damage> {
        let source = self.source(piece)?;
        if let Some(bytes) = source.bytes(piece.at, piece.n_bytes) {
            self.check(piece, bytes)?;
            return Ok(take(bytes));
        }
        if scratch.len() < piece.n_bytes {
            scratch.resize(piece.n_bytes, 0);
        }
        let bytes = &mut scratch[..piece.n_bytes];
        source.read(bytes, piece.at).map_err(|error| Damage { source: Some(piece.source), error })?;
        self.check(piece, bytes)?;
        Ok(take(bytes))
    }

    /// Fills `bytes` with the pieces of a group. Each is checked right after it was read, while it is in the core's cache.
    fn read(&self, group: &[Load<'_, '_>], mut bytes: &mut [u8]) -> Result<(), Damage> {
        for Load { piece, .. } in group {
            let source = self.source(piece)?;
            let (own, rest) = bytes.split_at_mut(piece.n_bytes);
            match source.bytes(piece.at, piece.n_bytes) {
                Some(held) => own.copy_from_slice(held),
                None => source.read(own, piece.at).map_err(|error| Damage { source: Some(piece.source), error })?,
            }
            self.check(piece, own)?;
            bytes = rest;
        }
        Ok(())
    }

    fn source(&self, piece: &Piece) -> Result<&dyn Source, Damage> {
        let source = self.sources.get(piece.source).copied();
        source.ok_or_else(|| Error::value("restore", "a source of the piece", piece.source).into())
    }

    fn check(&self, piece: &Piece, bytes: &[u8]) -> Result<(), Damage> {
        let Some(checksum) = piece.checksum else { return Ok(()) };
        let found = (self.checksum)(bytes);
        if found == checksum {
            return Ok(());
        }
        let expected = format!("checksum {checksum:016x} of {} bytes at {}", piece.n_bytes, piece.at);
        let error = Error::value("restore", expected, format!("{found:016x}"));
        Err(Damage { source: Some(piece.source), error })
    }
}

/// `work` with the source of its failure kept beside the error.
fn shared<J: Send, S>(
    jobs: Vec<J>,
    threads: NonZero<usize>,
    start: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, J) -> Result<(), Damage> + Sync,
    end: impl Fn(S) -> Result<()> + Sync,
) -> Result<(), Damage> {
    let damaged = std::sync::Mutex::new(None);
    let work = |state: &mut S, job| {
        work(state, job).map_err(|damage| {
            if damage.source.is_some() {
                *damaged.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = damage.source;
            }
            damage.error
        })
    };
    let done = share(jobs, threads, start, work, end);
    let source = damaged.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.map_err(|error| Damage { source, error })
}

fn on_host(reader: &Reader<'_>, assemblies: &[Assembly], threads: NonZero<usize>) -> Result<Vec<Array>, Damage> {
    let shapes = assemblies.iter().map(|assembly| (assembly.shape.as_slice(), assembly.dtype));
    let mut buffers = HostBuffer::many("restore", shapes)?;
    // A buffer is one thread's alone: its pieces interleave, head by head.
    let jobs: Vec<_> = buffers.iter_mut().map(HostBuffer::bytes).zip(assemblies).collect();
    let work = |scratch: &mut Vec<u8>, (memory, assembly): (&mut [MaybeUninit<u8>], &Assembly)| {
        let Sizes { n_heads, row, head } = assembly.sizes();
        let mut filled = vec![false; head.checked_div(row).unwrap_or(0)];
        for piece in &assembly.pieces {
            reader.with(piece, scratch, |bytes| {
                let in_piece = piece.n_bytes / n_heads;
                for (rows, held) in memory.chunks_exact_mut(head).zip(bytes.chunks_exact(in_piece)) {
                    let from = &held[piece.rows.start * row..piece.rows.end * row];
                    rows[piece.to * row..][..from.len()].write_copy_of_slice(from);
                }
            })?;
            filled[piece.to..piece.to + piece.rows.len()].fill(true);
        }
        if head > 0 {
            for rows in memory.chunks_exact_mut(head) {
                for (at, _) in filled.iter().enumerate().filter(|(_, filled)| !**filled) {
                    rows[at * row..(at + 1) * row].fill(MaybeUninit::new(0));
                }
            }
        }
        Ok(())
    };
    shared(jobs, threads, || Ok(Vec::new()), work, |_| Ok(()))?;
    Ok(buffers.into_iter().map(HostBuffer::finish).collect())
}

fn on_device(
    reader: &Reader<'_>,
    assemblies: &[Assembly],
    buffers: Vec<DeviceBuffer>,
    threads: NonZero<usize>,
) -> Result<Vec<Array>, Damage> {
    let jobs = buffers.iter().zip(assemblies).flat_map(|(buffer, assembly)| {
        let pieces = assembly.pieces.iter().filter(|piece| !piece.rows.is_empty());
        pieces.map(move |piece| Load { memory: buffer.memory(), sizes: assembly.sizes(), piece })
    });
    let groups = grouped(jobs.collect());
    let largest = groups.iter().map(|loads| span(loads).1).max().unwrap_or(0).max(SPAN);
    fill_device(reader, groups, largest, threads)?;
    Ok(buffers.into_iter().map(DeviceBuffer::finish).collect())
}

/// A piece on its way to the device.
#[derive(Clone, Copy)]
struct Load<'a, 'p> {
    memory: &'a DeviceMemory,
    sizes: Sizes,
    piece: &'p Piece,
}

/// Pieces that follow each other in one source, as many as fit into a slot: they are read at once.
fn grouped<'a, 'p>(mut loads: Vec<Load<'a, 'p>>) -> Vec<Vec<Load<'a, 'p>>> {
    loads.sort_by_key(|load| (load.piece.source, load.piece.at));
    let mut groups: Vec<Vec<Load<'_, '_>>> = Vec::new();
    for load in loads {
        match groups.last_mut() {
            Some(group) if follows(group, load.piece) => group.push(load),
            _ => groups.push(vec![load]),
        }
    }
    groups
}

fn follows(group: &[Load<'_, '_>], piece: &Piece) -> bool {
    let (start, n_bytes) = span(group);
    group[0].piece.source == piece.source && start + n_bytes as u64 == piece.at && n_bytes + piece.n_bytes <= SPAN
}

/// Where a group begins, and its bytes.
fn span(group: &[Load<'_, '_>]) -> (u64, usize) {
    (group[0].piece.at, group.iter().map(|load| load.piece.n_bytes).sum())
}

fn fill_device<'a>(
    reader: &Reader<'_>,
    groups: Vec<Vec<Load<'a, '_>>>,
    slot_bytes: usize,
    threads: NonZero<usize>,
) -> Result<(), Damage> {
    let work = |uploader: &mut Uploader<'a>, group: Vec<Load<'a, '_>>| {
        let (_, n_bytes) = span(&group);
        reader.read(&group, &mut uploader.slot()?[..n_bytes])?;
        let mut from = 0;
        for Load { memory, sizes, piece } in group {
            let Sizes { n_heads, row, head } = sizes;
            let to = piece.to * row;
            let runs = [from + piece.rows.start * row, piece.n_bytes / n_heads];
            uploader.upload(memory, &(to..to + n_heads * head), [n_heads, piece.rows.len() * row], runs)?;
            from += piece.n_bytes;
        }
        Ok(uploader.send()?)
    };
    shared(groups, threads, || Uploader::new(slot_bytes), work, Uploader::finish)
}
