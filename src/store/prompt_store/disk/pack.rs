//! Tensors made smaller: the first bytes of all elements, then their second ones and so on, through zstd.
//!
//! Exponents of neighbours are alike and mantissas are noise; apart from each other the former shrink. Pure.

use std::io;
use zstd::{bulk, zstd_safe};

/// Nearly as small as higher ones on such data, and much faster.
const LEVEL: i32 = 1;
/// How many times its own bytes what is packed may become: a small file cannot take much memory.
pub const MAX_RATIO: u64 = 64;

/// `bytes`, whose elements have `width` bytes, in less room; None if that saves less than a sixteenth, or so much that it
/// would be refused.
pub fn pack(bytes: &[u8], width: usize) -> Option<Vec<u8>> {
    let packed = bulk::compress(&apart(bytes, width), LEVEL).ok()?;
    let (n_packed, n_bytes) = (packed.len() as u64, bytes.len() as u64);
    (n_packed <= n_bytes - n_bytes / 16 && n_bytes <= n_packed * MAX_RATIO).then_some(packed)
}

/// Fills `bytes` with what [`pack`] made smaller.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if `packed` does not make exactly as many.
pub fn unpack(packed: &[u8], width: usize, bytes: &mut [u8]) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "what does not unpack to its size");
    let declared = zstd_safe::get_frame_content_size(packed).ok().flatten();
    if declared != Some(bytes.len() as u64) {
        return Err(wrong());
    }
    let mut elements = vec![0; bytes.len()];
    if bulk::decompress_to_buffer(packed, &mut elements).map_err(|_| wrong())? != bytes.len() {
        return Err(wrong());
    }
    together(&elements, width, bytes);
    Ok(())
}

/// The first bytes of all elements, then the second ones; what is no whole element stays at the end.
fn apart(bytes: &[u8], width: usize) -> Vec<u8> {
    let n_elements = bytes.len() / width;
    let mut lanes = vec![0; bytes.len()];
    for (at, lane) in lanes[..n_elements * width].chunks_exact_mut(n_elements.max(1)).enumerate() {
        for (to, element) in lane.iter_mut().zip(bytes.chunks_exact(width)) {
            *to = element[at];
        }
    }
    lanes[n_elements * width..].copy_from_slice(&bytes[n_elements * width..]);
    lanes
}

/// Undoes [`apart`].
fn together(lanes: &[u8], width: usize, bytes: &mut [u8]) {
    let n_elements = bytes.len() / width;
    for (at, lane) in lanes[..n_elements * width].chunks_exact(n_elements.max(1)).enumerate() {
        for (from, element) in lane.iter().zip(bytes.chunks_exact_mut(width)) {
            element[at] = *from;
        }
    }
    bytes[n_elements * width..].copy_from_slice(&lanes[n_elements * width..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(n: u16) -> Vec<u8> {
        (0..n).flat_map(|at| (1.0 + (f32::from(at) * 0.7).sin()).to_le_bytes()).collect()
    }

    #[test]
    fn what_is_packed_comes_back_whatever_its_length_and_width() {
        for n_bytes in (0..40).chain([4095, 4096, 40_000]) {
            let bytes = &floats(10_000)[..n_bytes];
            for width in [1, 2, 4, 8] {
                let mut back = vec![0; n_bytes];
                together(&apart(bytes, width), width, &mut back);
                assert_eq!(back, bytes);
                if let Some(packed) = pack(bytes, width) {
                    assert!(packed.len() < n_bytes);
                    back.fill(0);
                    assert!(unpack(&packed, width, &mut back).is_ok());
                    assert_eq!(back, bytes, "{n_bytes} bytes of width {width}");
                }
            }
        }
        assert!(pack(&floats(10_000), 4).is_some());
    }

    #[test]
    fn noise_and_what_would_be_refused_stay_as_they_are() {
        let noise: Vec<u8> = (0..1000_u32).flat_map(|at| *blake3::hash(&at.to_le_bytes()).as_bytes()).collect();
        assert_eq!(pack(&noise, 2), None);
        assert_eq!(pack(&vec![0; 1 << 20], 2), None, "more than {MAX_RATIO} times");
    }

    #[test]
    fn what_lies_about_its_size_is_refused() {
        let bytes = floats(10_000);
        let packed = pack(&bytes, 4).unwrap_or_default();
        assert!(!packed.is_empty());
        for n_bytes in [0, 1, bytes.len() - 1, bytes.len() + 1, bytes.len() * 2] {
            assert!(unpack(&packed, 4, &mut vec![0; n_bytes]).is_err(), "{n_bytes} bytes");
        }
        for at in 0..packed.len() {
            assert!(unpack(&packed[..at], 4, &mut vec![0; bytes.len()]).is_err(), "cut at {at}");
        }
        // Two frames, one after the other, make more than is declared.
        assert!(unpack(&[&packed[..], &packed[..]].concat(), 4, &mut vec![0; bytes.len()]).is_err());
        assert!(unpack(&[], 4, &mut []).is_err());
    }
}
