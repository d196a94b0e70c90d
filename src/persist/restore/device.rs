//! Into CUDA device memory: through pinned buffers, which the device reads while the next ones are filled.

use super::Target;
use super::plan::{SPAN, Span};
use crate::array::{Array, DeviceBuffer, DeviceMemory, Uploader};
use crate::error::Result;
use crate::persist::reader::Data;
use crate::persist::threads::share;
use std::num::NonZero;

/// None where arrays do not lie in device memory.
pub(super) fn read(data: &Data, targets: &[Target], threads: NonZero<usize>) -> Result<Option<Vec<Array>>> {
    let shapes = targets.iter().map(|target| (target.shape.as_slice(), target.dtype));
    let Some(buffers) = DeviceBuffer::zeros(shapes)? else { return Ok(None) };
    let jobs = buffers.iter().zip(targets).flat_map(|(buffer, target)| {
        let spans = target.layout.spans().into_iter().filter(|span| span.valid > 0);
        spans.map(move |span| (buffer.memory(), span))
    });
    fill(data, jobs.collect(), threads)?;
    Ok(Some(buffers.into_iter().map(DeviceBuffer::finish).collect()))
}

fn fill<'a>(data: &Data, jobs: Vec<(&'a DeviceMemory, Span)>, threads: NonZero<usize>) -> Result<()> {
    let work = |uploader: &mut Uploader<'a>, (memory, span): (&'a DeviceMemory, Span)| {
        let n_bytes = span.file_bytes();
        data.read(&mut uploader.slot()?[..n_bytes], span.at)?;
        uploader.upload(memory, &span.memory, [span.n_heads, span.valid], [0, span.in_file])?;
        uploader.send()
    };
    share(jobs, threads, || Uploader::new(SPAN), work, Uploader::finish)
}
