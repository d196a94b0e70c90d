//! STUB by the lead until the real file lands.
use super::state::CacheState;
use crate::array::Dtype;
/// x
pub trait Described {
    /// x
    fn shape(&self) -> Vec<usize>;
    /// x
    fn dtype(&self) -> Dtype;
}
/// x
#[derive(Debug)]
pub struct Fault {
    /// x
    pub key: String,
    /// x
    pub expected: String,
    /// x
    pub got: String,
}
/// x
pub fn check<T: Described>(_s: &CacheState<T>) -> Result<(), Fault> {
    Ok(())
}
