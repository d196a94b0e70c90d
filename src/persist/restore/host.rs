//! Into host memory that MLX adopts, straight to each row's place.

use super::plan::Span;
use super::{LOAD, Target};
use crate::array::{Array, HostBuffer};
use crate::error::Result;
use crate::persist::reader::Data;
use crate::persist::threads::share;
use std::mem::MaybeUninit;
use std::num::NonZero;

/// Heads below this many bytes are read many at a time and then put in their places.
const SMALL: usize = 64 << 10;

/// One span, and the memory that is its alone.
struct Job<'a> {
    span: Span,
    memory: &'a mut [MaybeUninit<u8>],
}

pub(super) fn read(data: &Data, targets: &[Target], threads: NonZero<usize>) -> Result<Vec<Array>> {
    let shapes = targets.iter().map(|target| (target.shape.as_slice(), target.dtype));
    let mut buffers = HostBuffer::many(LOAD, shapes)?;
    let mut jobs = Vec::new();
    for (buffer, target) in buffers.iter_mut().zip(targets) {
        let mut rest = buffer.bytes();
        for span in target.layout.spans() {
            let (memory, behind) = rest.split_at_mut(span.memory.len());
            rest = behind;
            jobs.push(Job { span, memory });
        }
    }
    share(jobs, threads, || Ok(Vec::new()), |scratch, job| fill(data, job, scratch), |_| Ok(()))?;
    Ok(buffers.into_iter().map(HostBuffer::finish).collect())
}

fn fill(data: &Data, Job { span, memory }: Job<'_>, scratch: &mut Vec<u8>) -> Result<()> {
    let gather = span.n_heads > 1 && span.in_file < SMALL && span.valid > 0;
    if gather {
        scratch.resize(span.file_bytes(), 0);
        data.read(scratch.as_mut_slice(), span.at)?;
    }
    for (head, rows) in memory.chunks_exact_mut(span.in_memory()).enumerate() {
        let (valid, zeros) = rows.split_at_mut(span.valid);
        zeros.fill(MaybeUninit::new(0));
        let from = head * span.in_file;
        if gather {
            for (to, &byte) in valid.iter_mut().zip(&scratch[from..]) {
                to.write(byte);
            }
        } else {
            data.read_uninit(valid, span.at + from as u64)?;
        }
    }
    Ok(())
}
